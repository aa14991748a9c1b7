"""Losses of the router, and the correction bias."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import Tensor

from ernie45.errors import ErnieError
from ernie45.losses import (
    RouterLosses,
    attach,
    load_balance_loss,
    orthogonalization_loss,
    orthogonalize_step,
    router_losses,
    router_z_loss,
    sum_over_ranks,
    update_correction_bias,
)
from ernie45.models.moe import Routing
from tests.helpers.losses import check, random
from tests.helpers.numeric import numeric_gradient, softmax, top_k


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


@pytest.mark.parametrize(("hidden_size", "experts"), [(7, 4), (3, 5)])
def test_orthogonalize_step_goes_down_the_gradient(hidden_size: int, experts: int) -> None:
    start = random(hidden_size, experts)
    weight = paddle.to_tensor(start, stop_gradient=False)
    assert orthogonalize_step([weight], 0.5) is None
    expected = start - 0.5 * numeric_gradient(slow_orthogonalization, start)
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert not weight.stop_gradient and weight.grad is None


def test_orthogonalize_steps_make_the_loss_fall_to_zero_where_there_is_room() -> None:
    weight = paddle.to_tensor(random(8, 5), stop_gradient=False)
    losses = []
    for _ in range(100):
        losses.append(float(orthogonalization_loss(weight)))
        orthogonalize_step([weight], 2.0)
    assert all(after < before for before, after in zip(losses[:10], losses[1:11], strict=True))
    assert losses[-1] < 1e-3 * losses[0]


def test_orthogonalize_step_leaves_frozen_and_orthonormal_weights_alone() -> None:
    frozen, directions = paddle.to_tensor(random(7, 4)), np.linalg.qr(random(8, 5))[0]
    orthonormal = paddle.to_tensor(directions, stop_gradient=False)
    orthogonalize_step([frozen, orthonormal], 10.0)
    assert frozen.numpy().tolist() == random(7, 4).tolist()
    np.testing.assert_allclose(orthonormal.numpy(), directions, atol=1e-5)


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


def test_balance_is_k_for_each_bank_and_layer_that_is_routed_uniformly() -> None:
    turns = np.stack([np.roll(np.arange(5), i) for i in range(5)]).astype(np.float32)
    uniform = paddle.to_tensor(1e-3 * np.concatenate([turns, turns]))  # each expert is best, second best, ... as often
    routing = [routed(1, 0, uniform), routed(2, 0, uniform), routed(2, 1, uniform)]
    weights = {layer: [paddle.ones([7, 5]), paddle.ones([7, 5])] for layer in (1, 2)}
    found = router_losses(routing, weights, K)
    assert [float(bank.balance) for bank in found.banks] == pytest.approx([2 * K, K], rel=1e-3)


def test_attached_router_losses_reach_gradients_but_not_the_value() -> None:
    x = paddle.to_tensor([3.0, 5.0], stop_gradient=False)
    loss = attach(x[0] ** 2, 1e3 * x[1] + x[0])
    assert float(loss) == 9
    loss.backward()
    assert x.grad.numpy().tolist() == [7, 1000]


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


def test_correction_bias_follows_the_counts_of_all_ranks() -> None:
    mine, others = paddle.to_tensor([[9, 0, 0, 3]]), paddle.to_tensor([[0, 0, 20, 0]])
    bias = paddle.zeros([1, 4])
    update_correction_bias(bias, mine, 0.5, reduce=lambda counts: counts + others)
    assert bias.numpy().tolist() == [[-0.5, 0.5, -0.5, 0.5]]  # of 8 each; alone, the third would have gone up
    assert mine.numpy().tolist() == [[9, 0, 0, 3]]


def test_a_single_process_sums_over_itself() -> None:
    counts = paddle.to_tensor([3, 1])
    assert sum_over_ranks(counts).numpy().tolist() == [3, 1]


def test_all_ranks_are_asked_once_training_is_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paddle.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(paddle.distributed, "all_reduce", lambda counts: counts.add_(paddle.to_tensor([10, 20])))
    counts = paddle.to_tensor([3, 1])
    assert sum_over_ranks(counts).numpy().tolist() == [13, 21]
    assert counts.numpy().tolist() == [3, 1]


def test_correction_bias_makes_the_load_of_a_toy_router_more_even() -> None:
    tokens, experts, k = 512, 8, 2
    logits = random(tokens, experts) + np.linspace(2, -2, experts, dtype=np.float32)  # most want the first experts
    scores, bias = paddle.nn.functional.softmax(paddle.to_tensor(logits)), paddle.zeros([experts])
    excess = []  # load of the busiest expert over the mean load
    for _ in range(300):
        chosen = paddle.topk(scores + bias, k)[1]
        counts = paddle.bincount(chosen.flatten(), minlength=experts)
        excess.append(float(counts.max()) * experts / (tokens * k))
        update_correction_bias(bias, counts, 1e-3)
    assert excess[0] > 2.5 and excess[100] < excess[0] - 0.5 and max(excess[-10:]) < 1.25
