"""The dense building blocks: linear map, RMSNorm, attention and the SwiGLU MLP.

Weights are [in, out] and fused as in the published -Paddle files. Parameters are created as zeros (norms as ones):
the model draws random values or a reader fills them in, never both.
"""

from __future__ import annotations

import math

import paddle
from paddle import Tensor, nn
from paddle.nn.initializer import Constant

from ernie45 import ops
from ernie45.config import ErnieConfig
from ernie45.models.cache import KVCache
from ernie45.models.mask import AttentionMask

ZEROS = Constant(0.0)


class Linear(nn.Layer):
    """y = x W with W [in_features, out_features] and no bias, as everywhere in ERNIE 4.5's decoder."""

    def __init__(self, in_features: int, out_features: int, dtype: str):
        super().__init__()
        self.weight = self.create_parameter([in_features, out_features], dtype=dtype, default_initializer=ZEROS)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in the dtype of x."""
        return ops.linear(x, self.weight)


class BiasedLinear(Linear):
    """y = x W + b, as in the vision tower and the adapter."""

    def __init__(self, in_features: int, out_features: int, dtype: str):
        super().__init__(in_features, out_features, dtype)
        self.bias = self.create_parameter([out_features], dtype=dtype, default_initializer=ZEROS)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in the dtype of x."""
        return super().forward(x) + self.bias.astype(x.dtype)


class LayerNorm(nn.Layer):
    """LayerNorm (arXiv 1607.06450) over the last axis with learned scale and shift [width]."""

    def __init__(self, width: int, dtype: str, epsilon: float = 1e-6):
        super().__init__()
        self.epsilon = epsilon
        self.weight = self.create_parameter([width], dtype=dtype, default_initializer=Constant(1.0))
        self.bias = self.create_parameter([width], dtype=dtype, default_initializer=ZEROS)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape and dtype."""
        return ops.layer_norm(x, self.weight, self.bias, self.epsilon)


class RMSNorm(nn.Layer):
    """Root-mean-square norm (arXiv 1910.07467) over the last axis with a learned scale [hidden_size]."""

    def __init__(self, config: ErnieConfig, dtype: str):
        super().__init__()
        self.epsilon = config.rms_norm_eps
        self.weight = self.create_parameter([config.hidden_size], dtype=dtype, default_initializer=Constant(1.0))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> the same shape and dtype."""
        return ops.rms_norm(x, self.weight, self.epsilon)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum, both like x [..., hidden_size], in one pass over memory."""
        return ops.rms_norm(x, self.weight, self.epsilon, residual)


class Attention(nn.Layer):
    """Grouped-query attention with rotary positions and one fused Q|K|V projection."""

    def __init__(self, config: ErnieConfig, layer: int, dtype: str):
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = 1.0 / (config.scale_qk_coeff * math.sqrt(config.head_dim))
        width = self.num_heads * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, width + 2 * self.num_kv_heads * self.head_dim, dtype)
        self.o_proj = Linear(width, config.hidden_size, dtype)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: AttentionMask, cache: KVCache | None = None
    ) -> Tensor:
        """x [batch, sequence, hidden_size] -> the same shape; with a cache, keys and values are appended to it."""
        query, key, value = self.split(self.qkv_proj(x))
        query, key = ops.rope(query, *rotary), ops.rope(key, *rotary)
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        if cache is None and mask.causal and ops.rounds_activations(x, self.qkv_proj.weight):
            mixed = ops.causal_attention(query, key, value, self.scale, mask.key_ends())
        else:
            mixed = ops.attention(query, key, value, self.scale, mask.visible)
        return self.o_proj(mixed.flatten(2))

    def split(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Splits the fused projection [batch, sequence, width] into q, k, v [batch, sequence, heads, head_dim].

        With grouped queries the columns are all Q heads, all K heads, all V heads. Without (as many kv heads as
        heads) upstream stores q, k and v side by side for each head.
        """
        batch, sequence = fused.shape[:2]
        if self.num_heads == self.num_kv_heads:
            per_head = fused.reshape([batch, sequence, self.num_heads, 3 * self.head_dim])
            return tuple(paddle.split(per_head, 3, axis=-1))
        heads = fused.reshape([batch, sequence, self.num_heads + 2 * self.num_kv_heads, self.head_dim])
        return tuple(paddle.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], axis=2))


class MLP(nn.Layer):
    """SwiGLU feed-forward network (arXiv 2002.05202); the gate is the first half of the fused projection."""

    def __init__(self, hidden_size: int, intermediate_size: int, dtype: str):
        super().__init__()
        self.up_gate_proj = Linear(hidden_size, 2 * intermediate_size, dtype)
        self.down_proj = Linear(intermediate_size, hidden_size, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> the same shape."""
        return self.down_proj(ops.swiglu(self.up_gate_proj(x)))
