"""The table of tensor names, the layout told from names, and what tensors decide about a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.checkpoint.names import (
    PADDLE,
    PT,
    TensorSpec,
    aliases,
    bytes_left_out,
    checkpoint_tensors,
    detect_layout,
    quantised_kind,
    quantised_tensors,
    settle_config,
    text_part_tensors,
    weight_bytes,
)
from ernie45.config import ErnieConfig
from ernie45.errors import CheckpointError
from ernie45.quantization.config import QuantizationConfig
from tests.helpers.tiny import DENSE, MOE, tiny_config
from tests.helpers.vision import VISION, vision_config

CONFIGS = Path(__file__).parent.parent.parent / "configs"
UNGROUPED = {**DENSE, "num_key_value_heads": 4}
MTP = {**MOE, "num_nextn_predict_layers": 2, "head_dim": 6}


def specs_of(keys: dict[str, Any]) -> list[TensorSpec]:
    return checkpoint_tensors(ErnieConfig.from_dict(keys))


def find(specs: list[TensorSpec], name: str) -> TensorSpec:
    (spec,) = [spec for spec in specs if spec.name == name]
    return spec


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("ernie-4.5-0.3b", {}, 360_748_032),
        ("ernie-4.5-vl-424b-a47b", {"mtp": False}, 423_526_285_184),
    ],
)
def test_published_sizes(name: str, options: dict[str, bool], parameters: int) -> None:
    config = ErnieConfig.from_pretrained(CONFIGS / f"{name}.json")
    specs = checkpoint_tensors(config, **options)
    assert sum(spec.size for spec in specs) == parameters
    for layout in (PADDLE, PT):
        parts = [part for spec in specs for part in spec.stored(layout)]
        assert sum(int(np.prod(part.shape)) for part in parts) == parameters
        assert len({part.name for part in parts}) == len(parts)


@pytest.mark.parametrize(("name", "millions"), [("ernie-4.5-21b-a3b", 21_826), ("ernie-4.5-300b-a47b", 298_600)])
def test_published_sizes_in_millions(name: str, millions: int) -> None:
    config = ErnieConfig.from_pretrained(CONFIGS / f"{name}.json")
    assert sum(s.size for s in checkpoint_tensors(config, mtp=False)) / 1e6 == pytest.approx(millions, rel=3e-4)


@pytest.mark.parametrize(
    "keys", [DENSE, MOE, UNGROUPED, MTP, VISION], ids=["dense", "moe", "ungrouped", "mtp", "vision-language"]
)
@given(step=st.integers(1, 50), seed=st.integers(0, 3))
def test_parts_put_back_in_any_pieces_give_the_tensor(keys: dict[str, Any], step: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for spec in specs_of(keys):
        tensor = generator.random(spec.shape)
        for layout in (PADDLE, PT):
            again = np.full(spec.shape, np.nan)
            for part in spec.stored(layout):
                piece = part.take(tensor)
                assert piece.shape == part.shape
                for first in range(0, len(piece), step):
                    part.put(again, piece[first : first + step], first)
            assert (again == tensor).all(), (spec.name, layout)


def test_grouped_attention_is_all_q_then_all_k_then_all_v() -> None:
    spec = find(specs_of(DENSE), "ernie.layers.0.self_attn.qkv_proj.weight")
    tensor = np.tile(np.arange(64), (24, 1))
    q, k, v = (part.take(tensor)[:, 0].tolist() for part in spec.parts)
    assert (q, k, v) == (list(range(32)), list(range(32, 48)), list(range(48, 64)))
    assert [part.name for part in spec.parts] == [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]


def test_ungrouped_attention_has_q_k_v_side_by_side_per_head() -> None:
    spec = find(specs_of(UNGROUPED), "ernie.layers.0.self_attn.qkv_proj.weight")
    tensor = np.tile(np.arange(96), (24, 1))
    for offset, part in zip((0, 8, 16), spec.parts, strict=True):
        expected = [24 * head + offset + d for head in range(4) for d in range(8)]
        assert part.take(tensor)[:, 0].tolist() == expected


def test_the_gate_is_the_first_half() -> None:
    spec = find(specs_of(DENSE), "ernie.layers.0.mlp.up_gate_proj.weight")
    tensor = np.tile(np.arange(80), (24, 1))
    taken = {part.name: part.take(tensor)[:, 0].tolist() for part in spec.parts}
    assert taken["model.layers.0.mlp.gate_proj.weight"] == list(range(40))
    assert taken["model.layers.0.mlp.up_proj.weight"] == list(range(40, 80))


def test_router_and_bias_are_float32() -> None:
    names = {spec.name.rpartition(".mlp.")[2] for spec in specs_of(MTP) if spec.float32}
    assert names == {"gate.weight", "moe_statics.e_score_correction_bias"}


def test_weight_bytes_counts_float32_tensors_as_such() -> None:
    specs = specs_of(MOE)
    wide = sum(spec.size for spec in specs if spec.float32)
    assert weight_bytes(specs, "bfloat16") == 2 * sum(s.size for s in specs) + 2 * wide
    assert weight_bytes(specs, "float32") == 4 * sum(s.size for s in specs)


@pytest.mark.parametrize(
    ("name", "kind", "codes", "scales"),
    [
        ("ernie.layers.0.mlp.down_proj.weight", "wint8", (40, 24), (24,)),
        ("ernie.layers.0.mlp.down_proj.weight", "wint4", (20, 24), (1, 24)),
        ("ernie.embed_tokens.weight", "wint8", (61, 24), (61,)),
        ("ernie.embed_tokens.weight", "wint4", (61, 12), (61, 1)),
        ("lm_head.weight", "wint8", (24, 61), (61,)),
    ],
)
def test_quantised_spelling(name: str, kind: str, codes: tuple[int, ...], scales: tuple[int, ...]) -> None:
    stem = name.removesuffix(".weight")
    found = quantised_tensors(find(specs_of(MOE), name), kind)
    assert [tensor.name for tensor in found] == [f"{stem}.quant_weight", f"{stem}.weight_scale"]
    assert [tensor.shape for tensor in found] == [codes, scales]
    assert [tensor.dtype for tensor in found] == ["I8", "F32" if kind == "wint8" else "BF16"]


def test_what_is_quantised() -> None:
    quantization = QuantizationConfig("wint8", "wint4", "bfloat16")
    kinds = {spec.name: quantised_kind(spec, quantization) for spec in specs_of(MTP)}
    assert kinds["ernie.layers.1.self_attn.qkv_proj.weight"] == "wint8"
    assert kinds["ernie.layers.1.mlp.shared_experts.down_proj.weight"] == "wint8"
    assert kinds["ernie.layers.1.mlp.experts.5.up_gate_proj.weight"] == "wint4"
    assert kinds["ernie.mtp_linear_proj.1.weight"] == kinds["ernie.mtp_block.0.mlp.down_proj.weight"] == "wint8"
    for name in (
        "ernie.embed_tokens.weight",
        "lm_head.weight",
        "ernie.norm.weight",
        "ernie.mtp_emb_norm.0.weight",
        "ernie.layers.1.input_layernorm.weight",
        "ernie.layers.1.mlp.gate.weight",
        "ernie.layers.1.mlp.moe_statics.e_score_correction_bias",
    ):
        assert kinds[name] is None, name


def test_the_vision_tower_is_not_quantised_and_vision_experts_are() -> None:
    config = ErnieConfig.from_pretrained(CONFIGS / "ernie-4.5-vl-28b-a3b.json")
    groups = {
        spec.group for spec in checkpoint_tensors(config) if quantised_kind(spec, QuantizationConfig.uniform("wint4"))
    }
    assert "vision experts" in groups and not groups & {"vision tower", "adapter", "norms", "router"}


@pytest.mark.parametrize(("kind", "gigabytes"), [("wint8", 22.0), ("wint4", 11.8)])
def test_the_21b_model_in_8_and_4_bits(kind: str, gigabytes: float) -> None:
    specs = checkpoint_tensors(ErnieConfig.from_pretrained(CONFIGS / "ernie-4.5-21b-a3b.json"))
    assert weight_bytes(specs, "bfloat16", QuantizationConfig.uniform(kind)) / 1e9 == pytest.approx(gigabytes, abs=0.1)


@pytest.mark.parametrize("keys", [DENSE, MOE, MTP, VISION])
@pytest.mark.parametrize("layout", [PADDLE, PT])
def test_layout_is_told_from_names(keys: dict[str, Any], layout: str) -> None:
    names = [part.name for spec in specs_of(keys) for part in spec.stored(layout)]
    assert detect_layout(names, "here") == layout
    assert detect_layout(reversed(names), "here") == layout


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.layers.0.self_attn.qkv_proj.weight", "model.norm.weight"], "PaddleFormers' in-memory layout"),
        (["transformer.h.0.attn.weight"], "not an ERNIE 4.5 checkpoint: expected names such as 'ernie.norm.weight'"),
        (["x.quant_weight"], "quantised checkpoints are read with -Paddle names"),
        ([], "not an ERNIE 4.5 checkpoint"),
    ],
)
def test_foreign_names_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        detect_layout(names, "some/folder")
    assert message in str(caught.value) and "some/folder" in str(caught.value)


@pytest.mark.parametrize("layout", [PADDLE, PT])
def test_tensors_decide_what_the_config_leaves_open(layout: str) -> None:
    def names(**changes: Any) -> list[str]:
        return [part.name for s in specs_of({**MTP, **changes}) for part in s.stored(layout)]

    silent = tiny_config(MTP, tie_word_embeddings=None, moe_use_aux_free=None, num_nextn_predict_layers=None)
    settled = settle_config(silent, names())
    assert not settled.tie_word_embeddings and settled.moe_use_aux_free and settled.num_nextn_predict_layers == 2
    bare = names(tie_word_embeddings=True, moe_use_aux_free=False, num_nextn_predict_layers=0)
    settled = settle_config(silent, bare)
    assert settled.tie_word_embeddings
    assert settled.moe_use_aux_free is False and settled.num_nextn_predict_layers == 0


def test_tensors_overrule_the_config_about_bias_and_mtp_but_not_about_tying() -> None:
    names = [spec.name for spec in specs_of({**MOE, "moe_use_aux_free": False})]
    settled = settle_config(tiny_config(MTP, moe_use_aux_free=True, tie_word_embeddings=True), names)
    assert settled.moe_use_aux_free is False and settled.num_nextn_predict_layers == 0
    assert settled.tie_word_embeddings is True, "a copy of the embedding may be stored as lm_head"


# Vision-language models.


def mlp_shapes(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.up_gate_proj.weight": (hidden, 2 * width), f"{prefix}.down_proj.weight": (width, hidden)}


def with_bias(prefix: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.weight": shape, f"{prefix}.bias": shape[-1:]}


def vision_language_shapes(last_vision_layer: int) -> dict[str, tuple[int, ...]]:
    """What the published files hold for the sizes of VISION: 4 + 4 experts of widths 24 and 8."""
    shapes: dict[str, tuple[int, ...]] = {"ernie.embed_tokens.weight": (2561, 32), "ernie.norm.weight": (32,)}
    for layer in range(3):
        prefix = f"ernie.layers.{layer}"
        shapes |= {f"{prefix}.{norm}_layernorm.weight": (32,) for norm in ("input", "post_attention")}
        shapes[f"{prefix}.self_attn.qkv_proj.weight"] = (32, 64)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (32, 32)
        if layer == 0:
            shapes |= mlp_shapes(f"{prefix}.mlp", 32, 48)
            continue
        shapes |= {f"{prefix}.mlp.gate.weight": (32, 4), f"{prefix}.mlp.gate.weight_1": (32, 4)}
        shapes[f"{prefix}.mlp.moe_statics.e_score_correction_bias"] = (2, 4)
        shapes |= mlp_shapes(f"{prefix}.mlp.shared_experts", 32, 48)
        for expert in range(8 if layer <= last_vision_layer else 4):
            shapes |= mlp_shapes(f"{prefix}.mlp.experts.{expert}", 32, 24 if expert < 4 else 8)
    shapes["vision_model.patch_embed.proj.weight"] = (588, 32)
    for block in range(2):
        prefix = f"vision_model.blocks.{block}"
        shapes |= with_bias(f"{prefix}.norm1", 32) | with_bias(f"{prefix}.norm2", 32)
        shapes |= with_bias(f"{prefix}.attn.qkv", 32, 96) | with_bias(f"{prefix}.attn.proj", 32, 32)
        shapes |= with_bias(f"{prefix}.mlp.fc1", 32, 64) | with_bias(f"{prefix}.mlp.fc2", 64, 32)
    shapes |= with_bias("vision_model.ln", 32)
    adapter = "ernie.resampler_model"
    for linear, inputs in (("spatial_linear", 128), ("temporal_linear", 256)):
        shapes |= with_bias(f"{adapter}.{linear}.0", inputs, 128) | with_bias(f"{adapter}.{linear}.2", 128, 128)
        shapes |= with_bias(f"{adapter}.{linear}.3", 128)
    return shapes | with_bias(f"{adapter}.mlp", 128, 32) | {f"{adapter}.after_norm.weight": (32,)}


@pytest.mark.parametrize("last", [1, 2])
def test_tensors_of_a_vision_language_model(last: int) -> None:
    """Where the vision bank ends early, its router and its row of the bias are stored all the same."""
    specs = checkpoint_tensors(vision_config(moe_layer_end_index=[2, last]))
    assert {spec.name: spec.shape for spec in specs} == vision_language_shapes(last)
    names = {spec.name: [part.name for part in spec.stored(PT)] for spec in specs}
    assert names["vision_model.ln.weight"] == ["vision_model.ln.weight"]
    assert names["ernie.resampler_model.mlp.bias"] == ["model.resampler_model.mlp.bias"]
    for spec in specs:  # routers are the only linear weights that -PT does not transpose
        turned = len(spec.shape) == 2 and not spec.float32 and spec.name != "ernie.embed_tokens.weight"
        assert all(part.transposed == turned for part in spec.parts), spec.name


def test_a_bank_of_text_that_ends_early() -> None:
    names = {spec.name for spec in checkpoint_tensors(vision_config(moe_layer_end_index=[1, 2]))}
    experts = [expert for expert in range(8) if f"ernie.layers.2.mlp.experts.{expert}.down_proj.weight" in names]
    assert experts == [4, 5, 6, 7]
    assert {"ernie.layers.2.mlp.gate.weight", "ernie.layers.2.mlp.gate.weight_1"} <= names


@pytest.mark.parametrize("adapter", ["", "ernie.", "model."])
@pytest.mark.parametrize("tower", ["", "ernie.", "model."])
@pytest.mark.parametrize("layout", [PADDLE, PT])
def test_prefixes_of_tower_and_adapter_say_nothing_about_the_layout(layout: str, tower: str, adapter: str) -> None:
    names = [part.name for spec in specs_of(VISION) for part in spec.stored(layout)]
    text = [name for name in names if "vision_model" not in name and "resampler" not in name]
    visual = [f"{tower}vision_model.ln.weight", f"{adapter}resampler_model.mlp.weight"]
    assert detect_layout(visual + text, "here") == detect_layout(text + visual, "here") == layout
    with pytest.raises(CheckpointError, match="not an ERNIE 4.5 checkpoint"):
        detect_layout(visual, "here")


def test_aliases() -> None:
    assert aliases("vision_model.a.weight") == (
        "vision_model.a.weight",
        "ernie.vision_model.a.weight",
        "model.vision_model.a.weight",
    )
    for name, other in (
        ("ernie.resampler_model.b", "model.resampler_model.b"),
        ("model.resampler_model.b", "ernie.resampler_model.b"),
    ):
        assert aliases(name) == (name, "resampler_model.b", other)
    for name in ("ernie.norm.weight", "model.norm.weight", "lm_head.weight", "ernie.layers.0.vision_model.x"):
        assert aliases(name) == (name,)


# The text part of a vision-language model.


def test_the_text_part_is_what_the_text_model_wants() -> None:
    config = vision_config()
    part, whole = text_part_tensors(config), {spec.name: spec for spec in checkpoint_tensors(config)}
    wanted = checkpoint_tensors(config.text_part())
    assert [(spec.name, spec.shape, spec.float32) for spec in part] == [(s.name, s.shape, s.float32) for s in wanted]
    for spec in part:
        for layout in (PADDLE, PT):
            found = [(stored.name, stored.shape) for stored in spec.stored(layout)]
            assert found == [(stored.name, stored.shape) for stored in whole[spec.name].stored(layout)]
    bias = find(part, "ernie.layers.1.mlp.moe_statics.e_score_correction_bias")
    assert all(stored.used_rows == 1 for layout in (PADDLE, PT) for stored in bias.stored(layout))


def test_the_text_part_of_a_text_model_is_all_of_it() -> None:
    specs = text_part_tensors(ErnieConfig(**MTP))
    assert [spec.name for spec in specs] == [spec.name for spec in specs_of(MTP)]
    assert all(part.is_whole for spec in specs for part in spec.stored(PADDLE))
    assert bytes_left_out(ErnieConfig(**MTP), "float32") == 0


def test_what_the_text_part_leaves_out() -> None:
    config = ErnieConfig.from_pretrained(CONFIGS / "ernie-4.5-vl-28b-a3b.json")
    vision = 6_794_772_480 + 630_433_280 + 144_225_280  # experts, tower, adapter
    routing = 27 * 64 * (2560 + 1)
    assert bytes_left_out(config, "bfloat16") == 2 * vision + 4 * routing
    assert bytes_left_out(config, "float32") == 4 * vision + 4 * routing


@pytest.mark.parametrize("layout", [PADDLE, PT])
@pytest.mark.parametrize("tied", [True, False])
def test_tensors_settle_a_vision_language_config(tied: bool, layout: str) -> None:
    silent = vision_config(tie_word_embeddings=None, moe_use_aux_free=None)
    specs = checkpoint_tensors(vision_config(tie_word_embeddings=tied))
    settled = settle_config(silent, [part.name for spec in specs for part in spec.stored(layout)])
    assert settled == silent.replace(tie_word_embeddings=tied, moe_use_aux_free=True, num_nextn_predict_layers=0)
