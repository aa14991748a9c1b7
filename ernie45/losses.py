"""Losses of the language model and of the router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ernie45.errors import ErnieError

if TYPE_CHECKING:
    from ernie45.models.moe import Routing

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
    if not denominator > 0:
        raise ErnieError(f"denominator: expected a positive number of tokens, found {denominator!r}")
    losses = token_losses(logits, labels)
    scaled = losses.sum() / denominator
    return scaled - scaled.detach() + _mean(losses, labels).detach()


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


@dataclass(frozen=True)
class BankLosses:
    """Router losses of one expert bank, each the sum over the layers: float32 scalars, 0 if no token came."""

    balance: Tensor
    orthogonality: Tensor
    z: Tensor


@dataclass(frozen=True)
class RouterLosses:
    """Router losses of all banks.

    Attributes:
        total: float32 scalar to be added to the loss, the sum of all terms times their coefficients.
        banks: the terms of each bank, without the coefficients.
    """

    total: Tensor
    banks: tuple[BankLosses, ...]


def router_losses(
    routing: Sequence[Routing],
    router_weights: Mapping[int, Sequence[Tensor]],
    k: int,
    *,
    balance: float | Sequence[float] = 0.0,
    orthogonality: float | Sequence[float] = 0.0,
    z: float | Sequence[float] = 0.0,
) -> RouterLosses:
    """The three router losses, each bank by itself over its own tokens.

    A bank to which no token came in a layer adds nothing for that layer, its orthogonality included.

    Args:
        routing: what the layers noted in one forward pass.
        router_weights: by layer, the weight [hidden_size, experts] of each bank: `models.parts.router_weights(model)`.
        k: experts per token.
        balance: coefficient of `load_balance_loss`, for all banks or one for each; in published configs
            `router_aux_loss_coef` or `moe_aux_loss_lambda`.
        orthogonality: of `orthogonalization_loss`; `moe_orthogonal_loss_lambda`.
        z: of `router_z_loss`; `router_z_loss_coef` or `moe_z_loss_lambda`.

    Raises:
        ErnieError: a list of coefficients has not one for each bank.
    """
    count = max((len(weights) for weights in router_weights.values()), default=0)
    coefficients = zip(
        _per_bank("balance", balance, count),
        _per_bank("orthogonality", orthogonality, count),
        _per_bank("z", z, count),
        strict=True,
    )
    banks = tuple(_bank_losses([step for step in routing if step.bank == b], router_weights, k) for b in range(count))
    weighted = [
        first * terms.balance + second * terms.orthogonality + third * terms.z
        for terms, (first, second, third) in zip(banks, coefficients, strict=True)
    ]
    return RouterLosses(_sum(weighted), banks)


def _bank_losses(steps: Sequence[Routing], router_weights: Mapping[int, Sequence[Tensor]], k: int) -> BankLosses:
    steps = [step for step in steps if step.logits.shape[0]]
    return BankLosses(
        balance=_sum([load_balance_loss(step.probabilities, k) for step in steps]),
        orthogonality=_sum([orthogonalization_loss(router_weights[step.layer][step.bank]) for step in steps]),
        z=_sum([router_z_loss(step.logits) for step in steps]),
    )


def _sum(terms: list[Tensor]) -> Tensor:
    return paddle.add_n(terms) if terms else paddle.zeros([], dtype="float32")


def _per_bank(name: str, coefficient: float | Sequence[float], banks: int) -> list[float]:
    if not isinstance(coefficient, Sequence):
        return [coefficient] * banks
    if len(coefficient) != banks:
        raise ErnieError(f"{name}: expected one coefficient or {banks}, one per expert bank, found {list(coefficient)}")
    return list(coefficient)


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
