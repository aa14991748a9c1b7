"""The vision tower as one fused operator, from normalised pixels to normed vectors, for inference on packed weights.

Its definition is `VisionTransformer.forward` in models/vision.py; this module only knows how the operator wants its
arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from paddle import Tensor

from ernie45.config import VisionConfig
from ernie45.ops import custom
from ernie45.ops.packed import KINDS, PackedWeight

Norm = tuple[Tensor, Tensor]  # scale and shift of a LayerNorm [width] float32
Biased = tuple[PackedWeight, Tensor]  # a weight and its bias [out] float32


@dataclass(frozen=True)
class PackedVisionBlock:
    """The weights of one block, in the order of computation."""

    norm1: Norm
    qkv: Biased
    proj: Biased
    norm2: Norm
    fc1: Biased
    fc2: Biased


@dataclass(frozen=True)
class PackedTower:
    """All weights as the operator takes them: a flat list of tensors, and the shapes of the matrices among them."""

    sizes: list[int]
    epsilon: float
    weights: list[Tensor]
    shapes: list[int]

    @classmethod
    def collect(
        cls,
        config: VisionConfig,
        epsilon: float,
        patch_embed: PackedWeight,
        blocks: Iterable[PackedVisionBlock],
        norm: Norm,
    ) -> PackedTower:
        """Lists the weights in the order in which csrc/bindings/vision.cpp reads them."""
        weights: list[Tensor] = []
        shapes: list[int] = []

        def add(matrix: PackedWeight) -> None:
            shapes.extend([KINDS[matrix.kind], matrix.in_features, matrix.out_features, 1])
            weights.extend([matrix.data] if matrix.scales is None else [matrix.data, matrix.scales])

        add(patch_embed)
        for block in blocks:
            weights += block.norm1
            for linear in (block.qkv, block.proj):
                add(linear[0])
                weights.append(linear[1])
            weights += block.norm2
            for linear in (block.fc1, block.fc2):
                add(linear[0])
                weights.append(linear[1])
        weights += norm
        sizes = [config.num_heads, config.head_dim, config.intermediate_size, config.depth]
        return cls(sizes, epsilon, weights, shapes)


def vision(pixels: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int], tower: PackedTower) -> Tensor:
    """Runs patches of whole frames through the tower.

    Args:
        pixels: [N, patch_bytes] float32, normalised.
        cos, sin: [N, head_dim / 2] float32, angles by which the halves of queries and keys turn.
        lengths: patches of each frame, in order; attention stays inside a frame.
        tower: the weights.

    Returns:
        [N, width] float32, after the final norm. What a frame gets does not depend on the other frames, to the bit.
    """
    return custom.run(
        "ernie45_vision", pixels, cos, sin, tower.weights, list(lengths), tower.sizes, tower.epsilon, tower.shapes
    )[0]
