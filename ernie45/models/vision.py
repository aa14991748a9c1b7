"""The vision tower: patches of any mix of pictures and video frames in, one vector per patch out (NaViT, 2307.06304).

All frames lie one after the other in a single sequence; attention never leaves a frame, so cost grows with the sum of
the frames and not with its square.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import paddle
from paddle import Tensor, nn

from ernie45 import ops
from ernie45.config import VisionConfig
from ernie45.errors import ErnieError
from ernie45.models.layers import BiasedLinear, LayerNorm, Linear

if TYPE_CHECKING:
    from ernie45.models.fused_vision import FusedVision

ROPE_BASE = 10000.0
# Mean and deviation of the channels of a picture in 0..1 (CLIP, arXiv 2103.00020).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class PatchEmbed(nn.Layer):
    """Linear map of the pixels of a patch, without bias."""

    def __init__(self, config: VisionConfig, dtype: str):
        super().__init__()
        self.proj = Linear(config.patch_bytes, config.width, dtype)

    def forward(self, patches: Tensor) -> Tensor:
        """patches [N, patch_bytes] -> [N, width]."""
        return self.proj(patches)


class VisionAttention(nn.Layer):
    """Multi-head attention inside each frame, with two-dimensional rotary positions."""

    def __init__(self, config: VisionConfig, dtype: str):
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv = BiasedLinear(config.width, 3 * config.width, dtype)
        self.proj = BiasedLinear(config.width, config.width, dtype)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        """x [N, width], of which each frame is the next lengths[i] rows -> the same shape."""
        query, key, value = paddle.unbind(self.qkv(x).reshape([-1, 3, self.num_heads, self.head_dim]), axis=1)
        query, key = ops.rope_halves(query, *rotary), ops.rope_halves(key, *rotary)
        return self.proj(ops.attention_by_frame(query, key, value, lengths).flatten(1))


class VisionMLP(nn.Layer):
    """Two linear maps with quick-GELU between them."""

    def __init__(self, config: VisionConfig, dtype: str):
        super().__init__()
        self.fc1 = BiasedLinear(config.width, config.intermediate_size, dtype)
        self.fc2 = BiasedLinear(config.intermediate_size, config.width, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, width] -> the same shape."""
        return self.fc2(ops.quick_gelu(self.fc1(x)))


class VisionBlock(nn.Layer):
    """Pre-norm attention and MLP."""

    def __init__(self, config: VisionConfig, dtype: str):
        super().__init__()
        self.norm1 = LayerNorm(config.width, dtype)
        self.attn = VisionAttention(config, dtype)
        self.norm2 = LayerNorm(config.width, dtype)
        self.mlp = VisionMLP(config, dtype)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        """x [N, width] -> the same shape."""
        x = x + self.attn(self.norm1(x), rotary, lengths)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Layer):
    """The tower. Parameter names are those of the published files below `vision_model.`."""

    def __init__(self, config: VisionConfig, dtype: str = "float32"):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config, dtype)
        self.blocks = nn.LayerList([VisionBlock(config, dtype) for _ in range(config.depth)])
        self.ln = LayerNorm(config.width, dtype)
        self.fused: FusedVision | None = None  # set from outside: see models/packing.py

    def forward(self, images: Tensor, grid_thw: np.ndarray) -> Tensor:
        """One vector per patch, after the final norm.

        Args:
            images: [N, patch_bytes] uint8, which is normalised here, or floats that are normalised already. Patches of
                all items one after the other, frame by frame; inside a frame the patches of a block of
                merge_size x merge_size stand together, blocks and patches row by row.
            grid_thw: [items, 3] frames, rows and columns of patches of each picture or video.

        Returns:
            [N, width] in the dtype of activations.
        """
        x = self.normalised(images)
        places, lengths = patch_places(grid_thw, self.config.merge_size), frame_lengths(grid_thw)
        if self.fused is not None and self.fused.usable(x):
            return self.fused(x, places, lengths)
        rotary = rotary_2d(places, self.config.head_dim)
        x = self.patch_embed(x)
        for block in self.blocks:
            x = block(x, rotary, lengths)
        return self.ln(x)

    def normalised(self, images: Tensor) -> Tensor:
        """Pixels as the tower was trained on them, in the dtype of activations."""
        dtype = ops.compute_dtype(self.ln.weight.dtype)
        if paddle.is_floating_point(images):
            return images.astype(dtype)
        if images.dtype != paddle.uint8:
            raise ErnieError(f"images: expected uint8 pixels, or floats that are normalised, found {images.dtype}")
        per_channel = self.config.patch_size**2
        mean = paddle.to_tensor(np.repeat(np.array(PIXEL_MEAN, "float32"), per_channel))
        deviation = paddle.to_tensor(np.repeat(np.array(PIXEL_DEVIATION, "float32"), per_channel))
        return ((images.astype("float32") / 255.0 - mean) / deviation).astype(dtype)


