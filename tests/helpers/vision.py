"""A tiny vision-language checkpoint with random weights and a real tokenizer, for tests of several modules."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ernie45.checkpoint.names import checkpoint_tensors
from ernie45.checkpoint.writer import TensorPlan, write_checkpoint, write_json_atomic
from ernie45.config import ErnieConfig
from ernie45.tokenizer import ErnieTokenizer

# The ids are those of the tokenizer of ernie45-tiny.
VISION: dict[str, Any] = {
    "model_type": "ernie4_5_moe_vl",
    "vocab_size": 2561,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "dtype": "float32",
    "moe_num_experts": [4, 4],
    "moe_k": 2,
    "moe_intermediate_size": [24, 8],
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": [1, 1],
    "moe_layer_end_index": [2, 2],
    "moe_layer_interval": 1,
    "moe_use_aux_free": True,
    "im_patch_id": 1536,
    "image_start_token_id": 2545,
    "image_end_token_id": 2546,
    "video_start_token_id": 2547,
    "video_end_token_id": 2548,
    "pixel_hidden_size": 32,
    "spatial_conv_size": 2,
    "temporal_conv_size": 2,
    "freq_allocation": 2,
    "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
}


def vision_config(**changes: Any) -> ErnieConfig:
    return ErnieConfig.from_dict({**VISION, **changes})


def write_processor_folder(folder: Path, config: ErnieConfig | None = None, **tokenizer_config: Any) -> Path:
    """What a processor reads: config.json, and the tokenizer of ernie45-tiny without its template for text models.

    `tokenizer_config` holds further entries of tokenizer_config.json, such as another chat_template.
    """
    ErnieTokenizer.from_pretrained("ernie45-tiny").save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    published = json.loads(path.read_text(encoding="utf-8"))
    del published["chat_template"]
    path.write_text(json.dumps({**published, **tokenizer_config}), encoding="utf-8")
    write_json_atomic(folder / "config.json", (config or vision_config()).to_dict("paddle"))
    return folder


def write_vision_folder(folder: Path, config: ErnieConfig | None = None, seed: int = 0, layout: str = "paddle") -> Path:
    """A whole checkpoint. Every weight is random, norms and biases included, so that each one matters."""
    config = config or vision_config()
    generator = np.random.default_rng(seed)
    parts = [part for spec in checkpoint_tensors(config) for part in spec.stored(layout)]
    plans = [
        TensorPlan(part.name, "F32", part.shape, partial(_random, part.name, part.shape, generator)) for part in parts
    ]
    write_processor_folder(folder, config)
    write_json_atomic(folder / "config.json", config.to_dict(layout))
    write_checkpoint(folder, plans, metadata={"format": "np"}, progress=False)
    return folder


def _random(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    values = generator.standard_normal(shape, dtype="float32")
    if len(shape) == 2 and not name.endswith("e_score_correction_bias"):
        return values / np.float32(np.sqrt(VISION["hidden_size"]))
    return 0.05 * values + (0 if name.endswith("bias") else 1)
