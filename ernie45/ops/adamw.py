"""The update of AdamW in one pass over memory: the fused kernel where there is one, else the definition."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import paddle
from paddle import Tensor

from ernie45.ops import custom


@dataclass(frozen=True)
class AdamWStep:
    """The numbers of one step.

    Attributes:
        number: of this step, from 1 on, for the correction of the moments.
        scale: what gradients are multiplied with before anything else.
    """

    number: int
    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    scale: float = 1.0

    @property
    def kept(self) -> float:
        """The factor of the decay."""
        return 1 - self.learning_rate * self.weight_decay

    @property
    def corrections(self) -> tuple[float, float]:
        """What the moments are divided by."""
        return 1 - self.beta1**self.number, 1 - self.beta2**self.number


@paddle.no_grad()
def adamw_update(
    parameter: Tensor, gradient: Tensor, master: Tensor, moment1: Tensor, moment2: Tensor, step: AdamWStep
) -> None:
    """One step of AdamW (arXiv 1711.05101, algorithm 2, with the decay scaled by the learning rate), in place.

    Args:
        parameter: float32 or bfloat16; it gets the new master, rounded.
        gradient: of the same shape, float32 or bfloat16.
        master: float32; the parameter itself if that is float32.
        moment1, moment2: float32.
    """
    if not _takes(parameter, gradient, master, moment1, moment2):
        return _definition(parameter, gradient, master, moment1, moment2, step)
    first, second = step.corrections
    numbers = (step.scale, step.beta1, step.beta2, step.epsilon, step.learning_rate / first, step.kept)
    _native().ernie45_adamw(
        int(gradient.dtype == paddle.bfloat16),
        _pointer(gradient),
        ctypes.c_int64(gradient.size),
        *map(_pointer, (master, moment1, moment2)),
        _pointer(parameter) if parameter.dtype == paddle.bfloat16 else None,
        (ctypes.c_float * 7)(*numbers, 1 / math.sqrt(second)),
    )


@paddle.no_grad()
def sum_of_squares(x: Tensor) -> float:
    """The sum of x ** 2 over all elements of a float32 or bfloat16 tensor, as for the norm of a gradient."""
    if not _takes(x):
        return float(x.astype("float32").square().sum())
    library = _native()
    library.ernie45_squares.restype = ctypes.c_double
    return float(library.ernie45_squares(int(x.dtype == paddle.bfloat16), _pointer(x), ctypes.c_int64(x.size)))


def _definition(
    parameter: Tensor, gradient: Tensor, master: Tensor, moment1: Tensor, moment2: Tensor, step: AdamWStep
) -> None:
    wide = gradient.astype("float32") * step.scale
    moment1.scale_(step.beta1).add_(wide * (1 - step.beta1))
    moment2.scale_(step.beta2).add_(wide * wide * (1 - step.beta2))
    first, second = step.corrections
    change = moment1 / first / ((moment2 / second).sqrt() + step.epsilon)
    master.scale_(step.kept).subtract_(step.learning_rate * change)
    if parameter is not master:
        parameter.copy_(master.astype(parameter.dtype), True)


def _takes(*tensors: Tensor) -> bool:
    """Whether the kernels can read these: numbers of a known kind without gaps."""
    known = (paddle.float32, paddle.bfloat16)
    return custom.usable(*tensors) and all(x.dtype in known and x.is_contiguous() for x in tensors)


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _native() -> ctypes.CDLL:
    library = custom.library()
    assert library is not None  # as `usable` said
    return library
