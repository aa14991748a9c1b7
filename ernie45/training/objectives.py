"""What a batch teaches: the loss of language modelling, or of preferences."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import paddle
from paddle import Tensor

from ernie45.losses import (
    IGNORED_LABEL,
    Answers,
    Pairs,
    PreferenceOptions,
    chunked_head_loss,
    chunked_log_probs,
    preference_loss,
)
from ernie45.models.moe import Routing
from ernie45.models.pretrained import PretrainedModel
from ernie45.training.data.packing import Batch

WITHOUT_REFERENCE = ("simpo", "orpo")  # losses that compare an answer with nothing but the other one


@dataclass(frozen=True)
class Result:
    """What an objective finds in a batch.

    Attributes:
        loss: float32 scalar, a mean over what `Objective.count` counts.
        report: further means, by the columns of the objective.
    """

    loss: Tensor
    report: dict[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """A loss of a model on batches."""

    columns: tuple[str, ...]  # of what it reports beside the loss

    def count(self, batch: Batch) -> int:
        """How many things the loss is a mean over: the weight of a micro batch in its step."""
        ...

    def __call__(self, model: PretrainedModel, batch: Batch, routing: list[Routing] | None = None) -> Result:
        """The loss on a batch; routers append what they decide to `routing`."""
        ...


class LanguageModelling:
    """Mean cross entropy of the learned tokens: `model(..., labels=labels)`, without ever holding all logits.

    Args:
        denominator: if given, the gradient is that of the sum over tokens divided by it; see
            `losses.token_balanced_loss`.
    """

    columns: tuple[str, ...] = ()

    def __init__(self, denominator: int | None = None):
        self.denominator = denominator

    def count(self, batch: Batch) -> int:
        """The learned tokens; the denominator if there is one, so that all micro batches weigh the same."""
        return batch.learned if self.denominator is None else self.denominator

    def __call__(self, model: PretrainedModel, batch: Batch, routing: list[Routing] | None = None) -> Result:
        """See `Objective`."""
        hidden = hidden_states(model, batch, routing)
        weight, transposed = head(model)
        labels = paddle.to_tensor(batch.labels)
        return Result(chunked_head_loss(hidden, weight, labels, transposed=transposed, denominator=self.denominator))


class Preferences:
    """Learning from pairs of answers; see `losses.preference`.

    Args:
        options: the loss and its coefficients.
        reference: gives, while it is entered, the model to compare with: `lora.disabled(model)`, or a frozen copy;
            None: the loss compares with none.
    """

    columns: tuple[str, ...] = ("preference_loss", "sft_loss", "accuracy", "margin")

    def __init__(
        self,
        options: PreferenceOptions,
        reference: Callable[[], AbstractContextManager[PretrainedModel]] | None,
    ):
        self.options, self.reference = options, reference

    def count(self, batch: Batch) -> int:
        """The pairs."""
        return len(batch.pairs)

    def __call__(self, model: PretrainedModel, batch: Batch, routing: list[Routing] | None = None) -> Result:
        """See `Objective`."""
        reference = None
        if self.reference is not None:
            with paddle.no_grad(), self.reference() as other:
                reference = answers(other, batch)
        found = preference_loss(Pairs.of(answers(model, batch, routing), reference), self.options)
        values = (float(found.preference), float(found.sft), found.accuracy, found.margin)
        return Result(found.total, dict(zip(self.columns, values, strict=True)))


def hidden_states(model: PretrainedModel, batch: Batch, routing: list[Routing] | None = None) -> Tensor:
    """Hidden states [batch, sequence, hidden_size] after the final norm, of a text or a vision-language model.

    Padding belongs to no expert bank: it costs the experts nothing and does not count as their load.
    """
    features = None
    if batch.images is not None and len(batch.images):
        features = model.encode_images(paddle.to_tensor(batch.images), batch.grid_thw)
    banks = np.where(batch.document_ids < 0, -1, 0 if batch.token_type_ids is None else batch.token_type_ids != 0)
    return model.ernie(
        paddle.to_tensor(batch.input_ids),
        position_ids=paddle.to_tensor(batch.position_ids),
        attn_mask_startend_row_indices=paddle.to_tensor(batch.attn_mask_startend_row_indices),
        routing=routing,
        banks=paddle.to_tensor(banks) if banks.any() else None,
        features=features,
    )


def head(model: PretrainedModel) -> tuple[Tensor, bool]:
    """The weight of the head, and whether it is [vocab_size, hidden_size], which the embedding of a tied one is."""
    return (model.ernie.embed_tokens.weight, True) if model.head is None else (model.head.weight, False)


def answers(model: PretrainedModel, batch: Batch, routing: list[Routing] | None = None) -> Answers:
    """Log-probabilities of the answers of a batch of pairs: all chosen ones, then all rejected ones."""
    weight, transposed = head(model)
    hidden = hidden_states(model, batch, routing)
    log_probs = chunked_log_probs(hidden, weight, paddle.to_tensor(batch.labels), transposed=transposed)
    places = np.flatnonzero(batch.labels != IGNORED_LABEL)
    owners = batch.document_ids.flatten()[places]
    count, order = batch.document_ids.max() + 1, batch.pairs.T.flatten()
    learned = paddle.gather(log_probs.flatten(), paddle.to_tensor(places))
    zeros = paddle.zeros([count], dtype="float32")
    sums = paddle.scatter_nd_add(zeros, paddle.to_tensor(owners).unsqueeze(-1), learned)
    lengths = np.bincount(owners, minlength=count)[order].astype("float32")
    return Answers(paddle.gather(sums, paddle.to_tensor(order)), paddle.to_tensor(lengths))
