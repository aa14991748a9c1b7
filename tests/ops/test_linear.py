"""Products with packed weights: against the definition in float64 with activations rounded as documented.

All tolerances are bounds that follow from the roundings, not measurements.
"""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45 import ops
from ernie45.checkpoint.dtypes import convert
from ernie45.ops import custom, reference
from ernie45.ops.linear import embedding, linear, linear_transposed, unstack
from ernie45.ops.packed import PackedWeight
from tests.helpers.fused import both_instruction_sets, fused
from tests.helpers.packed import KINDS, fill, packed, published

LARGEST = 128 * 127  # of an activation in 15 bits
HALF_UNIT = 2.0**-24  # float32: relative error of one rounding
SIZES = st.one_of(st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 128, 129]), st.integers(1, 200))
ROWS = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 13, 65])
THREADS = st.sampled_from([1, 2, 7])

kinds = pytest.mark.parametrize("kind", KINDS)
native = pytest.mark.skipif(custom.library() is None, reason="no native library here")


def activations(rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    """Rows of very different magnitudes."""
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((rows, inputs)) * 10.0 ** generator.uniform(-3, 3, (rows, 1))).astype(np.float32)


def rounded(x: np.ndarray, kind: str) -> np.ndarray:
    """The activations that a product really sees, float64."""
    if kind == "bfloat16":
        return convert(convert(x, "F32", "BF16"), "BF16", "F32").astype(np.float64)
    peak = np.abs(x).max(axis=-1, keepdims=True, initial=0)
    inverse = np.where(peak > 0, np.float32(LARGEST) / np.where(peak > 0, peak, 1), np.float32(0))
    return np.rint(x * inverse).astype(np.float64) * (peak / LARGEST)


def product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ weight.astype(np.float64)


@both_instruction_sets
@kinds
@settings(max_examples=40)
@given(rows=ROWS, inputs=SIZES, outputs=SIZES, outputs_first=st.booleans(), threads=THREADS)
def test_linear(isa: str, kind: str, rows: int, inputs: int, outputs: int, outputs_first: bool, threads: int) -> None:
    source = published(kind, inputs, outputs, outputs_first)
    weight, x = packed(source), activations(rows, inputs, seed=rows)
    with fused(isa, "linear", threads=threads):
        found = linear(paddle.to_tensor(x), weight)
        turned = linear_transposed(paddle.to_tensor(x), weight)
    assert found.dtype == paddle.float32 and found.shape == [rows, outputs]
    np.testing.assert_array_equal(turned.numpy(), found.numpy())
    seen = rounded(x, kind)
    sizes = product(np.abs(seen), np.abs(source.meaning))
    assert np.all(np.abs(found.numpy() - product(seen, source.meaning)) <= (inputs + 4) * HALF_UNIT * sizes)


@both_instruction_sets
@kinds
@settings(max_examples=15)
@given(rows=ROWS, inputs=SIZES, outputs=SIZES)
def test_linear_is_near_the_product_with_dense_weights(
    isa: str, kind: str, rows: int, inputs: int, outputs: int
) -> None:
    """bfloat16 activations are off by 1 in 256 at most, 15-bit ones by half a step of their row's scale."""
    source = published(kind, inputs, outputs)
    weight, x = packed(source), activations(rows, inputs, seed=rows)
    with fused(isa, "linear"):
        found = linear(paddle.to_tensor(x), weight).numpy()
    expected = reference.linear(paddle.to_tensor(x), weight.dense()).numpy()
    if kind == "bfloat16":
        off = 2.0**-8 * np.abs(x)
    else:
        off = np.broadcast_to(0.5001 * np.abs(x).max(axis=-1, keepdims=True, initial=0) / LARGEST, x.shape)
    float_error = (2 * inputs + 4) * HALF_UNIT * product(np.abs(x), np.abs(source.meaning))
    assert np.all(np.abs(found - expected) <= product(off, np.abs(source.meaning)) + float_error)


@kinds
@settings(max_examples=20)
@given(rows=ROWS, inputs=SIZES, outputs=SIZES)
def test_both_instruction_sets_compute_the_same(kind: str, rows: int, inputs: int, outputs: int) -> None:
    """Up to the order of float32 additions: the rounded activations are the same."""
    source = published(kind, inputs, outputs)
    weight, x = packed(source), activations(rows, inputs)
    results = []
    for isa in ("avx512", "avx2"):
        with fused(isa, "linear"):
            results.append(linear(paddle.to_tensor(x), weight).numpy())
    sizes = product(np.abs(rounded(x, kind)), np.abs(source.meaning))
    assert np.all(np.abs(results[0] - results[1]) <= (inputs + 4) * HALF_UNIT * sizes)


@both_instruction_sets
@kinds
@settings(max_examples=15)
@given(inputs=SIZES, outputs=SIZES, threads=THREADS)
def test_a_row_does_not_depend_on_the_others_or_on_threads(
    isa: str, kind: str, inputs: int, outputs: int, threads: int
) -> None:
    """Bit for bit: whatever tile a row falls into, it is summed in the same order."""
    weight, x = packed(published(kind, inputs, outputs)), activations(13, inputs)
    with fused(isa, "linear", threads=threads):
        together = linear(paddle.to_tensor(x), weight).numpy()
    with fused(isa, "linear", threads=1):
        for rows in (1, 2, 3, 4, 5, 6, 7):
            np.testing.assert_array_equal(linear(paddle.to_tensor(x[-rows:]), weight).numpy(), together[-rows:])


