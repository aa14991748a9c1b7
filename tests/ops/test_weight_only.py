"""The layout of weights for Paddle's `weight_only_linear`, against the arithmetic of the header that Paddle ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie45 import ops
from ernie45.checkpoint.dtypes import convert
from ernie45.errors import ErnieError
from ernie45.ops import weight_only
from ernie45.ops.weight_only import WeightOnly
from ernie45.quantization.weights import Quantised, dequantize
from tests.helpers import packed

HEADER = Path(paddle.__file__).parent / "include/paddle/phi/kernels/impl/weight_quantize_kernel_gpu_impl.h"


def codes_of(rows: int, outputs: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(-128, 128, (rows, outputs)).astype(np.int8)


def permuted8(codes: np.ndarray) -> np.ndarray:
    """`weight_permute_kernel_wint8`, index by index."""
    total_k, total_n = codes.shape
    places = [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]
    out = np.zeros(codes.size, np.uint8)
    for k, n in np.ndindex(*codes.shape):
        kk = places[k % 16] + k // 16 * 16
        out[kk % 64 + kk // 64 * 128 + 64 * (n % 2) + total_k * 2 * (n // 2)] = int(codes[k, n]) + 128
    return out.view(np.int8).reshape(total_n, total_k)


def permuted4(codes: np.ndarray) -> np.ndarray:
    """`weight_permute_kernel_wint4` on bytes, then `weight_interval_kernel_wint4` on words."""
    total_k, total_n = 2 * len(codes), codes.shape[1]
    places = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]
    out = np.zeros(codes.size, np.uint8)
    for k, n in np.ndindex(*codes.shape):
        kk = places[k % 16] + k // 16 * 16
        out[kk % 32 + kk // 32 * 128 + 32 * (n % 4) + total_k * 2 * (n // 4)] = codes.view(np.uint8)[k, n]
    words = []
    for word in out.view(np.uint32).tolist():
        nibbles = [((word >> 4 * source & 0xF) + 8) & 0xF for source in (0, 2, 4, 6, 1, 3, 5, 7)]
        words.append(sum(nibble << 4 * place for place, nibble in enumerate(nibbles)))
    return np.array(words, np.uint32).view(np.int8).reshape(total_n // 2, total_k)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 16), (192, 48)])
def test_eight_bits_lie_as_in_paddles_header(inputs: int, outputs: int) -> None:
    codes = codes_of(inputs, outputs)
    np.testing.assert_array_equal(weight_only.arranged("wint8", codes), permuted8(codes))


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 16), (192, 48)])
def test_four_bits_lie_as_in_paddles_header(inputs: int, outputs: int) -> None:
    codes = codes_of(inputs // 2, outputs)
    np.testing.assert_array_equal(weight_only.arranged("wint4", codes), permuted4(codes))


def test_the_header_is_still_the_one_that_was_read() -> None:
    """Paddle 3.3. Another version may lay weights out in another way; then both have to be read again."""
    text = "".join(HEADER.read_text(encoding="utf-8").split())
    for expected in (
        "map[16]={0,2,4,6,8,10,12,14,1,3,5,7,9,11,13,15};",
        "permute_kk%64+permute_kk/64*128+64*(n_id%2)+total_k*2*(n_id/2);",
        "map[16]={0,4,8,12,1,5,9,13,2,6,10,14,3,7,11,15};",
        "permute_kk%32+permute_kk/32*128+32*(n_id%4)+total_k*2*(n_id/4);",
        "map[8]={0,2,4,6,1,3,5,7};",
    ):
        assert expected in text


@pytest.mark.parametrize("kind", ["wint8", "wint4"])
def test_the_product_is_given_what_was_published(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a product that undoes the layout by looking every code up."""
    inputs, outputs = 128, 32
    codes = codes_of(inputs if kind == "wint8" else inputs // 2, outputs)
    scales: np.ndarray = np.random.default_rng(1).uniform(0.5, 2, outputs if kind == "wint8" else (2, outputs))
    scales = convert(scales.astype(np.float32), "F32", "BF16")
    scales = convert(scales, "BF16", "F32") if kind == "wint8" else scales
    expected = dequantize(Quantised(kind, (inputs, outputs), codes, scales))
    given: dict[str, Any] = {}

    def weight_only_linear(x: paddle.Tensor, weight: paddle.Tensor, **options: Any) -> paddle.Tensor:
        given.update(options, codes=weight)
        return x

    monkeypatch.setattr(weight_only.quant, "weight_only_linear", weight_only_linear)
    monkeypatch.setattr(paddle.device, "cuda", type("Cuda", (), {"get_device_capability": lambda: (9, 0)}))
    weight = filled(kind, codes, scales)
    ops.linear(paddle.ones([1, inputs], "bfloat16"), weight)
    assert weight.shape == [inputs, outputs] and given["weight_scale"].dtype == paddle.bfloat16
    assert given["arch"] == 90
    assert (given["weight_dtype"], given["group_size"]) == (("int8", -1) if kind == "wint8" else ("int4", 64))
    assert list(given["codes"].shape) == ([outputs, inputs] if kind == "wint8" else [outputs // 2, inputs])
    wide = given["weight_scale"].astype("float32").numpy()
    found = looked_up(kind, given["codes"].numpy(), inputs, outputs) * (
        wide if kind == "wint8" else wide.repeat(64, axis=0)
    )
    np.testing.assert_array_equal(found, expected)


def looked_up(kind: str, codes: np.ndarray, inputs: int, outputs: int) -> np.ndarray:
    """The codes [in, out] as numbers, found by sending the number of each place through the layout."""
    if kind == "wint8":
        order = np.empty(inputs * outputs, np.int64)
        for bit in range(0, 24, 8):  # eight bits of each number at a time
            numbers = np.arange(inputs * outputs).reshape(inputs, outputs) >> bit
            part = weight_only.arranged(kind, numbers.astype(np.uint8).view(np.int8)).view(np.uint8) ^ 0x80
            order = part.reshape(-1).astype(np.int64) << bit | (order if bit else 0)
        flat = np.empty(inputs * outputs, np.int64)
        flat[order] = (codes.view(np.uint8).reshape(-1) ^ 0x80).view(np.int8)
        return flat.reshape(inputs, outputs)
    order = np.zeros(inputs * outputs, np.int64)
    for bit in range(0, 24, 4):
        numbers = (np.arange(inputs * outputs).reshape(inputs, outputs) >> bit & 0xF).astype(np.uint8)
        packed = (numbers[0::2] | numbers[1::2] << 4).view(np.int8)
        part = weight_only.arranged(kind, packed).view(np.uint8).reshape(-1)
        nibbles = np.stack([part & 0xF, part >> 4], axis=1).reshape(-1).astype(np.int64) ^ 8
        order |= nibbles << bit
    flat = np.empty(inputs * outputs, np.int64)
    bits = codes.view(np.uint8).reshape(-1)
    flat[order] = np.stack([bits & 0xF, bits >> 4], axis=1).reshape(-1).astype(np.int64) - 8
    return flat.reshape(inputs, outputs)


def filled(kind: str, codes: np.ndarray, scales: np.ndarray) -> WeightOnly:
    """The weight, written in two pieces."""
    inputs = len(codes) * (2 if kind == "wint4" else 1)
    weight = WeightOnly(kind, [inputs, codes.shape[1]])
    for first, last in ((len(codes) // 2, len(codes)), (0, len(codes) // 2)):
        weight.write(codes[first:last], first)
    weight.write_scales(scales)
    return weight


@pytest.mark.parametrize("kind", ["wint8", "wint4"])
def test_what_was_written_comes_back(kind: str) -> None:
    published = packed.published(kind, 192, 48)
    weight = filled(kind, published.codes, published.scales)
    np.testing.assert_array_equal(weight.codes(), published.codes)
    rounded = published.scales
    if kind == "wint8":  # scales are in the dtype of activations
        rounded = convert(convert(rounded, "F32", "BF16"), "BF16", "F32")
    np.testing.assert_array_equal(weight.scale_values(), rounded)
    assert weight.nbytes == published.codes.size + 2 * published.scales.size


@pytest.mark.parametrize(("capability", "arch"), [((8, 0), 80), ((8, 7), 86), ((9, 0), 90), ((12, 0), 100)])
def test_newer_gpus_run_the_newest_kernels(
    capability: tuple[int, int], arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    monkeypatch.setattr(weight_only.quant, "weight_only_linear", lambda x, *_, arch, **__: found.append(arch) or x)
    monkeypatch.setattr(paddle.device, "cuda", type("Cuda", (), {"get_device_capability": lambda: capability}))
    published = packed.published("wint8", 64, 16)
    x = paddle.ones([2, 64])
    assert filled("wint8", published.codes, published.scales).product(x).dtype == x.dtype and found == [arch]


def test_sizes_that_kernels_do_not_take() -> None:
    with pytest.raises(ErnieError, match=r"a weight of shape \[32, 16\], expected \[in, out\], multiples of 64 and 16"):
        WeightOnly("wint8", [32, 16])
    with pytest.raises(ErnieError, match=r"shape \[64, 20\]"):
        WeightOnly("wint4", [64, 20])
    with pytest.raises(ErnieError, match="found 'bfloat16' with 'bfloat16', expected 'wint8' or 'wint4' with"):
        WeightOnly("bfloat16", [64, 16])
    with pytest.raises(ErnieError, match=r"int8 \[3, 16\] from row 62 on do not fit into 64 rows of 16 \(wint8\)"):
        WeightOnly("wint8", [64, 16]).write(np.zeros((3, 16), np.int8), 62)
