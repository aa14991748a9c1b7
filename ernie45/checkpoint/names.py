"""The one table of tensor names: what a checkpoint contains, in the -Paddle and in the -PT layout.

Everything that has to know names or shapes derives it from here: the readers and writers, `ernie45 info` and
`ernie45 convert`, and the tool that writes random checkpoints. Facts: the published files; -Paddle stores linear
weights [in, out] with fused Q|K|V and gate|up, -PT stores them [out, in] and split.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from ernie45.checkpoint.dtypes import DTYPES, dtype_from_framework_name
from ernie45.config import ErnieConfig, VisionConfig
from ernie45.errors import CheckpointError
from ernie45.quantization.config import NOT_QUANTISED, QuantizationConfig
from ernie45.quantization.weights import SCALE_DTYPES, stored_shapes

PADDLE, PT = "paddle", "pt"
LAYOUTS = (PADDLE, PT)
CODES_SUFFIX, SCALES_SUFFIX = ".quant_weight", ".weight_scale"  # in place of ".weight"


@dataclass(frozen=True)
class Part:
    """One stored tensor that makes up (some columns of) a -Paddle tensor: mostly in the -PT layout.

    Attributes:
        name: in the file.
        shape: in the file.
        columns: last-axis columns of the -Paddle tensor, a slice or an index array; None: all.
        transposed: the stored tensor is the transpose of those columns.
        used_rows: so many of the first rows of the stored tensor are used, and it can only be read; None: all.
    """

    name: str
    shape: tuple[int, ...]
    columns: slice | np.ndarray | None = None
    transposed: bool = False
    used_rows: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the stored tensor is the -Paddle tensor as it stands."""
        return self.columns is None and not self.transposed and self.used_rows is None

    def take(self, tensor: np.ndarray) -> np.ndarray:
        """This part of a -Paddle tensor, oriented as it is stored (a view where possible)."""
        columns = tensor if self.columns is None else tensor[..., self.columns]
        return columns.T if self.transposed else columns

    def put(self, tensor: np.ndarray, rows: np.ndarray, first: int) -> None:
        """Writes rows first, first + 1, ... of the stored tensor to where they belong in a -Paddle tensor."""
        last = first + len(rows)
        if not self.transposed and self.columns is None:
            tensor[first:last] = rows
        elif not self.transposed:
            tensor[first:last, self.columns] = rows
        elif isinstance(self.columns, np.ndarray):
            tensor[:, self.columns[first:last]] = rows.T
        else:
            start = 0 if self.columns is None else self.columns.start
            tensor[:, start + first : start + last] = rows.T


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a -Paddle checkpoint.

    Attributes:
        name: -Paddle name.
        shape: -Paddle shape.
        group: the part of the architecture that it belongs to, for people.
        parts: the same tensor in the -PT layout.
        float32: stored in float32 whatever the dtype of the model (router and correction bias).
        either_orientation: published files are known to hold both orientations; the shape decides.
        paddle_parts: the same tensor in the -Paddle layout, where it is not just itself.
    """

    name: str
    shape: tuple[int, ...]
    group: str
    parts: tuple[Part, ...]
    float32: bool = False
    either_orientation: bool = False
    paddle_parts: tuple[Part, ...] = ()

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def outputs_first(self) -> bool:
        """Whether a row is an output channel: of an embedding, which is the transpose of a tied head."""
        return self.group == "embedding"

    def stored(self, layout: str) -> tuple[Part, ...]:
        """The tensors that hold it in this layout: mostly itself in the -Paddle layout, its parts in the -PT layout."""
        return self.parts if layout == PT else self.paddle_parts or (Part(self.name, self.shape),)


def checkpoint_tensors(config: ErnieConfig, *, mtp: bool = True, vision: bool = True) -> list[TensorSpec]:
    """Every tensor of a checkpoint with this architecture, in the order of the model.

    Args:
        config: `tie_word_embeddings`, `moe_use_aux_free` and `num_nextn_predict_layers` count as false or 0 if None.
        mtp: include the multi-token-prediction blocks that the config announces.
        vision: include vision experts, vision tower and adapter of a vision-language model.
    """
    table = _Table(config)
    specs = [table.copy("ernie.embed_tokens.weight", "embedding", config.vocab_size, config.hidden_size)]
    for layer in range(config.num_hidden_layers):
        specs += table.decoder_layer(f"ernie.layers.{layer}", layer, vision)
    specs.append(table.copy("ernie.norm.weight", "norms", config.hidden_size))
    if not config.tie_word_embeddings:
        head = table.linear("lm_head.weight", "head", config.hidden_size, config.vocab_size)
        specs.append(replace(head, either_orientation=True))
    if mtp:
        for depth in range(config.num_nextn_predict_layers or 0):
            specs += table.mtp(depth)
    if vision and config.vision_config is not None:
        specs += table.vision_tower() + table.adapter()
    return specs


def text_part_tensors(config: ErnieConfig) -> list[TensorSpec]:
    """What a model of `config.text_part()` consists of, and where a vision-language checkpoint holds it.

    Names and shapes are the text model's. The files differ from a text model's in two ways: routers are stored
    [in, out] in both layouts, and the correction bias has a row for each bank, of which the first is the text bank's.
    For a text model it is `checkpoint_tensors(config)`.
    """
    specs = checkpoint_tensors(config, vision=False)
    if config.vision_config is None:
        return specs
    return [_first_row(spec) if spec.name.endswith(".e_score_correction_bias") else spec for spec in specs]


def _first_row(spec: TensorSpec) -> TensorSpec:
    parts, paddle_parts = (tuple(replace(part, used_rows=1) for part in spec.stored(layout)) for layout in (PT, PADDLE))
    return replace(spec, shape=(1, *spec.shape[1:]), parts=parts, paddle_parts=paddle_parts)


@dataclass(frozen=True)
class QuantisedTensor:
    """One of the two tensors of a quantised checkpoint that take the place of a weight.

    Attributes:
        name: `X.quant_weight` or `X.weight_scale` for the weight `X.weight`.
        shape: its shape.
        dtype: its safetensors dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def byte_count(self) -> int:
        """Bytes in a file."""
        return math.prod(self.shape) * DTYPES[self.dtype].item_size


