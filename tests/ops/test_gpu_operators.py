"""The operators on the GPU as Paddle sees them, over emulated kernels: results, gradients, checks, shapes, dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import Tensor

from ernie45 import ops
from ernie45.ops import custom, reference
from tests.helpers import cuda_operators
from tests.helpers.tiny import tiny_model, token_ids

DTYPES = ("float32", "float16", "bfloat16")
# Of values that are about 1: float32 sums in another order, and one rounding for the halves.
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


@pytest.fixture(autouse=True)
def on_gpu() -> Iterator[None]:
    with cuda_operators.on_this_cpu(cuda_operators.loaded()):
        yield


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> Tensor:
    values = np.random.default_rng(seed + sum(shape)).standard_normal(shape).astype("float32")
    return paddle.to_tensor(values).astype(dtype)


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    """Copies that want gradients where they can have them."""
    copies = [tensor.detach().clone() for tensor in tensors]
    for copy in copies:
        copy.stop_gradient = not copy.is_floating_point()
    return copies


def results(function: Callable[..., object], inputs: list[Tensor], wide: bool) -> list[Tensor]:
    """What a function returns, and the gradients of all of it, weighted with fixed numbers."""
    used = leaves([x.astype("float32") if wide and x.is_floating_point() else x for x in inputs])
    returned = function(*used)
    outputs = list(returned) if isinstance(returned, (tuple, list)) else [returned]
    total = paddle.zeros([])
    for seed, out in enumerate(outputs):
        if not out.stop_gradient:
            total = total + (out.astype("float32") * normal(*out.shape, seed=seed)).sum()
    if not total.stop_gradient:
        total.backward()
    # Where nothing was computed from an input, one has no gradient and the other zeros.
    grads = [paddle.zeros_like(x) if x.grad is None else x.grad for x in used if not x.stop_gradient]
    return [*outputs, *grads]


def check(function: Callable[..., object], definition: Callable[..., object], inputs: list[Tensor], dtype: str) -> None:
    """The operator agrees with its definition in float32, and returns the dtypes of the definition."""
    found = results(function, inputs, wide=False)
    expected = results(definition, inputs, wide=True)
    assert [x.shape for x in found] == [x.shape for x in expected]
    if dtype != "float16":  # in which Paddle on a CPU cannot compute all definitions
        assert [x.dtype for x in found] == [x.dtype for x in results(definition, inputs, wide=False)]
    for ours, theirs in zip(found, expected, strict=True):
        if not ours.is_floating_point():
            assert (ours == theirs).all()
            continue
        wide, largest = theirs.numpy(), max(1.0, float(theirs.abs().max()) if theirs.size else 1.0)
        np.testing.assert_allclose(ours.astype("float32").numpy(), wide, rtol=0, atol=TOLERANCE[dtype] * largest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 40), (0, 8), (3, 7)])
def test_rms_norm(shape: tuple[int, ...], dtype: str) -> None:
    x, residual, weight = (
        normal(*shape, dtype=dtype),
        normal(*shape, dtype=dtype, seed=1),
        normal(shape[-1], dtype=dtype),
    )
    check(lambda x, w: ops.rms_norm(x, w, 1e-5), lambda x, w: reference.rms_norm(x, w, 1e-5), [x, weight], dtype)
    check(
        lambda x, r, w: ops.rms_norm(x, w, 1e-5, r),
        lambda x, r, w: reference.rms_norm(x, w, 1e-5, r),
        [x, residual, weight],
        dtype,
    )


def test_rms_norm_with_a_wide_weight_keeps_the_dtype_of_x() -> None:
    x, weight = normal(4, 32, dtype="bfloat16"), normal(32)
    check(lambda x, w: ops.rms_norm(x, w, 1e-5), lambda x, w: reference.rms_norm(x, w, 1e-5), [x, weight], "bfloat16")


@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_results_of_the_norm_of_a_sum_may_be_unused(used: int) -> None:
    inputs = [normal(3, 16), normal(3, 16, seed=1), normal(16)]
    check(
        lambda x, r, w: ops.rms_norm(x, w, 1e-5, r)[used],
        lambda x, r, w: reference.rms_norm(x, w, 1e-5, r)[used],
        inputs,
        "float32",
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 40), (0, 8), (3, 14)])
def test_swiglu(shape: tuple[int, ...], dtype: str) -> None:
    x, prob = normal(*shape, dtype=dtype), normal(*shape[:-1])
    check(ops.swiglu, reference.swiglu, [x], dtype)
    check(ops.swiglu, reference.swiglu, [x, prob], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2])
def test_rope(rows: int, dtype: str) -> None:
    positions = paddle.to_tensor(np.arange(rows * 5).reshape(rows, 5))
    x, (cos, sin) = normal(2, 5, 3, 16, dtype=dtype), reference.rope_angles(positions, 16, 1e4)
    check(lambda x: ops.rope(x, cos, sin), lambda x: reference.rope(x, cos, sin), [x], dtype)


@pytest.mark.parametrize("time_pairs", [0, 3])
def test_rope_angles(time_pairs: int) -> None:
    flat, grid = paddle.arange(10).reshape([2, 5]), paddle.arange(30).reshape([2, 5, 3])
    for positions in (flat, grid):
        check(
            lambda p: ops.rope_angles(p, 16, 1e4, time_pairs),
            lambda p: reference.rope_angles(p, 16, 1e4, time_pairs),
            [positions],
            "float32",
        )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_moe_gate(activation: str, bias: bool) -> None:
    shift = normal(8, seed=3) if bias else None
    settings = (shift, 3, activation, bias, 1e-9)
    check(lambda x: ops.moe_gate(x, *settings), lambda x: reference.moe_gate(x, *settings), [normal(6, 8)], "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 7])
def test_moe_permute_and_combine(tokens: int, dtype: str) -> None:
    x, indices = normal(tokens, 24, dtype=dtype), paddle.to_tensor(np.arange(tokens * 2).reshape(tokens, 2) % 5)
    check(lambda x: ops.moe_permute(x, indices, 6), lambda x: reference.moe_permute(x, indices, 6), [x], dtype)
    slots = reference.moe_permute(x.astype("float32"), indices, 6)[3]
    rows, weights = normal(tokens * 2, 24, dtype=dtype), normal(tokens, 2)
    check(
        lambda rows, weights: ops.moe_combine(rows, slots, weights),
        lambda rows, weights: reference.moe_combine(rows, slots, weights),
        [rows, weights],
        dtype,
    )


def test_rows_of_an_expert_can_be_padded_with_zeros_to_a_multiple() -> None:
    x, indices = normal(5, 8), paddle.to_tensor([[0, 2], [2, 3], [2, 0], [3, 2], [0, 3]])
    rows, counts, offsets, slots = custom.run("ernie45_cuda_moe_permute", x, indices, 4, 4)
    assert counts.tolist() == [3, 0, 4, 3] and offsets.tolist() == [0, 4, 4, 8, 12]
    used = slots.flatten().numpy()
    np.testing.assert_array_equal(rows.numpy()[used], np.repeat(x.numpy(), 2, axis=0))
    assert not np.delete(rows.numpy(), used, axis=0).any()
    weights = paddle.ones([5, 2])
    check(
        lambda rows: ops.moe_combine(rows, slots, weights),
        lambda rows: reference.moe_combine(rows, slots, weights),
        [rows],
        "float32",
    )


@pytest.mark.parametrize("block", [(1, 128), (128, 128)])
@pytest.mark.parametrize("scale", ["float32", "power_of_two"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8(dtype: str, scale: str, block: tuple[int, int]) -> None:
    x = normal(130, 200, dtype=dtype)
    functions = (ops.fp8_quantize, ops.fp8_quantize_transposed, ops.fp8_quantize_both)
    found = [tensor for function in functions for tensor in function(x, block, scale)]
    with custom.reference_only():
        expected = [tensor for function in functions for tensor in function(x, block, scale)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours.view("uint8").numpy(), theirs.view("uint8").numpy())
    restored = ops.fp8_dequantize(*found[:2], block, dtype)
    with custom.reference_only():
        assert (restored == ops.fp8_dequantize(*found[:2], block, dtype)).all()


@pytest.mark.parametrize("with_prob", [False, True])
def test_swiglu_fp8_quantize_and_what_its_backward_needs(with_prob: bool) -> None:
    x, prob, grad = normal(9, 256), normal(9) if with_prob else None, normal(9, 128, seed=5)
    codes, scales = ops.swiglu_fp8_quantize(x, prob)
    with custom.reference_only():
        exact = ops.swiglu(x, prob)
    assert float((codes.astype("float32") - exact / scales).abs().max()) <= 16
    inputs = leaves([x, paddle.ones([9]) if prob is None else prob])
    reference.swiglu(*inputs).backward(grad)
    grad_x, grad_prob, out, *quantised = ops.swiglu_fp8_quantize_backward(x, grad, prob)
    for ours, theirs in ((grad_x, inputs[0].grad), (grad_prob, inputs[1].grad), (out, exact)):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(quantised, ops.fp8_quantize(grad_x), strict=True):
        np.testing.assert_array_equal(ours.view("uint8").numpy(), theirs.view("uint8").numpy())
    narrow = custom.run("ernie45_cuda_swiglu_fp8_quantize_backward", x[:, :14], prob, grad[:, :7], False, False)
    assert [list(tensor.shape) for tensor in narrow] == [[9, 14], [9], [9, 7], [9, 0], [9, 0]]


@pytest.mark.parametrize("stacked", [False, True])
def test_weights_of_experts_are_stacked_and_quantised_in_both_orientations(stacked: bool) -> None:
    weights = [normal(130, 140, seed=seed, dtype="bfloat16") for seed in range(3)]
    given = [paddle.stack(weights[:2]), weights[2]] if stacked else weights
    found = ops.fp8_quantize_stack(given, "power_of_two")
    with custom.reference_only():
        each = [ops.fp8_quantize_both(weight, (128, 128), "power_of_two") for weight in weights]
    for ours, theirs in zip(found, zip(*each, strict=True), strict=True):
        expected = np.stack([tensor.view("uint8").numpy() for tensor in theirs])
        np.testing.assert_array_equal(ours.view("uint8").numpy(), expected)


@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        ("swiglu", lambda: [normal(2, 3)], r"swiglu: x has shape \[2, 3\], expected an even last axis"),
        ("swiglu", lambda: [paddle.ones([2, 4], "float64")], "x is float64, expected float32, float16 or bfloat16"),
        ("swiglu_prob", lambda: [normal(2, 4), normal(3)], r"swiglu: prob has shape \[3\], expected \[2\]"),
        ("rms_norm", lambda: [normal(2, 4), normal(3), 1e-5], r"rms_norm: weight has shape \[3\], expected \[4\]"),
        ("rope", lambda: [normal(2, 4), normal(3), normal(3)], r"rope: x has shape \[2, 4\], expected \[batch, sequ"),
        ("moe_gate", lambda: [normal(2, 4), None, 5, True, True, 0.0], "moe_gate: k is 5, expected 1 to the 4 experts"),
        ("moe_permute", lambda: [normal(2, 4), paddle.ones([3, 2], "int64"), 4, 1], r"indices has shape \[3, 2\]"),
        ("moe_combine", lambda: [normal(4, 4), paddle.ones([2, 2], "int32"), normal(2, 2)], "slots is int32, expected"),
        ("fp8_quantize", lambda: [normal(2, 4), 64, False], "fp8_quantize: block_rows is 64, expected 1 or 128"),
        (
            "fp8_quantize",
            lambda: [normal(2, 4, dtype="float16"), 1, False],
            "x is float16, expected float32 or bfloat16",
        ),
        ("fp8_quantize_stack", lambda: [[normal(2, 4), normal(2, 3)], False], r"weights has shape \[2, 3\], expected"),
        ("swiglu_fp8_quantize", lambda: [normal(2, 3), None, False], "x has 3 columns, expected an even number"),
    ],
)
def test_errors_name_what_was_found_and_expected(
    operator: str, arguments: Callable[[], list[object]], message: str
) -> None:
    with pytest.raises(OSError, match=message):
        custom.run(f"ernie45_cuda_{operator}", *arguments())


def test_a_model_is_trained_through_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture of experts: its loss and every gradient agree with those of the definitions."""
    model, ids, used, run = tiny_model(), token_ids(2, 9), set(), custom.run

    def noted(name: str, *arguments: object) -> list[Tensor]:
        used.add(name.removeprefix("ernie45_cuda_"))
        return run(name, *arguments)

    def step() -> list[np.ndarray]:
        logits = model(ids)
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        arrays = [logits.numpy(), *(p.grad.numpy() for p in model.parameters() if p.grad is not None)]
        model.clear_gradients()
        return arrays

    monkeypatch.setattr(custom, "run", noted)
    found = step()
    assert used >= {"rms_norm", "add_rms_norm", "rope_angles", "rope", "moe_gate", "moe_permute", "moe_combine"}
    assert used & {"swiglu", "swiglu_prob"}
    with custom.reference_only():
        expected = step()
    assert len(found) == len(expected) > 20
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


