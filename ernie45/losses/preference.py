"""Learning from pairs of answers: DPO and its relatives, on log-probabilities of whole answers.

Everything here works on one number per answer, so that it does not matter whether the log-probabilities come from
logits (`token_log_probs`) or from a head that never holds them (`chunked_log_probs`). The reference model never gets a
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ernie45.errors import ErnieError
from ernie45.losses.language import IGNORED_LABEL

SMALLEST_MARGIN = 1e-6  # between the scores of two answers, before the logarithm
LARGEST_AVERAGE = -1e-6  # of a log-probability, so that 1 - probability stays above 0


@dataclass(frozen=True)
class Answers:
    """Log-probabilities of whole answers.

    Attributes:
        log_probs: [rows] float32, sums over the tokens of the answer.
        lengths: [rows] float32, how many tokens that are.
    """

    log_probs: Tensor
    lengths: Tensor


def sequence_log_probs(log_probs: Tensor, labels: Tensor) -> Answers:
    """Sums over the learned tokens of each row.

    Args:
        log_probs: [rows, sequence] float32, of `token_log_probs` or `chunked_log_probs`.
        labels: [rows, sequence] int64, -100 where ignored.
    """
    learned = (labels != IGNORED_LABEL).astype("float32")
    return Answers((log_probs * learned).sum(axis=-1), learned.sum(axis=-1))


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of pairs of answers to the same prompt, each [pairs] float32.

    Attributes:
        chosen, rejected: under the model that learns.
        reference_chosen, reference_rejected: under the reference; zeros without one.
        chosen_lengths, rejected_lengths: tokens of the answers.
        margins: score of the chosen minus that of the rejected answer, where scores are known.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    margins: Tensor | None = None

    @classmethod
    def of(cls, policy: Answers, reference: Answers | None = None, margins: Tensor | None = None) -> Pairs:
        """Of batches whose rows are the chosen answers of all pairs, followed by the rejected ones in the same order.

        Args:
            policy: [2 * pairs], of the model that learns.
            reference: of the same rows under the reference; None: learn without one.
            margins: [pairs].

        Raises:
            ErnieError: the number of rows is odd, or not the same in both.
        """
        rows = policy.log_probs.shape[0]
        fixed = paddle.zeros_like(policy.log_probs) if reference is None else reference.log_probs
        if rows % 2 or fixed.shape[0] != rows:
            raise ErnieError(
                "preference pairs: expected as many chosen as rejected answers, and the reference of each, "
                f"found {rows} rows and {fixed.shape[0]} of the reference"
            )
        chosen, rejected = paddle.split(policy.log_probs, 2)
        reference_chosen, reference_rejected = paddle.split(fixed.detach(), 2)
        chosen_lengths, rejected_lengths = paddle.split(policy.lengths, 2)
        return cls(chosen, rejected, reference_chosen, reference_rejected, chosen_lengths, rejected_lengths, margins)

    @property
    def chosen_ratio(self) -> Tensor:
        """log(policy / reference) of the chosen answers, [pairs]."""
        return self.chosen - self.reference_chosen.detach()

    @property
    def rejected_ratio(self) -> Tensor:
        """log(policy / reference) of the rejected answers, [pairs]."""
        return self.rejected - self.reference_rejected.detach()

    @property
    def difference(self) -> Tensor:
        """chosen_ratio - rejected_ratio, [pairs]: u in the formulas below."""
        return self.chosen_ratio - self.rejected_ratio

    def scaled(self, chosen: Tensor, rejected: Tensor) -> Pairs:
        """All log-probabilities, the reference's included, times a factor [pairs] for each side."""
        return replace(
            self,
            chosen=self.chosen * chosen,
            rejected=self.rejected * rejected,
            reference_chosen=self.reference_chosen * chosen,
            reference_rejected=self.reference_rejected * rejected,
        )

    def averaged(self) -> Pairs:
        """Log-probabilities per token instead of per answer."""
        return self.scaled(1 / paddle.clip(self.chosen_lengths, min=1), 1 / paddle.clip(self.rejected_lengths, min=1))

    def normalized(self) -> Pairs:
        """Log-probabilities as if both answers had the mean of their lengths."""
        mean = (self.chosen_lengths + self.rejected_lengths) / 2
        return self.averaged().scaled(mean, mean)


