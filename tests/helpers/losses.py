"""Losses against slow definitions in float64, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import pytest
from paddle import Tensor

from tests.helpers.numeric import numeric_gradient, softmax


def random(*shape: int, seed: int = 0) -> np.ndarray:
    """Of the normal distribution, float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def value_and_gradient(loss: Callable[[Tensor], Tensor], at: np.ndarray) -> tuple[float, np.ndarray]:
    """Of a scalar loss."""
    x = paddle.to_tensor(at, stop_gradient=False)
    value = loss(x)
    value.backward()
    return float(value), x.grad.numpy()


def check(loss: Callable[[Tensor], Tensor], slow: Callable[[np.ndarray], float], at: np.ndarray) -> None:
    """Whether value and gradient of a loss are those of its definition."""
    value, gradient = value_and_gradient(loss, at)
    assert value == pytest.approx(slow(at.astype(np.float64)), rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, numeric_gradient(slow, at), rtol=1e-3, atol=1e-5)


def slow_token_losses(logits: np.ndarray, labels: np.ndarray) -> list[float]:
    """Cross entropy of each token, 0 where the label is -100."""
    rows, wanted = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    return [0.0 if label == -100 else -np.log(softmax(row)[label]) for row, label in zip(rows, wanted, strict=True)]


def slow_language_model_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Their mean over the labels that are not -100."""
    losses = slow_token_losses(logits, labels)
    return float(np.sum(losses) / max(int((labels != -100).sum()), 1))
