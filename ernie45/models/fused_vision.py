"""Runs a vision tower with packed weights in one operator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
from paddle import Tensor

from ernie45.models.layers import BiasedLinear, LayerNorm
from ernie45.models.vision import VisionBlock, VisionTransformer, rotary_2d
from ernie45.ops import custom
from ernie45.ops.packed import PackedWeight
from ernie45.ops.vision import Biased, Norm, PackedTower, PackedVisionBlock, vision


class FusedVision:
    """The tower of `VisionTransformer.forward` for weights that `models.packing.pack` has packed."""

    def __init__(self, tower: VisionTransformer):
        self.config = tower.config
        self.tower = PackedTower.collect(
            tower.config,
            tower.ln.epsilon,
            _packed(tower.patch_embed.proj.weight),
            [_block(block) for block in tower.blocks],
            _norm(tower.ln),
        )

    def usable(self, x: Tensor) -> bool:
        """Whether the operator takes these patches [N, patch_bytes]: it is there, and they are float32 on the CPU."""
        return custom.usable(x) and x.dtype == paddle.float32

    def __call__(self, x: Tensor, places: np.ndarray, lengths: Sequence[int]) -> Tensor:
        """One vector per patch, after the final norm.

        Args:
            x: [N, patch_bytes] float32, normalised pixels.
            places: [N, 2] row and column of each patch in its frame.
            lengths: patches of each frame, in order.

        Returns:
            [N, width] float32.
        """
        cos, sin = (angles.squeeze(1) for angles in rotary_2d(places, self.config.head_dim))
        return vision(x, cos, sin, lengths, self.tower)


def _block(block: VisionBlock) -> PackedVisionBlock:
    return PackedVisionBlock(
        _norm(block.norm1),
        _biased(block.attn.qkv),
        _biased(block.attn.proj),
        _norm(block.norm2),
        _biased(block.mlp.fc1),
        _biased(block.mlp.fc2),
    )


def _norm(norm: LayerNorm) -> Norm:
    return norm.weight.astype("float32"), norm.bias.astype("float32")


def _biased(linear: BiasedLinear) -> Biased:
    return _packed(linear.weight), linear.bias.astype("float32")


def _packed(weight: Tensor | PackedWeight) -> PackedWeight:
    assert isinstance(weight, PackedWeight), "pack the tower first"
    return weight
