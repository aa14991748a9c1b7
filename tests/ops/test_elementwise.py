"""Fused RMSNorm, SwiGLU and rotary positions against their definitions."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45 import ops
from ernie45.ops import custom, elementwise, reference
from tests.helpers.fused import assert_agree, both_instruction_sets, fused, outputs_and_gradients
from tests.helpers.numeric import numeric_gradient

# Odd and empty, less and more than a vector, and one that is worth several threads.
WIDTHS = st.sampled_from([0, 1, 2, 7, 16, 33, 130, 20000])
ROWS = st.sampled_from([(0,), (1,), (65,), (2, 3), (2, 0, 3)])
DTYPES = st.sampled_from(["float32", "bfloat16"])
THREADS = st.sampled_from([1, 2, 7])
SPECIAL = st.sampled_from([0.0, 1e4, 1e-20, -200.0, np.nan, np.inf, -np.inf])


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_special(x: np.ndarray, value: float) -> np.ndarray:
    """x with the value at a few places of its first row, or everywhere in the row if it is 0."""
    if x.size:
        row = x.reshape(-1, x.shape[-1])[0]
        row[:: 3 if value else 1] = value
    return x


# RMSNorm.


@both_instruction_sets
@settings(max_examples=40)
@given(rows=ROWS, width=WIDTHS, dtype=DTYPES, threads=THREADS, special=SPECIAL)
def test_rms_norm(isa: str, rows: tuple[int, ...], width: int, dtype: str, threads: int, special: float) -> None:
    x, weight = with_special(random(*rows, width), special), random(width, seed=1)
    options = {"dtype": dtype, "gradients": bool(np.isfinite(special))}

    def normed(definition):
        return lambda x, weight: definition(x, weight, 1e-5)

    with fused(isa, "rms_norm", threads=threads):
        found = outputs_and_gradients(normed(ops.rms_norm), x, weight, **options)
    assert_agree(found, outputs_and_gradients(normed(reference.rms_norm), x, weight, **options), dtype)


@both_instruction_sets
@settings(max_examples=40)
@given(rows=ROWS, width=WIDTHS, dtype=DTYPES, threads=THREADS, special=SPECIAL)
def test_rms_norm_with_a_residual(
    isa: str, rows: tuple[int, ...], width: int, dtype: str, threads: int, special: float
) -> None:
    x, weight, residual = random(*rows, width), random(width, seed=1), with_special(random(*rows, width), special)
    options = {"dtype": dtype, "gradients": bool(np.isfinite(special))}

    def normed(definition):
        return lambda x, weight, residual: definition(x, weight, 1e-5, residual)

    with fused(isa, "add_rms_norm", threads=threads):
        found = outputs_and_gradients(normed(ops.rms_norm), x, weight, residual, **options)
    expected = outputs_and_gradients(normed(reference.rms_norm), x, weight, residual, **options)
    assert_agree(found, expected, dtype)


@both_instruction_sets
@pytest.mark.parametrize("output", [0, 1])
def test_one_output_of_the_residual_norm_may_be_unused(isa: str, output: int) -> None:
    arrays = random(3, 5), random(5, seed=1), random(3, 5, seed=2)
    with fused(isa, "add_rms_norm"):
        found = outputs_and_gradients(lambda x, w, r: ops.rms_norm(x, w, 1e-5, r)[output], *arrays)
    with custom.reference_only():
        # Not using a weight at all would leave its gradient undefined.
        expected = outputs_and_gradients(lambda x, w, r: ops.rms_norm(x, w, 1e-5, r)[output] + 0 * w, *arrays)
    assert_agree(found, expected)


@both_instruction_sets
def test_rms_norm_gradient_is_numeric(isa: str) -> None:
    x, weight, mix = random(3, 5), random(5, seed=1), random(3, 5)

    def slow(x: np.ndarray, weight: np.ndarray) -> float:
        return float((x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * weight * mix).sum())

    with fused(isa, "rms_norm"):
        _, grad_x, grad_weight = outputs_and_gradients(lambda x, w: ops.rms_norm(x, w, 1e-5), x, weight)
    wide = x.astype(np.float64), weight.astype(np.float64)
    assert_agree([grad_x], [numeric_gradient(lambda at: slow(at, wide[1]), x)])
    assert_agree([grad_weight], [numeric_gradient(lambda at: slow(wide[0], at), weight)])


def test_the_weight_gradient_does_not_depend_on_the_threads() -> None:
    arrays = random(65, 20000), random(20000, seed=1)
    found = []
    for threads in (1, 2, 7):
        with fused("avx2", "rms_norm", threads=threads):
            found.append(outputs_and_gradients(lambda x, w: ops.rms_norm(x, w, 1e-5), *arrays)[2])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


# SwiGLU.


@both_instruction_sets
@settings(max_examples=40)
@given(rows=ROWS, width=WIDTHS, dtype=DTYPES, threads=THREADS, special=SPECIAL, weighted=st.booleans())
def test_swiglu(
    isa: str, rows: tuple[int, ...], width: int, dtype: str, threads: int, special: float, weighted: bool
) -> None:
    arrays = [with_special(random(*rows, 2 * width), special), random(*rows, seed=1)][: 1 + weighted]
    options = {"dtype": dtype, "gradients": bool(np.isfinite(special))}
    with fused(isa, "swiglu_prob" if weighted else "swiglu", threads=threads):
        found = outputs_and_gradients(ops.swiglu, *arrays, **options)
    assert_agree(found, outputs_and_gradients(reference.swiglu, *arrays, **options), dtype)


@both_instruction_sets
def test_silu_is_within_three_units_in_the_last_place(isa: str) -> None:
    """The exponential is good to 2, the sum and the quotient add a half each."""
    gate = np.concatenate([np.linspace(-85, 90, 100_001), 10.0 ** -np.arange(1, 38), [0.0, 3e38]]).astype(np.float32)
    x = np.concatenate([gate, np.ones_like(gate)])[None]
    with fused(isa, "swiglu"):
        found = ops.swiglu(paddle.to_tensor(x)).numpy()[0]
    wide = gate.astype(np.float64)
    exact = wide / (1 + np.exp(-wide))
    assert np.all(np.abs(found - exact) <= 3 * np.spacing(np.abs(exact).astype(np.float32)))


@both_instruction_sets
def test_swiglu_gradient_is_numeric(isa: str) -> None:
    x, prob, mix = random(3, 10), random(3, seed=1), random(3, 5)

    def slow(x: np.ndarray, prob: np.ndarray) -> float:
        gate, up = np.split(x, 2, axis=-1)
        return float((gate / (1 + np.exp(-gate)) * up * prob[:, None] * mix).sum())

    with fused(isa, "swiglu_prob"):
        _, grad_x, grad_prob = outputs_and_gradients(ops.swiglu, x, prob)
    assert_agree([grad_x], [numeric_gradient(lambda at: slow(at, prob.astype(np.float64)), x)])
    assert_agree([grad_prob], [numeric_gradient(lambda at: slow(x.astype(np.float64), at), prob)])


# Rotary positions.


@both_instruction_sets
@settings(max_examples=40)
@given(
    batch=st.integers(0, 3),
    sequence=st.sampled_from([0, 1, 5, 65]),
    heads=st.integers(1, 3),
    pairs=st.sampled_from([1, 3, 8, 32, 50]),
    axes=st.sampled_from([1, 3]),
    shared=st.booleans(),
    dtype=DTYPES,
    threads=THREADS,
    special=SPECIAL,
)
def test_rope(
    isa: str,
    batch: int,
    sequence: int,
    heads: int,
    pairs: int,
    axes: int,
    shared: bool,
    dtype: str,
    threads: int,
    special: float,
) -> None:
    x = with_special(random(batch, sequence, heads, 2 * pairs), special)
    shape = [1 if shared else batch, sequence] + [3] * (axes == 3)
    positions = paddle.to_tensor(np.random.default_rng(0).integers(0, 1000, shape))
    angles = ops.rope_angles(positions, 2 * pairs, 10000.0, pairs // 3 if axes == 3 else 0)
    options = {"dtype": dtype, "gradients": bool(np.isfinite(special))}
    with fused(isa, "rope", threads=threads):
        found = outputs_and_gradients(lambda x: ops.rope(x, *angles), x, **options)
    assert_agree(found, outputs_and_gradients(lambda x: reference.rope(x, *angles), x, **options), dtype)


@both_instruction_sets
def test_rope_gradient_turns_back(isa: str) -> None:
    x = paddle.to_tensor(random(2, 3, 2, 8), stop_gradient=False)
    angles = ops.rope_angles(paddle.to_tensor([[0, 5, 9], [1, 2, 3]]), 8, 10000.0)
    with fused(isa, "rope"):
        rotated = ops.rope(x, *angles)
        paddle.autograd.backward([rotated], [rotated.detach()])
    np.testing.assert_allclose(x.grad.numpy(), x.numpy(), atol=1e-6)


# Conversions.


@both_instruction_sets
@pytest.mark.parametrize("count", [0, 1, 37, 200_000])
def test_bfloat16_and_back(isa: str, count: int) -> None:
    """Every kind of float32, halfway cases and NaN with any payload included."""
    bits = np.random.default_rng(0).integers(0, 2**32, count, np.uint32)
    bits[::5] = bits[::5] & 0xFFFF0000 | 0x8000
    bits[::7] |= 0x7F800000
    x = paddle.to_tensor(bits.view(np.float32))
    with fused(isa, "narrow", "widen"):
        narrowed = elementwise.narrow(x, like=paddle.zeros([1], "bfloat16"))
        widened = elementwise.widen(narrowed)
    np.testing.assert_array_equal(widened.numpy(), x.astype("bfloat16").astype("float32").numpy())


# All of them.


@both_instruction_sets
def test_views_are_read_in_their_own_order(isa: str) -> None:
    x = random(6, 8, seed=3)
    view = paddle.to_tensor(x).T[:, ::2]
    with fused(isa, "rms_norm", "swiglu"):
        normed, product = ops.rms_norm(view, paddle.ones([3]), 1e-5), ops.swiglu(view.T.T[:, :2])
    plain = paddle.to_tensor(np.ascontiguousarray(x.T[:, ::2]))
    assert_agree([normed.numpy()], [reference.rms_norm(plain, paddle.ones([3]), 1e-5).numpy()])
    assert_agree([product.numpy()], [reference.swiglu(plain[:, :2]).numpy()])


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_other_dtypes_use_the_definition(dtype: str) -> None:
    x = paddle.to_tensor(random(1, 3, 2, 8)).astype(dtype)
    angles = ops.rope_angles(paddle.to_tensor([[0, 1, 2]]), 8, 10000.0)
    for found in (ops.swiglu(x), ops.rms_norm(x, paddle.ones([8]), 1e-5), ops.rope(x, *angles)):
        assert found.dtype == x.dtype


@both_instruction_sets
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_the_weight_may_have_another_dtype(isa: str, dtype: str) -> None:
    x, weight = paddle.to_tensor(random(3, 8)), paddle.to_tensor(random(8, seed=1)).astype(dtype)
    with fused(isa, "rms_norm"):
        found = ops.rms_norm(x, weight, 1e-5)
    assert_agree([found.numpy()], [reference.rms_norm(x, weight, 1e-5).numpy()])


def test_switched_off_fused_operators_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom, "run", lambda name, *arguments: pytest.fail(f"{name} ran"))
    x = paddle.to_tensor(random(1, 3, 2, 8))
    with custom.reference_only():
        ops.rms_norm(x, paddle.ones([8]), 1e-5)
        ops.swiglu(x)
        ops.rope(x, *ops.rope_angles(paddle.to_tensor([[0, 1, 2]]), 8, 10000.0))
        rows, _, _, slots = ops.moe_permute(x[0, :, 0], ops.moe_gate(x[0, :, 0], None, 2, "softmax", True, 0.0)[1], 8)
        ops.moe_combine(rows, slots, paddle.ones([3, 2]))


@both_instruction_sets
def test_errors_name_operator_argument_and_shapes(isa: str) -> None:
    x = paddle.zeros([2, 5])
    cos, sin = ops.rope_angles(paddle.zeros([1, 4]), 8, 10000.0)
    with fused(isa):
        with pytest.raises(OSError, match=r"swiglu: x has shape \[2, 5\], expected an even last axis"):
            ops.swiglu(x)
        with pytest.raises(OSError, match=r"rms_norm: weight has shape \[4\], expected \[5\]"):
            ops.rms_norm(x, paddle.ones([4]), 1e-5)
        with pytest.raises(OSError, match=r"rope: cos has shape \[1, 4, 1, 4\], expected \[1, 3, 1, 4\]"):
            ops.rope(paddle.zeros([2, 3, 1, 8]), cos, sin)
