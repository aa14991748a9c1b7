"""Which implementation a tensor on a GPU gets, with tensors that pretend to be on one."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie45 import ops
from ernie45.ops import __main__ as report
from ernie45.ops import build_cuda, custom, fp8_reference, gpu, reference, toolchain

BUILT = custom.Loaded(None, Path("ernie45_cuda-1-2.so"), ("ernie45_cuda_swiglu",))
NOT_BUILT = custom.Loaded(None, None, (), "no nvcc")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Tensors are on a GPU, the library is built, and its operators, are written down."""
    made: list[tuple[Any, ...]] = []

    def run(*arguments: Any) -> list[paddle.Tensor]:
        made.append(arguments)
        return [paddle.zeros([1]) for _ in range(5)][: OUTPUTS.get(arguments[0], 1)]

    monkeypatch.delenv("ERNIE45_OPS", raising=False)
    monkeypatch.setattr(gpu, "on_gpu", lambda x: True)
    monkeypatch.setattr(gpu, "_has_cuda", True)
    monkeypatch.setattr(gpu, "_loaded", BUILT)
    monkeypatch.setattr(custom, "usable", lambda *tensors: False)
    monkeypatch.setattr(custom, "run", run)
    return made


OUTPUTS = {
    "ernie45_cuda_add_rms_norm": 2,
    "ernie45_cuda_rope_angles": 2,
    "ernie45_cuda_moe_gate": 3,
    "ernie45_cuda_moe_permute": 4,
    "ernie45_cuda_fp8_quantize": 2,
    "ernie45_cuda_fp8_quantize_transposed": 2,
    "ernie45_cuda_fp8_quantize_both": 4,
    "ernie45_cuda_fp8_quantize_stack": 4,
    "ernie45_cuda_swiglu_fp8_quantize": 2,
    "ernie45_cuda_swiglu_fp8_quantize_backward": 5,
}


def ones(*shape: int, dtype: str = "bfloat16") -> paddle.Tensor:
    return paddle.ones(shape, dtype)


# What is called, the operator that runs, and its attributes.
CALLS = [
    (lambda: ops.rms_norm(ones(2, 4), ones(4), 1e-5), "rms_norm", [1e-5]),
    (lambda: ops.rms_norm(ones(2, 4), ones(4), 1e-5, ones(2, 4)), "add_rms_norm", [1e-5]),
    (lambda: ops.swiglu(ones(2, 4)), "swiglu", []),
    (lambda: ops.swiglu(ones(2, 4), ones(2)), "swiglu_prob", []),
    (lambda: ops.rope_angles(ones(1, 4, 3, dtype="int64"), 8, 1e4, 1), "rope_angles", [1]),
    (lambda: ops.rope(ones(1, 4, 2, 8), *[ones(1, 4, 1, 4, dtype="float32")] * 2), "rope", []),
    (
        lambda: ops.moe_gate(ones(2, 8, dtype="float32"), None, 2, "softmax", True, 1e-12),
        "moe_gate",
        [None, 2, True, True, 1e-12],
    ),
    (lambda: ops.moe_permute(ones(2, 4), ones(2, 2, dtype="int64"), 8), "moe_permute", [8, 1]),
    (lambda: ops.moe_combine(ones(4, 4), ones(2, 2, dtype="int64"), ones(2, 2)), "moe_combine", []),
    (lambda: ops.fp8_quantize(ones(2, 4), (128, 128), "power_of_two"), "fp8_quantize", [128, True]),
    (lambda: ops.fp8_quantize_transposed(ones(2, 4)), "fp8_quantize_transposed", [1, False]),
    (lambda: ops.fp8_quantize_both(ones(2, 4)), "fp8_quantize_both", [1, False]),
    (
        lambda: ops.fp8_dequantize(ones(2, 4).astype("float8_e4m3fn"), ones(2, 1, dtype="float32"), dtype="bfloat16"),
        "fp8_dequantize",
        [1, True],
    ),
    (lambda: ops.swiglu_fp8_quantize(ones(2, 4)), "swiglu_fp8_quantize", [None, False]),
    (
        lambda: ops.swiglu_fp8_quantize_backward(ones(2, 256), ones(2, 128), scale="power_of_two"),
        "swiglu_fp8_quantize_backward",
        [None, True, True],
    ),
    (lambda: ops.fp8_quantize_stack([ones(2, 4), ones(3, 2, 4)], "power_of_two"), "fp8_quantize_stack", [True]),
]


