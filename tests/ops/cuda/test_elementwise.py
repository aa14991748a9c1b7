"""The elementwise CUDA kernels, emulated, against the definitions and their gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.ops import reference
from tests.helpers import cuda

DTYPES = st.sampled_from(cuda.FLOATS)
# None, less than a vector, several vectors, more than a warp and more than a block of threads take at once.
WIDTHS = st.sampled_from([0, 1, 5, 8, 24, 40, 129, 1000])
ROWS = st.sampled_from([0, 1, 3, 7])
SHIFTS = st.sampled_from([0, 0, 1, 8])
SPECIAL = st.sampled_from([None, None, 0.0, 1e4, 1e-20, -200.0, np.nan, np.inf, -np.inf])
INVALID = 1
EPSILON = 1e-5


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_special(x: np.ndarray, value: float | None) -> np.ndarray:
    """x with the value at every third place of its first row."""
    if value is not None and x.size:
        x[0, ::3] = value
    return x


def outputs_of(function: Callable[..., object], *inputs: cuda.Memory) -> list[np.ndarray]:
    """What the definition gives in float32 for the values that the kernel got."""
    found = function(*(paddle.to_tensor(x.numpy()) for x in inputs))
    return [x.numpy() for x in (found if isinstance(found, tuple) else (found,))]


def gradients_of(
    function: Callable[..., object], inputs: list[cuda.Memory], grads: list[cuda.Memory | None]
) -> list[np.ndarray]:
    """The gradients of the inputs, in float32, where those of the outputs are these or, for None, zero."""
    tensors = [paddle.to_tensor(x.numpy(), stop_gradient=False) for x in inputs]
    found = function(*tensors)
    outputs = found if isinstance(found, tuple) else (found,)
    pairs = [(output, paddle.to_tensor(grad.numpy())) for output, grad in zip(outputs, grads, strict=True) if grad]
    return [x.numpy() for x in paddle.grad([pair[0] for pair in pairs], tensors, [pair[1] for pair in pairs])]


def assert_rounded(found: cuda.Memory, expected: np.ndarray, terms: np.ndarray | None = None) -> None:
    """What a kernel wrote is what is expected, rounded once, but for what float32 sums in another order change.

    That is relative to the size of what is summed up, given by `terms` or taken as the largest result of the row.
    """
    ours, rounded = found.numpy(), paddle.to_tensor(expected).astype(found.dtype).astype("float32").numpy()
    assert ours.shape == expected.shape
    same = (ours == rounded) | (np.isnan(ours) & np.isnan(rounded))
    finite = np.where(np.isfinite(expected), np.abs(expected), 0)
    size = finite.max(axis=-1, keepdims=True, initial=0) if terms is None else np.nan_to_num(terms)
    rounding = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[found.dtype]
    step = 2.0**-24 if found.dtype == "float16" else 2.0**-126
    with np.errstate(invalid="ignore"):
        near = np.abs(ours - expected) <= finite * (rounding + 1e-5) + 3e-6 * size + step
    wrong = ~(same | (near & np.isfinite(rounded)))
    assert not wrong.any(), f"found {ours[wrong]}, expected {expected[wrong]} at {np.argwhere(wrong)[:5]}"


# SwiGLU


@settings(max_examples=50)
@given(ROWS, WIDTHS, DTYPES, SHIFTS, SPECIAL, st.booleans())
def test_swiglu(rows: int, width: int, dtype: str, shift: int, special: float | None, weighted: bool) -> None:
    x = cuda.device(with_special(random(rows, 2 * width), special), dtype, shift)
    inputs = [x, cuda.device(random(rows, seed=1))] if weighted else [x]
    prob = inputs[1] if weighted else None
    out = cuda.empty([rows, width], dtype, shift)
    cuda.library("swiglu").call("ernie45_cuda_swiglu", x, prob, rows, width, x.tag, out)
    assert_rounded(out, outputs_of(reference.swiglu, *inputs)[0])


@settings(max_examples=50)
@given(ROWS, WIDTHS, DTYPES, SHIFTS, SPECIAL, st.booleans())
def test_swiglu_grad(rows: int, width: int, dtype: str, shift: int, special: float | None, weighted: bool) -> None:
    x = cuda.device(with_special(random(rows, 2 * width), special), dtype, shift)
    inputs = [x, cuda.device(random(rows, seed=1))] if weighted else [x]
    grad_out = cuda.device(random(rows, width, seed=2), dtype)
    grad_x, grad_prob = cuda.empty([rows, 2 * width], dtype, shift), cuda.empty([rows])
    cuda.library("swiglu").call(
        "ernie45_cuda_swiglu_grad", *(x, inputs[1] if weighted else None, grad_out, rows, width, x.tag),
        *(grad_x, grad_prob if weighted else None),
    )  # fmt: skip
    expected = gradients_of(reference.swiglu, inputs, [grad_out])
    assert_rounded(grad_x, expected[0])
    if weighted:
        # A sum may be small beside its terms.
        terms = np.abs(outputs_of(reference.swiglu, x)[0] * grad_out.numpy())
        largest = terms.max(initial=1, where=np.isfinite(terms))
        np.testing.assert_allclose(grad_prob.numpy(), expected[1], rtol=1e-5, atol=1e-6 * largest)


def test_impossible_sizes_are_refused() -> None:
    for rows, width in ((-1, 8), (8, -1), (8, 2**31)):
        with pytest.raises(cuda.CudaError) as error:
            cuda.library("swiglu").call("ernie45_cuda_swiglu", None, None, rows, width, cuda.DTYPES["float32"], None)
        assert error.value.code == INVALID


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    tag = cuda.DTYPES.get(dtype, 99)
    memory = cuda.empty([8])
    for name, arguments in (
        ("swiglu", (memory, None, 1, 2, tag, memory)),
        ("swiglu_grad", (memory, None, memory, 1, 2, tag, memory, None)),
        ("rms_norm", (memory, None, memory, 0.1, 1, 2, tag, tag, memory, None)),
        ("rms_norm_grad", (memory, memory, memory, None, 0.1, 1, 2, tag, tag, memory, memory, memory)),
        ("rope", (memory, 2, 1, None, 0, 0, memory, memory, 1, 1, 2, 0, tag, memory, 2, None, 0)),
    ):
        with pytest.raises(cuda.CudaError) as error:
            cuda.library("swiglu", "rms_norm", "rope").call(f"ernie45_cuda_{name}", *arguments)
        assert error.value.code == INVALID


# RMSNorm


def normed(x: paddle.Tensor, weight: paddle.Tensor, residual: paddle.Tensor | None = None) -> object:
    return reference.rms_norm(x, weight, EPSILON, residual)


@settings(max_examples=60)
@given(ROWS, WIDTHS, DTYPES, SHIFTS, SPECIAL, st.booleans(), st.booleans())
def test_rms_norm(
    rows: int, width: int, dtype: str, shift: int, special: float | None, added: bool, wide_weight: bool
) -> None:
    x = cuda.device(random(rows, width), dtype, shift)
    residual = cuda.device(with_special(random(rows, width, seed=1), special), dtype, shift)
    weight = cuda.device(random(width, seed=2), "float32" if wide_weight else dtype)
    out, total = (cuda.empty([rows, width], dtype, shift) for _ in range(2))
    given = (residual, total) if added else (None, None)
    cuda.library("rms_norm").call(
        "ernie45_cuda_rms_norm", x, given[0], weight, EPSILON, rows, width, x.tag, weight.tag, out, given[1]
    )
    expected = outputs_of(normed, x, weight, *([residual] if added else []))
    assert_rounded(out, expected[0])
    if added:
        assert_rounded(total, expected[1])


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 8192), ("float32", 8192), ("float16", 4095)])
def test_rms_norm_of_the_widest_rows(dtype: str, width: int) -> None:
    x, grad = (cuda.device(random(2, width, seed=seed), dtype) for seed in range(2))
    weight = cuda.device(random(width, seed=2), dtype)
    out = cuda.empty([2, width], dtype)
    library = cuda.library("rms_norm")
    library.call("ernie45_cuda_rms_norm", x, None, weight, EPSILON, 2, width, x.tag, x.tag, out, None)
    assert_rounded(out, outputs_of(normed, x, weight)[0])
    assert_rounded_gradients([x, weight], grad, None)
    with pytest.raises(cuda.CudaError):
        too_wide = 8200 if width == 8192 else 4097  # of which the rows are not multiples of 16 bytes
        library.call("ernie45_cuda_rms_norm", x, None, weight, EPSILON, 1, too_wide, x.tag, x.tag, out, None)


def test_rms_norm_in_place() -> None:
    x, residual = (cuda.device(random(3, 40, seed=seed), "bfloat16") for seed in range(2))
    weight = cuda.device(random(40, seed=2), "bfloat16")
    expected = outputs_of(normed, x, weight, residual)
    cuda.library("rms_norm").call(
        "ernie45_cuda_rms_norm", x, residual, weight, EPSILON, 3, 40, x.tag, x.tag, x, residual
    )
    assert_rounded(x, expected[0])
    assert_rounded(residual, expected[1])


def assert_rounded_gradients(inputs: list[cuda.Memory], grad: cuda.Memory, direct: cuda.Memory | None) -> None:
    x, weight = inputs
    rows, width = x.shape
    library = cuda.library("rms_norm")
    parts = cuda.empty([library.call("ernie45_cuda_rms_norm_grad_parts", rows, width, x.tag), width])
    grad_x, grad_weight = cuda.empty(x.shape, x.dtype, 0), cuda.empty([width], weight.dtype)
    library.call(
        *("ernie45_cuda_rms_norm_grad", x, weight, grad, direct, EPSILON, rows, width, x.tag, weight.tag),
        *(parts, grad_x, grad_weight),
    )
    parts.stored()  # nothing beside it was written
    expected = gradients_of(lambda x, weight: (normed(x, weight), x * 1), inputs, [grad, direct])
    scale = 1 / np.sqrt((x.numpy() ** 2).sum(axis=-1, keepdims=True) / max(width, 1) + EPSILON)
    terms = [np.abs(grad.numpy() * scale * by) for by in (weight.numpy(), x.numpy())]
    assert_rounded(grad_x, expected[0], terms[0].max(axis=-1, keepdims=True, initial=0))
    assert_rounded(grad_weight, expected[1], terms[1].sum(axis=0))


@settings(max_examples=60)
@given(
    st.sampled_from([0, 1, 3, 7, 31]), WIDTHS, DTYPES, SHIFTS, st.sampled_from([None, 0.0, 1e4, np.nan]),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_rms_norm_grad(
    rows: int, width: int, dtype: str, shift: int, special: float | None, added: bool, wide_weight: bool
) -> None:
    x = cuda.device(with_special(random(rows, width), special), dtype, shift)
    weight = cuda.device(random(width, seed=1), "float32" if wide_weight else dtype)
    grad = cuda.device(random(rows, width, seed=2), dtype, shift)
    direct = cuda.device(random(rows, width, seed=3), dtype) if added else None
    assert_rounded_gradients([x, weight], grad, direct)


# Rotary positions


@settings(max_examples=30)
@given(st.sampled_from([0, 1, 5]), st.sampled_from([2, 6, 64, 128]), st.booleans(), st.integers(0, 2), SHIFTS)
def test_rope_angles(tokens: int, head_dim: int, three: bool, share: int, shift: int) -> None:
    generator = np.random.default_rng(0)
    shape = [tokens, 3] if three else [tokens]
    positions = cuda.device(generator.integers(0, 131072, shape), shift=shift)
    pairs, time_pairs = head_dim // 2, head_dim // 2 * share // 2
    frequencies = reference.rope_frequencies(head_dim, 500000.0)
    cos, sin = cuda.empty([tokens, pairs]), cuda.empty([tokens, pairs])
    cuda.library("rope").call(
        *("ernie45_cuda_rope_angles", positions, 3 if three else 1, cuda.device(frequencies.numpy()), tokens, pairs),
        *(time_pairs, cos, sin),
    )
    of = paddle.to_tensor(positions.numpy()).unsqueeze(0)
    expected = reference.rope_angles(of, head_dim, 500000.0, time_pairs)
    for found, wanted in zip((cos, sin), expected, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted.numpy().reshape([tokens, pairs]), rtol=0, atol=3e-7)


@settings(max_examples=60)
@given(
    batch=st.sampled_from([0, 1, 2]), length=st.sampled_from([1, 3]), heads=st.sampled_from([(1, 0), (4, 1), (20, 4)]),
    head_dim=st.sampled_from([2, 6, 16, 128]), dtype=DTYPES, shift=SHIFTS, special=SPECIAL, shared=st.booleans(),
    backward=st.booleans(), fused=st.booleans(), in_place=st.booleans(),
)  # fmt: skip
def test_rope(
    batch: int, length: int, heads: tuple[int, int], head_dim: int, dtype: str, shift: int, special: float | None,
    shared: bool, backward: bool, fused: bool, in_place: bool,
) -> None:  # fmt: skip
    """`shared`: one row of the batch has the angles of all; `fused`: q and k are parts of one projection, with v."""
    tokens = batch * length
    projection = with_special(random(tokens, (sum(heads) + heads[1]) * head_dim), special)
    whole = cuda.device(projection, dtype, shift)
    q_width, k_width = (of * head_dim for of in heads)
    angles = random(1 if shared else batch, length, 1, head_dim // 2, seed=1)
    cos, sin = cuda.device(np.cos(angles)), cuda.device(np.sin(angles))

    def part(start: int, width: int) -> tuple[cuda.Memory | int, int, np.ndarray]:
        """What to pass, the stride, and the values as the definition wants them."""
        values = whole.numpy()[:, start : start + width]
        split = values.reshape([batch, length, width // head_dim, head_dim])
        if fused:
            return whole.data_ptr() + start * (4 if dtype == "float32" else 2), projection.shape[1], split
        return cuda.device(values, dtype, shift), width, split

    (q, q_stride, q_values), (k, k_stride, k_values) = part(0, q_width), part(q_width, k_width)
    before = whole.numpy()
    outputs = [cuda.empty([tokens, width], dtype, shift) for width in (q_width, k_width)]
    to = (q, q_stride, k, k_stride) if in_place else (outputs[0], q_width, outputs[1], k_width)
    cuda.library("rope").call(
        *("ernie45_cuda_rope", q, q_stride, heads[0], k, k_stride, heads[1], cos, sin, tokens),
        *(length * (1 if shared else batch) if tokens else 0, head_dim, int(backward), whole.tag, *to),
    )
    sign = -1 if backward else 1
    expected = [
        reference.rope(*map(paddle.to_tensor, (x, cos.numpy(), sign * sin.numpy())))
        .numpy()
        .reshape([tokens, x.shape[2] * head_dim])
        for x in (q_values, k_values)
    ]
    if in_place and fused:
        assert_rounded(whole, np.concatenate([*expected, before[:, q_width + k_width :]], axis=1))
    else:
        for found, wanted in zip((q, k) if in_place else outputs, expected, strict=True):
            assert_rounded(found, wanted)
        np.testing.assert_array_equal(whole.numpy(), before)


def test_rope_turns_back() -> None:
    """The gradient of a rotation is the rotation back."""
    x = cuda.device(random(3, 2 * 8))
    angles = random(3, 4, seed=1)
    cos, sin = cuda.device(np.cos(angles)), cuda.device(np.sin(angles))
    before = x.numpy()
    for backward in (0, 1):
        cuda.library("rope").call(
            "ernie45_cuda_rope", x, 16, 2, None, 0, 0, cos, sin, 3, 3, 8, backward, x.tag, x, 16, None, 0
        )
        assert np.abs(x.numpy() - before).max() > 0.1 or backward
    np.testing.assert_allclose(x.numpy(), before, rtol=0, atol=1e-6)