def quantised_kind(spec: TensorSpec, quantization: QuantizationConfig) -> str | None:
    """How a weight is quantised; None for what stays as it is: norms, biases, router, vision tower and adapter."""
    if spec.float32 or len(spec.shape) != 2 or spec.group in ("vision tower", "adapter"):
        return None
    if spec.group in ("embedding", "head"):
        kind = quantization.embedding_quant_type
        return None if kind == NOT_QUANTISED else kind
    if spec.group in ("experts", "text experts", "vision experts"):
        return quantization.moe_quant_type
    return quantization.dense_quant_type


def quantised_tensors(spec: TensorSpec, kind: str) -> tuple[QuantisedTensor, QuantisedTensor]:
    """Codes and scales that stand for this weight in a quantised -Paddle checkpoint: see `quantization.weights`."""
    stem = spec.name.removesuffix(".weight")
    codes, scales = stored_shapes(kind, spec.shape, spec.outputs_first)
    return (
        QuantisedTensor(f"{stem}{CODES_SUFFIX}", codes, "I8"),
        QuantisedTensor(f"{stem}{SCALES_SUFFIX}", scales, SCALE_DTYPES[kind]),
    )


def weight_bytes(specs: Iterable[TensorSpec], dtype: str, quantization: QuantizationConfig | None = None) -> int:
    """Bytes of the weights in memory or in a file; float32 tensors stay float32.

    Args:
        specs: the tensors.
        dtype: dtype of those that are not quantised.
        quantization: which are quantised, and how; None: none is.
    """
    item = DTYPES[dtype_from_framework_name(dtype)].item_size
    total = 0
    for spec in specs:
        kind = None if quantization is None else quantised_kind(spec, quantization)
        if kind is None:
            total += spec.size * (4 if spec.float32 else item)
        else:
            total += sum(tensor.byte_count for tensor in quantised_tensors(spec, kind))
    return total


def bytes_left_out(config: ErnieConfig, dtype: str, quantization: QuantizationConfig | None = None) -> int:
    """Bytes of the weights that `text_part_tensors` leaves out of a whole model: see `weight_bytes`."""
    whole, part = checkpoint_tensors(config), text_part_tensors(config)
    return weight_bytes(whole, dtype, quantization) - weight_bytes(part, dtype, quantization)


def detect_layout(names: Iterable[str], where: str) -> str:
    """Tells the layout from the names of text tensors: the repository's name and its config.json are not reliable.

    Raises:
        CheckpointError: the names belong to neither published layout.
    """
    names = list(names)
    if any(name.startswith("ernie.") and not _is_visual(name) for name in names):
        return PADDLE
    if any(name.startswith("model.") and name.endswith(".q_proj.weight") for name in names):
        return PT
    if any(name.endswith(".qkv_proj.weight") for name in names):
        raise CheckpointError(
            f"{where}: fused qkv_proj under 'model.' is PaddleFormers' in-memory layout, not a published one; "
            "save it with save_to_hf=True (-PT layout) and load that"
        )
    if any(name.endswith(CODES_SUFFIX) for name in names):
        hint = "quantised checkpoints are read with -Paddle names, such as 'ernie.embed_tokens.quant_weight'"
    else:
        hint = "expected names such as 'ernie.norm.weight'"
    raise CheckpointError(f"{where}: not an ERNIE 4.5 checkpoint: {hint}; found {', '.join(sorted(names)[:4])}, ...")


