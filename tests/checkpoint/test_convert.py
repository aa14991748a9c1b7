"""Converting checkpoints: its own inverse bit for bit, nothing lost, nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie45.checkpoint import convert as module
from ernie45.checkpoint.convert import convert_checkpoint
from ernie45.config import ErnieConfig
from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.models.vision_language import ErnieForConditionalGeneration
from tests.helpers.tiny import (
    DENSE,
    MOE,
    cast,
    empty_like,
    read_folder,
    same_bits,
    tiny_model,
    write_folder,
)
from tests.helpers.vision import vision_config, write_vision_folder

OTHER = {"paddle": "pt", "pt": "paddle"}
MTP = {**MOE, "num_nextn_predict_layers": 2}

layouts = pytest.mark.parametrize("layout", ["paddle", "pt"])


def convert(source: Path, destination: Path, **options: Any) -> Path:
    convert_checkpoint(source, destination, progress=False, **options)
    return destination


def make(folder: Path, keys: dict[str, Any] = MTP, layout: str = "paddle", dtype: str = "float32") -> Path:
    tiny_model(ErnieConfig(**keys), mtp=True).save_pretrained(folder, layout=layout, dtype=dtype, progress=False)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# There and back.


@layouts
@pytest.mark.parametrize("kind", ["dense", "moe", "vl"])
def test_the_reference_checkpoints_convert_into_each_other(
    reference: Path, kind: str, layout: str, tmp_path: Path
) -> None:
    source, other = reference / kind / layout, reference / kind / OTHER[layout]
    there = convert(source, tmp_path / "there", layout=OTHER[layout])
    assert same_bits(read_folder(there), read_folder(other))
    back = convert(there, tmp_path / "back", layout=layout)
    assert (back / "model.safetensors").read_bytes() == (
        convert(source, tmp_path / "copy") / "model.safetensors"
    ).read_bytes()
    assert same_bits(read_folder(back), read_folder(source))


@layouts
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("keys", [DENSE, {**DENSE, "num_key_value_heads": 4}, MTP], ids=["dense", "ungrouped", "mtp"])
def test_there_and_back_bit_for_bit(keys: dict[str, Any], layout: str, dtype: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", keys, layout, dtype)
    there = convert(source, tmp_path / "there", layout=OTHER[layout], max_shard_bytes=10_000)
    assert len(list(there.glob("*.safetensors"))) > 1
    back = convert(there, tmp_path / "back", layout=layout)
    assert same_bits(read_folder(back), read_folder(source))
    before, after = ErnieConfig.from_pretrained(source), ErnieConfig.from_pretrained(back)
    assert before.to_dict(layout) == after.to_dict(layout)


@layouts
def test_it_writes_what_save_pretrained_writes(layout: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", MTP, OTHER[layout])
    expected = make(tmp_path / "expected", MTP, layout)
    found = convert(source, tmp_path / "found", layout=layout)
    assert (found / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert ErnieConfig.from_pretrained(found).to_dict(layout) == ErnieConfig.from_pretrained(expected).to_dict(layout)


@pytest.mark.parametrize("stored", ["BF16", "F32"])
def test_every_tensor_keeps_its_own_dtype(stored: str, tmp_path: Path) -> None:
    """Also a router in half precision and tensors of one fused pair in two dtypes."""
    source = make(tmp_path / "first", MTP, "pt")
    tensors = {name: cast(tensor, stored) for name, tensor in read_folder(source).items()}
    source = write_folder(tmp_path / "source", config_of(source), tensors)
    back = convert(convert(source, tmp_path / "there", layout="paddle"), tmp_path / "back", layout="pt")
    assert same_bits(read_folder(back), tensors)


def test_parts_of_different_dtypes_meet_in_float32(tmp_path: Path) -> None:
    source = make(tmp_path / "first", DENSE, "pt")
    tensors = read_folder(source)
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = cast(tensors[name], "BF16")
    source = write_folder(tmp_path / "source", config_of(source), tensors)
    there = read_folder(convert(source, tmp_path / "there", layout="paddle"))
    dtype, fused = there["ernie.layers.0.self_attn.qkv_proj.weight"]
    assert dtype == "F32"
    assert (cast(tensors[name], "F32")[1] == fused[:, 32:48].T).all()


# Vision-language checkpoints.


@layouts
@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": False, "moe_layer_end_index": [2, 1]}])
def test_a_vision_language_model_saved_is_what_is_converted(
    change: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    """Head, and a layer without the vision bank, included; in either layout and dtype."""
    source = write_vision_folder(tmp_path / "source", vision_config(**change), layout=layout)
    model = ErnieForConditionalGeneration.from_pretrained(source, dtype="float32", progress=False)
    for other in ("paddle", "pt"):
        for dtype in ("float32", "bfloat16"):
            model.save_pretrained(tmp_path / "saved", layout=other, dtype=dtype, progress=False)
            found = convert(source, tmp_path / "found", layout=other, dtype=dtype)
            assert same_bits(read_folder(found), read_folder(tmp_path / "saved"))
            saved, converted = (ErnieConfig.from_pretrained(tmp_path / name) for name in ("saved", "found"))
            converted = converted.replace(num_nextn_predict_layers=0)  # the model says that it has none
            assert saved.replace(extra={}) == converted.replace(extra={}) and saved.vision == converted.vision
            assert config_of(found)["architectures"] == ["Ernie4_5_VLMoeForConditionalGeneration"]
    assert same_bits(
        read_folder(convert(tmp_path / "found", tmp_path / "back", layout=layout)),
        {name: tensor if is_routing(name) else cast(tensor, "BF16") for name, tensor in read_folder(source).items()},
    )


def is_routing(name: str) -> bool:
    return ".mlp.gate." in name or name.endswith("correction_bias")


@layouts
@pytest.mark.parametrize("prefix", ["", "ernie.", "model."])
def test_vision_tensors_get_their_usual_names(reference: Path, prefix: str, layout: str, tmp_path: Path) -> None:
    source = reference / "vl" / layout
    tensors = {
        prefix + name.removeprefix("ernie.").removeprefix("model.")
        if "vision_model." in name or "resampler_model." in name
        else name: tensor
        for name, tensor in read_folder(source).items()
    }
    folder = write_folder(tmp_path / "renamed", config_of(source), tensors)
    for other in ("paddle", "pt"):
        found = convert(folder, tmp_path / f"{other} again", layout=other)
        assert same_bits(read_folder(found), read_folder(reference / "vl" / other))


def test_files_of_a_processor_are_copied(tmp_path: Path) -> None:
    source = write_vision_folder(tmp_path / "source")
    names = ["preprocessor_config.json", "chat_template.json", "chat_template.jsonl", "video_preprocessor_config.json"]
    for name in names:
        (source / name).write_text(f'{{"name": "{name}"}}', encoding="utf-8")
    expected = {name: content for name, content in files(source).items() if name not in WRITTEN}
    found = files(convert(source, tmp_path / "there", layout="pt"))
    assert {name: content for name, content in found.items() if name not in WRITTEN} == expected
    assert set(names) < expected.keys() and "tokenizer.model" in expected


WRITTEN = ("config.json", "model.safetensors")


# What is carried along.


@layouts
def test_unknown_tensors_are_carried_along(layout: str, tmp_path: Path) -> None:
    source = make(tmp_path / "first", DENSE, layout)
    tensors = read_folder(source)
    tensors["something.else"] = ("I64", np.arange(6).reshape(2, 3))
    tensors["lm_head.weight"] = empty_like("BF16", 61, 24)  # tied: not read, but kept
    source = write_folder(tmp_path / "source", config_of(source), tensors)
    there = convert(source, tmp_path / "there", layout=OTHER[layout])
    found = read_folder(there)
    for name in ("something.else", "lm_head.weight"):
        assert same_bits({name: found[name]}, {name: tensors[name]})
    assert same_bits(read_folder(convert(there, tmp_path / "back", layout=layout)), tensors)


def test_tokenizer_and_other_small_files_are_copied(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    (source / "tokenizer.model").write_bytes(b"\x00\x01")
    (source / "chat_template.jinja").write_text("{{ x }}", encoding="utf-8")
    (source / "folder").mkdir()
    (source / "old.safetensors.index.json").write_text("{}", encoding="utf-8")
    there = convert(source, tmp_path / "there", layout="pt")
    assert sorted(files(there)) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
    ]
    assert (there / "tokenizer.model").read_bytes() == b"\x00\x01"


# config.json.


def test_the_config_takes_the_spelling_of_the_layout_and_keeps_the_rest(tmp_path: Path) -> None:
    source = make(tmp_path / "source", {**MTP, "extra": {"comment": "kept", "hidden_act": "silu"}})
    there = config_of(convert(source, tmp_path / "there", layout="pt"))
    assert there["torch_dtype"] == "float32" and "dtype" not in there
    assert there["architectures"] == ["Ernie4_5_MoeForCausalLM"] and there["comment"] == "kept"
    dense = make(tmp_path / "dense", DENSE)
    assert config_of(convert(dense, tmp_path / "pt", layout="pt"))["architectures"] == ["Ernie4_5ForCausalLM"]
    assert config_of(convert(dense, tmp_path / "paddle"))["architectures"] == ["Ernie4_5_ForCausalLM"]


@pytest.mark.parametrize("layout", ["paddle", "pt"])
def test_keys_that_the_source_leaves_out_are_written_where_their_defaults_differ(layout: str, tmp_path: Path) -> None:
    """A missing key means another number in the other spelling; the converted model must be the same one."""
    keys = {**MOE, "moe_layer_interval": 1, "moe_layer_start_index": 1}
    source = make(tmp_path / "source", keys, layout)
    silent = config_of(source)
    for key in ("rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings"):
        del silent[key]
    (source / "config.json").write_text(json.dumps(silent), encoding="utf-8")
    there = convert(source, tmp_path / "there", layout=OTHER[layout])
    before = ErnieForCausalLM.from_pretrained(source, progress=False).config
    after = ErnieForCausalLM.from_pretrained(there, progress=False).config
    assert after.replace(extra={}) == before.replace(extra={})


def test_heads_that_the_source_leaves_out_are_written_for_transformers(tmp_path: Path) -> None:
    """Its defaults are those of a published model; a -Paddle file means: no grouping, hidden size over heads."""
    source = make(tmp_path / "source", {**DENSE, "num_key_value_heads": 4, "head_dim": 6})
    silent = {k: v for k, v in config_of(source).items() if k not in ("num_key_value_heads", "head_dim")}
    (source / "config.json").write_text(json.dumps(silent), encoding="utf-8")
    there = config_of(convert(source, tmp_path / "there", layout="pt"))
    assert (there["num_key_value_heads"], there["head_dim"]) == (4, 6)


def test_a_source_that_does_not_say_what_it_is(tmp_path: Path) -> None:
    source = make(tmp_path / "source", MOE)
    silent = {k: v for k, v in config_of(source).items() if k not in ("architectures", "model_type", "dtype")}
    (source / "config.json").write_text(json.dumps(silent), encoding="utf-8")
    there = config_of(convert(source, tmp_path / "there", layout="pt", dtype="float16"))
    assert there["architectures"] == ["Ernie4_5_MoeForCausalLM"] and there["model_type"] == "ernie4_5_moe"
    assert there["torch_dtype"] == "float16"


# Another dtype.


@layouts
def test_to_bfloat16_keeps_the_router_in_float32(layout: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", MTP)
    there = convert(source, tmp_path / "there", layout=layout, dtype="bfloat16")
    for name, (dtype, _) in read_folder(there).items():
        assert dtype == ("F32" if name.endswith((".mlp.gate.weight", "correction_bias")) else "BF16"), name
    assert config_of(there)["torch_dtype" if layout == "pt" else "dtype"] == "bfloat16"
    expected = {
        name: tensor if name.endswith((".mlp.gate.weight", "correction_bias")) else cast(tensor, "BF16")
        for name, tensor in read_folder(source).items()
    }
    assert same_bits(read_folder(convert(there, tmp_path / "back", layout="paddle")), expected)


def test_a_router_in_half_precision_becomes_float32_when_a_dtype_is_asked_for(tmp_path: Path) -> None:
    source = make(tmp_path / "first", MTP)
    tensors = {name: cast(tensor, "BF16") for name, tensor in read_folder(source).items()}
    source = write_folder(tmp_path / "source", config_of(source), tensors)
    there = read_folder(convert(source, tmp_path / "there", dtype="bfloat16"))
    assert there["ernie.layers.1.mlp.gate.weight"][0] == "F32"


# What it refuses, and what it leaves behind.


def test_all_problems_of_the_source_are_reported_and_nothing_is_written(tmp_path: Path) -> None:
    source = make(tmp_path / "first", MOE)
    tensors = read_folder(source)
    del tensors["ernie.norm.weight"]
    tensors["ernie.layers.0.mlp.down_proj.weight"] = empty_like("F32", 1, 1)
    source = write_folder(tmp_path / "source", config_of(source), tensors)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "there", layout="pt")
    assert "ernie.norm.weight: missing" in str(caught.value) and "shape [1, 1]" in str(caught.value)
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("option", "value"), [("layout", "torch"), ("dtype", "int8"), ("dtype", "float64"), ("dtype", "half")]
)
def test_unknown_choices(option: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=value):
        convert(make(tmp_path / "source"), tmp_path / "there", **{option: value})
    assert not (tmp_path / "there").exists()


def test_the_source_itself_is_no_destination(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    before = files(source)
    with pytest.raises(CheckpointError, match="is the source itself"):
        convert(source, tmp_path / "x" / ".." / "source")
    assert files(source) == before


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_source_without_a_usable_config(content: str | None, tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    (source / "config.json").unlink()
    if content is not None:
        (source / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError):
        convert(source, tmp_path / "there")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_an_interrupted_conversion_leaves_nothing_half_written(
    existing: bool, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = make(tmp_path / "source"), tmp_path / "there"
    if existing:
        make(destination, DENSE)
    before = files(destination) if existing else None
    calls = []

    def fail_later(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) > 20:
            raise error("interrupted")
        correct(*arguments)

    correct = module.copy_part
    monkeypatch.setattr(module, "copy_part", fail_later)
    with pytest.raises((error, CheckpointError)):
        convert(source, destination, layout="pt", max_shard_bytes=30_000)
    assert destination.exists() == existing
    if existing:
        assert files(destination) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_copy_leaves_no_half_file(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = make(tmp_path / "source"), make(tmp_path / "there")
    (source / "tokenizer.model").write_bytes(b"new" * 1000)
    (destination / "tokenizer.model").write_bytes(b"old")
    correct = shutil.copyfile

    def half(origin: Path, target: Path) -> None:
        if origin.name == "tokenizer.model":
            target.write_bytes(b"new")
            raise error("interrupted")
        correct(origin, target)

    monkeypatch.setattr(module.shutil, "copyfile", half)
    with pytest.raises((error, CheckpointError)):
        convert(source, destination, layout="pt")
    assert (destination / "tokenizer.model").read_bytes() == b"old"
    assert not list(destination.glob("*.partial"))