def frame_lengths(grid_thw: np.ndarray) -> list[int]:
    """Patches of each frame, in order."""
    return [int(rows * columns) for frames, rows, columns in grid_thw for _ in range(frames)]


def encoder_batches(grid_thw: np.ndarray, frames_per_token: int, most: int) -> Iterator[np.ndarray]:
    """Cuts pictures and videos into batches of at most `most` patches, or of one larger picture or pair of frames.

    Frames see nothing of each other before the adapter joins them, so a video may be cut between its pairs of frames:
    features of all batches together are those of the whole.

    Args:
        grid_thw: [items, 3] frames, rows and columns of patches.
        frames_per_token: frames that must stay together.
        most: patches.

    Yields:
        grid_thw of each batch.
    """
    batch: list[tuple[int, int, int]] = []
    patches = 0
    for frames, rows, columns in grid_thw.tolist():
        step = max(1, most // (rows * columns) // frames_per_token) * frames_per_token
        for first in range(0, frames, step):
            piece = (min(step, frames - first), rows, columns)
            if batch and patches + math.prod(piece) > most:
                yield np.array(batch)
                batch, patches = [], 0
            batch.append(piece)
            patches += math.prod(piece)
    if batch:
        yield np.array(batch)


def patch_places(grid_thw: np.ndarray, merge_size: int) -> np.ndarray:
    """Row and column of every patch in its frame, [N, 2] int64, in the order of `VisionTransformer.forward`."""
    places = [np.zeros([0, 2], "int64")]
    for frames, rows, columns in grid_thw:
        grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
        blocks = grid.reshape(rows // merge_size, merge_size, columns // merge_size, merge_size, 2)
        places += [blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)] * int(frames)
    return np.concatenate(places)


def rotary_2d(places: np.ndarray, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [N, 1, head_dim / 2] float32: the first half of the pairs turns by the row, the second by the column.

    Frequencies are 10000 ** (-2 j / (head_dim / 2)), j = 0 .. head_dim / 4 - 1, for both.
    """
    quarter = head_dim // 4
    frequencies = (ROPE_BASE ** (-np.arange(quarter, dtype="float32") / quarter)).astype("float32")
    angles = (places.astype("float32")[:, :, None] * frequencies).reshape(len(places), 1, 2 * quarter)
    return paddle.to_tensor(np.cos(angles)), paddle.to_tensor(np.sin(angles))


def read_grid(grid_thw: object, config: VisionConfig) -> np.ndarray:
    """Checks `grid_thw` and makes it an array [items, 3] int64; entries of zeros (padding of batches) are left out.

    Raises:
        ErnieError: it is None, has another shape, or sides that blocks of patches or pairs of frames do not divide.
    """
    if grid_thw is None:
        raise ErnieError("grid_thw: missing; images go with the frames, rows and columns of each item")
    grid = np.asarray(grid_thw.numpy() if isinstance(grid_thw, Tensor) else grid_thw)
    if grid.size == 0:
        return np.zeros([0, 3], "int64")
    if grid.ndim != 2 or grid.shape[1] != 3 or grid.dtype.kind not in "iu":
        raise ErnieError(
            f"grid_thw: expected integers [items, 3] as (frames, rows, columns), found {grid.dtype} {list(grid.shape)}"
        )
    grid = grid[(grid > 0).all(axis=1)].astype("int64")
    for item, (frames, rows, columns) in enumerate(grid):
        if rows % config.merge_size or columns % config.merge_size:
            raise ErnieError(
                f"grid_thw: item {item} has {rows} x {columns} patches; both must be multiples of {config.merge_size}"
            )
        if frames > 1 and frames % config.frames_per_token:
            raise ErnieError(
                f"grid_thw: item {item} has {frames} frames; a video needs a multiple of {config.frames_per_token}: "
                "repeat the last frame"
            )
    return grid
