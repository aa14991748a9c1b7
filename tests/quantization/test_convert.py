"""Quantising checkpoints: what is written, that it reads back, nothing lost, nothing half-written."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie45.checkpoint.convert import convert_checkpoint
from ernie45.checkpoint.folder import CheckpointFolder
from ernie45.checkpoint.names import checkpoint_tensors, detect_layout, quantised_kind, settle_config, weight_bytes
from ernie45.checkpoint.reader import QuantisedSource, find_sources, quantised_sources, read_quantised
from ernie45.config import ErnieConfig
from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.ops import custom
from ernie45.quantization import convert as module
from ernie45.quantization.config import QuantizationConfig
from ernie45.quantization.convert import quantize_checkpoint
from ernie45.quantization.weights import dequantize, quantize
from tests.helpers.tiny import (
    DENSE,
    MOE,
    Stored,
    as_float32,
    cast,
    empty_like,
    read_folder,
    same_bits,
    tiny_config,
    tiny_model,
    write_folder,
)
from tests.helpers.vision import vision_config, write_vision_folder

MTP = {**MOE, "num_nextn_predict_layers": 1}
EMBEDDINGS = ("wint8", "wint4", "bfloat16")

kinds = pytest.mark.parametrize("kind", ["wint8", "wint4"])


def make(folder: Path, keys: dict[str, Any] = MTP, layout: str = "paddle", dtype: str = "bfloat16") -> Path:
    tiny_model(ErnieConfig(**keys), mtp=True).save_pretrained(folder, layout=layout, dtype=dtype, progress=False)
    return folder


def quantised(source: Path, destination: Path, kind: str, **options: Any) -> Path:
    quantize_checkpoint(source, destination, kind, progress=False, **options)
    return destination


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def sources_of(folder: Path) -> tuple[list[Any], list[str]]:
    config = ErnieConfig.from_pretrained(folder)
    assert config.quantization_config is not None
    with CheckpointFolder(folder) as opened:
        config = settle_config(config, opened.tensors)
        return quantised_sources(opened, checkpoint_tensors(config), config.quantization_config)


# What is written.


@kinds
@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("keys", [DENSE, MTP], ids=["dense", "moe"])
def test_every_weight_becomes_its_codes_and_scales(
    keys: dict[str, Any], kind: str, embedding: str, tmp_path: Path
) -> None:
    source = make(tmp_path / "source", keys)
    there = quantised(source, tmp_path / "there", kind, embedding=embedding)
    before, after = read_folder(source), read_folder(there)
    config = ErnieConfig.from_pretrained(there)
    assert config.quantization_config == QuantizationConfig.uniform(kind, embedding)
    seen = set()
    for name, (dtype, array) in before.items():
        stem, is_head = name.removesuffix(".weight"), name.startswith(("ernie.embed_tokens", "lm_head"))
        wanted = embedding if is_head else kind
        if array.ndim == 1 or name.endswith((".mlp.gate.weight", "correction_bias")) or wanted == "bfloat16":
            assert same_bits({name: after[name]}, {name: (dtype, array)}), name
            seen.add(name)
            continue
        expected = quantize(array, dtype, wanted, outputs_first=name.startswith("ernie.embed"))
        assert after[f"{stem}.quant_weight"][0] == "I8"
        assert after[f"{stem}.weight_scale"][0] == {"wint8": "F32", "wint4": "BF16"}[wanted]
        assert (after[f"{stem}.quant_weight"][1] == expected.codes).all()
        assert (after[f"{stem}.weight_scale"][1] == expected.scales).all()
        seen |= {f"{stem}.quant_weight", f"{stem}.weight_scale"}
    assert seen == after.keys()
    specs = checkpoint_tensors(settle_config(config, after))
    stored = sum(array.nbytes for _, array in after.values())
    assert weight_bytes(specs, "bfloat16", config.quantization_config) == stored


@kinds
@pytest.mark.parametrize("keys", [DENSE, {**DENSE, "num_key_value_heads": 4}, MTP], ids=["dense", "ungrouped", "mtp"])
def test_both_layouts_give_the_same_file(keys: dict[str, Any], kind: str, tmp_path: Path) -> None:
    found = [
        quantised(make(tmp_path / layout, keys, layout), tmp_path / f"{layout}-{kind}", kind)
        for layout in ("paddle", "pt")
    ]
    first, second = (folder / "model.safetensors" for folder in found)
    assert first.read_bytes() == second.read_bytes()
    left, right = (ErnieConfig.from_pretrained(folder) for folder in found)
    assert left.to_dict() == right.to_dict()


@kinds
def test_the_reference_path_gives_the_same_file(kind: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", dtype="float32")
    native = quantised(source, tmp_path / "native", kind)
    with custom.reference_only():
        assert files(quantised(source, tmp_path / "reference", kind)) == files(native)


def test_router_and_bias_are_float32_and_norms_keep_their_dtype(tmp_path: Path) -> None:
    source = make(tmp_path / "first", MOE)
    tensors = {name: cast(tensor, "F16") for name, tensor in read_folder(source).items()}
    source = write_folder(tmp_path / "source", config_of(source), tensors)
    after = read_folder(quantised(source, tmp_path / "there", "wint8", embedding="bfloat16"))
    assert after["ernie.layers.1.mlp.gate.weight"][0] == "F32"
    assert after["ernie.layers.1.mlp.moe_statics.e_score_correction_bias"][0] == "F32"
    assert after["ernie.norm.weight"][0] == "F16"
    assert after["ernie.embed_tokens.weight"][0] == after["lm_head.weight"][0] == "BF16"


def test_shards_small_files_and_unknown_tensors(tmp_path: Path) -> None:
    source = make(tmp_path / "first", DENSE)
    tensors = read_folder(source)
    tensors["something.else"] = ("I64", np.arange(6))
    tensors["lm_head.weight"] = empty_like("BF16", 61, 24)  # the copy of a tied embedding: not needed
    source = write_folder(tmp_path / "source", config_of(source), tensors)
    (source / "tokenizer.model").write_bytes(b"\x00\x01")
    there = tmp_path / "there"
    before, after = quantize_checkpoint(source, there, "wint4", max_shard_bytes=2000, progress=False)
    found = read_folder(there)
    assert before == sum(array.nbytes for _, array in tensors.values())
    assert after == sum(array.nbytes for _, array in found.values()) < before / 2
    assert len(list(there.glob("*.safetensors"))) > 3
    assert (there / "tokenizer.model").read_bytes() == b"\x00\x01"
    assert same_bits({"x": found["something.else"]}, {"x": tensors["something.else"]})
    assert not [name for name in found if name.startswith("lm_head")]
    whole = read_folder(quantised(source, tmp_path / "whole", "wint4"))
    assert same_bits(found, whole)


def test_each_weight_is_quantised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return quantize(*arguments, **options)

    monkeypatch.setattr(module, "quantize", counting)
    after = read_folder(quantised(make(tmp_path / "source"), tmp_path / "there", "wint4", max_shard_bytes=1000))
    assert len(calls) == sum(name.endswith(".quant_weight") for name in after)


# Vision-language checkpoints.


@kinds
@pytest.mark.parametrize("layout", ["paddle", "pt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vision_experts_are_quantised_and_the_tower_is_not(kind: str, layout: str, dtype: str, tmp_path: Path) -> None:
    """Tower and adapter, norms and biases included, are bfloat16, whatever they were."""
    config = vision_config(moe_layer_end_index=[2, 1])
    source = tmp_path / "source"
    convert_checkpoint(
        write_vision_folder(tmp_path / "first", config), source, layout=layout, dtype=dtype, progress=False
    )
    (source / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    there = quantised(source, tmp_path / "there", kind)
    after, before = read_folder(there), read_folder(tmp_path / "first")
    visual = [name for name in before if name.startswith(("vision_model.", "ernie.resampler_model."))]
    assert visual and same_bits(
        {name: after[name] for name in visual}, {name: cast(before[name], "BF16") for name in visual}
    )
    for name in (".experts.4.up_gate_proj", ".experts.7.down_proj", ".shared_experts.down_proj"):
        full = f"ernie.layers.1.mlp{name}"
        weight = before[f"{full}.weight"] if dtype == "float32" else cast(before[f"{full}.weight"], "BF16")
        expected = quantize(weight[1], weight[0], kind)
        assert (after[f"{full}.quant_weight"][1] == expected.codes).all()
        assert (after[f"{full}.weight_scale"][1] == expected.scales).all() and f"{full}.weight" not in after
    for name in ("gate.weight", "gate.weight_1", "moe_statics.e_score_correction_bias"):
        assert after[f"ernie.layers.2.mlp.{name}"][0] == "F32"
    settled = settle_config(ErnieConfig.from_pretrained(there), after)
    whole = checkpoint_tensors(settled)
    norms = sum(spec.size for spec in whole if spec.group == "norms") * (2 if dtype == "float32" else 0)
    stored = sum(array.nbytes for _, array in after.values())
    assert weight_bytes(whole, "bfloat16", settled.quantization_config) == stored - norms
    assert not sources_of(there)[1] and (there / "preprocessor_config.json").exists()


@kinds
def test_quantised_vision_language_weights_back_to_floats(kind: str, tmp_path: Path) -> None:
    source = write_vision_folder(tmp_path / "source")
    there = quantised(source, tmp_path / "there", kind)
    for layout in ("paddle", "pt"):
        convert_checkpoint(there, tmp_path / layout, layout=layout, dtype="float32", progress=False)
    convert_checkpoint(tmp_path / "pt", tmp_path / "back", layout="paddle", progress=False)
    found, before = read_folder(tmp_path / "paddle"), read_folder(source)
    assert same_bits(read_folder(tmp_path / "back"), found) and found.keys() == before.keys()
    name = "ernie.layers.1.mlp.experts.6.down_proj.weight"
    assert (found[name][1] == dequantize(quantize(before[name][1], "F32", kind))).all()
    name = "ernie.resampler_model.mlp.weight"
    assert same_bits({name: found[name]}, {name: cast(cast(before[name], "BF16"), "F32")})


@kinds
def test_the_text_part_of_quantised_vision_language_weights(kind: str, tmp_path: Path) -> None:
    """Quantising a checkpoint and taking its text part is the same in either order."""
    source = write_vision_folder(tmp_path / "source")
    there = quantised(source, tmp_path / "there", kind)
    expected = ErnieForCausalLM.from_pretrained(source, quantization=kind, progress=False).state_dict()
    found = ErnieForCausalLM.from_pretrained(there, progress=False).state_dict()
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in found)


# Reading.


@kinds
def test_reading_gives_views_of_the_codes(kind: str, tmp_path: Path) -> None:
    there = quantised(make(tmp_path / "source"), tmp_path / "there", kind)
    config = ErnieConfig.from_pretrained(there)
    assert config.quantization_config is not None
    with CheckpointFolder(there) as folder:
        assert detect_layout(folder.tensors, "here") == "paddle"
        specs = checkpoint_tensors(settle_config(config, folder.tensors))
        sources, problems = quantised_sources(folder, specs, config.quantization_config)
        assert not problems and [source.spec for source in sources] == specs
        for source in sources:
            assert (quantised_kind(source.spec, config.quantization_config) is not None) == isinstance(
                source, QuantisedSource
            )
            if isinstance(source, QuantisedSource):
                weight = read_quantised(folder, source)
                assert weight.shape == source.spec.shape == dequantize(weight).shape
                assert not weight.codes.flags.writeable and not weight.codes.flags.owndata


def test_without_a_word_in_the_config_the_head_decides(tmp_path: Path) -> None:
    for keys in (DENSE, {**DENSE, "tie_word_embeddings": False}):
        name = str(keys["tie_word_embeddings"])
        there = quantised(make(tmp_path / name, keys), tmp_path / f"{name}-8", "wint8")
        silent = tiny_config(MTP, tie_word_embeddings=None)
        assert settle_config(silent, read_folder(there)).tie_word_embeddings == keys["tie_word_embeddings"]


def test_multi_token_prediction_is_told_from_the_tensors(tmp_path: Path) -> None:
    names = read_folder(quantised(make(tmp_path / "source", MTP), tmp_path / "there", "wint8"))
    assert settle_config(tiny_config(MOE), names).num_nextn_predict_layers == 1


def damage(tmp_path: Path) -> tuple[dict[str, Any], Stored]:
    there = quantised(make(tmp_path / "source", MOE), tmp_path / "whole", "wint4")
    return config_of(there), read_folder(there)


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    config, tensors = damage(tmp_path)
    del tensors["ernie.layers.0.self_attn.o_proj.quant_weight"], tensors["ernie.norm.weight"]
    tensors["ernie.layers.0.self_attn.qkv_proj.weight_scale"] = empty_like("BF16", 1, 63)
    tensors["ernie.layers.0.mlp.down_proj.quant_weight"] = empty_like("I8", 40, 24)
    tensors["ernie.layers.1.mlp.experts.0.down_proj.weight_scale"] = empty_like("F32", 1, 24)
    tensors["ernie.embed_tokens.quant_weight"] = empty_like("U8", 61, 24)
    tensors["ernie.layers.1.mlp.gate.weight"] = empty_like("F32", 6, 24)
    _, problems = sources_of(write_folder(tmp_path / "damaged", config, tensors))
    assert problems == [
        "ernie.embed_tokens.quant_weight: U8 [61, 24] in model.safetensors, expected I8 [61, 24]",
        "ernie.layers.0.self_attn.qkv_proj.weight_scale: BF16 [1, 63] in model.safetensors, expected BF16 [1, 64]",
        "ernie.layers.0.self_attn.o_proj.quant_weight: missing, expected I8 [16, 24]",
        "ernie.layers.0.mlp.down_proj.quant_weight: I8 [40, 24] in model.safetensors, expected I8 [20, 24]",
        "ernie.layers.1.mlp.gate.weight: shape [6, 24] in model.safetensors, expected [24, 6]",
        "ernie.layers.1.mlp.experts.0.down_proj.weight_scale: F32 [1, 24] in model.safetensors, expected BF16 [1, 24]",
        "ernie.norm.weight: missing, expected shape [24]",
    ]


def test_a_truncated_file(tmp_path: Path) -> None:
    there = quantised(make(tmp_path / "source"), tmp_path / "there", "wint8")
    content = (there / "model.safetensors").read_bytes()
    (there / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        sources_of(there)


def test_quantised_weights_with_a_config_that_does_not_say_so(tmp_path: Path) -> None:
    config, tensors = damage(tmp_path)
    del config["quantization_config"]
    folder = write_folder(tmp_path / "silent", config, tensors)
    with CheckpointFolder(folder) as opened, pytest.raises(CheckpointError, match="config.json has no quantization_co"):
        find_sources(opened, [])


# Back to floats.


@kinds
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["paddle", "pt"])
def test_converted_back_it_is_what_the_codes_stand_for(kind: str, dtype: str, layout: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", dtype="float32")
    there = quantised(source, tmp_path / "there", kind, embedding="wint4")
    convert_checkpoint(there, tmp_path / "back", layout=layout, dtype=dtype, progress=False)
    assert not {"quantization_config", "is_quantized"} & config_of(tmp_path / "back").keys()
    model = ErnieForCausalLM.from_pretrained(tmp_path / "back", dtype="float32", mtp=True, progress=False)
    loaded = model.state_dict()
    for name, (stored_dtype, array) in read_folder(source).items():
        expected = array
        if array.ndim == 2 and not name.endswith((".mlp.gate.weight", "correction_bias")):
            embedding = name.startswith(("ernie.embed_tokens", "lm_head"))
            chosen = "wint4" if embedding else kind
            expected = dequantize(quantize(array, stored_dtype, chosen, outputs_first=name.startswith("ernie.embed")))
        if not name.endswith((".mlp.gate.weight", "correction_bias")):
            expected = as_float32(cast(("F32", expected), "BF16" if dtype == "bfloat16" else "F32"))
        assert (loaded[name].numpy() == expected).all(), name


def test_converted_back_needs_a_dtype(tmp_path: Path) -> None:
    there = quantised(make(tmp_path / "source"), tmp_path / "there", "wint8")
    with pytest.raises(CheckpointError, match="there: is quantised; give the dtype to turn it into"):
        convert_checkpoint(there, tmp_path / "back", progress=False)
    assert not (tmp_path / "back").exists()


# What it refuses, and what it leaves behind.


@kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", ["paddle", "pt"])
def test_nan_and_infinity_are_refused_by_name(kind: str, bad: float, layout: str, tmp_path: Path) -> None:
    source = make(tmp_path / "first", MOE, layout, dtype="float32")
    tensors = read_folder(source)
    stem = "ernie" if layout == "paddle" else "model"
    tensors[f"{stem}.layers.2.mlp.experts.4.down_proj.weight"][1][3, 2] = bad
    source = write_folder(tmp_path / "source", config_of(source), tensors)
    with pytest.raises(CheckpointError) as caught:
        quantised(source, tmp_path / "there", kind)
    assert f"{source}: ernie.layers.2.mlp.experts.4.down_proj.weight: holds NaN or infinity" in str(caught.value)
    assert not (tmp_path / "there").exists()


def test_a_quantised_source_and_the_source_itself(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    there = quantised(source, tmp_path / "there", "wint8")
    with pytest.raises(CheckpointError, match="there: is quantised already"):
        quantised(there, tmp_path / "again", "wint4")
    with pytest.raises(CheckpointError, match="is the source itself"):
        quantised(source, source, "wint4")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("kind", "embedding"), [("int4", "wint8"), ("wint4", "float32"), ("bfloat16", "wint8")])
def test_unknown_choices(kind: str, embedding: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not supported"):
        quantised(make(tmp_path / "source"), tmp_path / "there", kind, embedding=embedding)
    assert not (tmp_path / "there").exists()


def test_all_problems_of_the_source_are_reported(tmp_path: Path) -> None:
    source = make(tmp_path / "first", MOE)
    tensors = read_folder(source)
    del tensors["ernie.norm.weight"], tensors["ernie.layers.1.mlp.experts.2.up_gate_proj.weight"]
    source = write_folder(tmp_path / "source", config_of(source), tensors)
    with pytest.raises(CheckpointError, match=r"2 problem\(s\).*experts.2.up_gate_proj.weight: missing.*ernie.norm"):
        quantised(source, tmp_path / "there", "wint8")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_in_the_middle_it_changes_nothing(
    existing: bool, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = make(tmp_path / "source"), tmp_path / "there"
    if existing:
        make(destination, DENSE)
    before = files(destination) if existing else None
    remaining = 20

    def fail_later(*arguments: Any, **options: Any) -> Any:
        nonlocal remaining
        remaining -= 1
        if not remaining:
            raise error("interrupted")
        return quantize(*arguments, **options)

    monkeypatch.setattr(module, "quantize", fail_later)
    with pytest.raises(error):
        quantised(source, destination, "wint8", max_shard_bytes=3000)
    assert destination.exists() == existing
    if existing:
        assert files(destination) == before


KILLED = """
import os, sys
from ernie45.quantization import convert
correct, remaining = convert.quantize, 20

def quantize(*arguments, **options):
    global remaining
    remaining -= 1
    if not remaining:
        os.kill(os.getpid(), 9)
    return correct(*arguments, **options)

convert.quantize = quantize
convert.quantize_checkpoint(sys.argv[1], sys.argv[2], "wint8", max_shard_bytes=3000, progress=False)
"""


def test_killed_in_the_middle_it_leaves_no_checkpoint(tmp_path: Path) -> None:
    source, destination = make(tmp_path / "source"), tmp_path / "there"
    result = subprocess.run([sys.executable, "-c", KILLED, str(source), str(destination)], cwd=Path.cwd())
    assert result.returncode == -9
    assert all(path.name.endswith(".partial") for path in destination.iterdir())
    with pytest.raises(CheckpointError, match="no .safetensors file"):
        CheckpointFolder(destination)
    quantised(source, destination, "wint8")
    assert not list(destination.glob("*.partial")) and not sources_of(destination)[1]
