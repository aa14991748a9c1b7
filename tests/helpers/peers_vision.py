"""Drawn vision-language architectures in the words of both libraries, and batches of prompts for both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle

from ernie45.config import ErnieConfig
from ernie45.models.vision import PIXEL_DEVIATION, PIXEL_MEAN
from ernie45.processing.positions import position_ids, token_grid, token_types

TEXT_IDS = 110  # the ids below are text; the ones from here on are the placeholder and the delimiters
PLACEHOLDER, IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END = range(TEXT_IDS, TEXT_IDS + 5)
VIDEO_PLACEHOLDER = TEXT_IDS + 5  # transformers alone tells the placeholders of videos from those of pictures
VOCABULARY = 128

# What prompts consist of: so many tokens of text, or frames, rows and columns of patches. Of the video in "long_video"
# there are more pairs of frames than rows or columns of tokens.
PROMPTS: dict[str, list[list[int | tuple[int, int, int]]]] = {
    "text": [[9]],
    "pictures": [[3, (1, 4, 6), 2, (1, 2, 2), (1, 6, 2), 4]],
    "video": [[(4, 4, 6), 5]],
    "long_video": [[2, (8, 2, 4), 3]],
    "mixed": [[2, (1, 4, 2), 3, (2, 2, 4), 1, (1, 2, 6), (4, 4, 4), 2]],
    "padded": [[(1, 2, 4), 3], [4, (4, 4, 4), 2, (1, 4, 4), 5], [6], [1, (1, 2, 2), 1, (1, 2, 4), 2]],
}


def draw(seed: int) -> dict[str, Any]:
    """An architecture as the keys of the published config.json."""
    generator = np.random.default_rng(seed)

    def pick(*options: Any) -> Any:
        return options[generator.integers(len(options))]

    heads, kv_heads = pick((4, 2), (6, 2), (4, 1), (4, 4))
    head_dim, time_pairs = pick((8, 2), (16, 2), (16, 4), (12, 2), (12, 4))
    tower_heads, tower_head_dim = pick((2, 8), (1, 12), (3, 4), (2, 12))
    experts, layers, first = pick(4, 5, 8), pick(2, 3), pick(0, 1)
    return {
        "model_type": "ernie4_5_moe_vl",
        "vocab_size": VOCABULARY,
        "hidden_size": pick(24, 32, 40),
        "intermediate_size": pick(36, 64),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": pick(1e-5, 1e-6),
        "rope_theta": pick(10000.0, 500000.0),
        "tie_word_embeddings": bool(generator.integers(2)),
        "dtype": "float32",
        "moe_num_experts": [experts, experts],
        "moe_k": pick(1, 2, 3),
        "moe_intermediate_size": pick([24, 8], [12, 4], [6, 10]),
        "moe_num_shared_experts": seed % 3,
        "moe_layer_start_index": [first, first],
        "moe_layer_end_index": pick([layers - 1, layers - 1], [29, 28]),
        "moe_layer_interval": pick(1, 1, 2),
        "moe_use_aux_free": True,
        "im_patch_id": PLACEHOLDER,
        "image_start_token_id": IMAGE_START,
        "image_end_token_id": IMAGE_END,
        "video_start_token_id": VIDEO_START,
        "video_end_token_id": VIDEO_END,
        "spatial_conv_size": 2,
        "temporal_conv_size": 2,
        "freq_allocation": time_pairs,
        "vision_config": {
            "depth": pick(1, 2, 3),
            "embed_dim": tower_heads * tower_head_dim,
            "num_heads": tower_heads,
            "mlp_ratio": pick(2, 3, 4),
            "patch_size": pick(2, 4, 14),
        },
    }


def is_moe_layer(keys: dict[str, Any], layer: int) -> bool:
    inside = keys["moe_layer_start_index"][0] <= layer <= keys["moe_layer_end_index"][0]
    return inside and (layer + 1) % keys["moe_layer_interval"] == 0


def their_config(keys: dict[str, Any]) -> Any:
    """The same architecture in the words of transformers."""
    import transformers

    layers, tower, pairs = keys["num_hidden_layers"], keys["vision_config"], keys["head_dim"] // 2
    same = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    same += " rms_norm_eps tie_word_embeddings moe_k moe_intermediate_size moe_num_shared_experts"
    sides = (pairs - keys["freq_allocation"]) // 2
    text = {
        **{key: keys[key] for key in same.split()},
        "moe_num_experts": keys["moe_num_experts"][0],
        "mlp_layer_types": ["sparse" if is_moe_layer(keys, layer) else "dense" for layer in range(layers)],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": keys["rope_theta"],
            "mrope_section": [sides, sides, keys["freq_allocation"]],
        },
    }
    vision = {
        "depth": tower["depth"],
        "hidden_size": tower["embed_dim"],
        "num_heads": tower["num_heads"],
        "intermediate_size": tower["embed_dim"] * tower["mlp_ratio"],
        "patch_size": tower["patch_size"],
    }
    return transformers.Ernie4_5_VLMoeConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=keys["tie_word_embeddings"],
        image_token_id=PLACEHOLDER,
        video_token_id=VIDEO_PLACEHOLDER,
        image_start_token_id=IMAGE_START,
        image_end_token_id=IMAGE_END,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
    )


@dataclass
class Row:
    """One prompt: ids, and for each picture or video its grid and its patches."""

    ids: list[int] = field(default_factory=list)
    grid: list[tuple[int, int, int]] = field(default_factory=list)
    patches: list[np.ndarray] = field(default_factory=list)


@dataclass
class Batch:
    """Prompts padded on the left, and how each library wants them."""

    config: ErnieConfig
    rows: list[Row]

    @property
    def length(self) -> int:
        return max(len(row.ids) for row in self.rows)

    @property
    def mask(self) -> np.ndarray:
        return self.padded([np.ones(len(row.ids), "int64") for row in self.rows])

    @property
    def grid(self) -> np.ndarray:
        return np.array([grid for row in self.rows for grid in row.grid], "int64").reshape(-1, 3)

    @property
    def patches(self) -> np.ndarray:
        """[N, patch_bytes] uint8 of all rows."""
        return np.concatenate([patches for row in self.rows for patches in row.patches])

    @property
    def positions_agree(self) -> bool:
        """transformers lets text continue after the rows and columns of a video, however long that is."""
        return all(pairs <= max(rows, columns) for pairs, rows, columns in token_grid(self.grid, self.config.vision))

    def padded(self, rows: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.pad(row, [(self.length - len(row), 0)] + [(0, 0)] * (row.ndim - 1)) for row in rows])

    def ours(self) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "input_ids": paddle.to_tensor(self.padded([np.array(row.ids) for row in self.rows])),
            "attention_mask": paddle.to_tensor(self.mask),
        }
        if len(self.grid):
            inputs |= {"images": paddle.to_tensor(self.patches), "grid_thw": paddle.to_tensor(self.grid)}
        return inputs

    def theirs(self) -> dict[str, Any]:
        import torch

        arrays = {"input_ids": self.padded([self._their_ids(row) for row in self.rows]), "attention_mask": self.mask}
        if len(self.grid):
            vision = self.config.vision
            kinds = [token_types(np.array(row.ids), np.array(row.grid), vision) for row in self.rows]
            is_placeholder = [np.array(row.ids) == PLACEHOLDER for row in self.rows]
            own = [kind * place for kind, place in zip(kinds, is_placeholder, strict=True)]
            arrays |= {"mm_token_type_ids": self.padded(own), "moe_mm_token_type_ids": self.padded(kinds)}
            arrays |= self._their_media(False, "pixel_values", "image_grid_thw")
            arrays |= self._their_media(True, "pixel_values_videos", "video_grid_thw")
        if not self.positions_agree:
            arrays["position_ids"] = self.positions().transpose(2, 0, 1)
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    def positions(self) -> np.ndarray:
        """[batch, sequence, 3]"""
        return self.padded(
            [position_ids(np.array(row.ids), np.array(row.grid), self.config.vision) for row in self.rows]
        )

    def _their_ids(self, row: Row) -> np.ndarray:
        ids = np.array(row.ids)
        is_video = token_types(ids, np.array(row.grid), self.config.vision) == 2
        return np.where(is_video, VIDEO_PLACEHOLDER, ids)

    def _their_media(self, videos: bool, pixels: str, grid: str) -> dict[str, np.ndarray]:
        items = [item for row in self.rows for item in zip(row.grid, row.patches, strict=True)]
        items = [item for item in items if (item[0][0] > 1) == videos]
        if not items:
            return {}
        patches = np.concatenate([patches for _, patches in items])
        return {pixels: normalised(patches), grid: np.array([grid for grid, _ in items])}


def normalised(patches: np.ndarray) -> np.ndarray:
    """float32 of uint8 [N, channels * size * size], as the image processor of transformers does it."""
    pixels = patches.reshape(len(patches), 3, -1) / 255.0
    mean, deviation = (np.array(values)[:, None] for values in (PIXEL_MEAN, PIXEL_DEVIATION))
    return ((pixels - mean) / deviation).reshape(len(patches), -1).astype("float32")


def batch_of(name: str, config: ErnieConfig, seed: int) -> Batch:
    generator = np.random.default_rng(seed)
    assert config.vision is not None

    def row_of(parts: list[Any]) -> Row:
        row = Row()
        for part in parts:
            if isinstance(part, int):
                row.ids += generator.integers(3, TEXT_IDS, part).tolist()
            else:
                start, end = (VIDEO_START, VIDEO_END) if part[0] > 1 else (IMAGE_START, IMAGE_END)
                tokens = int(token_grid(np.array([part]), config.vision).prod())
                row.ids += [start, *[PLACEHOLDER] * tokens, end]
                row.grid.append(part)
                size = (int(np.prod(part)), config.vision.patch_bytes)
                row.patches.append(generator.integers(0, 256, size).astype("uint8"))
        return row

    return Batch(config, [row_of(parts) for parts in PROMPTS[name]])
