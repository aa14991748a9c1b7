"""The files in configs/, checked against the published parameter counts by arithmetic that uses no library code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ernie45.config import ErnieConfig

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))


def read(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))


def banks(config: dict[str, Any], key: str) -> list[int]:
    """The value of a per-bank key, one entry for each expert bank."""
    value = config[key]
    return value if isinstance(value, list) else [value]


def attention(config: dict[str, Any]) -> int:
    hidden, query_heads, kv_heads = (
        config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    head_dim = config.get("head_dim", hidden // query_heads)
    return hidden * (query_heads + 2 * kv_heads) * head_dim + query_heads * head_dim * hidden


def swiglu(hidden: int, width: int) -> int:
    return 3 * hidden * width


def mixture(config: dict[str, Any], layer: int, experts_counted: int | None = None) -> int:
    """Parameters of one MoE layer: routers, correction biases, experts and the shared expert.

    ``experts_counted`` counts that many experts of the text bank alone: what one text token uses.
    """
    hidden = config["hidden_size"]
    widths = banks(config, "moe_intermediate_size")
    total = swiglu(hidden, widths[0] * config["moe_num_shared_experts"])
    for bank, experts in enumerate(banks(config, "moe_num_experts")):
        if not banks(config, "moe_layer_start_index")[bank] <= layer <= banks(config, "moe_layer_end_index")[bank]:
            continue
        if experts_counted is not None and bank > 0:
            continue
        total += hidden * experts + experts
        total += (experts if experts_counted is None else experts_counted) * swiglu(hidden, widths[bank])
    return total


def language(config: dict[str, Any], experts_counted: int | None = None) -> int:
    """Parameters of the decoder with its embedding and head, without multi-token-prediction blocks."""
    hidden, vocabulary, layers = (config[key] for key in ("hidden_size", "vocab_size", "num_hidden_layers"))
    first_sparse = min(banks(config, "moe_layer_start_index")) if "moe_num_experts" in config else layers
    total = vocabulary * hidden * (1 if config["tie_word_embeddings"] else 2) + hidden
    for layer in range(layers):
        total += attention(config) + 2 * hidden
        dense = layer < first_sparse
        total += swiglu(hidden, config["intermediate_size"]) if dense else mixture(config, layer, experts_counted)
    return total


def multi_token_prediction(config: dict[str, Any]) -> int:
    """Parameters of one block: a dense decoder layer, two norms and the projection of embedding and hidden state."""
    hidden = config["hidden_size"]
    layer = attention(config) + swiglu(hidden, config["intermediate_size"]) + 2 * hidden
    return layer + 2 * hidden + 2 * hidden * hidden


def vision(config: dict[str, Any]) -> int:
    """Parameters of the vision transformer: every linear but the patch embedding has a bias."""
    tower = config["vision_config"]
    width, mlp = tower["embed_dim"], tower["embed_dim"] * tower["mlp_ratio"]
    block = 4 * width + (width * 3 * width + 3 * width) + (width * width + width)
    block += (width * mlp + mlp) + (mlp * width + width)
    return tower["in_channels"] * tower["patch_size"] ** 2 * width + tower["depth"] * block + 2 * width


def adapter(config: dict[str, Any]) -> int:
    """Parameters of the adapter: two linears and a LayerNorm over space, the same over time, a projection, a norm."""
    hidden = config["hidden_size"]
    space = config["pixel_hidden_size"] * config["spatial_conv_size"] ** 2
    time = space * config["temporal_conv_size"]
    spatial = 2 * (space * space + space) + 2 * space
    temporal = (time * space + space) + (space * space + space) + 2 * space
    return spatial + temporal + (space * hidden + hidden) + hidden


def total(config: dict[str, Any]) -> int:
    return language(config) + (vision(config) + adapter(config) if "vision_config" in config else 0)


def test_there_is_one_file_for_each_published_model() -> None:
    assert NAMES == [
        "ernie-4.5-0.3b",
        "ernie-4.5-21b-a3b",
        "ernie-4.5-300b-a47b",
        "ernie-4.5-vl-28b-a3b",
        "ernie-4.5-vl-424b-a47b",
    ]


def test_the_dense_model_has_exactly_its_published_size() -> None:
    assert total(read("ernie-4.5-0.3b")) == 360_748_032


def test_the_largest_model_has_exactly_its_published_size() -> None:
    # The hub counts the elements of the published files: it settles the expert widths, the layer range of the
    # vision bank and that a head is stored apart from the embedding.
    assert total(read("ernie-4.5-vl-424b-a47b")) == 423_526_285_184


@pytest.mark.parametrize(
    ("name", "billions", "tolerance"),
    [
        ("ernie-4.5-21b-a3b", 21.83, 0.005),
        ("ernie-4.5-300b-a47b", 298.6, 0.05),
        ("ernie-4.5-vl-28b-a3b", 29.40, 0.005),
    ],
)
def test_the_others_have_their_published_sizes(name: str, billions: float, tolerance: float) -> None:
    assert total(read(name)) / 1e9 == pytest.approx(billions, abs=tolerance)


@pytest.mark.parametrize(("name", "billions"), [("ernie-4.5-21b-a3b", 3), ("ernie-4.5-300b-a47b", 47)])
def test_a_text_token_uses_the_share_that_the_name_says(name: str, billions: int) -> None:
    config = read(name)
    assert round(language(config, experts_counted=config["moe_k"]) / 1e9) == billions


def test_the_multi_token_prediction_block_has_its_published_size() -> None:
    config = read("ernie-4.5-21b-a3b")
    assert config["num_nextn_predict_layers"] == 1
    assert multi_token_prediction(config) / 1e9 == pytest.approx(0.123, abs=0.0005)


@pytest.mark.parametrize("name", ["ernie-4.5-vl-28b-a3b", "ernie-4.5-vl-424b-a47b"])
def test_vision_language_models_share_tower_tokens_and_positions(name: str) -> None:
    vision = ErnieConfig.from_pretrained(CONFIGS / f"{name}.json").vision
    assert vision is not None
    assert (vision.width, vision.depth, vision.head_dim, vision.intermediate_size) == (1280, 32, 80, 5120)
    assert (vision.patch_bytes, vision.factor, vision.frames_per_token, vision.time_pairs) == (588, 28, 2, 20)
    assert (vision.placeholder_id, *vision.delimiter_ids) == (100295, 101304, 101305, 101306, 101307)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_what_save_pretrained_would_write(name: str) -> None:
    text = (CONFIGS / f"{name}.json").read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2) + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_every_model_shares_vocabulary_context_and_rope(name: str) -> None:
    config = read(name)
    shared = {
        "vocab_size": 103424,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    }
    assert {key: config[key] for key in shared} == shared
    assert "torch_dtype" not in config  # its presence would announce the -PT layout
