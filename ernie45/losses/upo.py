"""UPO, Unified Preference Optimization: preferences between answers as a part of the policy-gradient objective.

The ERNIE 4.5 report names it and describes it in words: preference learning is integrated into the objective of the
policy gradient. No formula is taken from there; this is our reading of it. It is the plain sum of

    PPO's clipped objective over the tokens of sampled answers (arXiv 1707.06347, eq. 7) and
    the mean loss over pairs of answers, DPO's unless the options say otherwise (arXiv 2305.18290, eq. 7),

because each of the two then is what its own paper says: without pairs it is PPO, with advantages of zero it is DPO, and
the weight between them is the only new number. The pairs may come from the sampled answers themselves, the best and the
worst of each prompt, or from a fixed data set: nothing here depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import paddle
from paddle import Tensor

from ernie45.losses.language import IGNORED_LABEL
from ernie45.losses.preference import Pairs, PreferenceOptions, preference_loss

LARGEST_LOG_RATIO = 20.0  # of new and old probability of a token, so that the ratio stays finite


@dataclass(frozen=True)
class Rollout:
    """Answers that the policy sampled.

    Attributes:
        log_probs: [rows, sequence] float32, under the policy that learns.
        old_log_probs: [rows, sequence] float32, under the policy that sampled them.
        advantages: [rows, sequence], or [rows, 1] for one per answer.
        labels: [rows, sequence] int64, -100 where a token was not sampled.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    labels: Tensor


def policy_gradient_loss(rollout: Rollout, clip: float = 0.2) -> Tensor:
    """-mean over sampled tokens of min(ratio * A, clip(ratio, 1 - clip, 1 + clip) * A): float32 scalar.

    Source: arXiv 1707.06347, eq. 7, with ratio = exp(log_probs - old_log_probs), here at most e^20.
    """
    ratio = paddle.exp(paddle.clip(rollout.log_probs - rollout.old_log_probs.detach(), max=LARGEST_LOG_RATIO))
    advantages = rollout.advantages.detach()
    objective = paddle.minimum(ratio * advantages, paddle.clip(ratio, 1 - clip, 1 + clip) * advantages)
    sampled = (rollout.labels != IGNORED_LABEL).astype("float32")
    return -(objective * sampled).sum() / paddle.clip(sampled.sum(), min=1)


def upo_loss(rollout: Rollout, pairs: Pairs, options: PreferenceOptions, clip: float = 0.2) -> Tensor:
    """policy_gradient_loss + the total of `preference_loss`: float32 scalar; our reading of the report, see above.

    Args:
        options: of the pairs; preference_weight is the weight between the two.
    """
    return policy_gradient_loss(rollout, clip) + preference_loss(pairs, options).total
