"""The adapter: pixel shuffle over space, then over time, from the vision tower's vectors to the decoder's width.

Upstream calls it the resampler; its parameters have the published names below `ernie.resampler_model.`.
"""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ernie45.config import ErnieConfig
from ernie45.models.layers import BiasedLinear, LayerNorm, RMSNorm


class Shuffle(nn.Sequential):
    """Linear, GELU, linear, LayerNorm over vectors that were laid side by side."""

    def __init__(self, in_features: int, width: int, dtype: str):
        super().__init__(
            BiasedLinear(in_features, width, dtype), GELU(), BiasedLinear(width, width, dtype), LayerNorm(width, dtype)
        )


class GELU(nn.Layer):
    """x * Phi(x) with the exact normal distribution (arXiv 1606.08415), computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the same shape and dtype."""
        return F.gelu(x.astype("float32")).astype(x.dtype)


class Adapter(nn.Layer):
    """Joins blocks of merge_size x merge_size patches, then pairs of frames, and maps them to the decoder's width."""

    def __init__(self, config: ErnieConfig, dtype: str = "float32"):
        super().__init__()
        vision = config.vision
        assert vision is not None
        self.block, self.frames = vision.merge_size**2, vision.frames_per_token
        width = vision.width * self.block
        self.spatial_linear = Shuffle(width, width, dtype)
        self.temporal_linear = Shuffle(width * self.frames, width, dtype)
        self.mlp = BiasedLinear(width, config.hidden_size, dtype)
        self.after_norm = RMSNorm(config, dtype)

    def forward(self, x: Tensor, grid_thw: np.ndarray) -> Tensor:
        """One feature per token of the decoder, item by item, frame pair by frame pair, row by row.

        Args:
            x: [N, width] from the vision tower.
            grid_thw: [items, 3], as there.

        Returns:
            [tokens, hidden_size]
        """
        x = self.spatial_linear(x.reshape([x.shape[0] // self.block, -1]))
        rows = self.frame_rows(grid_thw)
        x = paddle.gather(x, paddle.to_tensor(rows.reshape(-1))).reshape([len(rows), -1])
        return self.after_norm(self.mlp(self.temporal_linear(x)))

    def frame_rows(self, grid_thw: np.ndarray) -> np.ndarray:
        """Which rows of the merged patches stand side by side in each token, [tokens, frames_per_token] int64.

        Those of successive frames at the same place; a picture stands beside itself.
        """
        rows, first = [np.zeros([0, self.frames], "int64")], 0
        for frames, height, width in grid_thw:
            size = int(height * width) // self.block
            numbers = first + np.arange(frames * size).reshape(frames, size)
            if frames == 1:
                numbers = np.repeat(numbers, self.frames, axis=0)
            rows.append(numbers.reshape(-1, self.frames, size).transpose(0, 2, 1).reshape(-1, self.frames))
            first += int(frames) * size
        return np.concatenate(rows)