def settle_config(config: ErnieConfig, names: Iterable[str]) -> ErnieConfig:
    """Decides from the tensors what config.json leaves open or what published configs get wrong.

    Tied embeddings: the config's word if it gives one, else whether there is an lm_head. Correction bias and
    multi-token prediction: whether their tensors are there.
    """
    names = set(names)
    tied = config.tie_word_embeddings
    depths = {name.split(".")[2] for name in names if ".mtp_linear_proj." in name}
    return config.replace(
        tie_word_embeddings=names.isdisjoint(HEAD_NAMES) if tied is None else tied,
        moe_use_aux_free=any(name.endswith(".e_score_correction_bias") for name in names) and bool(config.banks),
        num_nextn_predict_layers=len(depths),
    )


HEAD_NAMES = ("lm_head.weight", f"lm_head{CODES_SUFFIX}")


def pt_name(name: str) -> str:
    """-PT spelling of a -Paddle name that is not split."""
    return "model." + name.removeprefix("ernie.") if name.startswith("ernie.") else name


def aliases(name: str) -> tuple[str, ...]:
    """The names under which files hold this tensor, the usual one first.

    The vision tower and the adapter are found at the root, under `ernie.` and under `model.`, in either layout.
    """
    if not _is_visual(name):
        return (name,)
    stem = _without_prefix(name)
    return (name, *(other for prefix in ("", "ernie.", "model.") if (other := prefix + stem) != name))


def _is_visual(name: str) -> bool:
    return _without_prefix(name).startswith(("vision_model.", "resampler_model."))


def _without_prefix(name: str) -> str:
    return name.removeprefix("ernie.").removeprefix("model.")


def router_weight_name(bank: int) -> str:
    """Name of a bank's router weight inside `mlp.gate`."""
    return f"weight_{bank}" if bank else "weight"


