"""UPO: PPO's objective against its definition, and that it is PPO without pairs and DPO without advantages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import paddle
import pytest
from paddle import Tensor

from ernie45.losses import Pairs, PreferenceOptions, Rollout, policy_gradient_loss, preference_loss, upo_loss
from tests.helpers.losses import check, random

LABELS = np.array([[-100, 4, 2, 5], [1, 3, -100, -100]])
OLD = -np.abs(random(2, 4)) - 0.5
NEW = OLD + 0.4 * random(2, 4, seed=1)  # some ratios within 0.8 .. 1.2, some beyond
ADVANTAGES = np.array([[1.5, -0.5, 2.0, -1.0], [-2.0, 1.0, 3.0, 3.0]], np.float32)
PAIRS = Pairs(*(paddle.to_tensor(values) for values in ([-4.0], [-5.0], [-3.0], [-6.5], [2.0], [4.0])))
OPTIONS = PreferenceOptions(beta=0.3, preference_weight=0.5)


def rollout(log_probs: Tensor, advantages: np.ndarray = ADVANTAGES) -> Rollout:
    return Rollout(log_probs, paddle.to_tensor(OLD), paddle.to_tensor(advantages), paddle.to_tensor(LABELS))


def slow_policy_gradient(log_probs: np.ndarray, advantages: np.ndarray, clip: float) -> float:
    terms = []
    for index in np.argwhere(LABELS != -100):
        place = tuple(index)
        ratio, advantage = float(np.exp(log_probs[place] - OLD[place])), float(advantages[place])
        terms.append(min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage))
    return -float(np.mean(terms))


@pytest.mark.parametrize("clip", [0.1, 0.2, 0.5])
def test_policy_gradient_loss(clip: float) -> None:
    check(
        lambda x: policy_gradient_loss(rollout(x), clip),
        lambda x: slow_policy_gradient(x, ADVANTAGES, clip),
        NEW,
    )


def test_one_advantage_per_answer_is_that_of_all_its_tokens() -> None:
    each = np.array([[2.0], [-1.0]], np.float32)
    found = policy_gradient_loss(rollout(paddle.to_tensor(NEW), each))
    assert float(found) == pytest.approx(slow_policy_gradient(NEW, np.tile(each, (1, 4)), 0.2), rel=1e-5)


def test_the_loss_falls_when_good_answers_get_likelier() -> None:
    good = np.ones((2, 1), np.float32)
    losses = [float(policy_gradient_loss(rollout(paddle.to_tensor(OLD + shift), good))) for shift in (-0.1, 0, 0.1)]
    assert losses[0] > losses[1] > losses[2]


def test_a_rollout_without_sampled_tokens_is_zero() -> None:
    empty = replace(rollout(paddle.to_tensor(NEW)), labels=paddle.full([2, 4], -100, "int64"))
    assert float(policy_gradient_loss(empty)) == 0


@pytest.mark.parametrize("new", [-1e4, 0.0])
@pytest.mark.parametrize("old", [-1e4, 0.0])
def test_extreme_log_probabilities_stay_finite(new: float, old: float) -> None:
    x = paddle.full([2, 4], new)
    x.stop_gradient = False
    loss = policy_gradient_loss(replace(rollout(x), old_log_probs=paddle.full([2, 4], old)))
    loss.backward()
    assert np.isfinite(float(loss)) and np.isfinite(x.grad.numpy()).all()


def test_upo_is_the_sum_and_reaches_both() -> None:
    log_probs = paddle.to_tensor(NEW, stop_gradient=False)
    chosen = paddle.to_tensor([-4.0], stop_gradient=False)
    pairs = replace(PAIRS, chosen=chosen)
    loss = upo_loss(rollout(log_probs), pairs, OPTIONS)
    loss.backward()
    assert log_probs.grad.numpy().any() and chosen.grad.numpy().any()
    u = (-4.0 + 3.0) - (-5.0 + 6.5)
    expected = slow_policy_gradient(NEW, ADVANTAGES, 0.2) + 0.5 * np.log1p(np.exp(-0.3 * u))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_upo_is_ppo_without_pairs_and_dpo_without_advantages() -> None:
    log_probs = paddle.to_tensor(NEW)
    ppo = upo_loss(rollout(log_probs), PAIRS, replace(OPTIONS, preference_weight=0.0))
    assert float(ppo) == float(policy_gradient_loss(rollout(log_probs)))
    dpo = upo_loss(rollout(log_probs, np.zeros((2, 1), np.float32)), PAIRS, OPTIONS)
    assert float(dpo) == float(preference_loss(PAIRS, OPTIONS).total)
