"""Drawn text architectures as transformers has them, with random weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.helpers import peers


def draw(seed: int) -> dict[str, Any]:
    """An architecture as keys that both libraries understand; every third one is dense."""
    generator = np.random.default_rng(seed)

    def pick(*options: Any) -> Any:
        return options[generator.integers(len(options))]

    heads, kv_heads = pick((4, 4), (3, 3), (4, 2), (6, 2), (4, 1))
    layers = pick(2, 3, 4)
    keys: dict[str, Any] = {
        "vocab_size": pick(97, 128),
        "hidden_size": pick(24, 32, 40),
        "intermediate_size": pick(36, 64),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": pick(4, 8, 10, 16),
        "rms_norm_eps": pick(1e-5, 1e-6),
        "tie_word_embeddings": bool(generator.integers(2)),
    }
    if seed % 3:
        keys |= {
            "moe_num_experts": pick(4, 5, 8),
            "moe_k": pick(1, 2, 3, 4),
            "moe_intermediate_size": pick(6, 16),
            "moe_num_shared_experts": seed % 4 % 3,
            "moe_layer_start_index": pick(0, 1),
            "moe_layer_end_index": pick(-1, layers - 1, 1),
            "moe_layer_interval": pick(1, 1, 2),
        }
    return keys


def build(keys: dict[str, Any], seed: int) -> Any:
    import transformers

    kind = "Ernie4_5_Moe" if "moe_num_experts" in keys else "Ernie4_5"
    config = getattr(transformers, f"{kind}Config")(
        **keys, rope_parameters={"rope_type": "default", "rope_theta": 10000.0 * (1 + seed % 3)}
    )
    return peers.build(f"{kind}ForCausalLM", config, seed)
