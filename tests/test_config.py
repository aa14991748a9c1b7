"""ErnieConfig: spellings, defaults of missing keys, unknown keys, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.config import ErnieConfig
from ernie45.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))

REQUIRED: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}
MOE: dict[str, Any] = {**REQUIRED, "num_key_value_heads": 2, "moe_num_experts": 8, "moe_k": 3}
PT = {"torch_dtype": "bfloat16"}


def read(**keys: Any) -> ErnieConfig:
    return ErnieConfig.from_dict(keys)


# What a missing key means.


def test_missing_keys_of_the_paddle_layout() -> None:
    config = read(**REQUIRED, moe_num_experts=8)
    assert config.rms_norm_eps == 1e-6
    assert config.rope_theta == 10000
    assert config.max_position_embeddings == 32768
    assert (config.moe_k, config.moe_num_shared_experts) == (2, 0)
    assert (config.moe_layer_start_index, config.moe_layer_interval) == (0, 2)


@pytest.mark.parametrize(
    "mark",
    [
        PT,
        {"transformers_version": "4.54"},
        {"architectures": ["Ernie4_5ForCausalLM"]},
        {"rope_parameters": {"rope_type": "default"}},
    ],
)
def test_missing_keys_of_the_pt_layout(mark: dict[str, Any]) -> None:
    config = read(**REQUIRED, moe_num_experts=8, **mark)
    assert config.rms_norm_eps == 1e-5
    assert config.rope_theta == 500000
    assert config.max_position_embeddings == 131072
    assert (config.moe_k, config.moe_num_shared_experts) == (6, 2)
    assert (config.moe_layer_start_index, config.moe_layer_interval) == (1, 1)


@pytest.mark.parametrize("mark", [{}, PT])
def test_missing_keys_that_mean_the_same_in_both_layouts(mark: dict[str, Any]) -> None:
    config = read(**REQUIRED, **mark)
    assert config.num_key_value_heads == 8
    assert config.head_dim == 64 // 8
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert config.compression_ratio == 1
    assert config.tie_word_embeddings is None and config.moe_use_aux_free is None
    assert config.num_nextn_predict_layers is None
    assert config.banks == () and not any(config.is_moe_layer(i) for i in range(4))
    assert config.model_type == "ernie4_5"


def test_null_counts_as_missing() -> None:
    config = read(**REQUIRED, num_key_value_heads=None, head_dim=None, moe_num_experts=None, rope_theta=None)
    assert (config.num_key_value_heads, config.head_dim, config.banks) == (8, 8, ())
    assert config.rope_theta == 10000


def test_head_dim_need_not_be_hidden_size_over_heads() -> None:
    assert read(**REQUIRED, head_dim=128).head_dim == 128


# Other names of the same keys.


def test_new_names_of_keys() -> None:
    old = read(**MOE, moe_gate_act="sigmoid", **PT)
    new = read(**REQUIRED, num_key_value_heads=2, num_experts=8, num_experts_per_tok=3, scoring_func="sigmoid", **PT)
    assert old == new


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_under_either_name(key: str) -> None:
    assert read(**REQUIRED, **{key: "float16"}).dtype == "float16"


def test_nested_rope_theta() -> None:
    nested = {"rope_parameters": {"rope_theta": 1234.0, "rope_type": "default"}}
    assert read(**REQUIRED, **nested).rope_theta == 1234
    assert read(**REQUIRED, **nested, rope_theta=99.0).rope_theta == 99


# Which layers have experts.


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"moe_layer_interval": 1}, [0, 1, 2, 3, 4, 5]),
        ({"moe_layer_interval": 2}, [1, 3, 5]),
        ({"moe_layer_interval": 1, "moe_layer_start_index": 3}, [3, 4, 5]),
        ({"moe_layer_interval": 1, "moe_layer_end_index": 2}, [0, 1, 2]),
        ({"moe_layer_interval": 1, "moe_layer_end_index": 99}, [0, 1, 2, 3, 4, 5]),
        ({"moe_layer_interval": 3, "moe_layer_start_index": 3, "moe_layer_end_index": -1}, [5]),
    ],
)
def test_moe_layers(keys: dict[str, int], expected: list[int]) -> None:
    config = read(**{**MOE, "num_hidden_layers": 6}, **keys)
    assert [i for i in range(6) if config.is_moe_layer(i)] == expected


def test_experts_without_a_width_are_as_wide_as_the_dense_network() -> None:
    assert read(**MOE).banks[0].intermediate_size == 96
    assert read(**MOE, moe_intermediate_size=20, moe_num_shared_experts=3).shared_intermediate_size == 60


def test_two_banks_take_their_values_from_lists_or_share_one() -> None:
    config = read(
        **{**MOE, "moe_num_experts": [8, 8]},
        moe_intermediate_size=[24, 12],
        moe_layer_start_index=[1, 2],
        moe_layer_end_index=3,
        moe_layer_interval=1,
        vision_config={},
    )
    assert [(b.num_experts, b.intermediate_size, b.first_layer, b.last_layer) for b in config.banks] == [
        (8, 24, 1, 3),
        (8, 12, 2, 3),
    ]
    assert [config.banks[1].covers(i) for i in range(4)] == [False, False, True, True]
    assert config.model_type == "ernie4_5_moe_vl"


# Writing.


def assert_same(left: ErnieConfig, right: ErnieConfig) -> None:
    """All fields are equal; a dense model has no use for those of experts, and their defaults are not written."""
    ignored = {} if right.banks else {f.name: f.default for f in fields(ErnieConfig) if f.name.startswith("moe_")}
    assert left.replace(extra={}, **ignored) == right.replace(extra={}, **ignored)


@pytest.mark.parametrize("layout", ["paddle", "pt"])
@pytest.mark.parametrize("keys", [REQUIRED, MOE, {**MOE, "moe_use_aux_free": True, "tie_word_embeddings": False}])
def test_written_and_read_again_it_is_the_same(keys: dict[str, Any], layout: str) -> None:
    config = read(**keys, unknown={"a": [1]}, hidden_act="silu")
    again = ErnieConfig.from_dict(json.loads(json.dumps(config.to_dict(layout))))
    assert_same(again, config)
    assert again.extra["unknown"] == {"a": [1]} and again.extra["hidden_act"] == "silu"
    assert again.to_dict(layout) == config.to_dict(layout)


@pytest.mark.parametrize(
    ("keys", "paddle", "pt"),
    [
        (REQUIRED, "Ernie4_5_ForCausalLM", "Ernie4_5ForCausalLM"),
        (MOE, "Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeForCausalLM"),
    ],
)
def test_spelling_of_each_layout(keys: dict[str, Any], paddle: str, pt: str) -> None:
    for source in ({}, PT, {"architectures": [pt]}, {"architectures": [paddle]}):
        config = read(**keys, **source)
        assert config.to_dict("paddle")["architectures"] == [paddle]
        assert config.to_dict("pt")["architectures"] == [pt]
        assert config.to_dict("paddle")["dtype"] == config.to_dict("pt")["torch_dtype"] == "bfloat16"
        assert "torch_dtype" not in config.to_dict("paddle") and "dtype" not in config.to_dict("pt")


def test_a_dense_config_is_written_without_keys_of_experts() -> None:
    assert not [key for key in read(**REQUIRED).to_dict() if key.startswith("moe_")]


@pytest.mark.parametrize("name", NAMES)
def test_published_configs_load_and_write_back_every_key(name: str) -> None:
    raw = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    config = ErnieConfig.from_pretrained(CONFIGS / f"{name}.json")
    written = config.to_dict("paddle")
    assert {key: written[key] for key in raw} == raw
    assert config.model_type == raw["model_type"]
    assert [config.is_moe_layer(i) for i in (0, config.num_hidden_layers - 1)] == [False, bool(config.banks)]


# What it refuses, in words.


@pytest.mark.parametrize("missing", list(REQUIRED))
def test_missing_required_key(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"missing {missing}; is this"):
        read(**{key: value for key, value in REQUIRED.items() if key != missing})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, found '64'"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, found 0"),
        ({"num_attention_heads": True}, "num_attention_heads must be a positive integer, found True"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta must be a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta must be a positive number"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, found 'false'"),
        ({"eos_token_id": ["2"]}, "eos_token_id must be an integer"),
        ({"pad_token_id": 0.5}, "pad_token_id must be an integer"),
        ({"dtype": "int8"}, "dtype must be float32, float16 or bfloat16, found 'int8'"),
        ({"moe_num_experts": 4, "moe_k": 5}, "moe_k 5 exceeds the 4 experts of bank 0"),
        ({"moe_num_experts": [4, "x"]}, "moe_num_experts must be an integer or a list of integers"),
        ({"moe_num_experts": -4}, "moe_num_experts must not be negative"),
        ({"moe_num_experts": [8, 8]}, "moe_num_experts [8, 8]: a text model has one bank of experts"),
        ({"moe_num_experts": 8, "vision_config": {}}, "moe_num_experts 8: a vision-language model has two banks"),
        ({"moe_num_experts": [8, 8, 8], "vision_config": {}}, "a vision-language model has two banks of experts"),
        ({"moe_num_experts": [0, 8], "vision_config": {}}, "both banks must have equally many experts"),
        ({"moe_num_experts": [8, 0], "vision_config": {}}, "both banks must have equally many experts"),
        ({"moe_num_experts": [8, 4], "vision_config": {}}, "moe_num_experts [8, 4]: both banks must have equally"),
        ({"moe_num_shared_experts": {}}, "moe_num_shared_experts must be a non-negative integer, found {}"),
        ({"hidden_size": 10**30}, "exceeds 1000000, far more than any ERNIE 4.5 model has"),
        ({"moe_num_experts": 8, "moe_intermediate_size": [10**30]}, "moe_intermediate_size 1000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 exceeds 1000"),
        ({"moe_num_experts": 10**9}, "4000000000 experts in all layers exceed"),
        ({"num_attention_heads": 10**9, "head_dim": 2}, "num_attention_heads 1000000000 exceeds 1024"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported (supported: 'silu')"),
        ({"use_bias": True}, "use_bias=True is not supported"),
        ({"rope_reorder": True}, "rope_reorder=True is not supported"),
        ({"moe_gate_act": "relu"}, "moe_gate_act='relu' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope scaling"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling"),
        ({"vision_config": "x"}, "vision_config must be an object"),
        ({"vision_config": {"depth": 10**9}}, "vision_config.depth must be a positive integer up to 1000"),
        ({"vision_config": {"patch_size": "14"}}, "vision_config.patch_size must be a positive integer"),
        ({"vision_config": {"mlp_ratio": -4}}, "vision_config.mlp_ratio must be a positive number"),
        ({"vision_config": {}, "spatial_conv_size": 0.5}, "spatial_conv_size must be a positive integer"),
        ({"vision_config": {}, "pixel_hidden_size": 640}, "pixel_hidden_size 640 differs from the width of the vision"),
        ({"vision_config": {"num_heads": 0}}, "vision_config.num_heads must be a positive integer up to 1024"),
        (
            {"vision_config": {"embed_dim": 64, "num_heads": 3}},
            "embed_dim 64: each of 3 heads must get a multiple",
        ),
        ({"vision_config": {}, "im_patch_id": "x"}, "im_patch_id must be a token id, found 'x'"),
        ({"vision_config": {}, "video_end_token_id": -1}, "video_end_token_id must be a token id, found -1"),
        ({"vision_config": {}, "freq_allocation": 33}, "freq_allocation: the time takes 33 rotary pairs, expected an"),
        ({"vision_config": {}, "rope_scaling": {"mrope_section": [1, 2]}}, "must be [rows, columns, time], found ["),
        (
            {"vision_config": {}, "rope_scaling": {"mrope_section": [1, 1, "x"]}},
            "mrope_section: the time takes 'x'",
        ),
    ],
)
def test_refusals_name_key_value_and_expectation(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**{**REQUIRED, **keys})
    assert message in str(caught.value)


def test_several_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        read(**{**REQUIRED, "hidden_size": -1, "rms_norm_eps": "small", "dtype": "int4"})
    assert all(key in str(caught.value) for key in ("hidden_size", "rms_norm_eps", "dtype"))


@pytest.mark.parametrize("raw", [None, [], "config", 5])
def test_not_an_object(raw: Any) -> None:
    with pytest.raises(ConfigError, match="expected a JSON object"):
        ErnieConfig.from_dict(raw)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}", b"[" * 100_000, b"null"],
    ids=["empty", "open", "list", "not utf-8", "long number", "deep", "null"],
)
def test_a_file_that_is_no_config(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        ErnieConfig.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; a checkpoint folder needs"):
        ErnieConfig.from_pretrained(tmp_path)


# Any damage gives a config or a ConfigError, nothing else.

PUBLISHED = [json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8")) for name in NAMES]
KEYS = sorted({key for raw in PUBLISHED for key in raw} | {"rope_parameters", "num_experts", "torch_dtype"})
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 10**9, 10**30, 10**400, 1e300])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400)
@given(
    raw=st.sampled_from(PUBLISHED),
    deleted=st.sets(st.sampled_from(KEYS), max_size=3),
    replaced=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
)
def test_fuzz(raw: dict[str, Any], deleted: set[str], replaced: dict[str, Any]) -> None:
    damaged = {key: value for key, value in {**raw, **replaced}.items() if key not in deleted}
    try:
        config = ErnieConfig.from_dict(damaged)
    except ConfigError:
        return
    for layout in ("paddle", "pt"):
        again = ErnieConfig.from_dict(config.to_dict(layout))
        assert_same(again, config)
    assert len([i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]) <= config.num_hidden_layers
    assert config.shared_intermediate_size >= 0
