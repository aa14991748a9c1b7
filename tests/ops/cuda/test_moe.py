"""The CUDA kernels that route tokens to experts and back, emulated, against the definitions."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.ops import reference
from tests.helpers import cuda
from tests.helpers.fused import assert_agree, outputs_and_gradients

DTYPES = st.sampled_from(cuda.FLOATS)
SHIFTS = st.sampled_from([0, 0, 1, 8])
# None, fewer than a vector, several vectors, several segments of a warp.
WIDTHS = st.sampled_from([0, 1, 5, 8, 40, 129, 1200])


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def as_dtype(x: np.ndarray, dtype: str) -> np.ndarray:
    return paddle.to_tensor(x).astype(dtype).astype("float32").numpy()


# The gate


def gate(
    logits: np.ndarray,
    bias: np.ndarray | None,
    *options: int | bool | float,
    shift: int = 0,
    probabilities: bool = True,
) -> list[cuda.Memory | None]:
    """Probabilities, indices, weights, counts. Options: k, softmax, normalise, minimum."""
    tokens, experts = logits.shape
    k = int(options[0])
    x = cuda.device(logits, shift=shift)
    by = None if bias is None else cuda.device(bias, shift=shift)
    out = cuda.empty([tokens, experts], shift=shift) if probabilities else None
    rest = [cuda.empty([tokens, k], "int64"), cuda.empty([tokens, k]), cuda.empty([experts], "int64")]
    cuda.library("moe_gate").call("ernie45_cuda_moe_gate", x, by, tokens, experts, *options, out, *rest)
    return [out, *rest]


@settings(max_examples=60)
@given(
    tokens=st.sampled_from([0, 1, 7, 130]),
    experts=st.sampled_from([1, 2, 7, 8, 33, 48, 64, 130, 160, 256]),
    data=st.data(),
    softmax=st.booleans(),
    normalise=st.booleans(),
    biased=st.booleans(),
    special=st.sampled_from([0.0, 0.0, np.nan, np.inf, -np.inf]),
    shift=SHIFTS,
)
def test_moe_gate(
    tokens: int,
    experts: int,
    data: st.DataObject,
    softmax: bool,
    normalise: bool,
    biased: bool,
    special: float,
    shift: int,
) -> None:
    """The logits lie on a grid, so that many are equal."""
    k = data.draw(st.sampled_from(sorted({1, min(6, experts), min(16, experts), min(32, experts)})))
    logits = np.round(4 * random(tokens, experts)) / 4
    bias = np.round(4 * random(experts, seed=1)) / 4 if biased else None
    if special:
        logits[:1, ::3] = special
    found = gate(logits, bias, k, softmax, normalise, 1e-12, shift=shift)

    by = None if bias is None else paddle.to_tensor(bias)
    arguments = (k, "softmax" if softmax else "sigmoid", normalise, 1e-12)
    expected = outputs_and_gradients(lambda x: reference.moe_gate(x, by, *arguments), logits, gradients=not special)
    indices = found[1].numpy()
    np.testing.assert_array_equal(indices, expected[1])
    assert_agree([array.numpy().astype(np.float32) for array in found[:3]], expected[:3])
    np.testing.assert_array_equal(found[3].numpy(), np.bincount(indices.ravel(), minlength=experts))
    if special:
        return

    # The sum of outputs that the expected gradient is of.
    mixes = [np.random.default_rng(seed).standard_normal([tokens, size]) for seed, size in ((0, experts), (2, k))]
    grads = [cuda.device(mix.astype(np.float32), shift=shift) for mix in mixes]
    grad = cuda.empty([tokens, experts], shift=shift)
    sizes = (tokens, experts, k, softmax, normalise, 1e-12)
    cuda.library("moe_gate").call("ernie45_cuda_moe_gate_grad", found[0], found[1], *grads, *sizes, grad)
    assert_agree([grad.numpy()], expected[3:])


@pytest.mark.parametrize("given", [0, 1])
def test_a_gradient_that_is_not_given_is_zero(given: int) -> None:
    logits, sizes = random(5, 12), (5, 12, 3, True, True, 1e-12)
    probabilities, indices, _, _ = gate(logits, None, *sizes[2:])
    grads = [cuda.device(random(5, 12, seed=1)), cuda.device(random(5, 3, seed=2))]
    zeros = [cuda.device(np.zeros_like(grad.numpy())) for grad in grads]
    found, expected = cuda.empty([5, 12]), cuda.empty([5, 12])
    for pair, out in (([None, None], found), (zeros, expected)):
        pair[given] = grads[given]
        cuda.library("moe_gate").call("ernie45_cuda_moe_gate_grad", probabilities, indices, *pair, *sizes, out)
    np.testing.assert_array_equal(found.numpy(), expected.numpy())
    assert np.abs(expected.numpy()).max() > 0.01


def test_probabilities_need_not_be_wanted() -> None:
    logits = random(9, 20)
    wanted, unwanted = (gate(logits, None, 4, True, True, 1e-12, probabilities=wanted) for wanted in (True, False))
    for one, other in zip(wanted[1:], unwanted[1:], strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_the_sum_of_weights_is_clipped_from_below() -> None:
    """Where it is, the divisor is constant, and so is the gradient."""
    logits = np.array([[-80.0, -90.0, -85.0], [-1.0, 2.0, 3.0]], np.float32)
    found = gate(logits, None, 2, False, True, 1e-12)
    arguments = (None, 2, "sigmoid", True, 1e-12)
    expected = outputs_and_gradients(lambda x: reference.moe_gate(x, *arguments), logits)
    np.testing.assert_allclose(found[2].numpy(), expected[2], rtol=1e-5)
    grads = [np.random.default_rng(seed).standard_normal([2, size]) for seed, size in ((0, 3), (2, 2))]
    on_device, grad = [cuda.device(array.astype(np.float32)) for array in grads], cuda.empty([2, 3])
    sizes = (2, 3, 2, False, True, 1e-12)
    cuda.library("moe_gate").call("ernie45_cuda_moe_gate_grad", found[0], found[1], *on_device, *sizes, grad)
    np.testing.assert_allclose(grad.numpy(), expected[3], rtol=1e-5)


# The order


def sort(
    indices: np.ndarray, experts: int, multiple: int = 1, sources: bool = True
) -> tuple[np.ndarray, np.ndarray, cuda.Memory, cuda.Memory | None]:
    """Counts, offsets, slots, sources."""
    library, (tokens, k) = cuda.library("moe_sort"), indices.shape
    rows = library.call("ernie45_cuda_moe_sort_rows", tokens, k, experts, multiple)
    workspace = cuda.empty([library.call("ernie45_cuda_moe_sort_workspace", tokens, k, experts)], "uint8")
    counts, offsets = cuda.empty([experts], "int64"), cuda.empty([experts + 1], "int64")
    slots, tokens_of = cuda.empty([tokens, k], "int64"), cuda.empty([rows], "int32") if sources else None
    chosen = cuda.device(indices.astype(np.int64))
    library.call(
        "ernie45_cuda_moe_sort", chosen, tokens, k, experts, multiple, counts, offsets, slots, tokens_of, workspace
    )
    return counts.numpy(), offsets.numpy(), slots, tokens_of


@st.composite
def choices(draw: st.DrawFn, most: int = 64) -> tuple[np.ndarray, int]:
    """Indices [tokens, k] of different experts in every row, and the number of experts."""
    tokens, experts = draw(st.sampled_from([0, 1, 7, 65])), draw(st.sampled_from([1, 2, 7, most]))
    k = draw(st.sampled_from(sorted({1, min(2, experts), min(6, experts), min(32, experts)})))
    if draw(st.booleans()):  # all tokens go to the same experts
        return np.tile(np.arange(experts - k, experts), (tokens, 1)), experts
    return np.argsort(random(tokens, experts), axis=-1)[:, :k], experts


def check_order(indices: np.ndarray, experts: int, multiple: int = 1) -> None:
    """Holds the order against the definition's, moved by the rows that experts have left over."""
    counts, offsets, slots, sources = sort(indices, experts, multiple)
    tokens, k = indices.shape
    kept = (indices >= 0) & (indices < experts)
    # For the definition, choices that are dropped are those of one more expert.
    ids = paddle.to_tensor(np.where(kept, indices, experts))
    _, all_counts, starts, places = (
        tensor.numpy() for tensor in reference.moe_permute(paddle.zeros([tokens, 1]), ids, experts + 1)
    )
    np.testing.assert_array_equal(counts, all_counts[:-1])
    rows = -(-counts // multiple) * multiple
    np.testing.assert_array_equal(offsets, np.concatenate([[0], np.cumsum(rows)]))
    moved = places + np.append(offsets[:-1] - starts[:-2], 0)[ids.numpy()]
    np.testing.assert_array_equal(slots.numpy(), np.where(kept, moved, -1))
    expected = np.full(sources.shape, -1)
    expected[moved[kept]] = np.nonzero(kept)[0]
    np.testing.assert_array_equal(sources.numpy(), expected)
    assert offsets[-1] <= sources.shape[0] and sources.shape[0] % multiple == 0


@settings(max_examples=15)
@given(choices(most=130), st.sampled_from([1, 8, 128]))
def test_order(choice: tuple[np.ndarray, int], multiple: int) -> None:
    check_order(*choice, multiple)


@pytest.mark.parametrize("experts", [3, 1024])
def test_order_over_several_blocks(experts: int) -> None:
    check_order(np.random.default_rng(0).integers(experts, size=[3000, 3]), experts, 16)


@pytest.mark.parametrize("multiple", [1, 16])
def test_choices_of_no_expert_are_dropped(multiple: int) -> None:
    check_order(np.array([[2, -1], [-1, -5], [4, 0], [5, 2], [2**40, 0]]), 5, multiple)


def test_sources_need_not_be_wanted() -> None:
    indices = np.array([[2, 0], [1, 2]])
    np.testing.assert_array_equal(sort(indices, 3, sources=False)[2].numpy(), sort(indices, 3)[2].numpy())


# To the experts and back


@settings(max_examples=40)
@given(choices(), WIDTHS, st.sampled_from([*cuda.FLOATS, "float8_e4m3fn"]), st.sampled_from([1, 16]), SHIFTS)
def test_moe_permute(choice: tuple[np.ndarray, int], width: int, dtype: str, multiple: int, shift: int) -> None:
    indices, experts = choice
    tokens, k = indices.shape
    _, _, slots, sources = sort(indices, experts, multiple)
    rows = sources.shape[0]
    codes = np.random.default_rng(0).integers(256, size=[tokens, width], dtype=np.uint8)
    values = codes if dtype == "float8_e4m3fn" else random(tokens, width)
    x, out = cuda.device(values, dtype, shift), cuda.empty([rows, width], dtype, shift)
    library = cuda.library("moe_rows")
    library.call("ernie45_cuda_moe_permute", x, slots, sources, tokens, k, width, rows, x.tag, out)
    expected = np.zeros_like(out.numpy())
    expected[slots.numpy()] = x.numpy()[:, None]
    np.testing.assert_array_equal(out.numpy(), expected)
    if dtype == "float8_e4m3fn":
        return

    grad, grad_x = cuda.device(random(rows, width, seed=1), dtype, shift), cuda.empty([tokens, width], dtype, shift)
    library.call("ernie45_cuda_moe_permute_grad", grad, slots, tokens, k, width, rows, x.tag, grad_x)
    sums = grad.numpy()[slots.numpy()].sum(axis=1, dtype=np.float32)
    assert_agree([grad_x.numpy()], [as_dtype(sums, dtype)], dtype)


def test_rows_and_offsets_are_those_of_the_definition() -> None:
    """Without a multiple, the outputs of the operators are equal to those of `reference.moe_permute`."""
    x, indices = random(7, 24), np.argsort(random(7, 9, seed=1))[:, :4]
    counts, offsets, slots, _ = sort(indices, 9)
    out = cuda.empty([28, 24])
    cuda.library("moe_rows").call("ernie45_cuda_moe_permute", cuda.device(x), slots, None, 7, 4, 24, 28, 0, out)
    expected = reference.moe_permute(paddle.to_tensor(x), paddle.to_tensor(indices), 9)
    for one, other in zip([out.numpy(), counts, offsets, slots.numpy()], expected, strict=True):
        np.testing.assert_array_equal(one, other.numpy())


@settings(max_examples=40)
@given(
    choices(),
    WIDTHS,
    DTYPES,
    st.sampled_from(["rows", *cuda.FLOATS]),
    st.sampled_from([1, 16]),
    SHIFTS,
    st.sampled_from([0.0, 0.0, np.nan, np.inf]),
)
def test_moe_combine(
    choice: tuple[np.ndarray, int],
    width: int,
    dtype: str,
    weights_dtype: str,
    multiple: int,
    shift: int,
    special: float,
) -> None:
    indices, experts = choice
    tokens, k = indices.shape
    weights_dtype = dtype if weights_dtype == "rows" else weights_dtype
    _, _, slots, sources = sort(indices, experts, multiple)
    rows = sources.shape[0]
    values = random(rows, width)
    if special:
        values[:1, ::3] = special
    x, weights = cuda.device(values, dtype, shift), cuda.device(random(tokens, k, seed=1), weights_dtype, shift)
    out = cuda.empty([tokens, width], dtype, shift)
    library, sizes = cuda.library("moe_rows"), (tokens, k, width, rows, x.tag, weights.tag)
    library.call("ernie45_cuda_moe_combine", x, slots, weights, *sizes, out)
    if not rows:
        return

    def combine(x: paddle.Tensor, weights: paddle.Tensor) -> paddle.Tensor:
        return reference.moe_combine(x, paddle.to_tensor(slots.numpy()), weights)

    expected, expected_x, expected_weights = outputs_and_gradients(combine, x.numpy(), weights.numpy())
    assert_agree([out.numpy()], [as_dtype(expected, dtype)], dtype)

    mix = cuda.device(np.random.default_rng(0).standard_normal([tokens, width]).astype(np.float32), dtype, shift)
    grad_x, grad_weights = cuda.empty([rows, width], dtype, shift), cuda.empty([tokens, k], weights_dtype, shift)
    library.call("ernie45_cuda_moe_combine_grad", x, slots, weights, mix, sources, *sizes, grad_x, grad_weights)
    chosen, by = x.numpy()[slots.numpy()], weights.numpy()
    if dtype == "float32":  # the mix is not rounded
        assert_agree([grad_x.numpy()], [expected_x])
        if not special:
            assert_agree([grad_weights.numpy()], [as_dtype(expected_weights, weights_dtype)], weights_dtype)
    with np.errstate(invalid="ignore"):
        wide = np.zeros([rows, width], np.float32)
        wide[slots.numpy()] = by[:, :, None] * mix.numpy()[:, None]
        dots = (chosen.astype(np.float64) * mix.numpy()[:, None]).sum(axis=-1)
    assert_agree([grad_x.numpy()], [as_dtype(wide, dtype)], dtype)
    assert_agree([grad_weights.numpy()], [as_dtype(dots.astype(np.float32), weights_dtype)], weights_dtype)


def test_what_is_dropped_adds_nothing() -> None:
    """Whatever its weight: NaN would not go away by a product with zero."""
    slots = cuda.device(np.array([[1, -1], [-1, -1], [7, 0]]))
    x, weights = random(2, 24), np.array([[2, np.nan], [np.inf, 1], [3, 4]], np.float32)
    out, grad = cuda.empty([3, 24]), random(3, 24, seed=1)
    on_device, by = cuda.device(x), cuda.device(weights)
    library = cuda.library("moe_rows")
    library.call("ernie45_cuda_moe_combine", on_device, slots, by, 3, 2, 24, 2, 0, 0, out)
    np.testing.assert_array_equal(out.numpy(), np.stack([2 * x[1], np.zeros(24, np.float32), 4 * x[0]]))
    grad_x, grad_weights = cuda.empty([2, 24]), cuda.empty([3, 2])
    outputs = (grad_x, grad_weights)
    library.call(
        "ernie45_cuda_moe_combine_grad", on_device, slots, by, cuda.device(grad), None, 3, 2, 24, 2, 0, 0, *outputs
    )
    np.testing.assert_array_equal(grad_x.numpy(), np.stack([4 * grad[2], 2 * grad[0]]))
    np.testing.assert_array_equal(grad_weights.numpy() == 0, [[False, True], [True, True], [True, False]])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("moe_gate", (None, None, 1, 257, 1, True, True, 0.0, None, None, None, None)),
        ("moe_gate", (None, None, 1, 64, 33, True, True, 0.0, None, None, None, None)),
        ("moe_gate", (None, None, 1, 4, 5, True, True, 0.0, None, None, None, None)),
        ("moe_gate_grad", (None, None, None, None, -1, 4, 1, True, True, 0.0, None)),
        ("moe_sort", (None, 1, 1, 1025, 1, None, None, None, None, None)),
        ("moe_sort", (None, 1, 1, 8, 0, None, None, None, None, None)),
        ("moe_sort", (None, 2**31, 1, 8, 1, None, None, None, None, None)),
        ("moe_sort", (None, 2**30, 4, 8, 1, None, None, None, None, None)),
        ("moe_permute", (None, None, None, 1, 33, 8, 33, 0, None)),
        ("moe_permute", (None, None, None, 1, 1, 8, 1, 4, None)),
        ("moe_permute_grad", (None, None, 1, 1, 8, 1, 3, None)),
        ("moe_combine", (None, None, None, 1, 1, 8, 1, 0, 3, None)),
        ("moe_combine", (None, None, None, 1, 0, 8, 1, 0, 0, None)),
        ("moe_combine_grad", (None, None, None, None, None, 2**30, 2, 8, 1, 0, 0, None, None)),
    ],
)
def test_sizes_and_types_that_are_not_taken(name: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises(cuda.CudaError) as error:
        cuda.library("moe_gate", "moe_sort", "moe_rows").call(f"ernie45_cuda_{name}", *arguments)
    assert error.value.code == 1
