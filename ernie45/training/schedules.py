"""Learning-rate schedules: pure functions from the step to a factor of the peak rate.

A schedule after the warm-up is a function of its progress: 0 at the first step after the warm-up, 1 past the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ernie45.errors import ErnieError

STEADY = 0.9  # share of its steps that `wsd` stays at the peak, as upstream


def constant(progress: float) -> float:
    """Always 1."""
    return 1.0


def linear(progress: float) -> float:
    """From 1 to 0 on a line."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine (arXiv 1608.03983, eq. 5, without restarts)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def wsd(progress: float) -> float:
    """Warm-up, stable, decay: 1 for nine tenths of the way, then 1 - sqrt down to 0 (arXiv 2405.18392, section 3)."""
    return 1.0 - math.sqrt(max(0.0, progress - STEADY) / (1.0 - STEADY))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": constant, "linear": linear, "cosine": cosine, "wsd": wsd,
}  # fmt: skip


def factor(name: str, step: int, steps: int, warmup: int = 0, floor: float = 0.0) -> float:
    """What the peak learning rate is multiplied with at a step.

    During the warm-up (step + 1) / warmup, so that no step is done at rate 0; afterwards
    floor + (1 - floor) * schedule(progress).

    Args:
        name: "constant", "linear", "cosine" or "wsd".
        step: steps done so far: 0 at the first one.
        steps: steps of the whole run, warm-up included.
        warmup: steps of the warm-up.
        floor: the factor at the end, lowest learning rate / peak; "constant" does not know it.

    Raises:
        ErnieError: there is no such schedule.
    """
    if name not in SCHEDULES:
        raise ErnieError(f"lr_scheduler_type: there is no schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1.0 - floor) * SCHEDULES[name](progress)