class _Table:
    """Builds the specs of one architecture; method names say how a tensor is laid out or what it belongs to."""

    def __init__(self, config: ErnieConfig):
        self.config = config
        self.hidden = config.hidden_size
        self.qkv_columns = _qkv_columns(config)

    # How a tensor is laid out.

    def copy(self, name: str, group: str, *shape: int, float32: bool = False) -> TensorSpec:
        return TensorSpec(name, shape, group, (Part(pt_name(name), shape),), float32=float32)

    def linear(self, name: str, group: str, inputs: int, outputs: int, *, float32: bool = False) -> TensorSpec:
        part = Part(pt_name(name), (outputs, inputs), transposed=True)
        return TensorSpec(name, (inputs, outputs), group, (part,), float32=float32)

    def linear_with_bias(self, name: str, group: str, inputs: int, outputs: int) -> list[TensorSpec]:
        return [self.linear(f"{name}.weight", group, inputs, outputs), self.copy(f"{name}.bias", group, outputs)]

    def fused(self, prefix: str, fused: str, group: str, columns: dict[str, slice | np.ndarray]) -> TensorSpec:
        widths = {key: _width(where) for key, where in columns.items()}
        parts = tuple(
            Part(pt_name(f"{prefix}.{key}.weight"), (widths[key], self.hidden), columns=where, transposed=True)
            for key, where in columns.items()
        )
        return TensorSpec(f"{prefix}.{fused}.weight", (self.hidden, sum(widths.values())), group, parts)

    # What it belongs to.

    def mlp(self, prefix: str, group: str, width: int) -> list[TensorSpec]:
        columns: dict[str, slice | np.ndarray] = {"gate_proj": slice(0, width), "up_proj": slice(width, 2 * width)}
        return [
            self.fused(prefix, "up_gate_proj", group, columns),
            self.linear(f"{prefix}.down_proj.weight", group, width, self.hidden),
        ]

    def decoder_layer(self, prefix: str, layer: int, vision: bool) -> list[TensorSpec]:
        config = self.config
        specs = self.attention_block(prefix, "attention")
        if config.is_moe_layer(layer):
            return specs + self.moe(f"{prefix}.mlp", layer, vision)
        return specs + self.mlp(f"{prefix}.mlp", "dense feed-forward", config.intermediate_size)

    def attention_block(self, prefix: str, group: str) -> list[TensorSpec]:
        config = self.config
        norms = "norms" if group == "attention" else group
        return [
            self.copy(f"{prefix}.input_layernorm.weight", norms, self.hidden),
            self.fused(f"{prefix}.self_attn", "qkv_proj", group, self.qkv_columns),
            self.linear(
                f"{prefix}.self_attn.o_proj.weight", group, config.num_attention_heads * config.head_dim, self.hidden
            ),
            self.copy(f"{prefix}.post_attention_layernorm.weight", norms, self.hidden),
        ]

    def moe(self, prefix: str, layer: int, vision: bool) -> list[TensorSpec]:
        config = self.config
        banks = config.banks if vision else config.banks[:1]
        specs = []
        for number, bank in enumerate(banks):
            name = f"{prefix}.gate.{router_weight_name(number)}"
            # Vision-language files keep the router [in, out] in both layouts.
            layout = self.copy if config.vision_config is not None else self.linear
            specs.append(layout(name, "router", self.hidden, bank.num_experts, float32=True))
        if config.moe_use_aux_free:
            name = f"{prefix}.moe_statics.e_score_correction_bias"
            specs.append(self.copy(name, "router", len(config.banks), config.banks[0].num_experts, float32=True))
        first = 0
        for number, bank in enumerate(banks):
            group = "experts" if len(config.banks) == 1 else ("text experts", "vision experts")[number]
            if bank.covers(layer):
                for expert in range(first, first + bank.num_experts):
                    specs += self.mlp(f"{prefix}.experts.{expert}", group, bank.intermediate_size)
            first += bank.num_experts
        if config.shared_intermediate_size:
            specs += self.mlp(f"{prefix}.shared_experts", "shared experts", config.shared_intermediate_size)
        return specs

    def mtp(self, depth: int) -> list[TensorSpec]:
        group = "multi-token prediction"
        projection = self.linear(f"ernie.mtp_linear_proj.{depth}.weight", group, 2 * self.hidden, self.hidden)
        return [
            *self.attention_block(f"ernie.mtp_block.{depth}", group),
            *self.mlp(f"ernie.mtp_block.{depth}.mlp", group, self.config.intermediate_size),
            self.copy(f"ernie.mtp_emb_norm.{depth}.weight", group, self.hidden),
            self.copy(f"ernie.mtp_hidden_norm.{depth}.weight", group, self.hidden),
            replace(projection, either_orientation=True),
        ]

    @property
    def vision(self) -> VisionConfig:
        vision = self.config.vision
        assert vision is not None
        return vision

    def vision_tower(self) -> list[TensorSpec]:
        group, vision = "vision tower", self.vision
        width, inner = vision.width, vision.intermediate_size
        specs = [self.linear("vision_model.patch_embed.proj.weight", group, vision.patch_bytes, width)]
        for block in range(vision.depth):
            prefix = f"vision_model.blocks.{block}"
            specs += self.layer_norm(f"{prefix}.norm1", group, width) + self.layer_norm(f"{prefix}.norm2", group, width)
            specs += self.linear_with_bias(f"{prefix}.attn.qkv", group, width, 3 * width)
            specs += self.linear_with_bias(f"{prefix}.attn.proj", group, width, width)
            specs += self.linear_with_bias(f"{prefix}.mlp.fc1", group, width, inner)
            specs += self.linear_with_bias(f"{prefix}.mlp.fc2", group, inner, width)
        return specs + self.layer_norm("vision_model.ln", group, width)

    def adapter(self) -> list[TensorSpec]:
        group, prefix = "adapter", "ernie.resampler_model"
        width = self.vision.width * self.vision.merge_size**2
        frames = width * self.vision.frames_per_token
        return [
            *self.linear_with_bias(f"{prefix}.spatial_linear.0", group, width, width),
            *self.linear_with_bias(f"{prefix}.spatial_linear.2", group, width, width),
            *self.layer_norm(f"{prefix}.spatial_linear.3", group, width),
            *self.linear_with_bias(f"{prefix}.temporal_linear.0", group, frames, width),
            *self.linear_with_bias(f"{prefix}.temporal_linear.2", group, width, width),
            *self.layer_norm(f"{prefix}.temporal_linear.3", group, width),
            *self.linear_with_bias(f"{prefix}.mlp", group, width, self.hidden),
            self.copy(f"{prefix}.after_norm.weight", group, self.hidden),
        ]

    def layer_norm(self, prefix: str, group: str, width: int) -> list[TensorSpec]:
        return [self.copy(f"{prefix}.weight", group, width), self.copy(f"{prefix}.bias", group, width)]


def _qkv_columns(config: ErnieConfig) -> dict[str, slice | np.ndarray]:
    """Columns of Q, K and V in the fused projection: three blocks, or side by side per head without grouping."""
    heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    keys = ("q_proj", "k_proj", "v_proj")
    if heads == groups:
        columns = np.arange(3 * heads * dim).reshape(heads, 3, dim)
        return {key: columns[:, i].ravel() for i, key in enumerate(keys)}
    stops = np.cumsum([heads * dim, groups * dim, groups * dim]).tolist()
    return {key: slice(start, stop) for key, start, stop in zip(keys, [0, *stops], stops, strict=False)}


def _width(columns: slice | np.ndarray) -> int:
    return columns.stop - columns.start if isinstance(columns, slice) else len(columns)