@dataclass(frozen=True)
class PreferenceOptions:
    """How to learn from pairs.

    Attributes:
        loss: a key of `PAIR_LOSSES`.
        beta: how closely the policy is held to the reference, or scale of the log-probabilities.
        label_smoothing: share of pairs whose order is wrong, for "sigmoid" and "simpo".
        offset: alpha of DPO with an offset, for "sigmoid"; needs `Pairs.margins`.
        gamma: target margin of "simpo".
        dpop_weight: lambda of "dpop".
        normalize: give both answers of a pair the mean of their lengths first (`normalize_logps` upstream, where it is
            on by default in one tool and off in the other); not for losses that average over tokens anyway.
        preference_weight: factor of the mean over pairs.
        sft_weight: factor of the language-model loss of the chosen answers.

    Raises:
        ErnieError: a value is out of range, or two of them exclude each other.
    """

    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    offset: float = 0.0
    gamma: float = 0.5
    dpop_weight: float = 50.0
    normalize: bool = False
    preference_weight: float = 1.0
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.loss not in PAIR_LOSSES:
            raise ErnieError(f"loss: expected one of {', '.join(PAIR_LOSSES)}, found {self.loss!r}")
        if not self.beta > 0:
            raise ErnieError(f"beta: expected a positive number, found {self.beta!r}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ErnieError(f"label_smoothing: expected at least 0 and less than 0.5, found {self.label_smoothing!r}")
        if self.label_smoothing and self.loss not in ("sigmoid", "simpo"):
            raise ErnieError(f"label_smoothing: goes with the losses sigmoid and simpo, not with {self.loss}")
        if self.offset and self.loss != "sigmoid":
            raise ErnieError(f"offset: goes with the loss sigmoid, not with {self.loss}")
        if self.normalize and self.loss in AVERAGING_LOSSES:
            raise ErnieError(f"normalize: the loss {self.loss} averages over tokens, so lengths are out of it already")


def sigmoid_loss(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """DPO: -(1 - s) log sigmoid(h) - s log sigmoid(-h) with h = beta * u - alpha * log(margin), [pairs].

    Source: arXiv 2305.18290, eq. 7. Label smoothing s is the conservative DPO of its authors; the offset is arXiv
    2402.10571: better answers have to be ahead by more, the further their scores are apart.

    Raises:
        ErnieError: there is an offset, but no margins.
    """
    logits = options.beta * pairs.difference
    if options.offset:
        if pairs.margins is None:
            raise ErnieError("offset: needs the difference of the scores of each pair (Pairs.margins), found none")
        logits = logits - options.offset * paddle.log(paddle.clip(pairs.margins, min=SMALLEST_MARGIN))
    return _smoothed(logits, options.label_smoothing)


def hinge_loss(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """max(0, 1 - beta * u), [pairs] (SLiC-HF, arXiv 2305.10425; on log-ratios: RSO, arXiv 2309.06657)."""
    return F.relu(1 - options.beta * pairs.difference)


def ipo_loss(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """(u - 1 / (2 beta)) ** 2 with log-probabilities per token, [pairs] (arXiv 2310.12036, eq. 17)."""
    return (pairs.averaged().difference - 1 / (2 * options.beta)) ** 2


def simpo_loss(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """-log sigmoid(beta * (chosen - rejected) - gamma) per token, without a reference, [pairs].

    Source: arXiv 2405.14734, eq. 6. References of the pairs are left out, whatever they are.
    """
    pairs = pairs.averaged()
    return _smoothed(options.beta * (pairs.chosen - pairs.rejected) - options.gamma, options.label_smoothing)


def dpop_loss(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """DPO-positive: -log sigmoid(beta * (u - lambda * max(0, -chosen_ratio))), [pairs].

    Source: arXiv 2402.13228, eq. 3. The penalty for chosen answers that become less likely stands inside the sigmoid,
    as in the paper; one of upstream's two copies adds it outside, without beta.
    """
    shortfall = F.relu(-pairs.chosen_ratio)
    return _smoothed(options.beta * (pairs.difference - options.dpop_weight * shortfall), 0.0)


def orpo_loss(pairs: Pairs, options: PreferenceOptions) -> Tensor:
    """-log sigmoid(log odds(chosen) - log odds(rejected)), odds p / (1 - p) with p per token, [pairs].

    Source: arXiv 2403.07691, eq. 4 and 7. The objective of the paper, eq. 6, is its mean times lambda plus the loss of
    the chosen answers: preference_weight = lambda, sft_weight = 1. Neither a reference nor beta takes part.
    """
    pairs = pairs.averaged()
    return -F.log_sigmoid(_log_odds(pairs.chosen) - _log_odds(pairs.rejected))


PairLoss = Callable[[Pairs, PreferenceOptions], Tensor]
PAIR_LOSSES: Mapping[str, PairLoss] = {
    "sigmoid": sigmoid_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "simpo": simpo_loss,
    "dpop": dpop_loss,
    "orpo": orpo_loss,
}
AVERAGING_LOSSES = ("ipo", "simpo", "orpo")


@dataclass(frozen=True)
class PreferenceLoss:
    """What `preference_loss` found.

    Attributes:
        total: float32 scalar to learn from.
        preference: float32 scalar, mean over pairs, without its weight and without gradient.
        sft: float32 scalar, language-model loss of the chosen answers, without its weight and without gradient.
        chosen_rewards, rejected_rewards: [pairs], beta * log(policy / reference), without gradient.
    """

    total: Tensor
    preference: Tensor
    sft: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen answer has the larger reward."""
        return float((self.chosen_rewards > self.rejected_rewards).astype("float32").mean())

    @property
    def margin(self) -> float:
        """Mean difference of the rewards."""
        return float((self.chosen_rewards - self.rejected_rewards).mean())


def preference_loss(pairs: Pairs, options: PreferenceOptions) -> PreferenceLoss:
    """preference_weight * mean over pairs of the loss + sft_weight * -sum(chosen) / sum(chosen_lengths).

    Raises:
        ErnieError: the loss needs something that the pairs do not have.
    """
    compared = pairs.normalized() if options.normalize else pairs
    preference = PAIR_LOSSES[options.loss](compared, options).mean()
    sft = -pairs.chosen.sum() / paddle.clip(pairs.chosen_lengths.sum(), min=1)
    return PreferenceLoss(
        options.preference_weight * preference + options.sft_weight * sft,
        preference.detach(),
        sft.detach(),
        options.beta * pairs.chosen_ratio.detach(),
        options.beta * pairs.rejected_ratio.detach(),
    )


def _smoothed(logits: Tensor, smoothing: float) -> Tensor:
    """Cross entropy of sigmoid(logits) with the label 1 - smoothing."""
    return -(1 - smoothing) * F.log_sigmoid(logits) - smoothing * F.log_sigmoid(-logits)


def _log_odds(log_prob: Tensor) -> Tensor:
    """log(p / (1 - p)) of log(p) < 0."""
    log_prob = paddle.clip(log_prob, max=LARGEST_AVERAGE)
    return log_prob - paddle.log(-paddle.expm1(log_prob))
