"""Products of FP8 matrices: the definition, and what Paddle's own product is given in its place on a GPU."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import Tensor

from ernie45 import ops
from ernie45.errors import ErnieError
from ernie45.ops import fp8_matmul


def normal(*shape: int, seed: int = 0) -> Tensor:
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape).astype("float32"))


def operands(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor, np.ndarray]:
    """Both sides quantised, and their product in float64."""
    x, weight = normal(rows, inputs), normal(inputs, outputs, seed=1)
    codes, scales = ops.fp8_quantize(x)
    weight_codes, weight_scales = ops.fp8_quantize_transposed(weight, (128, 128))
    dense = ops.fp8_dequantize(codes, scales), ops.fp8_dequantize(weight_codes, weight_scales, (128, 128))
    product = dense[0].numpy().astype("float64") @ dense[1].numpy().astype("float64").T
    return codes, scales, weight_codes, weight_scales, product


def blockwise(**given: Any) -> Tensor:
    """What tests in Paddle's repository define its product as: a sum over blocks of 128, with the scales of each."""
    assert given["is_a_1d_scaled"] and not given["is_b_1d_scaled"]
    a, b = (given[name].astype("float32").numpy() for name in "ab")
    a_scales, b_scales = given["a_decode_scale"].numpy(), given["b_decode_scale"].numpy()
    (rows, inputs), outputs = a.shape, len(b)
    assert a_scales.shape == (inputs // 128, rows) and b_scales.shape == (outputs // 128, inputs // 128)
    assert rows % 16 == 0
    out = np.zeros((rows, outputs))
    for k in range(inputs // 128):
        block = slice(128 * k, 128 * (k + 1))
        out += a[:, block] @ b[:, block].T * a_scales[k][:, None] * b_scales[:, k].repeat(128)
    return paddle.to_tensor(out).astype(given["out_dtype"])


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A Hopper GPU whose product is written down."""
    made: list[dict[str, Any]] = []

    class Cuda:
        capability = (9, 0)

        def get_device_capability(self) -> tuple[int, int]:
            return self.capability

    def product(**given: Any) -> Tensor:
        made.append(given)
        return blockwise(**given)

    monkeypatch.delenv("ERNIE45_OPS", raising=False)
    monkeypatch.setattr(fp8_matmul, "gpu", types.SimpleNamespace(on_gpu=lambda x: True))
    monkeypatch.setattr(paddle.device, "cuda", Cuda())
    monkeypatch.setattr(paddle.version, "cuda", lambda: "12.9")
    monkeypatch.setattr(fp8_matmul.fused, "fp8_gemm_blockwise", product)
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(3, 256, 128), (5, 100, 200)])
def test_the_definition(rows: int, inputs: int, outputs: int, dtype: str) -> None:
    *given, expected = operands(rows, inputs, outputs)
    found = fp8_matmul.fp8_linear(*given, dtype=dtype)
    assert found.dtype == getattr(paddle, dtype) and found.shape == [rows, outputs]
    tolerance = 1e-5 if dtype == "float32" else 2.0**-8
    np.testing.assert_allclose(found.astype("float32").numpy(), expected, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 16, 37])
def test_paddles_product_gets_scales_as_it_wants_them(rows: int, hopper: list[dict[str, Any]]) -> None:
    *given, expected = operands(rows, 384, 256)
    found = fp8_matmul.fp8_linear(*given, dtype="float32")
    assert len(hopper) == 1 and found.shape == [rows, 256]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("missing", ["blocks", "gpu", "cuda", "operator"])
def test_the_definition_stands_in_for_it(
    missing: str, hopper: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "gpu":
        monkeypatch.setattr(type(paddle.device.cuda), "capability", (8, 9))
    if missing == "cuda":
        monkeypatch.setattr(paddle.version, "cuda", lambda: "12.6")
    if missing == "operator":
        monkeypatch.delattr(fp8_matmul.fused, "fp8_gemm_blockwise")
    *given, expected = operands(4, 256, 200 if missing == "blocks" else 256)
    found = fp8_matmul.fp8_linear(*given, dtype="float32")
    assert not hopper
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 7, 0], [0, 0, 0]])
@pytest.mark.parametrize("on_hopper", [False, True])
def test_rows_meet_the_weights_of_their_experts(
    counts: list[int], on_hopper: bool, request: pytest.FixtureRequest
) -> None:
    rows, weights = sum(counts), normal(3, 256, 128, seed=2)
    codes, scales = ops.fp8_quantize(normal(rows, 256))
    pairs = [ops.fp8_quantize_transposed(weight, (128, 128)) for weight in weights]
    weight_codes = paddle.stack([pair[0].view("uint8") for pair in pairs]).view("float8_e4m3fn")
    weight_scales = paddle.stack([pair[1] for pair in pairs])
    made = request.getfixturevalue("hopper") if on_hopper else []
    found = fp8_matmul.fp8_expert_linear(codes, scales, paddle.to_tensor(counts), weight_codes, weight_scales)
    assert found.shape == [rows, 128] and found.dtype == paddle.bfloat16
    assert len(made) == (sum(count > 0 for count in counts) if on_hopper else 0)
    x = codes.astype("float32").numpy() * scales.numpy().repeat(128, axis=1)
    dense = [ops.fp8_dequantize(*pair, (128, 128)).numpy() for pair in pairs]
    for row, expert in enumerate(np.repeat(np.arange(3), counts)):
        expected = x[row] @ dense[expert].T
        np.testing.assert_allclose(found[row].astype("float32").numpy(), expected, rtol=2.0**-7, atol=1e-3)


def test_operands_that_do_not_fit() -> None:
    codes, scales, weight_codes, weight_scales, _ = operands(4, 256, 128)
    with pytest.raises(ErnieError, match=r"fp8_linear: scales has shape \[4, 1\], expected \[4, 2\]"):
        fp8_matmul.fp8_linear(codes, scales[:, :1], weight_codes, weight_scales)
    with pytest.raises(ErnieError, match=r"fp8_linear: weight_scales has shape \[2, 1\], expected \[1, 2\]"):
        fp8_matmul.fp8_linear(codes, scales, weight_codes, weight_scales.T)
    with pytest.raises(ErnieError, match=r"expected \[rows, in\] and \[out, in\]"):
        fp8_matmul.fp8_linear(codes[:, :128], scales[:, :1], weight_codes, weight_scales)
    with pytest.raises(ErnieError, match="dtype is 'float16', expected 'float32' or 'bfloat16'"):
        fp8_matmul.fp8_linear(codes, scales, weight_codes, weight_scales, dtype="float16")
    stacked = weight_codes.view("uint8").unsqueeze(0).view("float8_e4m3fn"), weight_scales.unsqueeze(0)
    with pytest.raises(ErnieError, match="counts has 1 experts and 3 rows, expected .* codes, 4"):
        fp8_matmul.fp8_expert_linear(codes, scales, paddle.to_tensor([3]), *stacked)
