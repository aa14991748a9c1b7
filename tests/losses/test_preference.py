"""Losses of pairs of answers against slow definitions, and what each of them promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import paddle
import pytest
from paddle import Tensor

from ernie45.errors import ErnieError
from ernie45.losses import (
    PAIR_LOSSES,
    Answers,
    Pairs,
    PreferenceOptions,
    chunked_log_probs,
    preference_loss,
    sequence_log_probs,
    token_log_probs,
)
from ernie45.losses.preference import AVERAGING_LOSSES
from tests.helpers.losses import random, slow_token_losses
from tests.helpers.numeric import numeric_gradient

# Of three pairs: chosen, rejected, the same under the reference, and lengths.
LOG_PROBS = np.array([[-4, -9, -2.5], [-5, -6, -7.5], [-3, -9.5, -4], [-6.5, -5, -7]], np.float32)
LENGTHS = np.array([[2, 5, 3], [4, 3, 6]], np.float32)
MARGINS = np.array([0.5, 2, 7], np.float32)


def pairs_of(log_probs: np.ndarray | Tensor, lengths: np.ndarray = LENGTHS) -> Pairs:
    tensors = paddle.unbind(log_probs if isinstance(log_probs, Tensor) else paddle.to_tensor(log_probs))
    return Pairs(*tensors, *paddle.unbind(paddle.to_tensor(lengths)), margins=paddle.to_tensor(MARGINS))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def odds(log_prob: float) -> float:
    return math.exp(log_prob) / (1 - math.exp(log_prob))


def slow_sigmoid(
    c: float, r: float, ref_c: float, ref_r: float, *_: float, beta: float, s: float = 0.0, offset: float = 0.0
) -> float:
    h = beta * ((c - ref_c) - (r - ref_r)) - offset
    return -(1 - s) * log_sigmoid(h) - s * log_sigmoid(-h)


def slow_hinge(c: float, r: float, ref_c: float, ref_r: float, *_: float, beta: float) -> float:
    return max(0.0, 1 - beta * ((c - r) - (ref_c - ref_r)))


def slow_ipo(c: float, r: float, ref_c: float, ref_r: float, len_c: float, len_r: float, *, beta: float) -> float:
    return ((c / len_c - r / len_r) - (ref_c / len_c - ref_r / len_r) - 1 / (2 * beta)) ** 2


def slow_simpo(
    c: float, r: float, ref_c: float, ref_r: float, len_c: float, len_r: float, *, beta: float, gamma: float
) -> float:
    return -log_sigmoid(beta / len_c * c - beta / len_r * r - gamma)


def slow_dpop(c: float, r: float, ref_c: float, ref_r: float, *_: float, beta: float, weight: float) -> float:
    return -log_sigmoid(beta * ((c - ref_c) - (r - ref_r) - weight * max(0.0, ref_c - c)))


def slow_orpo(c: float, r: float, ref_c: float, ref_r: float, len_c: float, len_r: float) -> float:
    return -log_sigmoid(math.log(odds(c / len_c) / odds(r / len_r)))


CASES: dict[str, tuple[PreferenceOptions, Callable[..., float]]] = {
    "sigmoid": (PreferenceOptions(beta=0.3), lambda *x: slow_sigmoid(*x, beta=0.3)),
    "smoothed": (
        PreferenceOptions(beta=0.3, label_smoothing=0.2),
        lambda *x: slow_sigmoid(*x, beta=0.3, s=0.2),
    ),
    "hinge": (PreferenceOptions("hinge", beta=0.3), lambda *x: slow_hinge(*x, beta=0.3)),
    "ipo": (PreferenceOptions("ipo", beta=0.3), lambda *x: slow_ipo(*x, beta=0.3)),
    "simpo": (PreferenceOptions("simpo", beta=2.0, gamma=1.5), lambda *x: slow_simpo(*x, beta=2.0, gamma=1.5)),
    "dpop": (PreferenceOptions("dpop", beta=0.3, dpop_weight=5), lambda *x: slow_dpop(*x, beta=0.3, weight=5)),
    "orpo": (PreferenceOptions("orpo"), slow_orpo),
}


def slow_mean(slow: Callable[..., float], log_probs: np.ndarray) -> float:
    return float(np.mean([slow(*column) for column in np.concatenate([log_probs, LENGTHS]).T]))


def gradient_of(loss: Callable[[Pairs], Tensor], log_probs: np.ndarray = LOG_PROBS) -> np.ndarray:
    """Of chosen, rejected and their references, [4, pairs]."""
    point = paddle.to_tensor(log_probs, stop_gradient=False)
    loss(pairs_of(point)).backward()
    return point.grad.numpy()


def test_every_loss_is_tested() -> None:
    assert {options.loss for options, _ in CASES.values()} == set(PAIR_LOSSES)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_definition(case: str) -> None:
    options, slow = CASES[case]
    found = preference_loss(pairs_of(LOG_PROBS), options)
    assert PAIR_LOSSES[options.loss](pairs_of(LOG_PROBS), options).shape == [3]
    assert found.total.dtype == paddle.float32 and found.total.shape == []
    assert float(found.total) == float(found.preference) == pytest.approx(slow_mean(slow, LOG_PROBS), rel=1e-5)
    expected = numeric_gradient(lambda x: slow_mean(slow, x), LOG_PROBS)
    gradient = gradient_of(lambda pairs: preference_loss(pairs, options).total)
    np.testing.assert_allclose(gradient[:2], expected[:2], rtol=1e-3, atol=1e-5)
    assert not gradient[2:].any()  # the reference never learns


@pytest.mark.parametrize("case", CASES)
def test_the_loss_falls_when_the_chosen_answer_gets_likelier(case: str) -> None:
    options, _ = CASES[case]

    def loss(shift: float) -> float:
        return float(preference_loss(pairs_of(LOG_PROBS + np.array([[shift], [-shift], [0], [0]])), options).total)

    assert loss(-0.5) > loss(0.0) > loss(0.5)


@pytest.mark.parametrize("case", ["sigmoid", "smoothed", "dpop"])
def test_a_policy_that_is_its_reference_has_the_loss_of_a_coin(case: str) -> None:
    same = np.concatenate([LOG_PROBS[2:], LOG_PROBS[2:]])
    assert float(preference_loss(pairs_of(same), CASES[case][0]).total) == pytest.approx(math.log(2))


@pytest.mark.parametrize("case", ["sigmoid", "orpo"])
def test_exchanged_answers_have_the_complementary_probability(case: str) -> None:
    loss = PAIR_LOSSES[CASES[case][0].loss]
    straight = loss(pairs_of(LOG_PROBS), CASES[case][0]).numpy()
    exchanged = loss(pairs_of(LOG_PROBS[[1, 0, 3, 2]], LENGTHS[::-1].copy()), CASES[case][0]).numpy()
    np.testing.assert_allclose(np.exp(-straight) + np.exp(-exchanged), 1, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chosen", [-1e4, -1e-9, 0.0])
@pytest.mark.parametrize("rejected", [-1e4, 0.0])
def test_extreme_log_probabilities_stay_finite(case: str, chosen: float, rejected: float) -> None:
    log_probs = np.array([[chosen] * 3, [rejected] * 3, [-10.0] * 3, [-1e4] * 3], np.float32)
    options = CASES[case][0]
    assert np.isfinite(float(preference_loss(pairs_of(log_probs), options).total))
    assert np.isfinite(gradient_of(lambda pairs: preference_loss(pairs, options).total, log_probs)).all()


# Where upstream goes another way.


def test_dpop_penalises_inside_the_sigmoid_and_only_lost_probability() -> None:
    options = PreferenceOptions("dpop", beta=0.3, dpop_weight=5)
    gained = LOG_PROBS + np.array([[9], [0], [0], [0]], np.float32)
    plain = replace(options, loss="sigmoid")
    assert float(preference_loss(pairs_of(gained), options).total) == float(
        preference_loss(pairs_of(gained), plain).total
    )
    losing = np.array([[-40], [-90], [-4], [-9]], np.float32).repeat(3, axis=1)  # ahead by 45, but 36 less likely
    u, lost = 45.0, 36.0
    assert float(preference_loss(pairs_of(losing), options).total) == pytest.approx(0.3 * (5 * lost - u), rel=1e-4)
    outside = -log_sigmoid(0.3 * u) + 5 * lost
    assert outside != pytest.approx(0.3 * (5 * lost - u), rel=0.1)


@pytest.mark.parametrize("case", AVERAGING_LOSSES)
def test_losses_per_token_do_not_see_lengths(case: str) -> None:
    options = CASES[case][0]
    factors = np.array([[3, 1, 2], [1, 4, 2]], np.float32)
    longer = pairs_of(LOG_PROBS * np.concatenate([factors, factors]), LENGTHS * factors)
    assert float(preference_loss(longer, options).total) == pytest.approx(
        float(preference_loss(pairs_of(LOG_PROBS), options).total), rel=1e-5
    )


def test_normalized_answers_have_their_mean_length_under_policy_and_reference_alike() -> None:
    options = PreferenceOptions(beta=0.3, normalize=True)
    factors = LENGTHS.mean(axis=0) / LENGTHS
    scaled = LOG_PROBS.astype(np.float64) * np.concatenate([factors, factors])
    expected = slow_mean(CASES["sigmoid"][1], scaled)
    assert float(preference_loss(pairs_of(LOG_PROBS), options).total) == pytest.approx(expected, rel=1e-5)
    equal = np.full((2, 3), 4, np.float32)
    assert float(preference_loss(pairs_of(LOG_PROBS, equal), options).total) == pytest.approx(
        float(preference_loss(pairs_of(LOG_PROBS, equal), replace(options, normalize=False)).total), rel=1e-6
    )


def test_an_offset_asks_for_more_where_scores_are_further_apart() -> None:
    options = PreferenceOptions(beta=0.3, offset=0.7)
    columns = zip(LOG_PROBS.T.astype(np.float64), MARGINS.astype(np.float64), strict=True)
    expected = np.mean([slow_sigmoid(*column, beta=0.3, offset=0.7 * math.log(margin)) for column, margin in columns])
    assert float(preference_loss(pairs_of(LOG_PROBS), options).total) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ErnieError, match=r"offset: needs the difference of the scores .* found none"):
        preference_loss(replace(pairs_of(LOG_PROBS), margins=None), options)
    tied = replace(pairs_of(LOG_PROBS), margins=paddle.zeros([3]))
    assert np.isfinite(float(preference_loss(tied, options).total))


# The total, and reports.


def test_total_weighs_preference_and_language_model_loss() -> None:
    options = PreferenceOptions("orpo", preference_weight=0.1, sft_weight=2.0)
    found = preference_loss(pairs_of(LOG_PROBS), options)
    nll = -LOG_PROBS[0].sum() / LENGTHS[0].sum()
    assert float(found.sft) == pytest.approx(nll, rel=1e-6)
    assert float(found.total) == pytest.approx(0.1 * slow_mean(slow_orpo, LOG_PROBS) + 2 * nll, rel=1e-5)
    gradient = gradient_of(lambda pairs: preference_loss(pairs, options).total)
    expected = numeric_gradient(
        lambda x: 0.1 * slow_mean(slow_orpo, x) - 2 * float(x[0].sum()) / float(LENGTHS[0].sum()), LOG_PROBS
    )
    np.testing.assert_allclose(gradient[:2], expected[:2], rtol=1e-3, atol=1e-5)


def test_rewards_accuracy_and_margin() -> None:
    found = preference_loss(pairs_of(LOG_PROBS), PreferenceOptions(beta=0.5))
    assert found.chosen_rewards.numpy().tolist() == [-0.5, 0.25, 0.75]
    assert found.rejected_rewards.numpy().tolist() == [0.75, -0.5, -0.25]
    assert found.accuracy == pytest.approx(2 / 3) and found.margin == pytest.approx(0.5 / 3)
    assert found.chosen_rewards.stop_gradient


def test_pairs_of_rows() -> None:
    log_probs = paddle.to_tensor([-1.0, -2.0, -3.0, -4.0], stop_gradient=False)
    reference = paddle.to_tensor([-5.0, -6.0, -7.0, -8.0], stop_gradient=False)
    lengths = paddle.to_tensor([1.0, 2.0, 3.0, 4.0])
    pairs = Pairs.of(Answers(log_probs, lengths), Answers(reference, lengths))
    assert pairs.chosen.numpy().tolist() == [-1, -2] and pairs.rejected.numpy().tolist() == [-3, -4]
    assert pairs.reference_chosen.numpy().tolist() == [-5, -6]
    assert pairs.reference_rejected.numpy().tolist() == [-7, -8] and pairs.reference_chosen.stop_gradient
    assert pairs.chosen_lengths.numpy().tolist() == [1, 2] and pairs.rejected_lengths.numpy().tolist() == [3, 4]
    assert Pairs.of(Answers(log_probs, lengths)).reference_rejected.numpy().tolist() == [0, 0]


@pytest.mark.parametrize(("rows", "reference"), [(3, 3), (4, 2)])
def test_pairs_that_do_not_go_together(rows: int, reference: int) -> None:
    policy, fixed = (Answers(paddle.zeros([count]), paddle.ones([count])) for count in (rows, reference))
    with pytest.raises(ErnieError, match=f"preference pairs: .* found {rows} rows and {reference} of the reference"):
        Pairs.of(policy, fixed)


def test_sequence_log_probs_are_sums_over_learned_tokens_from_logits_and_from_chunks() -> None:
    hidden, weight = paddle.to_tensor(random(2, 3, 5)), paddle.to_tensor(random(7, 5, seed=1))
    labels = np.array([[-100, 2, 6], [0, -100, -100]])
    logits = paddle.matmul(hidden, weight, transpose_y=True)
    expected = -np.array(slow_token_losses(logits.numpy().astype(np.float64), labels)).reshape(2, 3).sum(axis=1)
    wanted = paddle.to_tensor(labels)
    ways = (token_log_probs(logits, wanted), chunked_log_probs(hidden, weight, wanted, transposed=True))
    for log_probs in ways:
        found = sequence_log_probs(log_probs, wanted)
        np.testing.assert_allclose(found.log_probs.numpy(), expected, rtol=1e-5)
        assert found.lengths.numpy().tolist() == [2, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dpo"}, "loss: expected one of sigmoid, hinge, ipo, simpo, dpop, orpo, found 'dpo'"),
        ({"beta": 0}, "beta: expected a positive number, found 0"),
        ({"label_smoothing": 0.5}, "label_smoothing: expected at least 0 and less than 0.5, found 0.5"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "label_smoothing: goes with the losses sigmoid and simpo, not with"),
        ({"offset": 1.0, "loss": "simpo"}, "offset: goes with the loss sigmoid, not with simpo"),
        ({"normalize": True, "loss": "simpo"}, "normalize: the loss simpo averages over tokens"),
    ],
)
def test_options_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(ErnieError, match=message):
        PreferenceOptions(**options)
