"""Weights in a form for inference only, applied to a model from outside: packed on a CPU, of 8 or 4 bits on a GPU.

A layer whose `weight` is a `PackedWeight` or a `WeightOnly` instead of a parameter works as before, because
`ops.linear` and `ops.embedding` take both. It hides which parameters these replace, and how the fused stack of a CPU is
put together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import paddle
from paddle import Tensor, nn

from ernie45 import ops
from ernie45.checkpoint.names import CODES_SUFFIX, SCALES_SUFFIX, router_weight_name
from ernie45.models.adapter import Adapter
from ernie45.models.cache import KVCache
from ernie45.models.decoder import Decoder, DecoderLayer, Embedding
from ernie45.models.fused_vision import FusedVision
from ernie45.models.layers import MLP
from ernie45.models.mask import AttentionMask
from ernie45.models.moe import ExpertBank, MoE, Routing
from ernie45.models.vision import VisionTransformer
from ernie45.ops import AdaptedWeight, custom
from ernie45.ops.decoder import PackedBank, PackedLayer, PackedStack, supports
from ernie45.ops.packed import BFLOAT16, WINT8, PackedMemory, PackedWeight, aligned, packed_bytes
from ernie45.ops.weight_only import WeightOnly, WeightOnlyStack, takes
from ernie45.quantization.config import NOT_QUANTISED, QuantizationConfig

# Tokens that go through the layers at once: enough to be bound by arithmetic, few enough to stay in the caches.
CHUNK_TOKENS = 512


def pack(model: nn.Layer, quantization: QuantizationConfig | None) -> None:
    """Replaces the matrices of a model, made without memory, by packed weights of zeros, and gives the rest memory.

    Args:
        model: in bfloat16, made under `paddle.LazyGuard`.
        quantization: the kind of each weight; None: bfloat16. Vision tower and adapter are bfloat16 in any case.
    """
    chosen = _take_out(model, [matrix for matrix in _matrices(model, quantization) if matrix.dtype == BFLOAT16])
    memory = PackedMemory(sum(aligned(packed_bytes(m.kind, m.shape, outputs_first=m.outputs_first)) for m in chosen))
    for matrix in chosen:
        zeros = PackedWeight.zeros(matrix.kind, matrix.shape, outputs_first=matrix.outputs_first, memory=memory)
        setattr(matrix.layer, matrix.name, zeros)


def hold_in_few_bits(model: nn.Layer, quantization: QuantizationConfig) -> None:
    """Replaces matrices of a model, made without memory, by empty weights of 8 or 4 bits, and gives the rest memory.

    Embedding, head, and what has sizes that the kernels of a GPU do not take, stay parameters.

    Args:
        model: in bfloat16 or float16, made under `paddle.LazyGuard`.
        quantization: the kind of each weight.
    """
    matrices = [matrix for matrix in _matrices(model, quantization) if matrix.kind != BFLOAT16]
    for matrix in _take_out(model, [m for m in matrices if not m.is_vocabulary and takes(m.shape)]):
        make = WeightOnly if len(matrix.shape) == 2 else WeightOnlyStack
        setattr(matrix.layer, matrix.name, make(matrix.kind, matrix.shape, matrix.dtype))


@dataclass(frozen=True)
class _Matrix:
    """A parameter with rows and columns, or a stack of them, other than a router.

    Attributes:
        layer, name: where it is.
        kind: in which it is to be held.
        shape, dtype: of the parameter.
        is_vocabulary: it is the embedding or the head.
        outputs_first: it is [out, in].
    """

    layer: nn.Layer
    name: str
    kind: str
    shape: list[int]
    dtype: str
    is_vocabulary: bool
    outputs_first: bool


def _matrices(model: nn.Layer, quantization: QuantizationConfig | None) -> Iterator[_Matrix]:
    vision = [part for part in model.sublayers() if isinstance(part, VisionTransformer | Adapter)]
    never_quantised = {id(layer) for part in vision for layer in part.sublayers(include_self=True)}
    for layer in model.sublayers(include_self=True):
        for name, parameter in layer._parameters.items():
            if parameter.ndim > 1 and parameter.dtype != paddle.float32:
                is_head, is_embedding = layer is getattr(model, "head", None), isinstance(layer, Embedding)
                kind = _kind(layer, is_head, None if id(layer) in never_quantised else quantization)
                dtype = str(parameter.dtype).removeprefix("paddle.")
                yield _Matrix(layer, name, kind, list(parameter.shape), dtype, is_head or is_embedding, is_embedding)


def _take_out(model: nn.Layer, chosen: list[_Matrix]) -> list[_Matrix]:
    """Takes the chosen parameters out of the model; all others get memory, and no gradient."""
    for matrix in chosen:
        del matrix.layer._parameters[matrix.name]
    for parameter in model.parameters():
        parameter.initialize()
        parameter.stop_gradient = True
    return chosen


def packed_weights(model: nn.Layer) -> Iterator[tuple[str, PackedWeight | WeightOnly | WeightOnlyStack]]:
    """Every weight for inference only, with the name that its parameter would have."""
    for prefix, layer in model.named_sublayers(include_self=True):
        for name, value in vars(layer).items():
            value = value.base if isinstance(value, AdaptedWeight) else value
            if isinstance(value, PackedWeight | WeightOnly | WeightOnlyStack):
                yield (f"{prefix}.{name}" if prefix else name), value


def unpacked(name: str, weight: PackedWeight | WeightOnly) -> dict[str, Tensor]:
    """A packed weight in its published form: the bfloat16 tensor, or codes and scales under the quantised names."""
    codes = paddle.to_tensor(weight.codes())
    if weight.kind == BFLOAT16:
        return {name: codes.view("bfloat16")}
    stem, scales = name.removesuffix(".weight"), paddle.to_tensor(weight.scale_values())
    return {
        f"{stem}{CODES_SUFFIX}": codes,
        f"{stem}{SCALES_SUFFIX}": scales if weight.kind == WINT8 else scales.view("bfloat16"),
    }


class FusedDecoder:
    """Runs a decoder with packed weights in one operator."""

    def __init__(self, decoder: Decoder):
        config = decoder.config
        self.config = config
        self.stack = PackedStack.collect(
            config,
            decoder.layers[0].self_attn.scale,
            decoder.embed_tokens.weight,
            [_packed_layer(layer) for layer in decoder.layers],
            decoder.norm.weight.astype("float32"),
        )

    def first_keys(
        self, input_ids: Tensor, position_ids: Tensor, mask: AttentionMask, routing: list[Routing] | None
    ) -> Tensor | None:
        """The first key [batch] that each row may see; None if this call has to go layer by layer."""
        if routing is not None or not custom.usable(input_ids) or position_ids.dtype != paddle.int64:
            return None
        return mask.first_visible(input_ids.shape[0])

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        first: Tensor,
        cache: KVCache | None,
        banks: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [batch, new, hidden_size] float32; keys and values are appended to the cache, if any.

        See `ops.decoder` for `banks`, `features`, and the ids that stand for these.
        """
        batch, new = input_ids.shape
        cache = KVCache(self.config, new) if cache is None else cache
        buffers = cache.reserve(batch, new, paddle.bfloat16)
        step = max(1, CHUNK_TOKENS // batch)
        if new <= step:
            return ops.decoder(input_ids, position_ids, first, self.stack, buffers, cache.length, banks, features)
        parts = []
        for start in range(0, new, step):
            ids, positions, part_banks = (
                None if tensor is None else tensor[:, start : start + step]
                for tensor in (input_ids, position_ids, banks)
            )
            done = cache.length + start
            parts.append(ops.decoder(ids, positions, first, self.stack, buffers, done, part_banks, features))
        return paddle.concat(parts, axis=1)


def fuse(model: nn.Layer) -> None:
    """Lets the decoder of a packed model, and the vision tower if it has one, run as one operator where that can.

    Nothing else than packed weights goes with these operators: a model with weights of few bits stays as it is.
    """
    if not isinstance(model.ernie.embed_tokens.weight, PackedWeight):
        return
    if supports(model.ernie.config):
        model.ernie.fused = FusedDecoder(model.ernie)
    tower = getattr(model, "vision_model", None)
    if tower is not None:
        tower.fused = FusedVision(tower)


def _kind(layer: nn.Layer, is_head: bool, quantization: QuantizationConfig | None) -> str:
    if quantization is None:
        return BFLOAT16
    if is_head or isinstance(layer, Embedding):
        kind = quantization.embedding_quant_type
        return BFLOAT16 if kind == NOT_QUANTISED else kind
    return quantization.moe_quant_type if isinstance(layer, ExpertBank) else quantization.dense_quant_type


def _packed_layer(layer: DecoderLayer) -> PackedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    input_norm, post_norm = (
        norm.weight.astype("float32") for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    )
    qkv, out = attention.qkv_proj.weight, attention.o_proj.weight
    if isinstance(mlp, MLP):
        return PackedLayer(input_norm, post_norm, qkv, out, _projections(mlp))
    shared = None if mlp.shared_experts is None else _projections(mlp.shared_experts)
    banks = [_packed_bank(mlp, number) for number in range(len(mlp.experts))]
    return PackedLayer(input_norm, post_norm, qkv, out, shared, banks)


def _packed_bank(mlp: MoE, number: int) -> PackedBank:
    experts, router = mlp.experts[str(number)], getattr(mlp.gate, router_weight_name(number))
    bias = paddle.zeros([router.shape[1]], dtype="float32")
    if mlp.moe_statics is not None:
        bias = mlp.moe_statics.e_score_correction_bias[number].clone()
    return PackedBank(experts.up_gate_proj, experts.down_proj, router, bias)


def _projections(mlp: MLP) -> tuple[PackedWeight, PackedWeight]:
    return mlp.up_gate_proj.weight, mlp.down_proj.weight
