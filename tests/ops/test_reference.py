"""The definitions of the operators against slower and plainer ones in float64."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import ErnieError
from ernie45.models.mask import AttentionMask
from ernie45.ops import reference
from tests.helpers.numeric import numeric_gradient, softmax, top_k


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(found: paddle.Tensor, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(found.astype("float32").numpy(), expected, rtol=tolerance, atol=tolerance)


# Linear maps and norms.


def test_linear_and_its_transpose() -> None:
    x, weight = random(2, 3, 5), random(5, 4, seed=1)
    close(reference.linear(paddle.to_tensor(x), paddle.to_tensor(weight)), x @ weight)
    close(reference.linear_transposed(paddle.to_tensor(x), paddle.to_tensor(weight.T.copy())), x @ weight)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_used_exactly(dtype: str) -> None:
    x, weight = random(3, 5), paddle.to_tensor(random(5, 4, seed=1)).astype(dtype)
    exact = weight.astype("float32").numpy()
    found = reference.linear(paddle.to_tensor(x), weight)
    assert found.dtype == paddle.float32
    close(found, x @ exact)
    close(reference.linear_transposed(paddle.to_tensor(x), weight.T), x @ exact)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_activations_on_a_cpu_are_float32(dtype: str) -> None:
    assert reference.compute_dtype(getattr(paddle, dtype)) == paddle.float32


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm(scale: float) -> None:
    x, weight = (scale * random(2, 3, 8)).astype(np.float32), random(8, seed=1)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-5) * weight
    close(reference.rms_norm(paddle.to_tensor(x), paddle.to_tensor(weight), 1e-5), expected)


def test_rms_norm_rounds_once() -> None:
    x, weight = paddle.to_tensor(random(4, 64)).astype("bfloat16"), paddle.to_tensor(random(64, seed=1))
    found = reference.rms_norm(x, weight, 1e-5)
    assert found.dtype == paddle.bfloat16
    wide = reference.rms_norm(x.astype("float32"), weight, 1e-5)
    close(found, wide.astype("bfloat16").astype("float32").numpy(), 1e-7)


def test_rms_norm_adds_the_residual_first() -> None:
    x, residual, weight = (paddle.to_tensor(random(*shape, seed=len(shape))) for shape in ((3, 8), (3, 8), (8,)))
    out, total = reference.rms_norm(x, weight, 1e-5, residual)
    close(total, (x + residual).numpy(), 1e-7)
    close(out, reference.rms_norm(x + residual, weight, 1e-5).numpy(), 1e-7)


def test_swiglu_takes_the_gate_from_the_first_half() -> None:
    x = random(2, 3, 10)
    gate, up = x[..., :5], x[..., 5:]
    close(reference.swiglu(paddle.to_tensor(x)), gate / (1 + np.exp(-gate)) * up)


def test_swiglu_multiplies_by_the_probability_in_float32() -> None:
    x, prob = paddle.to_tensor(random(2, 3, 10)).astype("bfloat16"), paddle.to_tensor(random(2, 3, seed=1))
    exact = reference.swiglu(x.astype("float32")) * prob.unsqueeze(-1)
    found = reference.swiglu(x, prob)
    assert found.dtype == paddle.bfloat16
    close(found, exact.astype("bfloat16").astype("float32").numpy(), 1e-7)


# Rotary positions.


def test_rope_rotates_neighbours() -> None:
    x = np.zeros((1, 1, 1, 8), np.float32)
    x[..., 0] = 1
    angles = reference.rope_angles(paddle.to_tensor([[1]]), 8, 10000.0)
    expected = np.zeros(8)
    expected[:2] = math.cos(1), math.sin(1)
    close(reference.rope(paddle.to_tensor(x), *angles)[0, 0, 0], expected, 1e-7)


@settings(max_examples=20)
@given(
    positions=st.lists(st.integers(0, 131071), min_size=1, max_size=4),
    pairs=st.integers(1, 6),
    theta=st.sampled_from([10000.0, 500000.0]),
)
def test_rope_is_a_complex_rotation(positions: list[int], pairs: int, theta: float) -> None:
    """Pair j is a complex number that is multiplied by exp(i * position * theta ** (-2 j / head_dim))."""
    x = random(1, len(positions), 3, 2 * pairs)
    numbers = x[..., 0::2] + 1j * x[..., 1::2]
    frequencies = theta ** (-2 * np.arange(pairs) / (2 * pairs))
    rotated = numbers * np.exp(1j * np.array(positions)[:, None] * frequencies)[None, :, None, :]
    found = reference.rope(
        paddle.to_tensor(x), *reference.rope_angles(paddle.to_tensor([positions]), 2 * pairs, theta)
    ).numpy()
    # The angle is a float32: at position 131071 its last bit is worth 0.008.
    tolerance = 1e-5 + 4 * max(positions) * 2.0**-23
    np.testing.assert_allclose(found[..., 0::2], rotated.real, atol=tolerance)
    np.testing.assert_allclose(found[..., 1::2], rotated.imag, atol=tolerance)


def test_rope_scores_depend_on_distance_only() -> None:
    query, key = paddle.to_tensor(random(1, 1, 1, 16)), paddle.to_tensor(random(1, 1, 1, 16, seed=1))

    def score(at: int, other: int) -> float:
        rotated = [
            reference.rope(x, *reference.rope_angles(paddle.to_tensor([[p]]), 16, 10000.0))
            for x, p in ((query, at), (key, other))
        ]
        return float((rotated[0] * rotated[1]).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(3, 7), abs=1e-2)


def test_rope_angles_are_float32_whatever_the_positions_are() -> None:
    exact = np.cos(100_001.0)
    for positions in (paddle.to_tensor([[100_001]]), paddle.to_tensor([[100_001.0]])):
        cos, sin = reference.rope_angles(positions, 4, 10000.0)
        assert cos.dtype == sin.dtype == paddle.float32
        assert float(cos[0, 0, 0, 0]) == pytest.approx(exact, abs=1e-6)


def test_rope_keeps_the_dtype_but_rotates_in_float32() -> None:
    x = paddle.to_tensor(random(1, 3, 2, 8)).astype("bfloat16")
    angles = reference.rope_angles(paddle.to_tensor([[0, 1000, 5000]]), 8, 10000.0)
    found = reference.rope(x, *angles)
    assert found.dtype == paddle.bfloat16
    close(found, reference.rope(x.astype("float32"), *angles).astype("bfloat16").astype("float32").numpy(), 1e-7)


def test_three_equal_positions_are_one() -> None:
    positions = paddle.to_tensor([[0, 5, 1000]])
    three = paddle.stack([positions] * 3, axis=-1)
    for one, other in zip(
        reference.rope_angles(positions, 128, 500000.0), reference.rope_angles(three, 128, 500000.0, 20), strict=True
    ):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_rotary_pairs_take_row_and_column_in_turn_and_then_the_time() -> None:
    """head_dim 128 with 20 pairs for the time, as published: 22 rows and 22 columns alternate in the first 44."""
    time, row, column = 3.0, 5.0, 7.0
    _, sin = reference.rope_angles(paddle.to_tensor([[[time, row, column]]]), 128, 500000.0, 20)
    expected = [
        math.sin((time if pair >= 44 else row if pair % 2 == 0 else column) * 500000.0 ** (-2 * pair / 128))
        for pair in range(64)
    ]
    close(sin[0, 0, 0], np.array(expected), 1e-5)


@pytest.mark.parametrize(("shape", "pairs"), [([4], 0), ([1, 4, 2], 0), ([1, 4, 3], 5), ([1, 4, 3], -1)])
def test_positions_that_do_not_fit_are_named(shape: list[int], pairs: int) -> None:
    with pytest.raises(ErnieError, match=r"rope_angles: (positions have shape|time_pairs is)"):
        reference.rope_angles(paddle.zeros(shape), 8, 10000.0, pairs)


# Attention.


def slow_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float, visible: np.ndarray
) -> np.ndarray:
    """One head and one row at a time; visible [batch, rows, columns]."""
    batch, rows, heads, _ = query.shape
    mixed = np.zeros(query.shape)
    for b in range(batch):
        for row in range(rows):
            for head in range(heads):
                group = head // (heads // key.shape[2])
                columns = np.nonzero(visible[b, row])[0]
                weights = softmax(scale * key[b, columns, group].astype(np.float64) @ query[b, row, head])
                mixed[b, row, head] = weights @ value[b, columns, group]
    return mixed


@settings(max_examples=25)
@given(
    batch=st.integers(1, 2),
    rows=st.integers(1, 7),
    cached=st.integers(0, 5),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 2), (3, 1)]),
    padded=st.booleans(),
    block=st.sampled_from([1, 30, 2**24]),
)
def test_attention(batch: int, rows: int, cached: int, heads: tuple[int, int], padded: bool, block: int) -> None:
    columns = cached + rows
    query = random(batch, rows, heads[0], 4)
    key, value = random(batch, columns, heads[1], 4, seed=1), random(batch, columns, heads[1], 4, seed=2)
    visible = np.arange(columns) <= np.arange(cached, columns)[:, None]
    visible = np.repeat(visible[None], batch, axis=0)
    padding = None
    if padded and cached:
        visible[0, :, 0] = False
        padding = paddle.to_tensor(np.array([[b > 0 or c > 0 for c in range(columns)] for b in range(batch)]))
    mask = AttentionMask(offset=cached, padding=padding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "SCORE_BLOCK", block)
        tensors = [paddle.to_tensor(x) for x in (query, key, value)]
        found = reference.attention(*tensors, 0.7, mask.visible)
    close(found, slow_attention(query, key, value, 0.7, visible))


def test_attention_in_blocks_asks_for_parts_of_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def visible(first: int, last: int, columns: int) -> None:
        asked.append((first, last, columns))

    monkeypatch.setattr(reference, "SCORE_BLOCK", 2 * 2 * 9 * 4)  # four rows of 2 * 2 heads over 9 columns
    query, key = paddle.to_tensor(random(2, 9, 2, 4)), paddle.to_tensor(random(2, 9, 1, 4))
    reference.attention(query, key, key, 1.0, visible)
    assert asked == [(0, 4, 9), (4, 8, 9), (8, 9, 9)]


def test_a_row_that_sees_nothing_is_finite() -> None:
    x = paddle.to_tensor(random(1, 2, 1, 4))
    found = reference.attention(
        x, x, x, 1.0, lambda first, last, columns: paddle.zeros([1, 1, last - first, columns], "bool")
    )
    close(found, np.broadcast_to(x.numpy().mean(axis=1, keepdims=True), (1, 2, 1, 4)))


# The router's choice.


@settings(max_examples=30)
@given(
    experts=st.integers(2, 9),
    data=st.data(),
    activation=st.sampled_from(["softmax", "sigmoid"]),
    normalise=st.booleans(),
    biased=st.booleans(),
)
def test_moe_gate(experts: int, data: st.DataObject, activation: str, normalise: bool, biased: bool) -> None:
    k = data.draw(st.integers(1, experts))
    logits, bias = random(6, experts, seed=experts), 0.3 * random(experts, seed=k)
    probabilities = softmax(logits.astype(np.float64)) if activation == "softmax" else 1 / (1 + np.exp(-logits))
    chosen = top_k(probabilities + bias * biased, k)
    weights = np.take_along_axis(probabilities, chosen, axis=-1)
    if normalise:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    found = reference.moe_gate(
        paddle.to_tensor(logits), paddle.to_tensor(bias) if biased else None, k, activation, normalise, 1e-12
    )
    close(found[0], probabilities)
    assert found[1].numpy().tolist() == chosen.tolist()
    close(found[2], weights)


def test_a_large_bias_selects_but_does_not_weigh() -> None:
    logits = np.log(np.array([[0.6, 0.3, 0.1]], np.float32))
    _, indices, weights = reference.moe_gate(
        paddle.to_tensor(logits), paddle.to_tensor([0.0, 0.0, 100.0]), 2, "softmax", True, 1e-12
    )
    assert indices.tolist() == [[2, 0]]
    close(weights, np.array([[0.1 / 0.7, 0.6 / 0.7]]), 1e-6)


def test_the_sum_of_weights_is_clipped_from_below() -> None:
    _, _, weights = reference.moe_gate(paddle.to_tensor([[-80.0, -90.0]]), None, 1, "sigmoid", True, 1e-12)
    close(weights, np.array([[np.exp(-80.0) / 1e-12]]), 1e-12)


def test_moe_gate_gradient_flows_through_the_weights_only() -> None:
    at, mix = random(4, 5), random(4, 2, seed=3)
    bias = 0.3 * random(5, seed=1)
    chosen = top_k(softmax(at) + bias, 2)

    def slow(logits: np.ndarray) -> float:
        weights = np.take_along_axis(softmax(logits), chosen, axis=-1)
        return float((weights / weights.sum(axis=-1, keepdims=True) * mix).sum())

    logits, bias_tensor = paddle.to_tensor(at, stop_gradient=False), paddle.to_tensor(bias, stop_gradient=False)
    _, _, weights = reference.moe_gate(logits, bias_tensor, 2, "softmax", True, 1e-12)
    (weights * paddle.to_tensor(mix)).sum().backward()
    close(logits.grad, numeric_gradient(slow, at), 1e-4)
    assert bias_tensor.grad is None


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_of_equal_experts_the_first_is_chosen(activation: str) -> None:
    logits = paddle.to_tensor([[0.0] * 70, [0.0] * 30 + [1.0] * 40])
    _, indices, _ = reference.moe_gate(logits, None, 3, activation, True, 1e-12)
    assert indices.tolist() == [[0, 1, 2], [30, 31, 32]]


@pytest.mark.parametrize("experts", [5, 16, 64])
def test_nan_is_not_hidden_by_the_softmax(experts: int) -> None:
    logits = np.zeros((2, experts), np.float32)
    logits[0, 1] = np.nan
    probabilities, _, weights = reference.moe_gate(paddle.to_tensor(logits), None, 2, "softmax", True, 1e-12)
    assert np.isnan(probabilities.numpy()[0]).all() and np.isnan(weights.numpy()[0]).all()
    close(probabilities[1], np.full(experts, 1 / experts))


# To the experts and back.


def test_moe_permute_sorts_by_expert_and_then_by_token() -> None:
    x = paddle.to_tensor([[0.0], [1.0], [2.0]])
    rows, counts, offsets, slots = reference.moe_permute(x, paddle.to_tensor([[2, 0], [0, 3], [2, 3]]), 5)
    assert rows.flatten().tolist() == [0, 1, 0, 2, 1, 2]
    assert counts.tolist() == [2, 0, 2, 2, 0]
    assert offsets.tolist() == [0, 2, 2, 4, 6, 6]
    assert slots.tolist() == [[2, 0], [1, 4], [3, 5]]


@settings(max_examples=20)
@given(tokens=st.integers(0, 9), experts=st.integers(1, 6), data=st.data())
def test_moe_combine_takes_back_what_moe_permute_sent(tokens: int, experts: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, experts))
    indices = np.argsort(random(tokens, experts), axis=-1)[:, :k]
    x, weights = random(tokens, 3, seed=1), random(tokens, k, seed=2)
    rows, counts, _, slots = reference.moe_permute(paddle.to_tensor(x), paddle.to_tensor(indices), experts)
    assert counts.tolist() == np.bincount(indices.flatten(), minlength=experts).tolist()
    combined = reference.moe_combine(rows, slots, paddle.to_tensor(weights))
    close(combined, x * weights.sum(axis=-1, keepdims=True))


def test_moe_combine_weighs_and_adds_in_float32() -> None:
    rows, weights = paddle.to_tensor(random(6, 4)).astype("bfloat16"), paddle.to_tensor(random(3, 2, seed=1))
    slots = paddle.to_tensor([[0, 3], [5, 1], [2, 4]])
    exact = (rows.astype("float32").numpy()[slots.numpy()] * weights.numpy()[..., None]).sum(axis=1)
    found = reference.moe_combine(rows, slots, weights)
    assert found.dtype == paddle.bfloat16
    close(found, paddle.to_tensor(exact).astype("bfloat16").astype("float32").numpy(), 1e-7)
