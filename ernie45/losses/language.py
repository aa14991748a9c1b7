"""Losses of the language model on logits."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ernie45.errors import ErnieError

IGNORED_LABEL = -100
KINDS = ("text", "image", "video")  # of a row; their places are the values of token_type_ids


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of every token in float32, [...]; 0 where the label is -100.

    Args:
        logits: [..., vocab_size]
        labels: [...] int64, already shifted: labels[i] is the token that follows position i.
    """
    return F.cross_entropy(
        logits.astype("float32"), labels.unsqueeze(-1), reduction="none", ignore_index=IGNORED_LABEL
    ).reshape(labels.shape)


def language_model_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the labels that are not -100, in float32; 0 if there are none.

    Args:
        logits, labels: as of `token_losses`.
    """
    return _mean(token_losses(logits, labels), labels)


def token_balanced_loss(logits: Tensor, labels: Tensor, denominator: float) -> Tensor:
    """The value of `language_model_loss` with the gradient of sum(losses) / denominator.

    With s = sum(losses) / denominator it is s - stop_gradient(s) + stop_gradient(mean(losses)). Every token that is
    learned then weighs the same in every batch, however many tokens of the batch are pictures or prompts.

    Args:
        logits, labels: as of `token_losses`.
        denominator: tokens of a full batch on one device (the key `token_balance_seqlen` of published configs).

    Raises:
        ErnieError: the denominator is not positive.
    """
    check_denominator(denominator)
    losses = token_losses(logits, labels)
    scaled = losses.sum() / denominator
    return scaled - scaled.detach() + _mean(losses, labels).detach()


def check_denominator(denominator: float) -> None:
    """Raises ErnieError unless it is positive."""
    if not denominator > 0:
        raise ErnieError(f"denominator: expected a positive number of tokens, found {denominator!r}")


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of every label in float32, [...]; 0 where it is -100.

    The negative of `token_losses`, which Paddle cuts off at 64 on a CPU; this is not.

    Args:
        logits, labels: as of `token_losses`.
    """
    learned = labels != IGNORED_LABEL
    logits = logits.astype("float32")
    index = paddle.where(learned, labels, paddle.zeros_like(labels)).unsqueeze(-1)
    found = paddle.take_along_axis(logits, index, axis=-1).squeeze(-1) - paddle.logsumexp(logits, axis=-1)
    return paddle.where(learned, found, paddle.zeros_like(found))


@paddle.no_grad()
def losses_by_kind(losses: Tensor, labels: Tensor, token_type_ids: Tensor) -> dict[str, float]:
    """For reports: the mean loss of the rows with text alone, with pictures, and with videos (and maybe pictures).

    Args:
        losses: [batch, sequence], of `token_losses`.
        labels: [batch, sequence] int64.
        token_type_ids: [batch, sequence], 0 text, 1 picture, 2 video.

    Returns:
        by "text", "image" and "video", without those that no learned token belongs to.
    """
    kinds, learned = token_type_ids.max(axis=1, keepdim=True), labels != IGNORED_LABEL
    chosen = {name: losses[learned & (kinds == kind)] for kind, name in enumerate(KINDS)}
    return {name: float(part.mean()) for name, part in chosen.items() if part.shape[0]}


def _mean(losses: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that are not -100; 0 if there are none."""
    count = (labels != IGNORED_LABEL).astype("float32").sum()
    return losses.sum() / paddle.clip(count, min=1.0)
