"""FP8 quantisation: the definition against a slow one in float64, and the fused operators against the definition."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45 import ops
from ernie45.errors import ErnieError
from ernie45.ops import custom
from ernie45.ops.fp8 import BLOCKS, DTYPES, SCALES
from tests.helpers.fused import both_instruction_sets, fused

IMPLEMENTATIONS = ["reference", "avx512", "avx2"]
NAN = 0x7F

QUANTIZERS = (ops.fp8_quantize, ops.fp8_quantize_transposed, ops.fp8_quantize_both)
# Not multiples of any vector length, one more and one less than a block, and nothing at all.
SIZES = st.one_of(st.sampled_from([0, 1, 127, 128, 129, 256]), st.integers(0, 300))


def e4m3_value(code: int) -> float:
    """What a code stands for: 1 bit of sign, 4 of exponent (bias 7), 3 of mantissa; all ones is NaN."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 15, code & 7
    if code & 0x7F == NAN:
        return math.nan
    return sign * (2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8)


VALUES = np.array([e4m3_value(code) for code in range(256)])


def slow_codes(values: np.ndarray) -> np.ndarray:
    """The nearest code of each value in float64: by distance, the even one of two that are equally near."""
    magnitudes = np.minimum(np.abs(values), 448.0)
    above = np.searchsorted(VALUES[:NAN], np.nan_to_num(magnitudes))
    below = np.maximum(above - 1, 0)
    to_above, to_below = VALUES[above] - magnitudes, magnitudes - VALUES[below]
    nearest = np.where((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)), above, below)
    return np.where(np.isnan(values), NAN, nearest + 128 * np.signbit(values)).astype(np.uint8)


def slow_scale(block: np.ndarray, scale: str) -> np.float32:
    """The scale of one block of float32 values."""
    largest = np.abs(block[np.isfinite(block)]).max(initial=0.0)
    if largest == 0:
        return np.float32(1)
    if scale == "float32":
        return max(np.float32(largest) / np.float32(448), np.float32(2.0**-126))
    return np.float32(2.0 ** next(power for power in range(-126, 128) if 448 * 2.0**power >= float(largest)))