@pytest.mark.parametrize(("call", "operator", "attributes"), CALLS)
def test_tensors_on_a_gpu_use_our_operators(
    call: Callable[[], Any], operator: str, attributes: list[Any], calls: list[tuple[Any, ...]]
) -> None:
    call()
    assert [made[0] for made in calls] == [f"ernie45_cuda_{operator}"]
    assert [value for value in calls[0][1:] if not isinstance(value, paddle.Tensor | list)] == attributes


def test_every_operator_is_called_by_a_public_function() -> None:
    assert {entry.operator for entry in gpu.IMPLEMENTATIONS.values()} <= {operator for _, operator, _ in CALLS}


def test_factors_and_weights_come_in_a_dtype_that_kernels_take(calls: list[tuple[Any, ...]]) -> None:
    ops.swiglu(ones(2, 4), ones(2))
    ops.rms_norm(ones(2, 4), ones(4, dtype="float16"), 1e-5)
    ops.rms_norm(ones(2, 4), ones(4), 1e-5, ones(2, 4, dtype="float32"))
    assert [str(tensor.dtype) for made in calls for tensor in made[1:] if isinstance(tensor, paddle.Tensor)] == [
        *("paddle.bfloat16", "paddle.float32"),
        *("paddle.bfloat16", "paddle.float32"),
        *("paddle.bfloat16", "paddle.bfloat16", "paddle.bfloat16"),
    ]


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.swiglu(ones(2, 4, dtype="float64")),
        lambda: ops.rms_norm(ones(1, 8193, dtype="float32"), ones(8193), 1e-5),
        lambda: ops.moe_gate(ones(1, 257, dtype="float32"), None, 2, "softmax", True, 1e-12),
        lambda: ops.moe_permute(ones(1, 4, dtype="float32"), paddle.zeros([1, 2], "int64"), 1025),
        lambda: ops.moe_combine(ones(33, 4, dtype="float32"), paddle.arange(33).reshape([1, 33]), ones(1, 33)),
        lambda: ops.rope_angles(ones(1, 4, dtype="float32"), 8, 1e4),
    ],
)
def test_what_kernels_do_not_take_is_left_to_the_definition(
    call: Callable[[], Any], calls: list[tuple[Any, ...]]
) -> None:
    call()
    assert not calls


@pytest.mark.parametrize("setting", ["context", "environment"])
def test_the_user_may_want_the_definitions(
    setting: str, calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting == "environment":
        monkeypatch.setenv("ERNIE45_OPS", "reference")
        assert gpu.best(reference.swiglu, ones(1)) is reference.swiglu
    else:
        with custom.reference_only():
            assert gpu.best(reference.swiglu, ones(1)) is reference.swiglu
    assert gpu.best(reference.swiglu, ones(1)) is reference.swiglu or setting == "context"


def test_tensors_on_the_cpu_get_the_definition_and_load_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "loaded", lambda: pytest.fail("nothing is to be loaded"))
    for has_cuda in (False, True):
        monkeypatch.setattr(gpu, "_has_cuda", has_cuda)
        for definition in gpu.IMPLEMENTATIONS:
            assert gpu.best(definition, ones(2)) is definition
        assert not gpu.on_gpu(object())


