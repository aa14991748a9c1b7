"""Losses of the language model and of the router."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import Tensor

IGNORED_LABEL = -100


def language_model_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the labels that are not -100, in float32; 0 if there are none.

    Args:
        logits: [..., vocab_size]
        labels: [...] int64, already shifted: labels[i] is the token that follows position i.
    """
    losses = F.cross_entropy(
        logits.astype("float32"), labels.unsqueeze(-1), reduction="none", ignore_index=IGNORED_LABEL
    )
    count = (labels != IGNORED_LABEL).astype("float32").sum()
    return losses.sum() / paddle.clip(count, min=1.0)


def load_balance_loss(probabilities: Tensor, k: int) -> Tensor:
    """E * sum_e mean_t(p_te) * c_e / T: k for uniform routing (Switch Transformer, arXiv 2101.03961, eq. 4).

    The counts c_e are those of the k largest unbiased probabilities, so that the correction bias does not hide an
    imbalance; they carry no gradient.

    Args:
        probabilities: [tokens, experts] float32, as the router gives them.
        k: experts per token.
    """
    tokens, experts = probabilities.shape
    probabilities = probabilities / probabilities.sum(axis=-1, keepdim=True)
    chosen = paddle.topk(probabilities.detach(), k, axis=-1)[1]
    counts = paddle.bincount(chosen.flatten(), minlength=experts).astype("float32")
    return experts * (probabilities.mean(axis=0) * counts / tokens).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits) ** 2 (ST-MoE, arXiv 2202.08906, eq. 5); logits [tokens, experts]."""
    return (paddle.logsumexp(logits, axis=-1) ** 2).mean()


def orthogonalization_loss(router_weight: Tensor) -> Tensor:
    """|| W^T W - I ||_F^2 / E^2 for the L2-normalised columns of the router weight (ERNIE 4.5 report, router loss).

    Args:
        router_weight: [hidden_size, experts]; 0 if the columns are orthonormal.
    """
    weight = router_weight.astype("float32")
    norms = paddle.clip(paddle.linalg.norm(weight, axis=0, keepdim=True), min=1e-12)
    directions = weight / norms
    gram = paddle.matmul(directions, directions, transpose_x=True)
    return ((gram - paddle.eye(gram.shape[0], dtype="float32")) ** 2).mean()


@paddle.no_grad()
def update_correction_bias(bias: Tensor, counts: Tensor, rate: float) -> None:
    """Moves the bias of busy experts down and of idle ones up by `rate` (arXiv 2408.15664), in place.

    Args:
        bias: [banks, experts] or [experts] float32.
        counts: the same shape, assignments per expert since the last update.
        rate: step, 1e-3 upstream.
    """
    load = counts.astype("float32")
    step = paddle.sign(load.mean(axis=-1, keepdim=True) - load) * rate
    bias.set_value(bias + step.reshape(bias.shape))
