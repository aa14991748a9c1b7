"""KTO: learning from single answers that are known to be good or bad."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ernie45.errors import ErnieError
from ernie45.losses.router import sum_over_ranks


@dataclass(frozen=True)
class KTOOptions:
    """How to learn from single answers.

    Attributes:
        beta: how closely the policy is held to the reference.
        desirable_weight, undesirable_weight: of good and of bad answers; the paper wants their numbers times their
            weights to be about the same.

    Raises:
        ErnieError: beta is not positive, or a weight is negative.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ErnieError(f"beta: expected a positive number, found {self.beta!r}")
        if not min(self.desirable_weight, self.undesirable_weight) >= 0:
            raise ErnieError(
                "desirable_weight, undesirable_weight: expected numbers that are not negative, "
                f"found {self.desirable_weight!r} and {self.undesirable_weight!r}"
            )


@paddle.no_grad()
def kto_baseline(policy: Tensor, reference: Tensor, reduce: Callable[[Tensor], Tensor] = sum_over_ranks) -> Tensor:
    """max(0, mean(policy - reference)) over answers to other prompts, of all ranks: float32 scalar without gradient.

    It estimates the divergence of the policy from the reference. One upstream keeps it above 0 only if there are
    several ranks; it is so here in any case, as a divergence is.

    Args:
        policy, reference: [rows] log-probabilities of answers that belong to another prompt of the batch.
        reduce: sums [2] of this process -> of all.
    """
    rows = paddle.full([], policy.shape[0], dtype="float32")
    total, count = paddle.unbind(reduce(paddle.stack([(policy - reference).sum(), rows])))
    return paddle.clip(total / paddle.clip(count, min=1), min=0)


def kto_loss(policy: Tensor, reference: Tensor, desirable: Tensor, baseline: Tensor, options: KTOOptions) -> Tensor:
    """w_d (1 - sigmoid(beta (r - z))) for good answers, w_u (1 - sigmoid(beta (z - r))) for bad ones, [rows].

    With r = policy - reference and the baseline z (arXiv 2402.01306, eq. 8). One of upstream's branches takes cross
    entropies for log-probabilities and so learns the opposite; here `policy` and `reference` are log-probabilities,
    which are at most 0.

    Args:
        policy, reference: [rows] float32, log-probabilities of whole answers: `sequence_log_probs`.
        desirable: [rows] bool, whether an answer is a good one.
        baseline: of `kto_baseline`.
    """
    gain = options.beta * (policy - reference.detach() - baseline.detach())
    good = options.desirable_weight * F.sigmoid(-gain)
    bad = options.undesirable_weight * F.sigmoid(gain)
    return paddle.where(desirable, good, bad)
