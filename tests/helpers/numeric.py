"""Slow definitions in float64, and gradients of them by central differences: what the fast ones must agree with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle

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


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float = 1e-6) -> np.ndarray:
    """LayerNorm over the last axis."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon) * weight + bias


def weights_of(layer: paddle.nn.Layer) -> dict[str, np.ndarray]:
    """Its parameters by name, in float64."""
    return {name: weight.astype("float32").numpy().astype("float64") for name, weight in layer.named_parameters()}


def check_gradients(
    layer: paddle.nn.Layer, definition: Callable[[dict[str, np.ndarray]], np.ndarray], output: paddle.Tensor
) -> None:
    """Whether the gradients of a random linear function of `output` are those of its definition.

    Args:
        layer: has every parameter that they depend on.
        definition: the output for other parameters, in float64.
        output: what the layer made of the same input, not yet detached.
    """
    factors = np.random.default_rng(3).standard_normal(output.shape)
    (output * paddle.to_tensor(factors.astype("float32"))).sum().backward()
    weights = weights_of(layer)
    for name, parameter in layer.named_parameters():

        def value(other: np.ndarray, name: str = name) -> float:
            return float((definition({**weights, name: other}) * factors).sum())

        expected = numeric_gradient(value, weights[name])
        assert np.abs(parameter.grad.numpy() - expected).max() < 1e-3 * max(1.0, np.abs(expected).max()), name
