"""Weights packed for inference on a CPU, applied to a model from outside.

A layer whose `weight` is a `PackedWeight` instead of a parameter works as before, because `ops.linear` and
`ops.embedding` take both. It hides which parameters are packed, and how the fused stack is put together from them.
"""

from __future__ import annotations

from collections.abc import Iterator

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
from ernie45.quantization.config import NOT_QUANTISED, QuantizationConfig

# Tokens that go through the layers at once: enough to be bound by arithmetic, few enough to stay in the caches.
CHUNK_TOKENS = 512


def pack(model: nn.Layer, quantization: QuantizationConfig | None) -> None:
    """Replaces the matrices of a model, made without memory, by packed weights of zeros, and gives the rest memory.

    Args:
        model: in bfloat16, made under `paddle.LazyGuard`.
        quantization: the kind of each weight; None: bfloat16. Vision tower and adapter are bfloat16 in any case.
    """
    vision = [part for part in model.sublayers() if isinstance(part, VisionTransformer | Adapter)]
    never_quantised = {id(layer) for part in vision for layer in part.sublayers(include_self=True)}
    chosen = []
    for layer in model.sublayers(include_self=True):
        for name, parameter in list(layer._parameters.items()):
            if parameter.ndim > 1 and parameter.dtype == paddle.bfloat16:
                kinds = None if id(layer) in never_quantised else quantization
                kind = _kind(layer, layer is getattr(model, "head", None), kinds)
                del layer._parameters[name]
                chosen.append((layer, name, kind, list(parameter.shape), isinstance(layer, Embedding)))
            else:
                parameter.initialize()
                parameter.stop_gradient = True
    memory = PackedMemory(sum(aligned(packed_bytes(k, shape, outputs_first=o)) for _, _, k, shape, o in chosen))
    for layer, name, kind, shape, outputs_first in chosen:
        setattr(layer, name, PackedWeight.zeros(kind, shape, outputs_first=outputs_first, memory=memory))


def packed_weights(model: nn.Layer) -> Iterator[tuple[str, PackedWeight]]:
    """Every packed weight with the name that its parameter would have."""
    for prefix, layer in model.named_sublayers(include_self=True):
        for name, value in vars(layer).items():
            value = value.base if isinstance(value, AdaptedWeight) else value
            if isinstance(value, PackedWeight):
                yield (f"{prefix}.{name}" if prefix else name), value


def unpacked(name: str, weight: PackedWeight) -> dict[str, Tensor]:
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
    """Lets the decoder of a packed model, and the vision tower if it has one, run as one operator where that can."""
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
