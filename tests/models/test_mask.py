"""The first visible key of every row, where causal order and padding on the left are all there is."""

from __future__ import annotations

import paddle
import pytest

from ernie45.models.mask import AttentionMask


def padding(*rows: str) -> paddle.Tensor:
    return paddle.to_tensor([[character == "x" for character in row] for row in rows])


@pytest.mark.parametrize("batch", [1, 3])
def test_without_padding(batch: int) -> None:
    first = AttentionMask(offset=5).first_visible(batch)
    assert first is not None and first.dtype == paddle.int64 and first.tolist() == [0] * batch


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (("xxx",), [0]),
        (("..xx", "xxxx", "...x"), [2, 0, 3]),
        (("x",), [0]),
    ],
)
def test_padding_on_the_left(rows: tuple[str, ...], expected: list[int]) -> None:
    first = AttentionMask(padding=padding(*rows)).first_visible(len(rows))
    assert first is not None and first.dtype == paddle.int64 and first.tolist() == expected


@pytest.mark.parametrize("rows", [("xx.",), ("x.x",), (".x.x", "xxxx"), ("xxx", "..."), ("..xx", "xx..")], ids=str)
def test_padding_elsewhere_has_no_first_key(rows: tuple[str, ...]) -> None:
    assert AttentionMask(padding=padding(*rows)).first_visible(len(rows)) is None


def test_documents_and_explicit_masks_have_no_first_key() -> None:
    assert AttentionMask(end_rows=paddle.full([1, 3], 3, dtype="int64")).first_visible(1) is None
    assert AttentionMask(explicit=paddle.ones([1, 1, 3, 3], dtype="bool")).first_visible(1) is None
    both = AttentionMask(padding=padding(".xx"), end_rows=paddle.full([1, 3], 3, dtype="int64"))
    assert both.first_visible(1) is None
