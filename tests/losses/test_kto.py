"""KTO against its definition, and what it promises."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import Tensor

from ernie45.errors import ErnieError
from ernie45.losses import KTOOptions, kto_baseline, kto_loss, sequence_log_probs, token_log_probs
from tests.helpers.losses import check, random
from tests.helpers.numeric import numeric_gradient

POLICY = np.array([-3, -8, -2, -6], np.float32)
REFERENCE = np.array([-5, -7, -2.5, -4], np.float32)
GOOD = np.array([True, True, False, False])
BASELINE = 0.4
OPTIONS = KTOOptions(beta=0.5, desirable_weight=1.5, undesirable_weight=0.75)


def sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))


def slow_kto(
    policy: np.ndarray, reference: np.ndarray, good: np.ndarray, baseline: float, options: KTOOptions
) -> float:
    losses = [
        options.desirable_weight * (1 - sigmoid(options.beta * (p - r - baseline)))
        if desirable
        else options.undesirable_weight * (1 - sigmoid(options.beta * (baseline - (p - r))))
        for p, r, desirable in zip(policy, reference, good, strict=True)
    ]
    return float(np.mean(losses))


def fast_kto(policy: Tensor, reference: Tensor, baseline: Tensor | None = None) -> Tensor:
    baseline = paddle.to_tensor(BASELINE) if baseline is None else baseline
    return kto_loss(policy, reference, paddle.to_tensor(GOOD), baseline, OPTIONS).mean()


def test_kto_loss() -> None:
    check(
        lambda x: fast_kto(x, paddle.to_tensor(REFERENCE)),
        lambda x: slow_kto(x, REFERENCE, GOOD, BASELINE, OPTIONS),
        POLICY,
    )


def test_neither_reference_nor_baseline_learns() -> None:
    policy, reference, baseline = (
        paddle.to_tensor(array, stop_gradient=False) for array in (POLICY, REFERENCE, np.float32(BASELINE))
    )
    fast_kto(policy, reference, baseline).backward()
    assert policy.grad.numpy().all()
    assert reference.grad is None or not reference.grad.numpy().any()
    assert baseline.grad is None or not baseline.grad.numpy().any()


def test_good_answers_get_likelier_and_bad_ones_less() -> None:
    """Upstream's branch without the minus sign on cross entropies does the opposite."""
    logits = paddle.to_tensor(random(4, 3, 7), stop_gradient=False)
    labels = paddle.to_tensor(np.arange(12).reshape(4, 3) % 7)
    reference = sequence_log_probs(token_log_probs(logits.detach(), labels), labels).log_probs
    policy = sequence_log_probs(token_log_probs(logits, labels), labels).log_probs
    assert (policy.numpy() < 0).all()
    fast_kto(policy, reference).backward()
    moved = sequence_log_probs(token_log_probs(logits.detach() - logits.grad, labels), labels).log_probs
    assert ((moved > policy).numpy() == GOOD).all()


def test_baseline_is_the_mean_log_ratio_but_never_negative() -> None:
    policy = paddle.to_tensor(POLICY, stop_gradient=False)
    above = kto_baseline(policy, paddle.to_tensor(REFERENCE) - 2)
    assert float(above) == pytest.approx(float((POLICY - REFERENCE).mean()) + 2, rel=1e-6)
    assert above.stop_gradient and above.shape == []
    assert float(kto_baseline(policy, paddle.to_tensor(REFERENCE) + 9)) == 0
    assert float(kto_baseline(paddle.zeros([0]), paddle.zeros([0]))) == 0


def test_baseline_is_that_of_all_ranks() -> None:
    others = paddle.to_tensor([6.0, 2.0])  # sum and number of their log-ratios
    found = kto_baseline(paddle.to_tensor([1.0, 2.0]), paddle.zeros([2]), reduce=lambda sums: sums + others)
    assert float(found) == pytest.approx((3 + 6) / 4)


def test_weights_of_good_and_bad_answers() -> None:
    losses = {}
    for name, weights in {"both": (2.0, 3.0), "good": (2.0, 0.0), "bad": (0.0, 3.0)}.items():
        found = kto_loss(
            paddle.to_tensor(POLICY),
            paddle.to_tensor(REFERENCE),
            paddle.to_tensor(GOOD),
            paddle.zeros([]),
            KTOOptions(0.5, *weights),
        )
        assert found.shape == [4]
        losses[name] = found.numpy()
    assert losses["both"].tolist() == (losses["good"] + losses["bad"]).tolist()
    assert losses["good"][2:].tolist() == [0, 0] and losses["bad"][:2].tolist() == [0, 0]


@pytest.mark.parametrize("policy", [-1e4, 0.0])
@pytest.mark.parametrize("reference", [-1e4, 0.0])
def test_extreme_log_probabilities_stay_finite(policy: float, reference: float) -> None:
    x = paddle.full([4], policy)
    x.stop_gradient = False
    loss = fast_kto(x, paddle.full([4], reference))
    loss.backward()
    assert np.isfinite(float(loss)) and np.isfinite(x.grad.numpy()).all()


def test_gradients_at_several_betas() -> None:
    for beta in (0.01, 1.0):
        options = KTOOptions(beta)
        x = paddle.to_tensor(POLICY, stop_gradient=False)
        kto_loss(x, paddle.to_tensor(REFERENCE), paddle.to_tensor(GOOD), paddle.zeros([]), options).mean().backward()
        expected = numeric_gradient(lambda a, o=options: slow_kto(a, REFERENCE, GOOD, 0.0, o), POLICY)
        np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta: expected a positive number, found 0"),
        ({"desirable_weight": -1}, "expected numbers that are not negative, found -1 and 1.0"),
    ],
)
def test_options_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(ErnieError, match=message):
        KTOOptions(**options)
