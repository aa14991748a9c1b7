"""Slow definitions in float64, and gradients of them by central differences: what the fast ones must agree with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

STEP = 1e-5


def numeric_gradient(function: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    """d function / d at, elementwise, in float64."""
    point = np.array(at, dtype=np.float64)
    gradient = np.empty_like(point)
    for index in np.ndindex(point.shape):
        middle = point[index]
        point[index] = middle + STEP
        above = function(point)
        point[index] = middle - STEP
        gradient[index] = (above - function(point)) / (2 * STEP)
        point[index] = middle
    return gradient


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices [..., k] of the k largest, in descending order."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def swiglu_mlp(x: np.ndarray, up_gate: np.ndarray, down: np.ndarray) -> np.ndarray:
    """x [..., hidden], up_gate [hidden, 2 * width] with the gate first, down [width, hidden]."""
    gate, up = np.split(x @ up_gate, 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ down
