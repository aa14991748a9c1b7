"""Holding fused operators against their definitions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import paddle
import pytest

from ernie45 import runtime
from ernie45.ops import build, custom

both_instruction_sets = pytest.mark.parametrize("isa", ["avx512", "avx2"])


@contextlib.contextmanager
def fused(isa: str, *operators: str, threads: int = 2) -> Iterator[None]:
    """Inside, fused operators run for `isa` with so many threads; afterwards, the named ones must have run.

    Skips the test without a native library or on a processor that lacks the instruction set.
    """
    library = custom.library()
    if library is None or isa not in build.instruction_sets():
        pytest.skip(f"no fused operators for {isa} here")
    used: set[str] = set()
    run = custom.run

    def recording(name: str, *arguments: object) -> list[paddle.Tensor]:
        used.add(name)
        return run(name, *arguments)

    with pytest.MonkeyPatch.context() as patch, custom.instruction_set(isa):
        patch.setattr(custom, "run", recording)
        library.ernie45_set_num_threads(threads)
        try:
            yield
        finally:
            library.ernie45_set_num_threads(runtime.num_threads())
    assert {f"ernie45_{name}" for name in operators} <= used


def outputs_and_gradients(
    function: Callable[..., object], *arrays: np.ndarray, dtype: str = "float32", gradients: bool = True
) -> list[np.ndarray]:
    """The outputs of a function of tensors, then the gradients of a fixed sum over them for every input, as float32."""
    tensors = [paddle.to_tensor(array).astype(dtype).detach() for array in arrays]
    for tensor in tensors:
        tensor.stop_gradient = not gradients
    result = function(*tensors)
    outputs = list(result) if isinstance(result, (tuple, list)) else [result]
    found = [output.detach().astype("float32").numpy() for output in outputs]
    if not gradients:
        return found
    total = paddle.zeros([])
    for seed, output in enumerate(outputs):
        if output.is_floating_point():
            mix = np.random.default_rng(seed).standard_normal(output.shape).astype(np.float32)
            total = total + (output.astype("float32") * paddle.to_tensor(mix)).sum()
    total.backward()
    return found + [tensor.grad.astype("float32").numpy() for tensor in tensors]


def assert_agree(found: list[np.ndarray], expected: list[np.ndarray], dtype: str = "float32") -> None:
    """Equal but for rounding, relative to the largest value of the row and to the typical one of all, because a long
    sum may happen to be small; NaN and Inf in the same places.

    For bfloat16 one unit in the last place more: where the float32 results differ, they may round to neighbours.
    """
    relative = 1e-5 if dtype == "float32" else 2.0**-7
    assert len(found) == len(expected)
    for one, other in zip(map(np.atleast_1d, found), map(np.atleast_1d, expected), strict=True):
        assert one.shape == other.shape
        same = (one == other) | (np.isnan(one) & np.isnan(other))
        finite = np.where(np.isfinite(other), np.abs(other), 0)
        size = finite.max(axis=-1, keepdims=True, initial=np.median(finite) if finite.size else 0.0)
        with np.errstate(invalid="ignore"):
            near = np.abs(one - other) <= relative * np.abs(other) + 1e-5 * size + 1e-6
        assert np.all(same | near), f"found {one[~(same | near)]}, expected {other[~(same | near)]}"
