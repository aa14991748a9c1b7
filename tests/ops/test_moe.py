"""Fused routing of tokens to experts and back against its definition."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45 import ops
from ernie45.ops import reference
from tests.helpers.fused import assert_agree, both_instruction_sets, fused, outputs_and_gradients
from tests.helpers.numeric import numeric_gradient, softmax

TOKENS = st.sampled_from([0, 1, 7, 65])
WIDTHS = st.sampled_from([0, 1, 7, 16, 33, 5000])
DTYPES = st.sampled_from(["float32", "bfloat16"])
THREADS = st.sampled_from([1, 2, 7])


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@st.composite
def choices(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Indices [tokens, k] of different experts in every row, and the number of experts."""
    tokens, experts = draw(TOKENS), draw(st.sampled_from([1, 2, 7, 64]))
    k = draw(st.sampled_from([1, min(2, experts), min(6, experts), experts]))
    if draw(st.booleans()):  # all tokens go to the same experts
        return np.tile(np.arange(experts - k, experts), (tokens, 1)), experts
    return np.argsort(random(tokens, experts), axis=-1)[:, :k], experts


# The gate.


@both_instruction_sets
@settings(max_examples=60)
@given(
    tokens=TOKENS,
    experts=st.sampled_from([1, 2, 7, 16, 33, 64, 130]),
    data=st.data(),
    activation=st.sampled_from(["softmax", "sigmoid"]),
    normalise=st.booleans(),
    biased=st.booleans(),
    special=st.sampled_from([0.0, np.nan, np.inf, -np.inf]),
    threads=THREADS,
)
def test_moe_gate(
    isa: str,
    tokens: int,
    experts: int,
    data: st.DataObject,
    activation: str,
    normalise: bool,
    biased: bool,
    special: float,
    threads: int,
) -> None:
    """The logits lie on a grid, so that many are equal."""
    k = data.draw(st.sampled_from(sorted({1, min(6, experts), experts})))
    logits, bias = np.round(4 * random(tokens, experts)) / 4, np.round(4 * random(experts, seed=1)) / 4
    if special:
        logits[:1, ::3] = special
    shift = paddle.to_tensor(bias) if biased else None
    arguments = (k, activation, normalise, 1e-12)
    options = {"gradients": special == 0.0}
    with fused(isa, "moe_gate", threads=threads):
        found = outputs_and_gradients(lambda x: ops.moe_gate(x, shift, *arguments), logits, **options)
    expected = outputs_and_gradients(lambda x: reference.moe_gate(x, shift, *arguments), logits, **options)
    np.testing.assert_array_equal(found[1], expected[1])
    assert_agree(found, expected)


@both_instruction_sets
def test_the_sum_of_weights_is_clipped_from_below(isa: str) -> None:
    """Where it is, the divisor is constant, and so is the gradient."""
    logits = np.array([[-80.0, -90.0, -85.0], [-1.0, 2.0, 3.0]], np.float32)
    arguments = (None, 2, "sigmoid", True, 1e-12)
    with fused(isa, "moe_gate"):
        found = outputs_and_gradients(lambda x: ops.moe_gate(x, *arguments), logits)
    expected = outputs_and_gradients(lambda x: reference.moe_gate(x, *arguments), logits)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


