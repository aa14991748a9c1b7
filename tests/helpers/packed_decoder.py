"""A decoder with random packed weights and any number of expert banks, and its definition, operator by operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie45 import ops
from ernie45.checkpoint.dtypes import convert
from ernie45.config import ErnieConfig
from ernie45.ops import reference
from ernie45.ops.decoder import PackedBank, PackedLayer, PackedStack
from ernie45.ops.packed import PackedWeight
from ernie45.quantization.weights import quantize
from tests.helpers.vision import vision_config

VOCABULARY = 61
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "freq_allocation": 2,
    "im_patch_id": 60,
}
Banks = Sequence[tuple[int, int]]  # experts and their width


class RandomDecoder:
    """Weights of three layers: one without experts, one with shared experts, one with routed experts only."""

    def __init__(self, kind: str, banks: Banks, **changes: Any):
        self.kind, self.config = kind, vision_config(**{**SHAPE, **changes})
        self.generator = np.random.default_rng(0)
        config = self.config
        hidden, query = config.hidden_size, config.num_attention_heads * config.head_dim
        fused = query + 2 * config.num_key_value_heads * config.head_dim
        self.embedding = self.weight([config.vocab_size, hidden], outputs_first=True)
        self.final_norm = self.norm()
        self.layers = [
            PackedLayer(
                self.norm(),
                self.norm(),
                self.weight([hidden, fused]),
                self.weight([query, hidden]),
                None if layer == 2 else (self.weight([hidden, 2 * 40]), self.weight([40, hidden])),
                [self.bank(*shape) for shape in banks] if layer else [],
            )
            for layer in range(3)
        ]
        self.scale = config.head_dim**-0.5
        self.stack = PackedStack.collect(config, self.scale, self.embedding, self.layers, self.final_norm)

    def numbers(self, *shape: int) -> np.ndarray:
        return self.generator.standard_normal(shape, dtype=np.float32)

    def norm(self) -> Tensor:
        return paddle.to_tensor(1 + 0.2 * self.numbers(self.config.hidden_size))

    def weight(self, shape: list[int], outputs_first: bool = False) -> PackedWeight:
        """[in, out], or stacked [count, in, out], or [out, in] if outputs come first."""
        kind = "wint8" if outputs_first and self.kind == "wint4" else self.kind  # as embeddings are
        packed = PackedWeight.zeros(kind, shape, outputs_first=outputs_first)
        for index in range(packed.count or 1):
            values = self.numbers(*shape[-2:]) / np.float32(np.sqrt(packed.in_features))
            part = packed if packed.count is None else packed[index]
            if kind == "bfloat16":
                part.write(convert(values, "F32", "BF16"))
            else:
                quantised = quantize(values, "F32", kind, outputs_first=outputs_first)
                part.write(quantised.codes)
                part.write_scales(quantised.scales)
        return packed

    def bank(self, experts: int, width: int) -> PackedBank:
        hidden = self.config.hidden_size
        up_gate, down = self.weight([experts, hidden, 2 * width]), self.weight([experts, width, hidden])
        router = self.numbers(hidden, experts) / np.float32(np.sqrt(hidden))
        return PackedBank(up_gate, down, paddle.to_tensor(router), paddle.to_tensor(0.05 * self.numbers(experts)))

    def empty_caches(self, batch: int, capacity: int) -> list[Tensor]:
        shape = [batch, capacity, self.config.num_key_value_heads, self.config.head_dim]
        return [paddle.full(shape, float("nan"), dtype="bfloat16") for _ in range(2 * len(self.layers))]


@dataclass
class Prompt:
    """What the operator takes besides the weights and the cache.

    `margins` [batch] receives, from the definition, how near each row came to another choice of experts.
    """

    ids: Tensor
    positions: Tensor
    first: Tensor
    banks: Tensor | None = None
    features: Tensor | None = None
    margins: np.ndarray = field(default_factory=lambda: np.empty(0))

    @classmethod
    def random(cls, config: ErnieConfig, batch: int, length: int, banks: int, seed: int = 0) -> Prompt:
        """Runs of tokens of random banks, of which those of bank 1 are features; every third row is text."""
        generator = np.random.default_rng(seed)
        owners = generator.integers(0, banks, (batch, length)).repeat(3, axis=1)[:, :length]
        owners[::3] = 0
        ids = generator.integers(0, config.vocab_size, (batch, length))
        seen = owners == 1
        ids[seen] = -1 - generator.permutation(seen.sum())
        positions = np.arange(length)[None, :, None] + generator.integers(0, 5, (batch, length, 3)) * seen[..., None]
        features = generator.standard_normal((seen.sum(), config.hidden_size), dtype=np.float32)
        first = generator.integers(0, length // 2, batch)
        return cls(*map(paddle.to_tensor, (ids, positions, first, owners, features)))

    def rows(self, which: np.ndarray) -> Prompt:
        """Some of the rows."""
        index = paddle.to_tensor(which)
        banks = None if self.banks is None else self.banks[index]
        return Prompt(self.ids[index], self.positions[index], self.first[index], banks, self.features)

    def columns(self, start: int, stop: int) -> Prompt:
        """Some of the tokens, of all rows."""
        banks = None if self.banks is None else self.banks[:, start:stop]
        return Prompt(self.ids[:, start:stop], self.positions[:, start:stop], self.first, banks, self.features)


def fused_decoder(decoder: RandomDecoder, prompt: Prompt, caches: list[Tensor], cached: int = 0) -> np.ndarray:
    """The operator."""
    stack, banks, features = decoder.stack, prompt.banks, prompt.features
    return ops.decoder(prompt.ids, prompt.positions, prompt.first, stack, caches, cached, banks, features).numpy()


def defined_decoder(decoder: RandomDecoder, prompt: Prompt, caches: list[Tensor], cached: int = 0) -> np.ndarray:
    """What the operator computes. Packed products and attention are operators of their own, which round likewise."""
    config, ids, new = decoder.config, prompt.ids, prompt.ids.shape[1]
    assert config.vision is not None
    x = decoder.embedding.columns(paddle.clip(ids, min=0))
    if prompt.features is not None:
        given = paddle.gather(prompt.features, paddle.clip(-1 - ids, min=0).flatten()).reshape(x.shape)
        x = paddle.where((ids < 0).unsqueeze(-1), given, x)
    rotary = reference.rope_angles(prompt.positions, config.head_dim, config.rope_theta, config.vision.time_pairs)
    banks = paddle.zeros_like(ids) if prompt.banks is None else prompt.banks
    prompt.margins = np.full(ids.shape[0], np.inf)
    lengths = paddle.full([ids.shape[0]], cached + new, dtype="int64")
    sizes = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
    for layer, keys, values in zip(decoder.layers, caches[::2], caches[1::2], strict=True):
        qkv = ops.linear(reference.rms_norm(x, layer.input_norm, config.rms_norm_eps), layer.qkv)
        query, key, value = paddle.split(qkv.reshape([*ids.shape, sum(sizes), config.head_dim]), sizes, axis=2)
        keys[:, cached : cached + new] = reference.rope(key, *rotary).astype("bfloat16")
        values[:, cached : cached + new] = value.astype("bfloat16")
        query = reference.rope(query, *rotary)
        mixed = ops.decode_attention(query, keys, values, lengths, decoder.scale, prompt.first)
        x = x + ops.linear(mixed.flatten(2), layer.out)
        normed = reference.rms_norm(x, layer.post_norm, config.rms_norm_eps)
        if layer.dense is not None:
            x = x + ops.linear(reference.swiglu(ops.linear(normed, layer.dense[0])), layer.dense[1])
        for number, bank in enumerate(layer.banks):
            x = x + _routed(config, bank, normed, banks == number, prompt)
    return reference.rms_norm(x, decoder.final_norm, config.rms_norm_eps).numpy()


def _routed(config: ErnieConfig, bank: PackedBank, x: Tensor, members: Tensor, prompt: Prompt) -> Tensor:
    """What one bank adds to its tokens: every expert for every token, times a weight that is mostly zero."""
    logits = paddle.matmul(x, bank.router).flatten(0, 1)
    probabilities, indices, weights = reference.moe_gate(
        logits, bank.bias, config.moe_k, config.moe_gate_act, config.moe_norm_gate_logits, config.moe_norm_min
    )
    ordered = -np.sort(-(probabilities + bank.bias).numpy(), axis=-1)
    gaps = (ordered[:, config.moe_k - 1] - ordered[:, config.moe_k]).reshape(members.shape)
    prompt.margins = np.minimum(prompt.margins, np.where(members.numpy(), gaps, np.inf).min(axis=1))
    total = paddle.zeros_like(x)
    for expert in range(bank.router.shape[1]):
        weight = (weights * (indices == expert).astype("float32")).sum(axis=-1).reshape(members.shape)
        out = ops.linear(reference.swiglu(ops.linear(x, bank.up_gate[expert])), bank.down[expert])
        total = total + out * (weight * members.astype("float32")).unsqueeze(-1)
    return total
