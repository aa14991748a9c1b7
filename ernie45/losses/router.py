"""Losses of the router, and what keeps its experts busy without a loss: the correction bias."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import paddle
from paddle import Tensor

from ernie45.errors import ErnieError

if TYPE_CHECKING:
    from ernie45.models.moe import Routing


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
def orthogonalize_step(router_weights: Iterable[Tensor], rate: float) -> None:
    """One step down `orthogonalization_loss`, in place: W -= rate * gradient. Frozen weights stay.

    Instead of the loss's term, after the optimizer's step: its moments then do not mix with those of the other losses.

    Args:
        router_weights: each [hidden_size, experts] float32, such as those of `models.parts.router_weights(model)`.
        rate: step; the coefficient of the loss times the learning rate would be that of plain gradient descent.
    """
    for weight in router_weights:
        if not weight.stop_gradient:
            weight.set_value(weight - rate * _orthogonalization_gradient(weight))


def _orthogonalization_gradient(weight: Tensor) -> Tensor:
    point = weight.detach()
    point.stop_gradient = False
    with paddle.enable_grad():
        return paddle.grad(orthogonalization_loss(point), point)[0]


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


def attach(loss: Tensor, router_total: Tensor) -> Tensor:
    """The value of the loss, with the gradients of loss + router_total: loss + r - stop_gradient(r).

    Router losses are reported beside the loss of the language model, which stays comparable between models.
    """
    return loss + (router_total - router_total.detach())


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


def sum_over_ranks(counts: Tensor) -> Tensor:
    """The sum over all processes of the training; the counts as they are if `paddle.distributed` was not started."""
    if not paddle.distributed.is_initialized():
        return counts
    total = counts.clone()
    paddle.distributed.all_reduce(total)
    return total


@paddle.no_grad()
def update_correction_bias(
    bias: Tensor, counts: Tensor, rate: float, reduce: Callable[[Tensor], Tensor] = sum_over_ranks
) -> None:
    """Moves the bias of busy experts down and of idle ones up by `rate` (arXiv 2408.15664), in place.

    Every process has to call it, with what it counted itself: all then move the bias alike. Ranks that count the same
    tokens do no harm, since only the order of the loads matters.

    Upstream's pre-training copy sums the counts and then leaves the bias alone, its fine-tuning never finds ERNIE's
    routers, and without `paddle.distributed` neither does anything. This moves the bias in each of these cases.

    Args:
        bias: [banks, experts] or [experts] float32.
        counts: the same shape, assignments per expert since the last update.
        rate: step, 1e-3 upstream.
        reduce: counts of this process -> of all.
    """
    load = reduce(counts).astype("float32")
    step = paddle.sign(load.mean(axis=-1, keepdim=True) - load) * rate
    bias.set_value(bias + step.reshape(bias.shape))