def test_where_nothing_was_built_paddles_own_operators_take_their_place(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_loaded", NOT_BUILT)
    made = []

    def norm(x: paddle.Tensor, weight: paddle.Tensor, epsilon: float) -> tuple[paddle.Tensor, paddle.Tensor]:
        made.append(epsilon)
        return reference.rms_norm(x, weight, epsilon), x

    monkeypatch.setattr(gpu.fused, "fused_rms_norm_ext", norm)
    x, weight = paddle.randn([2, 8]), paddle.rand([8])
    assert (ops.rms_norm(x, weight, 1e-5) == reference.rms_norm(x, weight, 1e-5)).all() and made == [1e-5]
    ops.rms_norm(x, weight, 1e-5, x)
    ops.rms_norm(x, weight.astype("bfloat16"), 1e-5)
    assert made == [1e-5], "neither a residual nor two dtypes are what it takes"
    np.testing.assert_allclose(ops.swiglu(x).numpy(), reference.swiglu(x).numpy(), rtol=1e-6)
    assert (ops.swiglu(x, paddle.rand([2])).shape, calls) == ([2, 4], [])
    assert gpu.best(reference.moe_combine, x) is reference.moe_combine
    assert gpu.best(fp8_reference.quantize, x) is fp8_reference.quantize


@pytest.mark.parametrize("rows", [1, 2])
def test_paddles_rope_gets_the_same_angles(
    rows: int, calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against what the source of Paddle's kernel computes, element by element."""

    def rope(
        q: paddle.Tensor, *, sin: paddle.Tensor, cos: paddle.Tensor, position_ids: paddle.Tensor, **style: bool
    ) -> tuple[paddle.Tensor, None, None]:
        assert style == {"use_neox_rotary_style": True}
        assert sin.shape == cos.shape == [1, rows * 4, 1, 6] and position_ids.dtype == paddle.int64
        x, places = q.numpy(), position_ids.numpy()
        out = np.empty_like(x)
        for b, s, h, d in np.ndindex(*x.shape):
            turned = -x[b, s, h, d + 1] if d % 2 == 0 else x[b, s, h, d - 1]
            angles = (table.numpy().reshape(-1, 6)[places[b, s], d] for table in (cos, sin))
            out[b, s, h, d] = np.dot([x[b, s, h, d], turned], list(angles))
        return paddle.to_tensor(out), None, None

    monkeypatch.setattr(gpu, "_loaded", NOT_BUILT)
    monkeypatch.setattr(gpu.fused, "fused_rotary_position_embedding", rope)
    angles = reference.rope_angles(paddle.arange(rows * 4).reshape([rows, 4]), 6, 1e4)
    x = paddle.randn([2, 4, 3, 6])
    np.testing.assert_allclose(ops.rope(x, *angles).numpy(), reference.rope(x, *angles).numpy(), rtol=1e-5, atol=1e-6)


def test_the_library_is_loaded_once_and_a_failure_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def library_file() -> Path:
        tries.append(1)
        raise toolchain.BuildError("no nvcc")

    for name in ("ERNIE45_OPS", "ERNIE45_BUILD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpu, "_loaded", None)
    monkeypatch.setattr(build_cuda, "library_file", library_file)
    with pytest.warns(custom.ReferencePathWarning, match="no fused CUDA operators: no nvcc"):
        assert gpu.loaded().file is None
    assert gpu.loaded().why_not == "no nvcc" and tries == [1]


def test_the_report_says_why_there_is_nothing_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if paddle.is_compiled_with_cuda():
        pytest.skip("this Paddle was compiled with CUDA")
    report.main()
    assert capsys.readouterr().out.endswith("on a GPU\nnone: " + gpu.why_none() + "\n")
    assert "compiled without CUDA" in gpu.why_none()


@pytest.mark.parametrize(
    ("library", "setting", "expected"),
    [
        (BUILT, "", {"rms_norm": "native CUDA", "rope": "native CUDA", "moe_gate": "native CUDA"}),
        (
            NOT_BUILT,
            "",
            {"rms_norm": "Paddle's fused_rms_norm_ext", "swiglu": "Paddle's swiglu", "moe_gate": "reference"},
        ),
        (BUILT, "reference", {"rms_norm": "reference", "moe_gate": "reference"}),
    ],
)
def test_the_report_says_what_tensors_on_a_gpu_use(
    library: custom.Loaded,
    setting: str,
    expected: dict[str, str],
    calls: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(paddle.device, "cuda", types.SimpleNamespace(device_count=lambda: 1))
    monkeypatch.setattr(gpu, "_loaded", library)
    monkeypatch.setenv("ERNIE45_OPS", setting)
    report.main()
    _, _, on_gpu = capsys.readouterr().out.partition("on a GPU\n")
    table, _, facts = on_gpu.partition("\n\n")
    used = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert used.keys() == {entry.operator for entry in gpu.IMPLEMENTATIONS.values()}
    assert all(text in used[name] for name, text in expected.items())
    assert ("none: no nvcc" in facts) == (library is NOT_BUILT)
