"""The vision-language models of transformers, on the -PT layout of the same weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from ernie45.bench.peers import Transformers
from ernie45.bench.vision import VisionImplementation
from ernie45.config import ErnieConfig
from ernie45.errors import ErnieError
from ernie45.processing.positions import token_types


class TransformersVision(VisionImplementation, Transformers):
    """The Hugging Face implementation, on PyTorch.

    Its processor normalises pixels, so that this is not in its times.

    Args:
        model: folder in the -PT layout.
        threads: CPU threads.
        dtype: dtype of weights and products.
    """

    def __init__(self, model: str, threads: int, dtype: str):
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        config = ErnieConfig.from_pretrained(Path(model))
        assert config.vision is not None
        self.vision = config.vision
        start = time.perf_counter()
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(
            model, config=transformers.Ernie4_5_VLMoeConfig(**native_config(config)), dtype=getattr(torch, dtype)
        ).eval()
        self.load_seconds = time.perf_counter() - start
        self.vocabulary = config.vocab_size
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def start(self, ids: np.ndarray, capacity: int) -> None:
        """See `Implementation.start`."""
        self.model.model.rope_deltas = None  # it remembers where the text behind the last picture went on
        super().start(ids, capacity)

    def prepare(self, patches: np.ndarray, grid: np.ndarray) -> Any:
        """See `VisionImplementation.prepare`: normalised pixels [N, patch_bytes] float32, and the grid."""
        import torch
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        pixels = patches.reshape(len(patches), self.vision.channels, -1).astype("float32")
        pixels /= 255
        pixels -= np.array(OPENAI_CLIP_MEAN, "float32")[:, None]
        pixels /= np.array(OPENAI_CLIP_STD, "float32")[:, None]
        return torch.from_numpy(pixels.reshape(patches.shape)), torch.from_numpy(grid)

    def features(self, pictures: Any) -> np.ndarray:
        """See `VisionImplementation.features`."""
        import torch

        inner, (pixels, grid) = self.model.model, pictures
        encode = inner.get_video_features if grid[0, 0] > 1 else inner.get_image_features
        return torch.cat(encode(pixels, grid).pooler_output).float().numpy()

    def start_with(self, ids: np.ndarray, pictures: Any, grid: np.ndarray, capacity: int) -> None:
        """See `VisionImplementation.start_with`."""
        import torch

        self.model.model.rope_deltas = None
        types = token_types(ids[0], grid, self.vision)[None]
        placeholders = types * (ids == self.vision.placeholder_id)
        found = self.model(
            torch.from_numpy(ids),
            pixel_values=pictures[0],
            image_grid_thw=pictures[1],
            mm_token_type_ids=torch.from_numpy(placeholders),
            moe_mm_token_type_ids=torch.from_numpy(types),
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = found.past_key_values
        self.tokens = found.logits[:, -1].argmax(-1).numpy()


def native_config(config: ErnieConfig) -> dict[str, Any]:
    """The architecture in the words of transformers, arguments of its `Ernie4_5_VLMoeConfig`.

    Raises:
        ErnieError: transformers cannot express it.
    """
    vision = config.vision
    assert vision is not None
    pairs = config.head_dim // 2
    side_pairs = (pairs - vision.time_pairs) // 2
    text = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "moe_k": config.moe_k,
        "moe_num_experts": config.banks[0].num_experts,
        "moe_intermediate_size": [bank.intermediate_size for bank in config.banks],
        "moe_num_shared_experts": config.moe_num_shared_experts,
        "mlp_layer_types": _layer_types(config),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "mrope_section": [side_pairs, side_pairs, vision.time_pairs],
        },
    }
    tower = {
        "depth": vision.depth,
        "hidden_size": vision.width,
        "num_heads": vision.num_heads,
        "intermediate_size": vision.intermediate_size,
        "in_channels": vision.channels,
        "patch_size": vision.patch_size,
        "spatial_merge_size": vision.merge_size,
        "temporal_merge_size": vision.frames_per_token,
    }
    return {
        "text_config": text,
        "vision_config": tower,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "image_token_id": vision.placeholder_id,
        "image_start_token_id": vision.image_start_id,
        "image_end_token_id": vision.image_end_id,
        "video_start_token_id": vision.video_start_id,
        "video_end_token_id": vision.video_end_id,
    }


def _layer_types(config: ErnieConfig) -> list[str]:
    """ "sparse" or "dense" for each layer; no layer may have one bank without the other."""
    types = []
    for layer in range(config.num_hidden_layers):
        covered = [bank.covers(layer) for bank in config.banks]
        if config.is_moe_layer(layer) and not all(covered):
            raise ErnieError(f"layer {layer} has experts of one bank alone, which transformers cannot express")
        types.append("sparse" if config.is_moe_layer(layer) else "dense")
    return types
