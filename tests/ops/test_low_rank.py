"""A frozen weight with two narrow matrices beside it: against the definition in float64, rounded as documented."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle import Tensor

from ernie45.ops.low_rank import low_rank_linear
from tests.helpers.fused import both_instruction_sets, fused
from tests.helpers.packed import KINDS, packed, published

UNIT = 2.0**-8  # bfloat16: relative error of one rounding, at most
SCALE = 1.5


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rounded(array: np.ndarray) -> np.ndarray:
    """float64 numbers of bfloat16."""
    return paddle.to_tensor(array).astype("bfloat16").astype("float32").numpy().astype("float64")


def trained(array: np.ndarray) -> Tensor:
    return paddle.to_tensor(array, stop_gradient=False)


def assert_near(found: Tensor, expected: np.ndarray, bound: np.ndarray) -> None:
    assert found.shape == list(expected.shape)
    assert np.all(np.abs(found.numpy() - expected) <= bound * 1.01 + 1e-30)


def check(isa: str, kind: str, sizes: tuple[int, int, int, int], threads: int) -> None:
    """Both passes; the bounds follow from the roundings that come on top of those of the operands."""
    rows, inputs, outputs, rank = sizes
    plain = kind == "plain"
    source = published("bfloat16" if plain else kind, inputs, outputs)
    weight = paddle.to_tensor(source.meaning).astype("bfloat16") if plain else packed(source)
    x, a, b = trained(drawn(rows, inputs)), trained(drawn(inputs, rank, seed=1)), trained(drawn(rank, outputs, seed=2))
    mix = drawn(rows, outputs, seed=3)
    with fused(isa, "low_rank_linear", "low_rank_linear_backward", threads=threads):
        out = low_rank_linear(x, weight, a, b, SCALE)
        (out * paddle.to_tensor(mix)).sum().backward()
    w, xs, ws, dy = source.meaning.astype("float64"), rounded(x.numpy()), rounded(a.numpy()), rounded(mix)
    bs, whole = rounded(b.numpy()), x.numpy().astype("float64")
    h, of_h = SCALE * xs @ ws, SCALE * dy @ bs.T
    seen, off = (xs, 1e-5 * np.abs(xs)) if kind in ("plain", "bfloat16") else (whole, fifteen_bits(whole))
    narrow = UNIT * np.abs(h) @ np.abs(bs)
    assert_near(out, seen @ w + h @ bs, off @ np.abs(w) + narrow + 1e-5 * (np.abs(seen) @ np.abs(w)))
    assert_near(a.grad, xs.T @ of_h, (UNIT + 1e-5) * (np.abs(xs.T) @ np.abs(of_h)))
    assert_near(b.grad, h.T @ dy, (UNIT + 1e-5) * (np.abs(h.T) @ np.abs(dy)))
    direct, narrow = np.abs(dy) @ np.abs(w.T), UNIT * np.abs(of_h) @ np.abs(ws.T)
    lossless = kind in ("plain", "bfloat16")
    assert_near(x.grad, dy @ w.T + of_h @ ws.T, (1e-5 if lossless else UNIT) * direct + narrow + 1e-5 * narrow / UNIT)


def fifteen_bits(x: np.ndarray) -> np.ndarray:
    """How far the activations of an integer product may be off: half a step of their row."""
    return np.broadcast_to(0.51 * np.abs(x).max(axis=-1, keepdims=True, initial=0) / (128 * 127), x.shape)


every_kind = pytest.mark.parametrize("kind", ["plain", *KINDS])


@both_instruction_sets
@every_kind
@settings(max_examples=20, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 40), st.integers(1, 150), st.integers(1, 150), st.integers(1, 70)),
    threads=st.integers(1, 3),
)
def test_products_and_gradients(isa: str, kind: str, sizes: tuple[int, int, int, int], threads: int) -> None:
    check(isa, kind, sizes, threads)


@both_instruction_sets
@every_kind
@pytest.mark.parametrize(("inputs", "outputs"), [(4100, 70), (70, 4100)])
def test_long_sums_are_cut_into_blocks(isa: str, kind: str, inputs: int, outputs: int) -> None:
    check(isa, kind, (7, inputs, outputs, 5), 2)


@both_instruction_sets
def test_leading_axes_stay_and_what_is_frozen_gets_no_gradient(isa: str) -> None:
    x, a, b = paddle.to_tensor(drawn(2, 3, 6)), trained(drawn(6, 2)), paddle.to_tensor(drawn(2, 5))
    weight = trained(drawn(6, 5)).astype("bfloat16").detach()
    with fused(isa, "low_rank_linear_backward"):
        out = low_rank_linear(x, weight, a, b, SCALE)
        out.sum().backward()
    assert out.shape == [2, 3, 5] and a.grad is not None
    assert x.grad is None and b.grad is None and weight.grad is None


@both_instruction_sets
def test_a_wrong_width_is_refused(isa: str) -> None:
    weight = paddle.to_tensor(drawn(6, 5)).astype("bfloat16")
    with fused(isa), pytest.raises(Exception, match="low_rank_linear: the last axis of x is 7, expected 6"):
        low_rank_linear(paddle.to_tensor(drawn(3, 7)), weight, trained(drawn(6, 2)), trained(drawn(2, 5)), SCALE)
