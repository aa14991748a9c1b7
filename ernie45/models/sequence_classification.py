"""A text model that sorts texts into classes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.nn.initializer import Normal

from ernie45.checkpoint.names import Part, TensorSpec, checkpoint_tensors, text_part_tensors
from ernie45.config import ErnieConfig
from ernie45.errors import ConfigError, ErnieError
from ernie45.generation.generate import Generated
from ernie45.models.layers import Linear
from ernie45.models.moe import MoE, Routing
from ernie45.models.pretrained import PretrainedModel

Classifier = TypeVar("Classifier", bound="ErnieForSequenceClassification")
COUNT_KEY, NAMES_KEY = "num_labels", "id2label"  # of config.json, as in transformers
MOST_LABELS = 10**6
NO_TEXT = "this model sorts texts into classes and generates none; load it with ErnieForCausalLM"


class ErnieForSequenceClassification(PretrainedModel):
    """The decoder with one linear map, `score` [hidden_size, labels] in float32, of each text's last token.

    Of a vision-language checkpoint it reads and holds the text part only. It has no head of a language model.

    Args:
        config: architecture.
        dtype, mtp, initialize: as of `ErnieForCausalLM`.
        labels: number or names of the classes; None: the config's (`num_labels` and `id2label`). If that has none
            either, there is no `score` before `set_labels`.

    Attributes:
        labels: names of the classes, in the order of the logits.
    """

    def __init__(
        self,
        config: ErnieConfig,
        dtype: str = "float32",
        mtp: bool = False,
        initialize: bool = True,
        labels: int | Sequence[str] | None = None,
    ):
        super().__init__(config.text_part(), dtype, mtp, initialize=False)
        self.labels = read_labels(self.config) if labels is None else _names(labels)
        self.score: Any = Linear(config.hidden_size, len(self.labels), "float32") if self.labels else None
        self._note_labels()
        if initialize:
            self.initialize_weights()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        routing: list[Routing] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or (loss, logits) if labels are given.

        Args:
            input_ids, position_ids, routing: see `Decoder.forward`.
            attention_mask: [batch, sequence] with 0 for padding, on either side; None: there is none.
            labels: [batch] int64, the class of each text.

        Returns:
            logits [batch, labels] float32; loss: float32 scalar, the mean cross entropy.

        Raises:
            ErnieError: an argument has the wrong shape, a row is nothing but padding, or there is no such class.
        """
        if self.score is None:
            raise ErnieError("labels: this model has no classes yet; call set_labels, or load it with labels=")
        last = last_places(input_ids, attention_mask)
        hidden = self.ernie(input_ids, position_ids, attention_mask, routing=routing)
        rows = paddle.take_along_axis(hidden, last.reshape([-1, 1, 1]), axis=1, broadcast=True).squeeze(1)
        logits = self.score(rows.astype("float32"))
        if labels is None:
            return logits
        if labels.shape != [input_ids.shape[0]]:
            raise ErnieError(f"labels: expected [{input_ids.shape[0]}], one for each text, found {list(labels.shape)}")
        if not 0 <= int(labels.min()) <= int(labels.max()) < len(self.labels):
            raise ErnieError(
                f"labels: found {int(labels.min())} to {int(labels.max())}, expected 0 to {len(self.labels) - 1}"
            )
        return F.cross_entropy(logits, labels), logits

    def set_labels(self, labels: int | Sequence[str]) -> None:
        """Gives the model a new head, random, for so many classes, or for classes with these names.

        Raises:
            ErnieError: fewer than two classes, or two of the same name.
        """
        self.labels = _names(labels)
        self.score = Linear(self.config.hidden_size, len(self.labels), "float32")
        Normal(0.0, math.sqrt(0.3333 / self.config.hidden_size))(self.score.weight)  # as `initialize_weights` does
        self._note_labels()

    def _note_labels(self) -> None:
        entries = {COUNT_KEY: len(self.labels), NAMES_KEY: {str(i): name for i, name in enumerate(self.labels)}}
        if self.labels:
            self.config = self.config.replace(extra={**self.config.extra, **entries})

    def train_last(self, layers: int = 4, experts: bool = False) -> int:
        """Freezes all but the last layers, the final norm and the head; returns how many parameters are trained.

        Args:
            layers: so many decoder layers stay in training.
            experts: their routed experts and routers do, too.

        Raises:
            ErnieError: the model has fewer layers.
        """
        if not 0 <= layers <= len(self.ernie.layers):
            raise ErnieError(f"train_last: {layers} layers, but the model has {len(self.ernie.layers)}")
        for parameter in self.parameters():
            parameter.stop_gradient = True
        parts = [*self.ernie.layers[len(self.ernie.layers) - layers :], self.ernie.norm, self.score]
        chosen = {id(parameter): parameter for part in parts for parameter in part.parameters()}
        for mlp in (layer.mlp for layer in self.ernie.layers if isinstance(layer.mlp, MoE)):
            kept = [mlp.moe_statics] if experts else [mlp.moe_statics, mlp.experts, mlp.gate]
            for part in kept:
                for parameter in [] if part is None else part.parameters():
                    chosen.pop(id(parameter), None)
        for parameter in chosen.values():
            parameter.stop_gradient = False
        return len(chosen)

    def create_head(self, dtype: str) -> None:
        """See `PretrainedModel.create_head`: there is none."""

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Raises an ErnieError: it has none."""
        raise ErnieError(NO_TEXT)

    def generate(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Generated:
        """Raises an ErnieError: see `lm_head`."""
        raise ErnieError(NO_TEXT)

    def stream(self, prompt: Any, **options: Any) -> Iterator[str]:
        """Raises an ErnieError: see `lm_head`."""
        raise ErnieError(NO_TEXT)

    def tensors(self) -> list[TensorSpec]:
        """See `PretrainedModel.tensors`."""
        return _with_score(checkpoint_tensors(self.config), self.config, len(self.labels))

    @classmethod
    def from_pretrained(
        cls: type[Classifier], name: str | Path, *, labels: int | Sequence[str] | None = None, **options: Any
    ) -> Classifier:
        """Loads what `save_pretrained` wrote, or any published text model, which gets a new head.

        Args:
            name: see `PretrainedModel.from_pretrained`.
            labels: number or names of the classes of a new head; None: the checkpoint has one.
            options: see `PretrainedModel.from_pretrained`. On a CPU, dtype="float32" is for training the decoder too;
                beside packed weights only the head is trained.

        Raises:
            CheckpointError, ConfigError: see there.
            ErnieError: no labels for a checkpoint without classes, or other ones than it has.
        """
        model = super().from_pretrained(name, **options)
        if model.labels and labels not in (None, len(model.labels)) and _names(labels) != model.labels:
            raise ErnieError(f"labels: {name} has the classes {model.labels}; for others call set_labels afterwards")
        if not model.labels:
            if labels is None:
                raise ErnieError(f"labels: {name} has no classes; give their number or names, such as labels=2")
            model.set_labels(labels)
        for parameter in model.score.parameters():
            parameter.stop_gradient = False  # packing freezes everything
        return model

    @classmethod
    def part_of(cls, config: ErnieConfig, path: Path, progress: bool) -> tuple[ErnieConfig, list[TensorSpec]]:
        """See `PretrainedModel.part_of`: the decoder, and the head if the checkpoint has one."""
        specs = _with_score(text_part_tensors(config), config, len(read_labels(config)))
        return config.text_part(), specs


def last_places(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The column [batch] int64 of the last token of each row that is not padding.

    Raises:
        ErnieError: the mask has another shape than input_ids, or a row has padding only.
    """
    if attention_mask is None:
        return paddle.full([input_ids.shape[0]], input_ids.shape[1] - 1, dtype="int64")
    if attention_mask.shape != input_ids.shape:
        raise ErnieError(
            f"attention_mask: expected {list(input_ids.shape)} like input_ids, found {list(attention_mask.shape)}"
        )
    real = (attention_mask != 0).astype("int64")
    if not bool(real.any(axis=1).all()):
        raise ErnieError("attention_mask: a row has no token that is not padding")
    return (real * paddle.arange(input_ids.shape[1])).max(axis=1)


