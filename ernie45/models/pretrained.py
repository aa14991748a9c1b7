"""What all published models share: decoder, head, generation, and the way from and to a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import paddle
from paddle import Tensor, nn
from paddle.nn.initializer import Normal

from ernie45 import ops
from ernie45.checkpoint.folder import CheckpointFolder
from ernie45.checkpoint.hub import resolve_folder
from ernie45.checkpoint.loading import load
from ernie45.checkpoint.names import PADDLE, TensorSpec, checkpoint_tensors, settle_config
from ernie45.checkpoint.reader import (
    QuantisedSource,
    Source,
    find_sources,
    memory_problem,
    quantised_sources,
    raise_problems,
)
from ernie45.checkpoint.writer import DEFAULT_SHARD_BYTES
from ernie45.config import ErnieConfig
from ernie45.errors import CheckpointError, ConfigError, ErnieError
from ernie45.generation.config import GenerationConfig
from ernie45.generation.generate import Generated, generate
from ernie45.generation.streaming import stream
from ernie45.models.decoder import Decoder
from ernie45.models.layers import Linear
from ernie45.models.moe import published_tensors
from ernie45.models.packing import fuse, hold_in_few_bits, pack, packed_weights, unpacked
from ernie45.models.parts import freeze as freeze_parts
from ernie45.ops import custom, weight_only
from ernie45.ops.packed import PackedWeight
from ernie45.ops.weight_only import WeightOnly
from ernie45.quantization.config import NOT_QUANTISED, QuantizationConfig
from ernie45.runtime import prepare_cpu

Model = TypeVar("Model", bound="PretrainedModel")


class PretrainedModel(nn.Layer):
    """A decoder with a head, and its checkpoint: the base of the models below.

    `state_dict()` has the names, shapes and orientation of the published -Paddle files.

    Args:
        config: architecture.
        dtype: dtype of the weights: "float32", "bfloat16" or "float16"; the router is float32 in any case.
        mtp: build the multi-token-prediction blocks too.
        initialize: draw random weights; a reader that fills them in anyway passes False.
    """

    # Own names of sublayers, and the published ones.
    published_prefixes: Mapping[str, str] = {"head.": "lm_head."}

    def __init__(self, config: ErnieConfig, dtype: str = "float32", mtp: bool = False, initialize: bool = True):
        super().__init__()
        prepare_cpu()
        if not mtp:
            config = config.replace(num_nextn_predict_layers=0)  # the config says what this model holds
        self.config = config
        self.dtype = dtype
        self.generation_config = GenerationConfig.from_model_config(config)
        self.ernie = Decoder(config, dtype, mtp)
        self.head = self.create_head(dtype)
        if initialize:
            self.initialize_weights()

    def create_head(self, dtype: str) -> Linear | None:
        """The head of the language model; None: it is the embedding, transposed."""
        config = self.config
        return None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, dtype)

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size] of hidden states [..., hidden_size] that have passed the final norm."""
        if self.head is None:
            return ops.linear_transposed(hidden, self.ernie.embed_tokens.weight)
        return self.head(hidden)

    def generate(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Generated:
        """Continues prompts: `ids, scores = model.generate(ids)`; see `ernie45.generation.generate.generate`."""
        return generate(self, input_ids, attention_mask, **options)

    def stream(self, prompt: Any, **options: Any) -> Iterator[str]:
        """The reply to a text, messages or ids, piece by piece; see `ernie45.generation.streaming.stream`."""
        return stream(self, prompt, **options)

    def initialize_weights(self) -> None:
        """Draws every matrix from Normal(0, sqrt(0.3333 / hidden_size)), as upstream; norms 1, correction bias 0."""
        normal = Normal(0.0, math.sqrt(0.3333 / self.config.hidden_size))
        for parameter in self.parameters():
            if parameter.ndim > 1 and not parameter.stop_gradient:
                normal(parameter)

    @classmethod
    def packed(cls: type[Model], config: ErnieConfig, mtp: bool = False) -> Model:
        """A model in config.dtype for inference only: see `models.packing`.

        On a CPU its matrices are packed, in bfloat16 or as config.quantization_config says; on a GPU those that this
        quantises have 8 or 4 bits. They are to be filled in through `weights()`; then call `models.packing.fuse` on it.
        """
        with paddle.LazyGuard():
            model = cls(config, config.dtype, mtp, initialize=False)
        if _on_cpu():
            pack(model, config.quantization_config)
        else:
            assert config.quantization_config is not None, "nothing is packed on a GPU"
            hold_in_few_bits(model, config.quantization_config)
        return model

    @property
    def is_packed(self) -> bool:
        """Whether matrices are packed for inference, and are no parameters."""
        return next(packed_weights(self), None) is not None

    def train(self) -> None:
        """Switches to training.

        Raises:
            ErnieError: the weights are packed for inference, and nothing beside them is to be trained.
        """
        if self.is_packed and all(parameter.stop_gradient for parameter in self.parameters()):
            raise ErnieError(
                'train: the weights are packed for inference; load the model with dtype="float32", or on a CPU apply '
                "LoRA (ernie45.lora), whose adapters can be trained beside them"
            )
        super().train()

    def tensors(self) -> list[TensorSpec]:
        """What a checkpoint of this model consists of."""
        return checkpoint_tensors(self.config)

    def weights(self) -> dict[str, Tensor | PackedWeight | WeightOnly]:
        """Every weight by its published -Paddle name, as it is held: a parameter, a view of one, or packed."""
        return dict(self.published({**super().state_dict(), **dict(packed_weights(self))}))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Weights under their published -Paddle names; experts are views of the stacked parameters.

        Packed weights are unpacked into new tensors; quantised ones are `X.quant_weight` and `X.weight_scale`.
        """
        parameters = dict(self.published(super().state_dict(*args, **kwargs)))
        for name, weight in self.published(dict(packed_weights(self))):
            parameters.update(unpacked(name, weight))
        return parameters

    def set_state_dict(
        self, state_dict: Mapping[str, Any], use_structured_name: bool = True
    ) -> tuple[list[str], list[str]]:
        """Copies tensors or arrays with published -Paddle names into the model.

        Returns:
            missing, unexpected: names that only the model has, and names that only `state_dict` has.

        Raises:
            CheckpointError: a shape differs; nothing is copied then.
        """
        if not use_structured_name:
            raise ErnieError("set_state_dict: published names are structured names; use_structured_name=False is not")
        if self.is_packed:
            raise ErnieError(
                'set_state_dict: the weights are packed for inference; load the model with dtype="float32"'
            )
        own = self.state_dict()
        shared = own.keys() & state_dict.keys()
        wrong = [
            f"{k}: {list(state_dict[k].shape)}, expected {list(own[k].shape)}"
            for k in shared
            if list(state_dict[k].shape) != own[k].shape
        ]
        raise_problems("state_dict", sorted(wrong), "Nothing was copied.")
        with paddle.no_grad():
            for name in shared:
                value = state_dict[name]
                value = value if isinstance(value, Tensor) else paddle.to_tensor(value)
                own[name].copy_(value.astype(own[name].dtype), True)
        return sorted(own.keys() - shared), sorted(state_dict.keys() - shared)

    set_dict = set_state_dict

    def published(self, parameters: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """Weights by the model's own names -> their published names and the weights: see `published_tensors`."""
        for name, parameter in parameters.items():
            for own, published in self.published_prefixes.items():
                name = published + name.removeprefix(own) if name.startswith(own) else name
            yield from published_tensors(name, parameter, self.config.banks)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        name: str | Path,
        *,
        dtype: str | None = None,
        quantization: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        mtp: bool = False,
        freeze: Sequence[str] = (),
        pack: bool = True,
        progress: bool = True,
    ) -> Model:
        """Loads a published checkpoint, -Paddle or -PT, from a folder or a hub.

        Tensors are read one at a time into the parameters, after everything has been checked.

        Args:
            name: a folder, "owner/name" (Hugging Face), "aistudio:owner/name", "modelscope:owner/name", or a model
                that comes with the package ("ernie45-tiny").
            dtype: dtype of the weights in memory, by default the checkpoint's own. On a CPU "bfloat16" packs them for
                our operators, for inference only; to train there, choose "float32" or `pack=False`. Where those
                operators cannot be built, the default on a CPU is "float32".
            quantization: "wint8" or "wint4" quantises the weights while they are read, embedding and head to 8 bits
                in either case, vision tower and adapter not at all. A checkpoint that is quantised already needs no
                word. On a GPU embedding and head stay in `dtype`, and in "float32" so does everything.
            revision: branch, tag or commit on the hub.
            cache_dir: where downloads are kept.
            mtp: also load the multi-token-prediction blocks, if the checkpoint has them.
            freeze: parts that are not to be trained, of "vision", "adapter", "vision_experts" and "text": see
                `ernie45.models.parts`.
            pack: hold weights in the form that is fastest for inference: on a CPU bfloat16 ones packed, on a GPU
                quantised ones in their 8 or 4 bits. False leaves them parameters, which can be trained; quantised ones
                are packed on a CPU in any case.
            progress: show a progress bar when loading takes longer than a second.

        Raises:
            CheckpointError: lists everything that is wrong with the files.
            ConfigError: config.json describes no model that is supported, or not one of this class.
        """
        path = resolve_folder(name, revision=revision, cache_dir=cache_dir)
        config, folder = _open(path)
        with folder:
            config = settle_config(config, folder.tensors)
            if not mtp:
                config = config.replace(num_nextn_predict_layers=0)
            config, specs = cls.part_of(config, path, progress)
            generation_config = GenerationConfig.from_pretrained(path, config)
            sources, problems = _find(folder, specs, config.quantization_config)
            config = _choose_storage(config, dtype, quantization, str(path))
            packed = _packs(config, pack)
            shortage = memory_problem(specs, config.dtype, config.quantization_config if packed else None)
            raise_problems(
                path, problems + ([shortage] if shortage else []), "Download the files again, or correct config.json."
            )
            model = cls.packed(config, mtp) if packed else cls(config, config.dtype, mtp, initialize=False)
            freeze_parts(model, freeze)
            load(folder, sources, model.weights(), config.quantization_config, progress)
        if packed:
            fuse(model)
        model.generation_config = generation_config
        return model.eval()

    @classmethod
    def part_of(cls, config: ErnieConfig, path: Path, progress: bool) -> tuple[ErnieConfig, list[TensorSpec]]:
        """The architecture of the part of a checkpoint that this class holds, and the tensors to read for it.

        Raises:
            ConfigError: the checkpoint holds another kind of model.
        """
        raise NotImplementedError

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        layout: str = PADDLE,
        dtype: str | None = None,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        progress: bool = True,
    ) -> None:
        """Writes config.json, generation_config.json and the weights; an existing checkpoint there is replaced whole.

        Args:
            folder: created if needed.
            layout: "paddle" or "pt".
            dtype: dtype of the file, by default that of the weights. Quantised weights stay so by default, and become
                what they stand for in the dtype that is given.
            max_shard_bytes: larger models are split into shards with an index.
            progress: show a progress bar when writing takes longer than a second.

        Raises:
            CheckpointError: unknown layout or dtype, too little disk space, or the folder cannot be written.
        """
        from ernie45.checkpoint.convert import save_model

        save_model(self, Path(folder), layout, dtype, max_shard_bytes, progress)


