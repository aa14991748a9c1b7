"""The CUDA kernels of FP8 quantisation, emulated: the same codes and scales as the definitions, bit by bit."""

from __future__ import annotations

import ctypes

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.ops import fp8_reference, reference
from tests.helpers import cuda

NAN = 0x7F
DTYPES = st.sampled_from(["float32", "bfloat16"])
# Around vectors of 4, 8 and 16, around a block, and several blocks; a tile takes long to emulate.
SIZES = st.one_of(st.sampled_from([0, 1, 16, 127, 128, 129, 136, 256]), st.integers(0, 270))
SHIFTS = st.sampled_from([0, 0, 0, 1])
SCALES = st.sampled_from(["float32", "power_of_two"])
SEEDS = st.integers(0, 2**32)


def numbers(rows: int, columns: int, seed: int, octaves: float = 3, special: bool = False) -> np.ndarray:
    """Normal numbers over 2^-octaves .. 2^octaves, on demand with a row and a column of zeros, infinities, NaN, -0."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, columns)) * np.exp2(rng.uniform(-octaves, octaves, (rows, columns)))
    values = values.astype(np.float32)
    if special and values.size:
        values[rng.integers(rows)] = 0
        values[:, rng.integers(columns)] = 0
        for value in (np.inf, -np.inf, np.nan, -0.0, 3e38, 1e-40):
            values[rng.random((rows, columns)) < 0.005] = value
    return values


def tensor(memory: cuda.Memory) -> paddle.Tensor:
    """The values of an input, as the definition takes them."""
    return paddle.to_tensor(memory.numpy()).astype(memory.dtype)


def codes_of(found: np.ndarray | paddle.Tensor) -> np.ndarray:
    """Codes as uint8, with one code for NaN, which has two."""
    codes = found if isinstance(found, np.ndarray) else found.view("uint8").numpy()
    return np.where(codes & 0x7F == NAN, NAN, codes)


def blocks(size: int) -> int:
    return -(-size // 128)


def outputs(rows: int, columns: int, square: bool, shift: int = 0) -> tuple[cuda.Memory, cuda.Memory]:
    scales = [blocks(rows) if square else rows, blocks(columns)]
    return cuda.empty([rows, columns], "float8_e4m3fn", shift), cuda.empty(scales)


def assert_quantised(
    found: tuple[cuda.Memory, cuda.Memory], x: paddle.Tensor, block: tuple[int, int], scale: str
) -> None:
    codes, scales = fp8_reference.quantize(x, block, scale)
    np.testing.assert_array_equal(found[1].numpy(), scales.numpy())
    np.testing.assert_array_equal(codes_of(found[0].numpy()), codes_of(codes))


@settings(max_examples=200)
@given(
    rows=SIZES,
    columns=SIZES,
    dtype=DTYPES,
    shift=SHIFTS,
    seed=SEEDS,
    octaves=st.sampled_from([0, 6, 120]),
    special=st.booleans(),
    scale=SCALES,
    square=st.booleans(),
    wanted=st.sampled_from(["straight", "transposed", "both"]),
)
def test_quantize(
    rows: int,
    columns: int,
    dtype: str,
    shift: int,
    seed: int,
    octaves: float,
    special: bool,
    scale: str,
    square: bool,
    wanted: str,
) -> None:
    x = cuda.device(numbers(rows, columns, seed, octaves, special), dtype, shift)
    straight = outputs(rows, columns, square, shift) if wanted != "transposed" else (None, None)
    transposed = outputs(columns, rows, square, shift) if wanted != "straight" else (None, None)
    arguments = (x, rows, columns, x.tag, square, scale == "power_of_two", *straight, *transposed)
    cuda.library("fp8").call("ernie45_cuda_fp8_quantize", *arguments)

    block = (128, 128) if square else (1, 128)
    if straight[0]:
        assert_quantised(straight, tensor(x), block, scale)
    if transposed[0]:
        assert_quantised(transposed, tensor(x).transpose([1, 0]), block, scale)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("square", [False, True])
def test_every_byte_of_a_tile_is_transposed_to_its_place(dtype: str, square: bool) -> None:
    """Tiles without two equal rows or columns, whose scale is 1 everywhere: a code tells where it comes from."""
    rng = np.random.default_rng(0)
    x = rng.integers(-15, 16, (256, 384)).astype(np.float32)
    places = np.arange(256)[:, None] % 128 == np.arange(384) % 128
    x[places] = 448  # in each row and column of a tile
    memory, transposed = cuda.device(x, dtype), outputs(384, 256, square)
    cuda.library("fp8").call(
        "ernie45_cuda_fp8_quantize", memory, 256, 384, memory.tag, square, False, None, None, *transposed
    )
    np.testing.assert_array_equal(transposed[1].numpy(), 1)
    values = paddle.to_tensor(transposed[0].numpy()).view("float8_e4m3fn").astype("float32").numpy()
    np.testing.assert_array_equal(values, x.T)


@settings(max_examples=12)
@given(
    count=st.sampled_from([1, 2, 3]),
    rows=SIZES,
    columns=SIZES,
    dtype=DTYPES,
    shift=SHIFTS,
    seed=SEEDS,
    scale=SCALES,
    straight=st.booleans(),
)
def test_quantize_stack(
    count: int, rows: int, columns: int, dtype: str, shift: int, seed: int, scale: str, straight: bool
) -> None:
    # Each at a place of its own in memory.
    matrices = [cuda.device(numbers(rows, columns, seed + i, special=True), dtype, shift) for i in range(count)]
    found = [(outputs_of_stack(count, *shape)) for shape in ([rows, columns], [columns, rows])]
    quantize_stack(matrices, rows, columns, scale, found[0] if straight else (None, None), found[1])
    for i, matrix in enumerate(matrices):
        for (codes, scales), x in zip(found, (tensor(matrix), tensor(matrix).transpose([1, 0])), strict=True):
            if codes is found[0][0] and not straight:
                continue
            expected_codes, expected_scales = fp8_reference.quantize(x, (128, 128), scale)
            np.testing.assert_array_equal(scales.numpy()[i], expected_scales.numpy())
            np.testing.assert_array_equal(codes_of(codes.numpy()[i]), codes_of(expected_codes))


def outputs_of_stack(count: int, rows: int, columns: int) -> tuple[cuda.Memory, cuda.Memory]:
    return cuda.empty([count, rows, columns], "float8_e4m3fn"), cuda.empty([count, blocks(rows), blocks(columns)])


def quantize_stack(
    matrices: list[cuda.Memory],
    rows: int,
    columns: int,
    scale: str,
    straight: tuple[cuda.Memory | None, cuda.Memory | None],
    transposed: tuple[cuda.Memory | None, cuda.Memory | None],
) -> None:
    pointers = (ctypes.c_void_p * len(matrices))(*[matrix.data_ptr() for matrix in matrices])
    arguments = (ctypes.addressof(pointers), len(matrices), rows, columns, matrices[0].tag, scale == "power_of_two")
    cuda.library("fp8").call("ernie45_cuda_fp8_quantize_stack", *arguments, *straight, *transposed)


def test_more_matrices_than_a_launch_takes() -> None:
    matrices = [cuda.device(numbers(16, 8, seed), "bfloat16") for seed in range(70)]
    straight, transposed = outputs_of_stack(70, 16, 8), outputs_of_stack(70, 8, 16)
    quantize_stack(matrices, 16, 8, "float32", straight, transposed)
    for i in (0, 63, 64, 69):
        codes, scales = fp8_reference.quantize(tensor(matrices[i]), (128, 128), "float32")
        np.testing.assert_array_equal(straight[1].numpy()[i], scales.numpy())
        np.testing.assert_array_equal(straight[0].numpy()[i], codes_of(codes))
        np.testing.assert_array_equal(transposed[0].numpy()[i], codes_of(codes).T)


@settings(max_examples=40)
@given(rows=SIZES, columns=SIZES, dtype=DTYPES, shift=SHIFTS, seed=SEEDS, square=st.booleans())
def test_dequantize(rows: int, columns: int, dtype: str, shift: int, seed: int, square: bool) -> None:
    rng = np.random.default_rng(seed)
    block = (128, 128) if square else (1, 128)
    codes = cuda.device(rng.integers(0, 256, (rows, columns)).astype(np.uint8), "float8_e4m3fn", shift)
    scales = np.exp2(rng.uniform(-126, 126, fp8_reference.scales_shape([rows, columns], block))).astype(np.float32)
    if scales.size > 1:
        scales.flat[:2] = np.nan, np.inf
    out = cuda.empty([rows, columns], dtype, shift)
    cuda.library("fp8").call(
        "ernie45_cuda_fp8_dequantize", codes, cuda.device(scales), rows, columns, square, out.tag, out
    )
    as_codes = paddle.to_tensor(codes.numpy()).view("float8_e4m3fn")
    expected = fp8_reference.dequantize(as_codes, paddle.to_tensor(scales), block, dtype)
    np.testing.assert_array_equal(out.numpy(), expected.astype("float32").numpy())


# SwiGLU. An exponential that differs in its last bit moves a value over a border between codes once in a long while.


def steps(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """How many e4m3 values lie between two arrays of codes; NaN and a number are far apart."""
    ranks = [
        np.where(codes == NAN, 1000, np.where(codes & 0x80, -1, 1) * (codes & 0x7F).astype(int))
        for codes in (found, expected)
    ]
    return np.abs(ranks[0] - ranks[1])


@settings(max_examples=60)
@given(
    rows=st.sampled_from([0, 1, 3, 40]),
    width=SIZES,
    dtype=DTYPES,
    shift=SHIFTS,
    seed=SEEDS,
    octaves=st.sampled_from([0, 4]),
    special=st.booleans(),
    scale=SCALES,
    weighted=st.booleans(),
)
def test_swiglu_quantize(
    rows: int,
    width: int,
    dtype: str,
    shift: int,
    seed: int,
    octaves: float,
    special: bool,
    scale: str,
    weighted: bool,
) -> None:
    values = numbers(rows, 2 * width, seed, octaves, special)
    # Where gate * up overflows, the order of the factors decides what the product is.
    values = np.where(np.isfinite(values), np.clip(values, -1e15, 1e15), values)
    x = cuda.device(values, dtype, shift)
    prob = cuda.device(np.random.default_rng(seed + 1).standard_normal(rows, np.float32)) if weighted else None
    codes, scales = outputs(rows, width, False, shift)
    arguments = (x, prob, rows, width, x.tag, scale == "power_of_two", codes, scales)
    cuda.library("fp8_swiglu").call("ernie45_cuda_swiglu_fp8_quantize", *arguments)

    factors = paddle.to_tensor(prob.numpy()) if prob else None
    expected_codes, expected_scales = fp8_reference.swiglu_quantize(tensor(x), factors, scale)
    np.testing.assert_allclose(scales.numpy(), expected_scales.numpy(), rtol=1e-6)
    apart = steps(codes_of(codes.numpy()), codes_of(expected_codes))
    assert apart.max(initial=0) <= 1
    assert apart.sum() <= max(1, 1e-3 * apart.size)


@settings(max_examples=40)
@given(
    rows=st.sampled_from([0, 1, 3]),
    width=st.one_of(SIZES, st.sampled_from([128, 384, 2304])),
    dtype=DTYPES,
    shift=SHIFTS,
    seed=SEEDS,
    scale=SCALES,
    weighted=st.booleans(),
    everything=st.booleans(),
)
def test_swiglu_quantize_backward(
    rows: int, width: int, dtype: str, shift: int, seed: int, scale: str, weighted: bool, everything: bool
) -> None:
    x = cuda.device(numbers(rows, 2 * width, seed, 2), dtype, shift)
    grad = cuda.device(numbers(rows, width, seed + 1, 2), dtype, shift)
    prob = cuda.device(numbers(1, rows, seed + 2, 0)[0]) if weighted else None
    grad_x = cuda.empty([rows, 2 * width], dtype, shift)
    codes, scales = (None, None)
    if width % 128 == 0:
        codes, scales = outputs(rows, 2 * width, False, shift)
    grad_prob, out = (cuda.empty([rows]), cuda.empty([rows, width], dtype, shift)) if everything else (None, None)
    arguments = (x, prob, grad, rows, width, x.tag, scale == "power_of_two", grad_x, codes, scales, grad_prob, out)
    cuda.library("fp8_swiglu").call("ernie45_cuda_swiglu_fp8_quantize_backward", *arguments)

    expected_x, expected_prob, expected_out = gradients(x, prob, grad)
    half = 2.0**-8 if dtype == "bfloat16" else 0
    np.testing.assert_allclose(grad_x.numpy(), expected_x, rtol=half + 1e-5, atol=1e-5)
    if codes:
        assert_quantised((codes, scales), tensor(grad_x), (1, 128), scale)
    if everything:
        np.testing.assert_allclose(out.numpy(), expected_out, rtol=half + 1e-5, atol=1e-6)
        np.testing.assert_allclose(grad_prob.numpy(), expected_prob, rtol=1e-4, atol=1e-3)


def gradients(x: cuda.Memory, prob: cuda.Memory | None, grad: cuda.Memory) -> tuple[np.ndarray, ...]:
    """Of x and prob, and the output, by the definition in float32."""
    source, factors = paddle.to_tensor(x.numpy()), paddle.ones([x.shape[0]])
    if prob:
        factors = paddle.to_tensor(prob.numpy())
    source.stop_gradient = factors.stop_gradient = False
    if source.numel() == 0:
        return np.zeros(x.shape), np.zeros(x.shape[0]), np.zeros(grad.shape)
    out = reference.swiglu(source, factors)
    out.backward(paddle.to_tensor(grad.numpy()))
    return source.grad.numpy(), factors.grad.numpy(), out.numpy()


def test_gradients_may_come_as_codes_alone() -> None:
    x, grad = cuda.device(numbers(2, 512, 0), "bfloat16"), cuda.device(numbers(2, 256, 1), "bfloat16")
    grad_x, codes, scales = cuda.empty([2, 512], "bfloat16"), *outputs(2, 512, False)
    call = cuda.library("fp8_swiglu").call
    name = "ernie45_cuda_swiglu_fp8_quantize_backward"
    call(name, x, None, grad, 2, 256, x.tag, False, grad_x, None, None, None, None)
    call(name, x, None, grad, 2, 256, x.tag, False, None, codes, scales, None, None)
    assert_quantised((codes, scales), tensor(grad_x), (1, 128), "float32")


# Wrong input.


@pytest.mark.parametrize(
    ("file", "name", "arguments"),
    [
        ("fp8", "ernie45_cuda_fp8_quantize", (None, -1, 8, 0, False, False, None, None, None, None)),
        ("fp8", "ernie45_cuda_fp8_quantize", (None, 2**31, 8, 0, False, False, None, None, None, None)),
        ("fp8", "ernie45_cuda_fp8_quantize", (None, 8, 8, 1, False, False, 64, 64, None, None)),
        ("fp8", "ernie45_cuda_fp8_quantize_stack", (None, -1, 8, 8, 0, False, None, None, None, None)),
        ("fp8", "ernie45_cuda_fp8_dequantize", (None, None, 8, 8, False, 3, None)),
        ("fp8_swiglu", "ernie45_cuda_swiglu_fp8_quantize", (None, None, 8, -8, 0, False, None, None)),
        (
            "fp8_swiglu",
            "ernie45_cuda_swiglu_fp8_quantize_backward",
            (None, None, None, 8, 100, 0, False, None, 64, 64, None, None),
        ),
    ],
)
def test_sizes_and_types_that_are_not_taken(file: str, name: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises(cuda.CudaError) as error:
        cuda.library(file).call(name, *arguments)
    assert error.value.code == 1