FLOAT, BFLOAT, CODE, INT = paddle.float32, paddle.bfloat16, paddle.float8_e4m3fn, paddle.int64
# Operator, inputs as (shape, dtype), attributes, and what is known of the outputs before a program runs; -1: any size.
INFERRED = [
    ("rms_norm", [([-1, 64], BFLOAT), ([64], FLOAT)], [1e-5], [([-1, 64], BFLOAT)]),
    ("add_rms_norm", [([-1, 8], BFLOAT), ([-1, 8], BFLOAT), ([8], BFLOAT)], [1e-5], [([-1, 8], BFLOAT)] * 2),
    ("swiglu", [([-1, 3, 64], BFLOAT)], [], [([-1, 3, 32], BFLOAT)]),
    ("swiglu_prob", [([-1, -1], BFLOAT), ([-1], FLOAT)], [], [([-1, -1], BFLOAT)]),
    ("rope_angles", [([-1, -1, 3], INT), ([32], FLOAT)], [5], [([-1, -1, 1, 32], FLOAT)] * 2),
    (
        "rope",
        [([-1, 7, 3, 16], BFLOAT), ([1, 7, 1, 8], FLOAT), ([1, 7, 1, 8], FLOAT)],
        [],
        [([-1, 7, 3, 16], BFLOAT)],
    ),
    (
        "moe_gate",
        [([-1, 64], FLOAT), ([64], FLOAT)],
        [6, True, True, 1e-12],
        [([-1, 64], FLOAT), ([-1, 6], INT), ([-1, 6], FLOAT)],
    ),
    (
        "moe_permute",
        [([-1, 32], BFLOAT), ([-1, 6], INT)],
        [64, 1],
        [([-1, 32], BFLOAT), ([64], INT), ([65], INT), ([-1, 6], INT)],
    ),
    (
        "moe_permute",
        [([10, 32], BFLOAT), ([10, 6], INT)],
        [4, 1],
        [([60, 32], BFLOAT), ([4], INT), ([5], INT), ([10, 6], INT)],
    ),
    ("moe_combine", [([-1, 32], BFLOAT), ([-1, 6], INT), ([-1, 6], FLOAT)], [], [([-1, 32], BFLOAT)]),
    ("fp8_quantize", [([-1, 300], BFLOAT)], [1, False], [([-1, 300], CODE), ([-1, 3], FLOAT)]),
    ("fp8_quantize", [([300, 300], BFLOAT)], [128, False], [([300, 300], CODE), ([3, 3], FLOAT)]),
    ("fp8_quantize_transposed", [([-1, 300], BFLOAT)], [1, True], [([300, -1], CODE), ([300, -1], FLOAT)]),
    (
        "fp8_quantize_both",
        [([130, 300], FLOAT)],
        [1, True],
        [([130, 300], CODE), ([130, 3], FLOAT), ([300, 130], CODE), ([300, 2], FLOAT)],
    ),
    ("fp8_dequantize", [([-1, 300], CODE), ([-1, 3], FLOAT)], [1, True], [([-1, 300], BFLOAT)]),
    ("fp8_dequantize", [([-1, 300], CODE), ([-1, 3], FLOAT)], [1, False], [([-1, 300], FLOAT)]),
    ("swiglu_fp8_quantize", [([-1, 512], BFLOAT), ([-1], FLOAT)], [True], [([-1, 256], CODE), ([-1, 2], FLOAT)]),
    (
        "swiglu_fp8_quantize_backward",
        [([-1, 512], BFLOAT), ([-1], FLOAT), ([-1, 256], BFLOAT)],
        [True, False],
        [([-1, 512], BFLOAT), ([-1], FLOAT), ([-1, 256], BFLOAT), ([-1, 512], CODE), ([-1, 4], FLOAT)],
    ),
]


