"""Vision towers with random weights, plain and packed."""

from __future__ import annotations

import numpy as np
import paddle

from ernie45.checkpoint.dtypes import convert
from ernie45.config import VisionConfig
from ernie45.models.fused_vision import FusedVision
from ernie45.models.layers import Linear
from ernie45.models.vision import VisionTransformer
from ernie45.ops.packed import PackedWeight
from tests.helpers.vision import vision_config

Grid = list[tuple[int, int, int]]


def tower_config(
    heads: int = 2, head_dim: int = 16, wide: int = 40, patch_size: int = 3, depth: int = 2, merge_size: int = 1
) -> VisionConfig:
    """Blocks of a single patch, unless told otherwise, so that a frame may have any number of patches."""
    config = vision_config(
        pixel_hidden_size=heads * head_dim,
        spatial_conv_size=merge_size,
        vision_config={
            "depth": depth,
            "embed_dim": heads * head_dim,
            "hidden_size": heads * head_dim,
            "num_heads": heads,
            "mlp_ratio": wide / (heads * head_dim),
            "patch_size": patch_size,
        },
    ).vision
    assert config is not None
    return config


def plain_tower(config: VisionConfig, seed: int = 0) -> VisionTransformer:
    """In float32, with values that bfloat16 can hold; every parameter is random, so that each one matters."""
    tower = VisionTransformer(config)
    generator = np.random.default_rng(seed)
    for name, parameter in tower.named_parameters():
        values = generator.standard_normal(parameter.shape, dtype=np.float32)
        if parameter.ndim == 1:
            values = 0.2 * values + np.float32("norm" in name or name == "ln.weight")
        else:
            values *= np.float32(parameter.shape[0] ** -0.5)
        parameter.set_value(paddle.to_tensor(values).astype("bfloat16").astype("float32"))
    return tower.eval()


def packed_tower(plain: VisionTransformer) -> VisionTransformer:
    """The same tower with packed weights, to run as one operator."""
    tower = VisionTransformer(plain.config, "bfloat16")
    tower.set_state_dict({name: value.astype("bfloat16") for name, value in plain.state_dict().items()})
    for layer in tower.sublayers():
        if isinstance(layer, Linear):
            values = layer.weight.astype("float32").numpy()
            del layer._parameters["weight"]
            layer.weight = PackedWeight.zeros("bfloat16", list(values.shape))
            layer.weight.write(convert(values, "F32", "BF16"))
    tower.fused = FusedVision(tower)
    return tower.eval()


def pixels(config: VisionConfig, grid: Grid, seed: int = 1) -> paddle.Tensor:
    """Normalised patches of these frames, rows and columns."""
    count = sum(frames * rows * columns for frames, rows, columns in grid)
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal((count, config.patch_bytes), dtype=np.float32))


@paddle.no_grad()
def encode(tower: VisionTransformer, x: paddle.Tensor, grid: Grid) -> np.ndarray:
    return tower(x, np.array(grid, dtype=np.int64).reshape(-1, 3)).numpy()