def _open(path: Path) -> tuple[ErnieConfig, CheckpointFolder]:
    """Reads config.json and the headers of the weight files, and reports the problems of both together."""
    errors: list[ErnieError] = []
    try:
        config = ErnieConfig.from_pretrained(path)
    except ConfigError as error:
        errors.append(error)
    try:
        folder = CheckpointFolder(path)
    except CheckpointError as error:
        errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise CheckpointError("\n".join(str(error) for error in errors))
    return config, folder


def _find(
    folder: CheckpointFolder, specs: list[TensorSpec], quantization: QuantizationConfig | None
) -> tuple[Sequence[Source | QuantisedSource], list[str]]:
    return find_sources(folder, specs) if quantization is None else quantised_sources(folder, specs, quantization)


def _choose_storage(config: ErnieConfig, dtype: str | None, quantization: str | None, where: str) -> ErnieConfig:
    """Settles in what form the weights are held: `dtype` and `quantization_config` of the result."""
    stored = config.quantization_config
    if quantization is not None:
        wanted = QuantizationConfig.uniform(quantization)
        if stored is not None and (stored.dense_quant_type, stored.moe_quant_type) != (quantization, quantization):
            raise ConfigError(
                f"{where}: holds weights in {stored.dense_quant_type}, not {quantization}; leave quantization= out, or "
                "take the checkpoint that is not quantised"
            )
        config = config.replace(quantization_config=stored or wanted)
    on_cpu = _on_cpu()
    if config.quantization_config is not None and not on_cpu:
        held = replace(config.quantization_config, embedding_quant_type=NOT_QUANTISED)
        config = config.replace(quantization_config=held)
    if config.quantization_config is not None and on_cpu and dtype not in (None, "bfloat16"):
        raise ConfigError(f'{where}: quantised weights go with dtype="bfloat16" on a CPU, found {dtype!r}')
    if dtype is None:
        if config.quantization_config is not None and on_cpu:
            config = config.replace(dtype="bfloat16")  # quantised weights are packed, whatever they were before
        dtype = config.dtype if not on_cpu or _packs(config, True) else "float32"
    return config.replace(dtype=dtype)


def _packs(config: ErnieConfig, wanted: bool) -> bool:
    """Whether weights of this form are held for inference only: see `models.packing`."""
    quantised = config.quantization_config is not None
    if _on_cpu():
        return (wanted or quantised) and config.dtype == "bfloat16" and custom.library() is not None
    return wanted and quantised and config.dtype in weight_only.DTYPES


def _on_cpu() -> bool:
    return paddle.device.get_device() == "cpu"
