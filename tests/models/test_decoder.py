"""What the decoder promises about masks, positions, padding and packed documents, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import ErnieError
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.models.moe import Routing
from ernie45.ops import reference
from tests.helpers.tiny import DENSE, difference, tiny_config, tiny_model, token_ids

SAME = 2e-5


@pytest.fixture(scope="module", params=["dense", "moe", "ungrouped"])
def model(request: pytest.FixtureRequest) -> ErnieForCausalLM:
    if request.param == "moe":
        return tiny_model()
    return tiny_model(tiny_config(DENSE, num_key_value_heads=4 if request.param == "ungrouped" else 2))


def run(model: ErnieForCausalLM, ids: Any, **arguments: Any) -> paddle.Tensor:
    with paddle.no_grad():
        ids = ids if isinstance(ids, paddle.Tensor) else paddle.to_tensor(ids)
        return model(ids, **{name: paddle.to_tensor(value) for name, value in arguments.items()})


def test_a_batch_equals_its_rows_alone(model: ErnieForCausalLM) -> None:
    ids = token_ids(3, 9)
    together = run(model, ids)
    for row in range(3):
        assert difference(run(model, ids[row : row + 1]), together[row : row + 1]) < SAME


def test_a_token_does_not_see_what_follows(model: ErnieForCausalLM) -> None:
    ids = token_ids(1, 9).numpy()
    before = run(model, ids)
    ids[0, 6:] = (ids[0, 6:] + 1) % 50 + 3
    after = run(model, ids)
    assert difference(after[:, :6], before[:, :6]) < 1e-6
    assert difference(after[:, 6:], before[:, 6:]) > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", ["int64", "bool", "float32"])
def test_padded_rows_equal_unpadded_ones(model: ErnieForCausalLM, side: str, dtype: str) -> None:
    lengths, total = [8, 5, 1], 8
    ids, mask = np.zeros([3, total], np.int64), np.zeros([3, total])
    rows = [token_ids(1, length, seed=length).numpy() for length in lengths]
    for i, row in enumerate(rows):
        where = slice(total - lengths[i], total) if side == "left" else slice(0, lengths[i])
        ids[i, where], mask[i, where] = row[0], 1
    logits = run(model, ids, attention_mask=mask.astype(dtype)).numpy()
    assert np.isfinite(logits).all()
    for i, row in enumerate(rows):
        assert difference(logits[i][mask[i] == 1], run(model, row)[0]) < SAME


def test_a_mask_of_ones_changes_nothing(model: ErnieForCausalLM) -> None:
    ids = token_ids(2, 6)
    assert difference(run(model, ids, attention_mask=np.ones([2, 6], np.int64)), run(model, ids)) == 0


@pytest.mark.parametrize("dtype", ["int64", "bool"])
@pytest.mark.parametrize("shape", ["4-D", "3-D", "one for all rows"])
def test_an_explicit_causal_mask_equals_the_default(model: ErnieForCausalLM, shape: str, dtype: str) -> None:
    ids = token_ids(2, 7)
    mask = np.broadcast_to(np.tril(np.ones([7, 7])), (2, 1, 7, 7)).astype(dtype)
    mask = {"4-D": mask, "3-D": mask[:, 0], "one for all rows": mask[:1]}[shape].copy()
    assert difference(run(model, ids, attention_mask=mask), run(model, ids)) < 1e-6


def test_an_explicit_mask_replaces_the_causal_order(model: ErnieForCausalLM) -> None:
    ids = token_ids(1, 5).numpy()
    everything = np.ones([1, 1, 5, 5], bool)
    before = run(model, ids, attention_mask=everything)
    ids[0, -1] = 3 if ids[0, -1] != 3 else 4
    assert difference(run(model, ids, attention_mask=everything)[:, 0], before[:, 0]) > 1e-3


@st.composite
def documents(draw: st.DrawFn) -> list[list[int]]:
    """Lengths of the documents packed in each row; all rows are equally long."""
    rows = []
    for _ in range(draw(st.integers(1, 2))):
        sizes, left = [], 10
        while left:
            sizes.append(draw(st.integers(1, left)))
            left -= sizes[-1]
        rows.append(sizes)
    return rows


@settings(max_examples=15)
@given(packs=documents(), last_axis=st.booleans(), positions=st.booleans())
def test_packed_documents_equal_separate_ones(packs: list[list[int]], last_axis: bool, positions: bool) -> None:
    """Positions may restart or go on: attention depends on their differences alone."""
    model, ids = tiny_model(), token_ids(len(packs), 10)
    ends = np.stack([np.repeat(np.cumsum(sizes), sizes) for sizes in packs])[:, None].astype(np.int32)
    arguments: dict[str, Any] = {"attn_mask_startend_row_indices": ends[..., None] if last_axis else ends}
    if positions:
        arguments["position_ids"] = np.stack([np.concatenate([np.arange(n) for n in sizes]) for sizes in packs])
    packed = run(model, ids, **arguments)
    for row, sizes in enumerate(packs):
        start = 0
        for size in sizes:
            document = slice(start, start + size)
            assert difference(packed[row, document], run(model, ids[row : row + 1, document])[0]) < SAME
            start += size


def test_start_rows_equal_a_block_lower_triangular_mask(model: ErnieForCausalLM) -> None:
    ids, sizes = token_ids(1, 9), [4, 2, 3]
    ends = np.repeat(np.cumsum(sizes), sizes)[None, None, :, None]
    document = np.repeat(np.arange(3), sizes)
    block = np.tril(document[:, None] == document[None, :])[None, None]
    by_rows = run(model, ids, attn_mask_startend_row_indices=ends)
    assert difference(by_rows, run(model, ids, attention_mask=block)) < 1e-6
    assert difference(by_rows, run(model, ids)) > 1e-2


@pytest.mark.parametrize("block", [1, 64, 500])
def test_attention_in_blocks(model: ErnieForCausalLM, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = token_ids(2, 13), np.ones([2, 13], np.int64)
    mask[0, :4] = 0
    explicit = np.broadcast_to(np.tril(np.ones([13, 13], bool)), (2, 1, 13, 13)).copy()
    ends = np.repeat([5, 13], [5, 8])[None, None].repeat(2, axis=0)
    cases: list[dict[str, Any]] = [
        {},
        {"attention_mask": mask},
        {"attention_mask": explicit},
        {"attn_mask_startend_row_indices": ends},
    ]
    whole = [run(model, ids, **case) for case in cases]
    monkeypatch.setattr(reference, "SCORE_BLOCK", block)
    for case, expected in zip(cases, whole, strict=True):
        assert difference(run(model, ids, **case), expected) < SAME


def test_positions_count_from_zero_and_only_their_differences_matter(model: ErnieForCausalLM) -> None:
    ids = token_ids(2, 6)
    counted = np.tile(np.arange(6), (2, 1))
    plain = run(model, ids)
    assert difference(run(model, ids, position_ids=counted), plain) == 0
    assert difference(run(model, ids, position_ids=counted + 1000), plain) < 1e-3
    assert difference(run(model, ids, position_ids=2 * counted), plain) > 1e-2


def test_compression_ratio_divides_positions() -> None:
    ids, model = token_ids(1, 6), tiny_model(tiny_config(compression_ratio=2.0))
    expected = run(tiny_model(), ids, position_ids=np.arange(6)[None] / 2)
    assert difference(run(model, ids), expected) < 1e-6


def test_scale_qk_coeff_divides_scores() -> None:
    ids, plain = token_ids(1, 6), tiny_model()
    scaled = tiny_model(tiny_config(scale_qk_coeff=4.0))
    assert difference(run(scaled, ids), run(plain, ids)) > 1e-3
    for layer in scaled.ernie.layers:
        columns = layer.self_attn.qkv_proj.weight.numpy()
        columns[:, : 4 * 8] *= 4  # the query heads
        layer.self_attn.qkv_proj.weight.set_value(columns)
    assert difference(run(scaled, ids), run(plain, ids)) < SAME


def test_routing_lists_every_moe_layer() -> None:
    model, routing = tiny_model(), []
    model(token_ids(2, 5), routing=routing)
    assert [(type(r), r.layer, r.bank) for r in routing] == [(Routing, 1, 0), (Routing, 2, 0)]
    for r in routing:
        assert r.logits.shape == r.probabilities.shape == [10, 6]
        assert r.indices.shape == r.weights.shape == [10, 2]
        assert int(r.counts.sum()) == 20
        assert difference(r.weights.sum(axis=-1), np.ones(10)) < 1e-6


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        (np.zeros([5], np.int64), {}, r"expected a non-empty \[batch, sequence\], found shape \[5\]"),
        (np.zeros([1, 0], np.int64), {}, r"expected a non-empty \[batch, sequence\]"),
        (np.array([[3, 61]]), {}, r"ids 3..61 are outside the vocabulary 0..60"),
        (np.array([[-1, 3]]), {}, r"ids -1..3 are outside the vocabulary"),
        (np.array([[3, 4]]), {"position_ids": np.array([[0, 1, 2]])}, r"position_ids: expected \[1, 2\]"),
        (np.array([[3, 4]]), {"attention_mask": np.ones([1, 3])}, r"attention_mask: expected \[1, 2\]"),
        (np.array([[3, 4]]), {"attention_mask": np.ones([1, 1, 2, 3], bool)}, r"attention_mask: expected"),
        (np.array([[3, 4]]), {"attention_mask": np.zeros([1, 1, 2, 2], np.float32)}, r"additive float mask"),
        (
            np.array([[3, 4]]),
            {"attn_mask_startend_row_indices": np.ones([1, 1, 2, 2], np.int32)},
            r"attn_mask_startend_row_indices: expected \[1, 1, 2, 1\] .* found \[1, 1, 2, 2\]",
        ),
        (np.array([[3, 4]]), {"labels": np.array([[3]])}, r"labels: expected \[1, 2\]"),
    ],
)
def test_refusals(ids: np.ndarray, arguments: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ErnieError, match=message):
        run(tiny_model(), ids, **arguments)