def slow_quantize(x: np.ndarray, block: tuple[int, int], scale: str) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = -(-x.shape[0] // block[0]), -(-x.shape[1] // block[1])
    codes, scales = np.zeros(x.shape, np.uint8), np.zeros((rows, columns), np.float32)
    for row, column in np.ndindex(rows, columns):
        part = np.s_[row * block[0] : (row + 1) * block[0], column * block[1] : (column + 1) * block[1]]
        scales[row, column] = slow_scale(x[part], scale)
        with np.errstate(invalid="ignore", over="ignore"):
            codes[part] = slow_codes((x[part] * (np.float32(1) / scales[row, column])).astype(np.float64))
    return codes, scales


def using(implementation: str) -> contextlib.AbstractContextManager[None]:
    return custom.reference_only() if implementation == "reference" else fused(implementation)


def read(tensor: paddle.Tensor) -> np.ndarray:
    """Codes as uint8, with one code for NaN, which has two, and other tensors as float32."""
    if tensor.dtype != paddle.float8_e4m3fn:
        return tensor.astype("float32").numpy()
    codes = tensor.view("uint8").numpy()
    return np.where(codes & 0x7F == NAN, NAN, codes)


def numbers(rows: int, columns: int, seed: int, octaves: int, special: bool) -> np.ndarray:
    """Normal numbers spread over 2^-octaves .. 2^octaves, on demand with a row of zeros, infinities, NaN and -0."""
    rng = np.random.default_rng(seed)
    spread = np.exp2(rng.uniform(-octaves, octaves, (rows, columns)))
    values = (rng.standard_normal((rows, columns)) * spread).astype(np.float32)
    if special and values.size:
        values[rng.integers(rows)] = 0
        for value in (np.inf, -np.inf, np.nan, -0.0):
            values[rng.random((rows, columns)) < 0.01] = value
    return values


def steps(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """How many e4m3 values lie between two arrays of codes; NaN and a number are far apart."""
    ranks = [
        np.where(codes == NAN, 1000, np.where(codes & 0x80, -1, 1) * (codes & 0x7F).astype(int))
        for codes in (found, expected)
    ]
    return np.abs(ranks[0] - ranks[1])


# Codes.


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_code_is_decoded_and_found_again(implementation: str) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    with using(implementation):
        decoded = ops.fp8_dequantize(paddle.to_tensor(codes).view("float8_e4m3fn"), paddle.ones([2, 1]))
        found, scales = ops.fp8_quantize(decoded)
    np.testing.assert_array_equal(decoded.numpy(), VALUES.reshape(2, 128))
    np.testing.assert_array_equal(np.signbit(decoded.numpy()[:, :127]), [[False] * 127, [True] * 127])
    np.testing.assert_array_equal(scales.numpy(), 1)
    np.testing.assert_array_equal(read(found), np.where(codes == 255, NAN, codes))


def with_scale_one(values: np.ndarray) -> np.ndarray:
    """Values up to 448 as rows of 128 that start with 448, which makes the scale of each row 1."""
    rows = np.resize(values.astype(np.float32), (-(-len(values) // 127), 127))
    return np.concatenate([np.full((len(rows), 1), 448, np.float32), rows], axis=1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_every_bfloat16_is_rounded_to_the_nearest(implementation: str, scale: str) -> None:
    values = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    x = with_scale_one(values[~(np.isfinite(values) & (np.abs(values) > 448))])
    with using(implementation):
        found, scales = ops.fp8_quantize(paddle.to_tensor(x).astype("bfloat16"), scale=scale)
    np.testing.assert_array_equal(scales.numpy(), 1)
    with np.errstate(invalid="ignore"):  # signalling NaN
        np.testing.assert_array_equal(read(found), slow_codes(x.astype(np.float64)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_borders_and_random_float32_are_rounded_to_the_nearest(implementation: str) -> None:
    middles = ((VALUES[:126] + VALUES[1:127]) / 2).astype(np.float32)
    borders = np.concatenate([middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(999))])
    rng = np.random.default_rng(0)
    spread = rng.uniform(1, 2, 20000) * np.exp2(rng.integers(-149, 8, 20000))
    x = with_scale_one(np.concatenate([borders, -borders, spread, -spread]))
    with using(implementation):
        found = ops.fp8_quantize(paddle.to_tensor(x))[0]
    np.testing.assert_array_equal(read(found), slow_codes(x.astype(np.float64)))


# Scales.


@settings(max_examples=40)
@given(
    rows=st.integers(0, 140),
    columns=st.integers(0, 140),
    seed=st.integers(0, 2**32),
    octaves=st.sampled_from([0, 6, 100]),
    special=st.booleans(),
    block=st.sampled_from(BLOCKS),
    scale=st.sampled_from(SCALES),
)
def test_definition(
    rows: int, columns: int, seed: int, octaves: int, special: bool, block: tuple[int, int], scale: str
) -> None:
    x = numbers(rows, columns, seed, octaves, special)
    expected_codes, expected_scales = slow_quantize(x, block, scale)
    with custom.reference_only():
        codes, scales = ops.fp8_quantize(paddle.to_tensor(x), block, scale)
        back = ops.fp8_dequantize(codes, scales, block)
    np.testing.assert_array_equal(scales.numpy(), expected_scales)
    np.testing.assert_array_equal(read(codes), expected_codes)
    spread = np.repeat(np.repeat(expected_scales, block[0], 0)[:rows], block[1], 1)[:, :columns]
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(back.numpy(), (VALUES[expected_codes] * spread).astype(np.float32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("scale", SCALES)
def test_scales_use_the_whole_range(implementation: str, block: tuple[int, int], scale: str) -> None:
    x = numbers(256, 200, seed=1, octaves=8, special=False)
    with using(implementation):
        codes, scales = ops.fp8_quantize(paddle.to_tensor(x), block, scale)
        back = ops.fp8_dequantize(codes, scales, block).numpy()
    padded = np.pad(np.abs(x), ((0, 0), (0, 56))).reshape(256 // block[0], block[0], 2, 128)
    share = padded.max(axis=(1, 3)).astype(np.float64) / scales.numpy()
    if scale == "float32":
        np.testing.assert_allclose(share, 448, rtol=1e-6)
        assert ((read(codes) & 0x7F) == 0x7E).any(axis=1).sum() >= len(scales)
    else:
        np.testing.assert_array_equal(np.frexp(scales.numpy())[0], 0.5)
        assert ((share > 224) & (share <= 448)).all()
    # Half a unit in the last place of 3 bits of mantissa, or of the subnormals.
    spacing = np.repeat(np.repeat(scales.numpy(), block[0], 0), 128, 1)[:, :200] * 2.0**-10
    assert (np.abs(back - x) <= np.maximum(np.abs(x) * (2.0**-4 + 1e-6), spacing)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("scale", "largest", "expected"),
    [
        *[(scale, 0.0, 1.0) for scale in SCALES],
        *[(scale, tiny, 2.0**-126) for scale in SCALES for tiny in (2.0**-132, 2.0**-126, 2.0**-120)],
        ("float32", 448.0, 1.0),
        ("float32", 2.0**127, 2.0**127 / 448),
        ("power_of_two", 448.0, 1.0),
        ("power_of_two", 450.0, 2.0),
        ("power_of_two", 224.0, 0.5),
        ("power_of_two", 1.75 * 2.0**-118, 2.0**-126),
        ("power_of_two", 1.75 * 2.0**-117, 2.0**-125),
        ("power_of_two", 1.5 * 2.0**127, 2.0**119),
        ("power_of_two", 1.9375 * 2.0**127, 2.0**120),
    ],
)
def test_scale_of_a_block(implementation: str, dtype: str, scale: str, largest: float, expected: float) -> None:
    x = np.zeros((2, 130), np.float32)
    x[1, 3] = -largest
    x[1, 4] = largest / 2
    with using(implementation):
        codes, scales = ops.fp8_quantize(paddle.to_tensor(x).astype(dtype), scale=scale)
    np.testing.assert_array_equal(scales.numpy(), np.array([[1, 1], [expected, 1]], np.float32))
    assert not read(codes)[0].any()
    expected_codes = slow_codes(x[1, 3:5] / scales.numpy()[1, 0].astype(np.float64))
    np.testing.assert_array_equal(read(codes)[1, 3:5], expected_codes)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_infinities_saturate_and_nan_stays_and_neither_changes_the_rest(implementation: str, scale: str) -> None:
    x = numbers(3, 128, seed=2, octaves=2, special=False)
    x[0, :3] = x[1, :3] = 0
    x[1, :3] = np.inf, -np.inf, np.nan
    x[2] = np.inf
    with using(implementation):
        codes, scales = ops.fp8_quantize(paddle.to_tensor(x), scale=scale)
    found = read(codes)
    np.testing.assert_array_equal(found[1, :3], [0x7E, 0xFE, NAN])
    np.testing.assert_array_equal(found[1, 3:], slow_codes(x[1:2, 3:] * (1 / scales.numpy()[1, 0]))[0])
    assert scales.numpy()[1, 0] == slow_scale(x[1], scale)
    assert scales.numpy()[2, 0] == 1
    np.testing.assert_array_equal(found[2], 0x7E)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_that_is_nan_or_infinite_is_seen(implementation: str, dtype: str) -> None:
    all_bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800000], np.uint32).view(np.float32)
    codes = ops.fp8_quantize(paddle.ones([4, 20]))[0]
    with using(implementation):
        found = ops.fp8_dequantize(codes, paddle.to_tensor(all_bits[:, None]), dtype=dtype).astype("float32").numpy()
    assert np.isnan(found[:3]).all()
    assert np.isposinf(found[3]).all()


# The other orientation.


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 300), (129, 140), (256, 128), (7, 0), (0, 7)])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("scale", SCALES)
def test_orientations(implementation: str, shape: tuple[int, int], block: tuple[int, int], scale: str) -> None:
    values = numbers(*shape, seed=3, octaves=3, special=True)
    x, turned = paddle.to_tensor(values), paddle.to_tensor(np.ascontiguousarray(values.T))
    with using(implementation):
        straight = [read(tensor) for tensor in ops.fp8_quantize(x, block, scale)]
        transposed = [read(tensor) for tensor in ops.fp8_quantize_transposed(x, block, scale)]
        both = [read(tensor) for tensor in ops.fp8_quantize_both(x, block, scale)]
        expected = [read(tensor) for tensor in ops.fp8_quantize(turned, block, scale)]
    for one, other in zip([*straight, *transposed], both, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(transposed, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    if block == (128, 128):
        for one, other in zip(straight, transposed, strict=True):
            np.testing.assert_array_equal(one.T, other)


# Fused operators.


@both_instruction_sets
@settings(max_examples=60)
@given(
    rows=SIZES,
    columns=SIZES,
    seed=st.integers(0, 2**32),
    octaves=st.sampled_from([0, 6, 120]),
    special=st.booleans(),
    strided=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from(BLOCKS),
    scale=st.sampled_from(SCALES),
    quantize=st.sampled_from(QUANTIZERS),
    threads=st.sampled_from([1, 2, 7]),
)
def test_fused_quantisation_is_the_definition(
    isa: str,
    rows: int,
    columns: int,
    seed: int,
    octaves: int,
    special: bool,
    strided: bool,
    dtype: str,
    block: tuple[int, int],
    scale: str,
    quantize: Callable[..., tuple[paddle.Tensor, ...]],
    threads: int,
) -> None:
    values = numbers(rows, columns, seed, octaves, special)
    x = paddle.to_tensor(values.T.copy() if strided else values).astype(dtype)
    x = x.transpose([1, 0]) if strided else x
    with custom.reference_only():
        expected = quantize(x, block, scale)
        matrices = [ops.fp8_dequantize(*expected[at : at + 2], block, dtype) for at in range(0, len(expected), 2)]
    with fused(isa, quantize.__name__, "fp8_dequantize", threads=threads):
        found = quantize(x, block, scale)
        back = [ops.fp8_dequantize(*expected[at : at + 2], block, dtype) for at in range(0, len(expected), 2)]
    for one, other in zip([*found, *back], [*expected, *matrices], strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(read(one), read(other))


@both_instruction_sets
@settings(max_examples=40)
@given(
    rows=SIZES,
    width=SIZES,
    seed=st.integers(0, 2**32),
    octaves=st.sampled_from([0, 4]),
    special=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from(SCALES),
    weighted=st.booleans(),
    threads=st.sampled_from([1, 2, 7]),
)
def test_fused_swiglu_is_the_definition(
    isa: str,
    rows: int,
    width: int,
    seed: int,
    octaves: int,
    special: bool,
    dtype: str,
    scale: str,
    weighted: bool,
    threads: int,
) -> None:
    x = paddle.to_tensor(numbers(rows, 2 * width, seed, octaves, special)).astype(dtype)
    prob = paddle.to_tensor(numbers(1, rows, seed + 1, 0, special)[0]) if weighted else None
    with custom.reference_only():
        expected_codes, expected_scales = ops.swiglu_fp8_quantize(x, prob, scale)
    with fused(isa, "swiglu_fp8_quantize", threads=threads):
        codes, scales = ops.swiglu_fp8_quantize(x, prob, scale)
    np.testing.assert_allclose(scales.numpy(), expected_scales.numpy(), rtol=1e-6)
    # An exponential that differs in its last bit moves a value over a border between codes once in a long while.
    apart = steps(read(codes), read(expected_codes))
    assert apart.max(initial=0) <= 1
    assert apart.sum() <= max(1, 1e-3 * apart.size)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_in_float64(implementation: str, dtype: str) -> None:
    x, prob = paddle.to_tensor(numbers(5, 520, 4, 2, False)).astype(dtype), numbers(1, 5, 5, 0, False)[0]
    with using(implementation):
        found = ops.fp8_dequantize(*ops.swiglu_fp8_quantize(x, paddle.to_tensor(prob)))
    gate, up = np.split(x.astype("float32").numpy().astype(np.float64), 2, axis=1)
    expected = gate / (1 + np.exp(-gate)) * up * prob[:, None]
    largest = np.abs(np.pad(expected, ((0, 0), (0, 124))).reshape(5, 3, 128)).max(axis=2).repeat(128, 1)[:, :260]
    assert (np.abs(found.numpy() - expected) <= np.maximum(np.abs(expected) * 0.0626, largest / 448 * 2.0**-9)).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_weights_of_experts_are_stacked(implementation: str, scale: str) -> None:
    weights = [paddle.to_tensor(numbers(130, 140, seed, 3, False).astype("float32")) for seed in range(3)]
    with using(implementation):
        found = ops.fp8_quantize_stack([weights[0], paddle.stack(weights[1:])], scale)
        each = [ops.fp8_quantize_both(weight, (128, 128), scale) for weight in weights]
    for ours, theirs in zip(found, zip(*each, strict=True), strict=True):
        expected = np.stack([part.view("uint8").numpy() for part in theirs])
        np.testing.assert_array_equal(ours.view("uint8").numpy(), expected)


@pytest.mark.parametrize("with_prob", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_way_back_through_swiglu_is_its_gradient(dtype: str, with_prob: bool) -> None:
    """Against automatic differentiation of the definition, in float32."""
    paddle.seed(3)
    x, grad, prob = paddle.randn([5, 512]).astype(dtype), paddle.randn([5, 256]).astype(dtype), paddle.rand([5])
    inputs = [x.astype("float32"), prob if with_prob else paddle.ones([5])]
    for tensor in inputs:
        tensor.stop_gradient = False
    out = ops.swiglu(*inputs)
    out.backward(grad.astype("float32"))
    found = ops.swiglu_fp8_quantize_backward(x, grad, prob if with_prob else None)
    half = 2.0**-8 if dtype == "bfloat16" else 0
    for ours, theirs in ((found.x, inputs[0].grad), (found.prob, inputs[1].grad), (found.out, out)):
        np.testing.assert_allclose(ours.astype("float32").numpy(), theirs.numpy(), rtol=half + 1e-5, atol=1e-5)
    assert found.x.dtype == found.out.dtype == x.dtype and found.prob.dtype == paddle.float32
    for ours, theirs in zip(found[3:], ops.fp8_quantize(found.x), strict=True):
        np.testing.assert_array_equal(ours.view("uint8").numpy(), theirs.view("uint8").numpy())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_gradient(implementation: str) -> None:
    x = paddle.ones([2, 4])
    x.stop_gradient = False
    with using(implementation):
        outputs = [*ops.fp8_quantize_both(x), *ops.swiglu_fp8_quantize(x)]
        assert all(output.stop_gradient for output in [*outputs, ops.fp8_dequantize(*outputs[:2])])


# Wrong input.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.fp8_quantize(x[0]), r"fp8_quantize: x has shape \[4\], expected \[rows, columns\]"),
        (lambda x: ops.fp8_quantize_both(x.astype("int32")), "fp8_quantize_both: x is int32, expected float32 or bf"),
        (lambda x: ops.fp8_quantize_transposed(x, (128, 1)), r"block is \(128, 1\), expected \(1, 128\) or \(128, 1"),
        (lambda x: ops.fp8_quantize(x, scale="ue8m0"), "scale is 'ue8m0', expected 'float32' or 'power_of_two'"),
        (lambda x: ops.swiglu_fp8_quantize(x[:, :3]), "swiglu_fp8_quantize: x has 3 columns, expected .* even"),
        (lambda x: ops.swiglu_fp8_quantize(x, x), r"prob has shape \[2, 4\], expected \[2\]"),
        (lambda x: ops.fp8_quantize_stack([]), "fp8_quantize_stack: found no weights"),
        (lambda x: ops.fp8_quantize_stack([x, x[:1]]), r"\[1, 4\], expected .* matrices \[2, 4\] or stacks of them"),
        (lambda x: ops.fp8_quantize_stack([x.astype("float16")]), "fp8_quantize_stack: x is float16"),
        (lambda x: ops.swiglu_fp8_quantize_backward(x, x), "x has 4 columns, expected .* a multiple of 256"),
        (
            lambda x: ops.swiglu_fp8_quantize_backward(x.tile([1, 64]), x),
            r"grad has shape \[2, 4\], expected \[2, 128\]",
        ),
        (
            lambda x: ops.swiglu_fp8_quantize_backward(x.tile([1, 64]), x.tile([1, 32]), x[0]),
            r"prob has shape \[4\], expected \[2\]",
        ),
        (
            lambda x: ops.swiglu_fp8_quantize_backward(x.tile([1, 64]), x.tile([1, 32]).astype("bfloat16")),
            "grad is paddle.bfloat16, expected paddle.float32 like x",
        ),
        (lambda x: ops.fp8_dequantize(x, x), "codes is float32, expected float8_e4m3fn"),
        (lambda x: ops.fp8_dequantize(*ops.fp8_quantize(x), dtype="float16"), "dtype is 'float16', expected 'float32'"),
        (
            lambda x: ops.fp8_dequantize(*ops.fp8_quantize(x), block=(128, 128)),
            r"scales has shape \[2, 1\], expected \[1, 1\] for codes of shape \[2, 4\] in blocks of 128 x 128",
        ),
    ],
)
def test_wrong_input(call: Callable[[paddle.Tensor], object], message: str) -> None:
    with pytest.raises(ErnieError, match=message):
        call(paddle.ones([2, 4]))


# Another implementation.


@pytest.mark.parity
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_codes_are_those_of_torch(implementation: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    values = rng.uniform(-448, 448, 50000) * np.exp2(-rng.uniform(0, 20, 50000))
    x = with_scale_one(np.concatenate([values, [np.nan, 0.0, -0.0]]))
    with using(implementation):
        codes, scales = ops.fp8_quantize(paddle.to_tensor(x))
        back = ops.fp8_dequantize(codes, scales)
    expected = torch.from_numpy(x).to(torch.float8_e4m3fn)
    expected_codes = expected.view(torch.uint8).numpy()
    np.testing.assert_array_equal(read(codes), np.where(expected_codes & 0x7F == NAN, NAN, expected_codes))
    np.testing.assert_array_equal(back.numpy(), expected.float().numpy())
