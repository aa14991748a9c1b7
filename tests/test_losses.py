"""Losses against slow definitions in float64, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle import Tensor

from ernie45.errors import ErnieError
from ernie45.losses import (
    RouterLosses,
    language_model_loss,
    load_balance_loss,
    losses_by_kind,
    orthogonalization_loss,
    router_losses,
    router_z_loss,
    token_balanced_loss,
    token_losses,
    update_correction_bias,
)
from ernie45.models.moe import Routing
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


def slow_token_losses(logits: np.ndarray, labels: np.ndarray) -> list[float]:
    rows, wanted = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    return [0.0 if label == -100 else -np.log(softmax(row)[label]) for row, label in zip(rows, wanted, strict=True)]


def test_token_losses_have_the_shape_of_the_labels() -> None:
    logits, labels = random(2, 3, 7), np.array([[0, -100, 6], [-100, 2, 2]])
    losses = token_losses(paddle.to_tensor(logits).astype("bfloat16"), paddle.to_tensor(labels))
    assert losses.shape == [2, 3] and losses.dtype == paddle.float32
    rounded = paddle.to_tensor(logits).astype("bfloat16").astype("float64").numpy()
    np.testing.assert_allclose(losses.numpy().ravel(), slow_token_losses(rounded, labels), rtol=1e-5)


@settings(max_examples=20)
@given(
    labels=st.lists(st.sampled_from([-100, 0, 1, 4, 6]), min_size=1, max_size=6),
    denominator=st.sampled_from([1, 3, 4096, 0.5]),
)
def test_token_balanced_loss_has_the_mean_for_value_and_a_fixed_denominator_in_its_gradient(
    labels: list[int], denominator: float
) -> None:
    logits, wanted = random(1, len(labels), 7), np.array([labels])
    value, gradient = value_and_gradient(
        lambda x: token_balanced_loss(x, paddle.to_tensor(wanted), denominator), logits
    )
    assert value == pytest.approx(slow_language_model_loss(logits.astype(np.float64), wanted), rel=1e-5)
    expected = numeric_gradient(lambda x: sum(slow_token_losses(x, wanted)) / denominator, logits)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5 / denominator)


@pytest.mark.parametrize("denominator", [0, -1, float("nan")])
def test_token_balanced_loss_refuses_a_denominator_that_is_not_positive(denominator: float) -> None:
    with pytest.raises(ErnieError, match="denominator: expected a positive number of tokens, found"):
        token_balanced_loss(paddle.zeros([1, 1, 3]), paddle.zeros([1, 1], "int64"), denominator)


def test_losses_by_kind_of_row() -> None:
    types = [[0, 0, 0], [0, 0, 1], [1, 2, 1], [0, 0, 0], [1, 0, 0]]
    labels = [[5, -100, 5], [-100, 5, -100], [5, 5, -100], [-100, -100, 5], [5, -100, -100]]
    losses = [[1.0, 0.0, 2.0], [0.0, 4.0, 0.0], [8.0, 16.0, 0.0], [0.0, 0.0, 3.0], [5.0, 0.0, 0.0]]
    found = losses_by_kind(paddle.to_tensor(losses), paddle.to_tensor(labels), paddle.to_tensor(types))
    assert found == {"text": 2.0, "image": 4.5, "video": 12.0}


def test_losses_by_kind_leave_out_what_is_not_learned() -> None:
    types, labels = paddle.to_tensor([[0, 0], [1, 1]]), paddle.to_tensor([[-100, 5], [-100, -100]])
    assert losses_by_kind(paddle.to_tensor([[0.0, 7.0], [0.0, 0.0]]), labels, types) == {"text": 7.0}


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


K = 2
COEFFICIENTS = {"balance": [0.5, 2.0], "orthogonality": [0.25, 8.0], "z": [0.125, 4.0]}
TOKENS = {(1, 0): 6, (1, 1): 3, (2, 0): 6, (4, 1): 5}  # by layer and bank: layer 2 saw no picture, layer 4 no text


def routed(layer: int, bank: int, logits: Tensor) -> Routing:
    probabilities = paddle.nn.functional.softmax(logits)
    return Routing(layer, bank, logits, probabilities, *reversed(paddle.topk(probabilities, K)))


def all_router_losses(x: Tensor, weights: Tensor, **coefficients: float | list[float]) -> RouterLosses:
    """Of logits x [tokens, experts], cut as TOKENS says, and router weights [layers, banks, hidden, experts]."""
    parts = paddle.split(x, list(TOKENS.values()))
    routing = [routed(layer, bank, part) for (layer, bank), part in zip(TOKENS, parts, strict=True)]
    by_layer = {layer: paddle.unbind(weights[index]) for index, layer in enumerate((1, 2, 4))}
    return router_losses(routing, by_layer, K, **coefficients)


def slow_terms(x: np.ndarray, weights: np.ndarray, bank: int, chosen: np.ndarray) -> tuple[float, float, float]:
    """Balance, orthogonality and z of one bank, written out; `chosen` are the logits that decide who is chosen."""
    balance = orthogonality = z = 0.0
    ends = np.cumsum(list(TOKENS.values()))
    for (layer, owner), end in zip(TOKENS, ends, strict=True):
        if owner != bank:
            continue
        rows = slice(end - TOKENS[layer, owner], end)
        counts = np.bincount(top_k(chosen[rows], K).ravel(), minlength=x.shape[-1])
        balance += slow_load_balance(softmax(x[rows]), counts)
        orthogonality += slow_orthogonalization(weights[(1, 2, 4).index(layer), bank])
        z += float((np.log(np.exp(x[rows]).sum(axis=-1)) ** 2).mean())
    return balance, orthogonality, z


def slow_total(x: np.ndarray, weights: np.ndarray, chosen: np.ndarray) -> float:
    terms = [slow_terms(x, weights, bank, chosen) for bank in (0, 1)]
    return sum(
        coefficients[bank] * terms[bank][index]
        for index, coefficients in enumerate(COEFFICIENTS.values())
        for bank in (0, 1)
    )


def test_router_losses_are_those_of_each_bank_with_its_own_coefficients() -> None:
    x, weights = random(sum(TOKENS.values()), 5), random(3, 2, 7, 5, seed=1)
    found = all_router_losses(paddle.to_tensor(x), paddle.to_tensor(weights), **COEFFICIENTS)
    for bank in (0, 1):
        terms = found.banks[bank]
        expected = slow_terms(x.astype(np.float64), weights.astype(np.float64), bank, x)
        assert [float(terms.balance), float(terms.orthogonality), float(terms.z)] == pytest.approx(expected, rel=1e-5)
    fixed = paddle.to_tensor(weights)
    check(lambda t: all_router_losses(t, fixed, **COEFFICIENTS).total, lambda a: slow_total(a, weights, x), x)
    fixed_logits = paddle.to_tensor(x)
    check(lambda t: all_router_losses(fixed_logits, t, **COEFFICIENTS).total, lambda a: slow_total(x, a, x), weights)


def test_one_coefficient_is_for_all_banks_and_none_means_zero() -> None:
    x, weights = paddle.to_tensor(random(sum(TOKENS.values()), 5)), paddle.to_tensor(random(3, 2, 7, 5, seed=1))
    one = all_router_losses(x, weights, balance=0.5)
    assert float(one.total) == float(all_router_losses(x, weights, balance=[0.5, 0.5]).total)
    assert float(one.total) == pytest.approx(0.5 * sum(float(bank.balance) for bank in one.banks))
    assert float(all_router_losses(x, weights).total) == 0


@pytest.mark.parametrize("empty", [[], [routed(1, 1, paddle.zeros([0, 5]))]], ids=["absent", "no tokens"])
def test_a_bank_without_tokens_adds_exactly_nothing(empty: list[Routing]) -> None:
    weight = paddle.to_tensor(random(7, 5), stop_gradient=False)
    other = paddle.to_tensor(random(7, 5, seed=1), stop_gradient=False)
    logits = paddle.to_tensor(random(4, 5, seed=2), stop_gradient=False)
    found = router_losses([routed(1, 0, logits), *empty], {1: [weight, other]}, K, balance=1, orthogonality=1, z=1)
    terms = found.banks[1]
    assert float(terms.balance) == float(terms.orthogonality) == float(terms.z) == 0
    found.total.backward()
    assert np.isfinite(logits.grad.numpy()).all() and weight.grad.numpy().any()
    assert other.grad is None or not other.grad.numpy().any()


def test_router_losses_of_a_dense_model_can_be_added_to_a_loss() -> None:
    x = paddle.to_tensor(2.0, stop_gradient=False)
    found = router_losses([], {}, K, balance=1.0)
    (x + found.total).backward()
    assert found.banks == () and float(x.grad) == 1


def test_coefficients_that_do_not_go_with_the_banks() -> None:
    with pytest.raises(ErnieError, match=r"z: expected one coefficient or 1, one per expert bank, found \[1, 2\]"):
        router_losses([], {0: [paddle.ones([3, 2])]}, 1, z=[1, 2])


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


def test_correction_bias_of_a_bank_without_tokens_stays() -> None:
    bias = paddle.to_tensor([[0.5, 0.5], [0.25, -0.5]])
    update_correction_bias(bias, paddle.to_tensor([[3, 1], [0, 0]]), 0.125)
    assert bias.numpy().tolist() == [[0.375, 0.625], [0.25, -0.5]]
