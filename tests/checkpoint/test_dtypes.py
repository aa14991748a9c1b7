"""Element types: the table, and bit-exact conversion between the float types."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.checkpoint import dtypes
from ernie45.checkpoint.dtypes import DTYPES, convert, dtype_from_framework_name
from ernie45.errors import CheckpointError

ALL_BITS = np.arange(65536, dtype=np.uint32).astype(np.uint16)


def bfloat16_value(bits: int) -> float:
    """The number that 16 bits stand for: sign, 8 bits of exponent, 7 of fraction."""
    sign = -1.0 if bits >> 15 else 1.0
    exponent, fraction = (bits >> 7) & 0xFF, bits & 0x7F
    if exponent == 0xFF:
        return math.nan if fraction else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(fraction, -133)
    return sign * math.ldexp(128 + fraction, exponent - 134)


def nearest_bfloat16(value: float) -> int:
    """Bits of the bfloat16 nearest to a finite value, ties to the even pattern, by exact arithmetic."""
    sign = 0x8000 if math.copysign(1.0, value) < 0 else 0
    magnitude = Fraction(abs(value))
    low, high = 0, 0x7F80  # patterns of non-negative numbers are in the order of their values
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if Fraction(bfloat16_value(middle)) <= magnitude else (low, middle)
    upper = Fraction(2) ** 128 if high == 0x7F80 else Fraction(bfloat16_value(high))
    below, above = magnitude - Fraction(bfloat16_value(low)), upper - magnitude
    if below == above:
        return sign | (low if low % 2 == 0 else high)
    return sign | (low if below < above else high)


@pytest.mark.parametrize("target", ["F32", "F64"])
def test_every_bfloat16_pattern_widens_to_its_value(target: str) -> None:
    widened = convert(ALL_BITS, "BF16", target)
    expected = np.array([bfloat16_value(int(bits)) for bits in ALL_BITS])
    np.testing.assert_array_equal(widened, expected.astype(widened.dtype))
    np.testing.assert_array_equal(np.signbit(widened), ALL_BITS >= 0x8000)


@pytest.mark.parametrize("between", ["F32", "F64"])
def test_every_bfloat16_pattern_survives_a_round_trip(between: str) -> None:
    back = convert(convert(ALL_BITS, "BF16", between), between, "BF16")
    nan = np.isnan(convert(ALL_BITS, "BF16", "F32"))
    np.testing.assert_array_equal(back[~nan], ALL_BITS[~nan])
    assert np.isnan(convert(back, "BF16", "F32"))[nan].all()


@settings(deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_float32_rounds_to_nearest_even(value: float) -> None:
    assert int(convert(np.float32([value]), "F32", "BF16")[0]) == nearest_bfloat16(value)


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_float64_rounds_once(value: float) -> None:
    assert int(convert(np.float64([value]), "F64", "BF16")[0]) == nearest_bfloat16(value)


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("pattern", [0x3F80, 0x3F81, 0x0000, 0x0001, 0x7F7F, 0xBF80, 0xFF7F])
def test_ties_and_their_neighbours(pattern: int, dtype: str) -> None:
    tie = (np.uint32([pattern]) << 16 | 0x8000).view(np.float32).astype(DTYPES[dtype].storage)
    for value in (tie, np.nextafter(tie, np.inf, dtype=tie.dtype), np.nextafter(tie, -np.inf, dtype=tie.dtype)):
        assert int(convert(value, dtype, "BF16")[0]) == nearest_bfloat16(float(value[0]))


@pytest.mark.parametrize("bits", [0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000])
def test_nan_stays_nan(bits: int) -> None:
    narrowed = convert(np.uint32([bits]).view(np.float32), "F32", "BF16")
    assert math.isnan(bfloat16_value(int(narrowed[0])))


def test_infinities_and_overflow() -> None:
    infinities = np.float32([np.inf, -np.inf])
    assert convert(infinities, "F32", "BF16").tolist() == [0x7F80, 0xFF80]
    assert convert(infinities, "F32", "F16").tolist() == [math.inf, -math.inf]
    assert convert(np.float32([1e6]), "F32", "F16").tolist() == [math.inf]
    assert convert(np.float64([1e300, -1e300]), "F64", "BF16").tolist() == [0x7F80, 0xFF80]


@pytest.mark.parity
@pytest.mark.parametrize(
    ("source", "target"),
    # PyTorch takes F64 to BF16 through F32, rounding twice
    [pair for pair in itertools.product(dtypes.FLOAT_DTYPES, repeat=2) if pair != ("F64", "BF16")],
)
def test_agrees_with_torch(source: str, target: str) -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal(5000) * np.logspace(-45, 38, 5000)
    ours = convert(values, "F64", source)
    names = [getattr(torch, DTYPES[dtype].framework_name) for dtype in (source, target)]
    bits = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
    source_bits, target_bits = (bits[DTYPES[dtype].item_size] for dtype in (source, target))
    theirs = torch.from_numpy(ours.view(source_bits)).view(names[0]).to(names[1])
    theirs_bits = theirs.view(getattr(torch, target_bits.__name__)).numpy()
    np.testing.assert_array_equal(convert(ours, source, target).view(target_bits), theirs_bits)


def test_shape_is_kept_across_chunks_and_for_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "_CHUNK_ELEMENTS", 7)
    values = np.arange(30, dtype=np.float32).reshape(5, 6).T
    narrowed = convert(values, "F32", "BF16")
    assert narrowed.shape == (6, 5) and narrowed.dtype == np.uint16
    np.testing.assert_array_equal(convert(narrowed, "BF16", "F32"), values)
    assert convert(np.float32(2.0).reshape(()), "F32", "BF16").shape == ()
    assert convert(np.empty((0, 3), np.float32), "F32", "BF16").shape == (0, 3)


def test_equal_types_give_the_array_itself() -> None:
    assert convert(ALL_BITS, "BF16", "BF16") is ALL_BITS
    counters = np.arange(3)
    assert convert(counters, "I64", "I64") is counters


@pytest.mark.parametrize(
    ("array", "source", "target"),
    [
        (np.zeros(2, np.int64), "I64", "F32"),
        (np.zeros(2, np.float32), "F32", "U8"),
        (np.zeros(2, np.float32), "BF16", "F32"),
        (np.zeros(2, np.float32), "bfloat16", "F32"),
        (np.zeros(2, np.float32), "nothing", "nothing"),
    ],
)
def test_refuses_what_it_cannot_convert(array: np.ndarray, source: str, target: str) -> None:
    with pytest.raises(CheckpointError, match="cannot convert"):
        convert(array, source, target)


def test_framework_names() -> None:
    assert dtype_from_framework_name("bfloat16") == "BF16"
    assert all(dtype_from_framework_name(info.framework_name) == name for name, info in DTYPES.items())
    with pytest.raises(CheckpointError, match="unknown dtype 'bf16'"):
        dtype_from_framework_name("bf16")