def read_labels(config: ErnieConfig) -> list[str]:
    """Names of the classes that a config.json announces with `num_labels`; empty: none.

    Raises:
        ConfigError: the entries are no number and names of classes.
    """
    count, names = config.extra.get(COUNT_KEY), config.extra.get(NAMES_KEY)
    if count is None:
        return []
    if not isinstance(count, int) or not 2 <= count <= MOST_LABELS:
        raise ConfigError(f"config: {COUNT_KEY} is {count!r}, expected a number from 2 to {MOST_LABELS}")
    if names is None:
        return _names(count)
    if not isinstance(names, Mapping) or set(names) != {str(number) for number in range(count)}:
        raise ConfigError(f"config: {NAMES_KEY} does not name the classes 0 to {count - 1}, as {COUNT_KEY} has it")
    return [str(names[str(number)]) for number in range(count)]


def _names(labels: int | Sequence[str]) -> list[str]:
    names = [f"LABEL_{number}" for number in range(labels)] if isinstance(labels, int) else list(labels)
    if isinstance(labels, str) or len(names) < 2 or len(set(names)) < len(names):
        raise ErnieError(
            f"labels: expected a number of classes from 2 on, or so many different names, found {labels!r}"
        )
    return names


def _with_score(specs: list[TensorSpec], config: ErnieConfig, labels: int) -> list[TensorSpec]:
    """Without the head of the language model, and with that of the classes."""
    kept = [spec for spec in specs if spec.group != "head"]
    if not labels:
        return kept
    name, shape = "score.weight", (config.hidden_size, labels)
    part = Part(name, shape[::-1], transposed=True)
    return [*kept, TensorSpec(name, shape, "classes", (part,), float32=True)]