@pytest.mark.parametrize(("operator", "inputs", "attributes", "expected"), INFERRED)
def test_shapes_and_dtypes_are_known_before_a_program_runs(
    operator: str, inputs: list[tuple[list[int], object]], attributes: list[object], expected: list[object]
) -> None:
    paddle.enable_static()
    try:
        with paddle.static.program_guard(paddle.static.Program()):
            given = [paddle.static.data(f"x{i}", shape, dtype) for i, (shape, dtype) in enumerate(inputs)]
            outputs = custom.run(f"ernie45_cuda_{operator}", *given, *attributes)
            assert [(list(out.shape), out.dtype) for out in outputs] == expected
    finally:
        paddle.disable_static()


def test_every_operator_has_its_inference_tested() -> None:
    declared = {name for name in cuda_operators.loaded().operators if not name.endswith("_grad")}
    tested = {f"ernie45_cuda_{operator}" for operator, *_ in INFERRED}
    assert declared - tested == {"ernie45_cuda_fp8_quantize_stack"}, "which takes a list, tested below"


def test_a_stack_of_weights_has_its_inference_too() -> None:
    paddle.enable_static()
    try:
        with paddle.static.program_guard(paddle.static.Program()):
            given = [paddle.static.data(f"x{i}", [130, 300], BFLOAT) for i in range(5)]
            outputs = custom.run("ernie45_cuda_fp8_quantize_stack", given, True)
            found = [(list(out.shape), out.dtype) for out in outputs]
    finally:
        paddle.disable_static()
    assert found == [([5, 130, 300], CODE), ([5, 2, 3], FLOAT), ([5, 300, 130], CODE), ([5, 3, 2], FLOAT)]
