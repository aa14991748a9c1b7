"""The decoder as one fused operator, from ids to normed hidden states, for inference on packed weights.

Its definition is `Decoder.forward` in models/decoder.py; this module only knows how the operator wants its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import paddle
from paddle import Tensor

from ernie45.config import ErnieConfig
from ernie45.ops import custom, reference
from ernie45.ops.packed import KINDS, PackedWeight

ABSENT = [0, 0, 0, 0]
LARGEST_HEAD = 512


@dataclass(frozen=True)
class PackedBank:
    """Routed experts and what chooses among them.

    Attributes:
        up_gate, down: projections of the stacked experts.
        router: [hidden, experts] float32.
        bias: [experts] float32, added to the probabilities where experts are chosen.
    """

    up_gate: PackedWeight
    down: PackedWeight
    router: Tensor
    bias: Tensor


@dataclass(frozen=True)
class PackedLayer:
    """The weights of one decoder layer.

    Attributes:
        input_norm, post_norm: [hidden] float32.
        qkv, out: projections of the attention.
        dense: up_gate and down projection of the MLP or of the shared experts; None: there is none.
        banks: the routed experts, as many banks in every layer that has any; none: a dense layer.
    """

    input_norm: Tensor
    post_norm: Tensor
    qkv: PackedWeight
    out: PackedWeight
    dense: tuple[PackedWeight, PackedWeight] | None
    banks: Sequence[PackedBank] = ()


@dataclass(frozen=True)
class PackedStack:
    """All weights as the operator takes them: a flat list of tensors, and the shapes of the matrices among them."""

    sizes: list[int]
    numbers: list[float]
    weights: list[Tensor]
    shapes: list[int]

    @classmethod
    def collect(
        cls,
        config: ErnieConfig,
        attention_scale: float,
        embedding: PackedWeight,
        layers: Sequence[PackedLayer],
        final_norm: Tensor,
    ) -> PackedStack:
        """Lists the weights in the order in which csrc/bindings/decoder.cpp reads them."""
        weights: list[Tensor] = []
        shapes: list[int] = []
        banks = max(len(layer.banks) for layer in layers)

        def add(matrix: PackedWeight | None) -> None:
            shapes.extend(ABSENT if matrix is None else _shape(matrix))
            weights.extend([] if matrix is None else [matrix.data])
            weights.extend([] if matrix is None or matrix.scales is None else [matrix.scales])

        add(embedding)
        # Dividing the positions and dividing the frequencies is the same; published models divide by 1.
        frequencies = reference.rope_frequencies(config.head_dim, config.rope_theta) / config.compression_ratio
        weights += [frequencies, final_norm]
        for layer in layers:
            weights += [layer.input_norm, layer.post_norm]
            for matrix in (layer.qkv, layer.out, *(layer.dense or (None, None))):
                add(matrix)
            for bank in layer.banks:
                add(bank.up_gate)
                add(bank.down)
                weights += [bank.router, bank.bias]
            for _ in range(2 * (banks - len(layer.banks))):
                add(None)
        sizes = [
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.moe_k,
            int(config.moe_gate_act == "softmax"),
            int(config.moe_norm_gate_logits),
            0 if config.vision is None else config.vision.time_pairs,
            banks,
        ]
        return cls(sizes, [config.rms_norm_eps, attention_scale, config.moe_norm_min], weights, shapes)


def decoder(
    ids: Tensor,
    positions: Tensor,
    first: Tensor,
    stack: PackedStack,
    caches: Sequence[Tensor],
    cached: int,
    banks: Tensor | None = None,
    features: Tensor | None = None,
) -> Tensor:
    """Runs new tokens through the decoder.

    Args:
        ids: [batch, new] int64; -1 - row takes a row of `features` instead of an embedding.
        positions: [batch, new] int64, or [batch, new, 3] as (time, row, column): see `ops.rope_angles`.
        first: [batch] int64, the first column of the cache that a row may see.
        stack: the weights.
        caches: keys and values of every layer, bfloat16 [batch, capacity, kv_heads, head_dim]; the new tokens are
            written after the first `cached` ones, in place.
        cached: tokens in the cache.
        banks: [batch, new] int64, the bank of experts of each token; None: the first one for all.
        features: [any, hidden] float32; None: every id is in the vocabulary.

    Returns:
        [batch, new, hidden] float32, after the final norm.
    """
    return custom.run(
        "ernie45_decoder",
        ids,
        positions,
        first,
        banks,
        features,
        stack.weights,
        caches,
        cached,
        stack.sizes,
        stack.numbers,
        stack.shapes,
    )[0]


def supports(config: ErnieConfig) -> bool:
    """Whether the operator can compute this architecture: no head is too wide, and no MoE layer lacks a bank."""
    moe_layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
    complete = all(bank.covers(layer) for bank in config.banks for layer in moe_layers)
    return config.head_dim <= LARGEST_HEAD and complete and paddle.device.get_device() == "cpu"


def _shape(matrix: PackedWeight) -> list[int]:
    count = 1 if matrix.count is None else matrix.count
    return [KINDS[matrix.kind], matrix.in_features, matrix.out_features, count]