@both_instruction_sets
@pytest.mark.parametrize("output", [0, 2])
def test_moe_gate_gradient_is_numeric(isa: str, output: int) -> None:
    """Through the probabilities alone and through the weights alone."""
    at, bias = random(4, 5), 0.3 * random(5, seed=1)
    mix = np.random.default_rng(0).standard_normal((4, 5) if output == 0 else (4, 2)).astype(np.float32)
    bias_tensor = paddle.to_tensor(bias, stop_gradient=False)
    arguments = (bias_tensor, 2, "softmax", True, 1e-12)
    with fused(isa, "moe_gate"):
        chosen = ops.moe_gate(paddle.to_tensor(at), *arguments)[1].numpy()
        _, gradient = outputs_and_gradients(lambda x: ops.moe_gate(x, *arguments)[output], at)

    def slow(logits: np.ndarray) -> float:
        probabilities = softmax(logits)
        weights = np.take_along_axis(probabilities, chosen, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        return float(((probabilities if output == 0 else weights) * mix).sum())

    assert_agree([gradient], [numeric_gradient(slow, at)])
    assert bias_tensor.grad is None


@both_instruction_sets
def test_indices_and_counts_have_no_gradient(isa: str) -> None:
    logits, x = paddle.to_tensor(random(4, 5), stop_gradient=False), paddle.to_tensor(random(4, 3), stop_gradient=False)
    with fused(isa, "moe_gate", "moe_permute"):
        _, indices, weights = ops.moe_gate(logits, None, 2, "softmax", True, 1e-12)
        rows, *numbers = ops.moe_permute(x, indices, 5)
    assert all(tensor.stop_gradient and tensor.dtype == paddle.int64 for tensor in (indices, *numbers))
    assert not weights.stop_gradient and not rows.stop_gradient


# To the experts and back.


@both_instruction_sets
@settings(max_examples=40)
@given(choice=choices(), width=WIDTHS, dtype=DTYPES, threads=THREADS)
def test_moe_permute(isa: str, choice: tuple[np.ndarray, int], width: int, dtype: str, threads: int) -> None:
    indices, experts = paddle.to_tensor(choice[0]), choice[1]
    x = random(indices.shape[0], width)
    x[:1, :1] = np.nan
    with fused(isa, "moe_permute", threads=threads):
        found = outputs_and_gradients(lambda x: ops.moe_permute(x, indices, experts), x, dtype=dtype)
    expected = outputs_and_gradients(lambda x: reference.moe_permute(x, indices, experts), x, dtype=dtype)
    for one, other in zip(found[:4], expected[:4], strict=True):
        np.testing.assert_array_equal(one, other)
    # The definition adds the gradients of a token's copies in the dtype of x.
    assert_agree(found[4:], expected[4:]) if dtype == "float32" else np.testing.assert_allclose(
        found[4], expected[4], rtol=0.05, atol=0.2
    )


@both_instruction_sets
@settings(max_examples=40)
@given(choice=choices(), width=WIDTHS, dtype=DTYPES, threads=THREADS, special=st.sampled_from([0.0, np.nan, np.inf]))
def test_moe_combine(
    isa: str, choice: tuple[np.ndarray, int], width: int, dtype: str, threads: int, special: float
) -> None:
    indices, experts = paddle.to_tensor(choice[0]), choice[1]
    tokens, k = choice[0].shape
    slots = reference.moe_permute(paddle.zeros([tokens, 1]), indices, experts)[3]
    rows, weights = random(tokens * k, width), random(tokens, k, seed=1)
    rows[:1] = special
    options = {"dtype": dtype, "gradients": bool(np.isfinite(special))}
    with fused(isa, "moe_combine", threads=threads):
        found = outputs_and_gradients(lambda r, w: ops.moe_combine(r, slots, w), rows, weights, **options)
    expected = outputs_and_gradients(lambda r, w: reference.moe_combine(r, slots, w), rows, weights, **options)
    assert_agree(found, expected, dtype)


@both_instruction_sets
def test_gradients_of_the_way_there_and_back_are_numeric(isa: str) -> None:
    indices = np.array([[2, 0], [0, 3], [2, 3]])
    x, weights, mix = random(3, 4), random(3, 2, seed=1), random(3, 4)

    def there_and_back(x: paddle.Tensor, weights: paddle.Tensor) -> paddle.Tensor:
        rows, _, _, slots = ops.moe_permute(x, paddle.to_tensor(indices), 4)
        return ops.moe_combine(rows**3, slots, weights)

    def slow(x: np.ndarray, weights: np.ndarray) -> float:
        return float((x**3 * weights.sum(axis=-1, keepdims=True) * mix).sum())

    with fused(isa, "moe_permute", "moe_combine"):
        _, grad_x, grad_weights = outputs_and_gradients(there_and_back, x, weights)
    assert_agree([grad_x], [numeric_gradient(lambda at: slow(at, weights.astype(np.float64)), x)])
    assert_agree([grad_weights], [numeric_gradient(lambda at: slow(x.astype(np.float64), at), weights)])


@both_instruction_sets
def test_errors_name_operator_argument_and_value(isa: str) -> None:
    x, weights = paddle.zeros([2, 3]), paddle.ones([2, 1])
    with fused(isa):
        with pytest.raises(OSError, match="moe_gate: k is 4, expected 1 to the 3 experts"):
            ops.moe_gate(x, None, 4, "softmax", True, 1e-12)
        with pytest.raises(OSError, match=r"moe_gate: bias has shape \[2\], expected \[3\]"):
            ops.moe_gate(x, paddle.zeros([2]), 1, "softmax", True, 1e-12)
        with pytest.raises(OSError, match="moe_permute: indices contains 5, expected 0 to 4"):
            ops.moe_permute(x, paddle.to_tensor([[0], [5]]), 5)
        with pytest.raises(OSError, match=r"moe_permute: indices has shape \[3, 1\], expected \[2, any\]"):
            ops.moe_permute(x, paddle.zeros([3, 1], "int64"), 5)
        with pytest.raises(OSError, match="moe_combine: slots contains -1, expected 0 to 1"):
            ops.moe_combine(x, paddle.to_tensor([[0], [-1]]), weights)