@both_instruction_sets
@kinds
@pytest.mark.parametrize("shape", [[70], [2, 3, 70], [1, 1, 1, 70], [2, 0, 70]], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_leading_axes_and_dtypes(isa: str, kind: str, shape: list[int], dtype: str) -> None:
    weight = packed(published(kind, 70, 65))
    x = paddle.to_tensor(np.random.default_rng(0).standard_normal(shape).astype(np.float32)).astype(dtype)
    with fused(isa, "linear"):
        found = ops.linear(x, weight)
        flat = linear(x.astype("float32").reshape([-1, 70]), weight)
    assert found.dtype == x.dtype and found.shape == [*shape[:-1], 65]
    expected = flat.reshape(found.shape).astype(dtype).astype("float32")
    np.testing.assert_array_equal(found.astype("float32").numpy(), expected.numpy())


@both_instruction_sets
@kinds
def test_a_strided_input(isa: str, kind: str) -> None:
    weight, x = packed(published(kind, 70, 65)), activations(4, 140)
    with fused(isa, "linear"):
        found = linear(paddle.to_tensor(x)[:, 70:], weight)
        np.testing.assert_array_equal(found.numpy(), linear(paddle.to_tensor(x[:, 70:].copy()), weight).numpy())


@both_instruction_sets
@kinds
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("inputs", [17, 129])
def test_a_row_with_nan_or_infinity(isa: str, kind: str, special: float, inputs: int) -> None:
    """It gives what IEEE says in bfloat16 and NaN in integers; the other rows are what they were."""
    source = published(kind, inputs, 65)
    if kind == "bfloat16":
        source.codes[-1, ::5] = source.meaning[-1, ::5] = 0  # infinity times zero
    weight, x = packed(source), activations(7, inputs)
    with fused(isa, "linear"):
        clean = linear(paddle.to_tensor(x), weight).numpy()
        x[3, -1] = special
        found = linear(paddle.to_tensor(x), weight).numpy()
    others = [0, 1, 2, 4, 5, 6]
    np.testing.assert_array_equal(found[others], clean[others])
    with np.errstate(invalid="ignore"):
        expected = special * source.meaning[-1] if kind == "bfloat16" else np.full(65, np.nan)
    np.testing.assert_array_equal(found[3], expected.astype(np.float32))


@both_instruction_sets
@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_a_weight_with_nan_or_infinity_spoils_its_output_only(isa: str, special: float) -> None:
    source, x = published("bfloat16", 17, 70), np.abs(activations(7, 17))
    with fused(isa, "linear"):
        clean = linear(paddle.to_tensor(x), packed(source)).numpy()
        source.codes[5, 68:69] = convert(np.array([special], np.float32), "F32", "BF16")
        found = linear(paddle.to_tensor(x), packed(source)).numpy()
    np.testing.assert_array_equal(found[:, 68], np.full(7, special, np.float32))
    np.testing.assert_array_equal(np.delete(found, 68, axis=1), np.delete(clean, 68, axis=1))


@both_instruction_sets
@kinds
@pytest.mark.parametrize("size", [0.0, 1e-36, 1e-40])
def test_rows_of_zeros_and_of_almost_nothing(isa: str, kind: str, size: float) -> None:
    """A scale that float32 cannot hold must not turn a row into NaN."""
    source, x = published(kind, 70, 65), activations(4, 70)
    x[1], x[2, ::2], x[2, 1::2] = size, size, 0
    with fused(isa, "linear"):
        found = linear(paddle.to_tensor(x), packed(source)).numpy()
    bound = size * np.abs(source.meaning).sum(axis=0) * 1.01
    assert np.all(np.abs(found[1:3]) <= bound)
    assert np.any(found[0]) and np.any(found[3])


@both_instruction_sets
@kinds
@pytest.mark.parametrize(("inputs", "outputs"), [(0, 65), (70, 0)])
def test_weights_without_elements(isa: str, kind: str, inputs: int, outputs: int) -> None:
    weight = PackedWeight.zeros(kind, [inputs, outputs])
    with fused(isa, "linear"):
        found = linear(paddle.ones([3, inputs]), weight)
    assert found.shape == [3, outputs] and not found.numpy().any()


@native
@kinds
def test_a_wrong_width_is_refused(kind: str) -> None:
    with pytest.raises((OSError, RuntimeError, ValueError), match="the last axis of x is 69, expected 70"):
        linear(paddle.ones([3, 69]), packed(published(kind, 70, 65)))


@native
@kinds
def test_the_reference_takes_packed_weights(kind: str) -> None:
    source, x = published(kind, 70, 65), activations(4, 70)
    weight = packed(source)
    with custom.reference_only():
        found = linear(paddle.to_tensor(x), weight).numpy()
        turned = linear_transposed(paddle.to_tensor(x), weight).numpy()
    float_error = 74 * HALF_UNIT * product(np.abs(x), np.abs(source.meaning))
    assert np.all(np.abs(found - product(x, source.meaning)) <= float_error)
    np.testing.assert_array_equal(turned, found)


@native
@kinds
def test_embedding_and_stacks(kind: str) -> None:
    source = published(kind, 70, 65, outputs_first=True)
    ids = paddle.to_tensor([[0, 64], [7, 7]])
    np.testing.assert_array_equal(embedding(ids, packed(source)).numpy(), source.meaning.T[ids.numpy()])
    stack = PackedWeight.zeros(kind, [2, 65, 70], outputs_first=True)
    fill(stack[1], source)
    np.testing.assert_array_equal(unstack(stack)[1].dense().numpy(), source.meaning)
    assert len(unstack(stack)) == 2
