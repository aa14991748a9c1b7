"""Packed weights: what goes in comes out, bit for bit, and means what the published codes mean."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import ErnieError
from ernie45.ops import custom
from ernie45.ops.packed import LARGE_PAGE, WORD_ROWS, PackedMemory, PackedWeight, aligned, packed_bytes
from tests.helpers.packed import KINDS, Published, fill, packed, published

native = pytest.mark.skipif(custom.library() is None, reason="no native library here")
kinds = pytest.mark.parametrize("kind", KINDS)
SIZES = st.one_of(st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129]), st.integers(1, 200))


def assert_holds(weight: PackedWeight, source: Published) -> None:
    found = weight.codes()
    assert found.dtype == source.codes.dtype and found.shape == source.codes.shape
    np.testing.assert_array_equal(found, source.codes)
    if source.scales is not None:
        scales = weight.scale_values()
        assert scales.dtype == source.scales.dtype and scales.shape == source.scales.shape
        np.testing.assert_array_equal(scales, source.scales)
    np.testing.assert_array_equal(weight.dense().numpy(), source.meaning)


@native
@kinds
@settings(max_examples=40)
@given(inputs=SIZES, outputs=SIZES, outputs_first=st.booleans(), data=st.data())
def test_what_is_written_in_pieces_comes_back(
    kind: str, inputs: int, outputs: int, outputs_first: bool, data: st.DataObject
) -> None:
    source = published(kind, inputs, outputs, outputs_first, seed=inputs)
    step = 1 if outputs_first else WORD_ROWS
    cuts = data.draw(st.lists(st.integers(0, len(source.codes) // step), max_size=4))
    weight = PackedWeight.zeros(kind, source.shape, outputs_first=outputs_first)
    assert_holds(fill(weight, source, [step * cut for cut in cuts]), source)
    assert weight.shape == source.shape


@native
@kinds
@settings(max_examples=15)
@given(inputs=SIZES, outputs=SIZES, count=st.integers(1, 4), outputs_first=st.booleans())
def test_stacked_matrices_are_filled_through_views(
    kind: str, inputs: int, outputs: int, count: int, outputs_first: bool
) -> None:
    sources = [published(kind, inputs, outputs, outputs_first, seed) for seed in range(count)]
    stack = PackedWeight.zeros(kind, [count, *sources[0].shape], outputs_first=outputs_first)
    assert stack.shape == [count, *sources[0].shape]
    for index in reversed(range(count)):
        fill(stack[index], sources[index])
    for index, source in enumerate(sources):
        assert_holds(stack[index], source)
        assert stack[index].nbytes * count == stack.nbytes


@native
@kinds
def test_an_overwritten_piece_leaves_the_rest(kind: str) -> None:
    before, after = published(kind, 70, 70, seed=1), published(kind, 70, 70, seed=2)
    weight = packed(before)
    weight.write(after.codes[4:16], 4)
    expected = before.codes.copy()
    expected[4:16] = after.codes[4:16]
    np.testing.assert_array_equal(weight.codes(), expected)


@native
@kinds
@settings(max_examples=20)
@given(inputs=SIZES, outputs=SIZES, shape=st.sampled_from([(0,), (1,), (2, 3), (2, 0)]))
def test_columns_are_the_weights_of_outputs(kind: str, inputs: int, outputs: int, shape: tuple[int, ...]) -> None:
    source = published(kind, inputs, outputs, outputs_first=True)
    ids = np.random.default_rng(inputs).integers(0, outputs, shape)
    found = packed(source).columns(paddle.to_tensor(ids))
    assert found.dtype == paddle.float32 and found.shape == [*shape, inputs]
    np.testing.assert_array_equal(found.numpy(), source.meaning.T[ids])


@native
@kinds
@pytest.mark.parametrize("outputs_first", [False, True])
def test_a_new_weight_is_zero(kind: str, outputs_first: bool) -> None:
    weight = PackedWeight.zeros(kind, [3, 70, 65], outputs_first=outputs_first)
    for index in range(3):
        weight[index].write_scales(np.ones_like(weight[index].scale_values())) if kind == "wint8" else None
        assert not weight[index].codes().any() and not weight[index].dense().numpy().any()


@native
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bfloat16", 2 * 128 * 70 * 2),
        ("wint8", 2 * (128 * 72 + 128 * 4)),  # inputs in whole fours, a float32 scale per column
        ("wint4", 2 * 128 * 2 * (32 + 2)),  # inputs in two groups of 64: 32 bytes and a scale
    ],
)
def test_bytes_held(kind: str, expected: int) -> None:
    assert PackedWeight.zeros(kind, [2, 70, 65]).nbytes == expected


@native
@kinds
@pytest.mark.parametrize("shape", [[0, 70, 65], [0, 65], [70, 0], [2, 0, 0]], ids=str)
def test_weights_without_elements(kind: str, shape: list[int]) -> None:
    weight = PackedWeight.zeros(kind, shape)
    assert weight.shape == shape
    if len(shape) == 2:
        assert weight.dense().shape == shape and weight.codes().size == 0


@native
@kinds
@pytest.mark.parametrize("outputs_first", [False, True])
def test_rows_that_do_not_fit(kind: str, outputs_first: bool) -> None:
    source = published(kind, 70, 70, outputs_first)
    weight = packed(source)
    height, codes = len(source.codes), source.codes
    for rows, first in [
        (codes, 4),
        (codes[:1], 4 * height),
        (codes[:1], -4),
        (codes[:, 1:], 0),
        (codes[0], 0),
        (codes.astype(np.float64), 0),
    ]:
        with pytest.raises(ErnieError, match=rf"packed weight: .* from row {first} on do not fit into {height} rows"):
            weight.write(rows, first)
    assert_holds(weight, source)


@native
@kinds
def test_rows_of_inputs_begin_with_a_whole_word(kind: str) -> None:
    source = published(kind, 70, 70)
    with pytest.raises(ErnieError, match="rows must begin at a multiple of 4, found 2"):
        packed(source).write(source.codes[2:4], 2)


@native
@kinds
@pytest.mark.parametrize("index", [-1, 3])
def test_no_such_matrix(kind: str, index: int) -> None:
    with pytest.raises(IndexError, match=f"no matrix {index} in a stack of 3"):
        PackedWeight.zeros(kind, [3, 4, 5])[index]


@native
def test_one_matrix_is_no_stack() -> None:
    weight = PackedWeight.zeros("bfloat16", [4, 5])
    with pytest.raises(IndexError, match="no matrix 0 in a stack of None"):
        weight[0]


def test_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom, "_loaded", custom.Loaded(None, None, (), "no compiler"))
    with pytest.raises(ErnieError, match="packed weights need the fused CPU operators: no compiler"):
        PackedWeight.zeros("bfloat16", [4, 5])


@native
def test_weights_share_one_piece_of_memory_in_large_pages() -> None:
    shapes = [("bfloat16", [70, 130]), ("wint8", [3, 65, 64]), ("wint4", [200, 1])]
    sizes = [packed_bytes(kind, shape) for kind, shape in shapes]
    memory = PackedMemory(sum(map(aligned, sizes)))
    weights = [PackedWeight.zeros(kind, shape, memory=memory) for kind, shape in shapes]
    addresses = [weight.data.data_ptr() for weight in weights]
    assert addresses[0] % LARGE_PAGE == 0
    assert [b - a for a, b in pairwise(addresses)] == [aligned(size) for size in sizes[:-1]]
    for weight in weights:
        assert (weight[0] if weight.count else weight).dense().abs().max() == 0


@native
@kinds
@pytest.mark.parametrize("outputs_first", [False, True])
def test_outputs_are_a_view_of_some_columns(kind: str, outputs_first: bool) -> None:
    source = published("wint8" if outputs_first and kind == "wint4" else kind, 70, 150, outputs_first)
    weight = packed(source)
    for first, last in [(0, 150), (64, 150), (64, 100), (128, 129), (64, 64)]:
        part = weight.outputs(first, last)
        assert part.shape == ([last - first, 70] if outputs_first else [70, last - first])
        np.testing.assert_array_equal(part.dense().numpy(), source.meaning[:, first:last])
    for first, last in [(1, 65), (0, 151), (-64, 10), (64, 0)]:
        with pytest.raises(ErnieError, match=f"no outputs {first} to {last}"):
            weight.outputs(first, last)
