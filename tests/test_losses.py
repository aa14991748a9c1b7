"""Losses against slow definitions in float64, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle import Tensor

from ernie45.losses import (
    language_model_loss,
    load_balance_loss,
    orthogonalization_loss,
    router_z_loss,
    update_correction_bias,
)
from tests.helpers.numeric import numeric_gradient, softmax, top_k


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def value_and_gradient(loss: Callable[[Tensor], Tensor], at: np.ndarray) -> tuple[float, np.ndarray]:
    x = paddle.to_tensor(at, stop_gradient=False)
    value = loss(x)
    value.backward()
    return float(value), x.grad.numpy()


def check(loss: Callable[[Tensor], Tensor], slow: Callable[[np.ndarray], float], at: np.ndarray) -> None:
    value, gradient = value_and_gradient(loss, at)
    assert value == pytest.approx(slow(at.astype(np.float64)), rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, numeric_gradient(slow, at), rtol=1e-3, atol=1e-5)


# Language model loss.


def slow_language_model_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    rows, wanted = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    losses = [-np.log(softmax(row)[label]) for row, label in zip(rows, wanted, strict=True) if label != -100]
    return float(np.mean(losses)) if losses else 0.0


@settings(max_examples=20)
@given(
    labels=st.lists(st.sampled_from([-100, 0, 1, 4, 6]), min_size=1, max_size=6),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_language_model_loss(labels: list[int], scale: float) -> None:
    wanted = np.array([labels])
    check(
        lambda x: language_model_loss(x, paddle.to_tensor(wanted)),
        lambda x: slow_language_model_loss(x, wanted),
        scale * random(1, len(labels), 7),
    )


def test_language_model_loss_without_labels_is_zero_with_zero_gradient() -> None:
    value, gradient = value_and_gradient(
        lambda x: language_model_loss(x, paddle.full([2, 3], -100, "int64")), random(2, 3, 5)
    )
    assert value == 0 and not gradient.any()


def test_language_model_loss_does_not_shift() -> None:
    logits = np.full((1, 3, 4), -50, np.float32)
    logits[0, [0, 1, 2], [3, 1, 2]] = 50
    assert float(language_model_loss(paddle.to_tensor(logits), paddle.to_tensor([[3, 1, 2]]))) < 1e-6


def test_language_model_loss_is_computed_in_float32() -> None:
    logits = paddle.to_tensor(random(2, 4, 9)).astype("bfloat16")
    labels = paddle.to_tensor(np.arange(8).reshape(2, 4))
    loss = language_model_loss(logits, labels)
    assert loss.dtype == paddle.float32
    expected = slow_language_model_loss(logits.astype("float32").numpy().astype(np.float64), labels.numpy())
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_language_model_loss_of_extreme_logits_is_finite() -> None:
    logits = paddle.to_tensor(np.array([[[3e4, -3e4, 0.0]]], np.float32))
    assert 60 < float(language_model_loss(logits, paddle.to_tensor([[1]]))) < 1e5  # Paddle cuts it off at 64
    assert float(language_model_loss(logits / 1000, paddle.to_tensor([[1]]))) == pytest.approx(60)


# Router losses.


def slow_load_balance(probabilities: np.ndarray, counts: np.ndarray) -> float:
    shares = probabilities / probabilities.sum(axis=-1, keepdims=True)
    tokens, experts = probabilities.shape
    return float(sum(experts * shares[:, e].mean() * counts[e] / tokens for e in range(experts)))


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("normalised", [True, False])
def test_load_balance_loss(k: int, normalised: bool) -> None:
    logits = random(9, 5, seed=k)
    probabilities = softmax(logits) if normalised else 1 / (1 + np.exp(-logits))
    counts = np.bincount(top_k(probabilities, k).ravel(), minlength=5)
    check(lambda x: load_balance_loss(x, k), lambda x: slow_load_balance(x, counts), probabilities.astype(np.float32))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_load_balance_loss_is_k_for_uniform_routing_and_larger_for_a_collapsed_one(k: int) -> None:
    turns = np.stack([np.roll(np.arange(4), i) for i in range(4)]).astype(np.float32)
    uniform = softmax(1e-3 * turns)  # every expert is best, second best, ... equally often
    assert float(load_balance_loss(paddle.to_tensor(uniform), k)) == pytest.approx(k, rel=1e-3)
    collapsed = softmax(np.tile(np.array([9.0, 6.0, 3.0, 0.0], np.float32), (4, 1)))
    if k < 4:
        assert float(load_balance_loss(paddle.to_tensor(collapsed), k)) > k + 0.1


def test_router_z_loss() -> None:
    check(router_z_loss, lambda x: float((np.log(np.exp(x).sum(axis=-1)) ** 2).mean()), 2 * random(6, 4))


def slow_orthogonalization(weight: np.ndarray) -> float:
    columns = weight / np.linalg.norm(weight, axis=0)
    gram = columns.T @ columns
    return float(((gram - np.eye(len(gram))) ** 2).sum() / len(gram) ** 2)


def test_orthogonalization_loss() -> None:
    check(orthogonalization_loss, slow_orthogonalization, random(7, 4))


def test_orthogonalization_loss_of_orthogonal_columns_of_any_length_is_zero() -> None:
    directions, _ = np.linalg.qr(random(8, 5))
    weight = directions * np.array([0.1, 1, 2, 3, 50])
    assert float(orthogonalization_loss(paddle.to_tensor(weight.astype(np.float32)))) < 1e-12


def test_orthogonalization_loss_of_equal_columns() -> None:
    assert float(orthogonalization_loss(paddle.ones([6, 4]))) == pytest.approx(12 / 16)


# Correction bias.


@pytest.mark.parametrize("shape", [[4], [1, 4], [2, 4]])
def test_correction_bias_moves_against_the_load(shape: list[int]) -> None:
    counts = np.broadcast_to(np.array([10, 0, 5, 5]), shape)
    bias = paddle.create_parameter(shape, "float32", default_initializer=paddle.nn.initializer.Constant(0.5))
    bias.stop_gradient = True
    assert update_correction_bias(bias, paddle.to_tensor(counts.copy()), 0.25) is None
    expected = np.broadcast_to(np.array([0.25, 0.75, 0.5, 0.5], np.float32), shape)
    assert bias.numpy().tolist() == expected.tolist()
    assert bias.stop_gradient and bias.dtype == paddle.float32


def test_correction_bias_balances_each_bank_by_its_own_mean() -> None:
    bias = paddle.zeros([2, 2])
    update_correction_bias(bias, paddle.to_tensor([[100, 300], [3, 1]]), 1.0)
    assert bias.numpy().tolist() == [[1, -1], [-1, 1]]
