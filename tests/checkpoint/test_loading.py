"""Every way from a checkpoint into memory gives the same weights: either layout, quantised before or while reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie45.checkpoint import loading
from ernie45.checkpoint.dtypes import convert
from ernie45.checkpoint.reader import to_numpy
from ernie45.errors import CheckpointError, ConfigError
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.ops import custom
from ernie45.ops.packed import PackedWeight
from ernie45.quantization.convert import quantize_checkpoint
from tests.helpers.packed import KINDS, VARIANTS, load, meanings, plain_model, save_source
from tests.helpers.tiny import (
    DENSE,
    MOE,
    Stored,
    as_float32,
    cast,
    difference,
    read_folder,
    same_bits,
    token_ids,
    write_folder,
)

QUANTISED = ("wint8", "wint4")
MTP = {**MOE, "num_nextn_predict_layers": 1}

native = pytest.mark.skipif(custom.library() is None, reason="no native library here")
kinds = pytest.mark.parametrize("kind", KINDS)
quantised_kinds = pytest.mark.parametrize("kind", QUANTISED)
variants = pytest.mark.parametrize("keys", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the native library cannot be built."""
    monkeypatch.setattr(custom, "_loaded", custom.Loaded(None, None, (), "no compiler"))


def stored_form(model: ErnieForCausalLM) -> Stored:
    """The state dict as a file would hold it."""
    stored = {name: to_numpy(tensor)[::-1] for name, tensor in model.state_dict().items()}
    return {name: (dtype, np.array(array)) for name, (dtype, array) in stored.items()}


def quantised(source: Path, destination: Path, kind: str, **options: Any) -> Path:
    quantize_checkpoint(source, destination, kind, progress=False, **options)
    return destination


def open_model(folder: Path, **options: Any) -> ErnieForCausalLM:
    return ErnieForCausalLM.from_pretrained(folder, progress=False, **options)


# Packed weights.


@native
@variants
@pytest.mark.parametrize("layout", ["paddle", "pt"])
def test_a_bfloat16_model_comes_out_as_it_went_in(keys: dict[str, Any], layout: str, tmp_path: Path) -> None:
    """In memory and in either layout on disk, bit for bit."""
    paddle_folder = save_source(tmp_path / "source", keys)
    model = open_model(save_source(tmp_path / layout, keys, layout))
    assert any(isinstance(weight, PackedWeight) for weight in model.weights().values())
    source = read_folder(paddle_folder)
    assert same_bits(stored_form(model), source)
    model.save_pretrained(tmp_path / "again", progress=False)
    assert same_bits(read_folder(tmp_path / "again"), source)
    model.save_pretrained(tmp_path / "again", layout="pt", progress=False)
    assert same_bits(read_folder(tmp_path / "again"), read_folder(save_source(tmp_path / "pt", keys, "pt")))


@native
@quantised_kinds
@variants
def test_quantising_while_reading_equals_reading_what_was_quantised(
    keys: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    """Names, shapes, dtypes and bits of a quantised model are those of the quantised file, from either layout."""
    source = save_source(tmp_path / "source", keys)
    there = quantised(source, tmp_path / "there", kind)
    expected = read_folder(there)
    assert any(name.endswith(".quant_weight") for name in expected)
    models = [
        open_model(there),
        open_model(there, quantization=kind),
        open_model(there, dtype="bfloat16"),
        load(source, kind),
        load(save_source(tmp_path / "pt", keys, "pt"), kind),
    ]
    for model in models:
        assert same_bits(stored_form(model), expected)
    ids = token_ids(2, 7)
    with paddle.no_grad():
        logits = models[0](ids)
        for model in models[1:]:
            assert difference(model(ids), logits) == 0


@native
@quantised_kinds
@pytest.mark.parametrize("embedding", ["wint8", "wint4", "bfloat16"])
@pytest.mark.parametrize("keys", [DENSE, MTP], ids=["dense", "mtp"])
def test_every_kind_of_embedding(keys: dict[str, Any], kind: str, embedding: str, tmp_path: Path) -> None:
    folder = quantised(save_source(tmp_path / "source", keys), tmp_path / "there", kind, embedding=embedding)
    model = open_model(folder, mtp=True)
    assert same_bits(stored_form(model), read_folder(folder))
    assert model.ernie.embed_tokens.weight.kind == embedding
    ids = token_ids(2, 5)
    found = model.ernie.embed_tokens(ids).numpy()
    name = "ernie.embed_tokens.weight"
    dense = model.weights()[name].dense().numpy().T
    np.testing.assert_array_equal(found, dense[ids.numpy()])


@native
@quantised_kinds
def test_dense_weights_and_experts_in_different_kinds(kind: str, tmp_path: Path) -> None:
    """As published: experts in 4 bits, all else in 8."""
    source = save_source(tmp_path / "source", MOE)
    parts = {each: read_folder(quantised(source, tmp_path / each, each)) for each in QUANTISED}
    other = "wint4" if kind == "wint8" else "wint8"
    tensors = {name: value for name, value in parts[kind].items() if ".experts." not in name}
    tensors |= {name: value for name, value in parts[other].items() if ".experts." in name}
    config = json.loads((tmp_path / kind / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= {"moe_quant_type": other, "quantization": "mix_quant", "group_size": 64}
    folder = write_folder(tmp_path / "mixed", config, tensors)
    model = open_model(folder)
    assert same_bits(stored_form(model), read_folder(folder))
    bank = model.ernie.layers[1].mlp.experts["0"]
    assert bank.down_proj.kind == other and model.ernie.layers[1].self_attn.o_proj.weight.kind == kind
    ids = token_ids(2, 5)
    with paddle.no_grad():
        assert np.isfinite(model(ids).numpy()).all()
    with pytest.raises(ConfigError, match=f"holds weights in {kind}, not {other}|holds weights in"):
        open_model(folder, quantization=other)


@native
@pytest.mark.parametrize("stored", ["float32", "float16"])
@kinds
def test_weights_of_another_dtype_are_rounded_on_the_way(kind: str, stored: str, tmp_path: Path) -> None:
    folder = save_source(tmp_path, MOE, dtype=stored)
    model = load(folder, kind, dtype="bfloat16")
    source, found = read_folder(folder), stored_form(model)
    for name, weight in model.weights().items():
        if isinstance(weight, PackedWeight) and weight.kind != "bfloat16":
            continue
        expected = source[name] if source[name][0] == "F32" and name.endswith(ROUTING) else cast(source[name], "BF16")
        assert same_bits({name: found[name]}, {name: expected})
    if kind != "bfloat16":
        for name, values in meanings(folder, kind).items():
            weight = model.weights()[name]
            if isinstance(weight, PackedWeight):
                dense = weight.dense().numpy()
                np.testing.assert_array_equal(dense.T if weight.outputs_first else dense, values)


ROUTING = (".gate.weight", ".e_score_correction_bias")


@native
@quantised_kinds
def test_quantising_a_float32_checkpoint_packs_it_too(kind: str, tmp_path: Path) -> None:
    """Without a word about the dtype: quantised weights are for the packed form on a CPU."""
    model = load(save_source(tmp_path, DENSE, dtype="float32"), kind)
    assert isinstance(model.ernie.embed_tokens.weight, PackedWeight)
    assert model.ernie.layers[0].mlp.down_proj.weight.kind == kind


@native
@kinds
@pytest.mark.parametrize("chunk", [1, 100, 1000])
def test_tensors_larger_than_a_chunk(kind: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {**DENSE, "vocab_size": 333, "hidden_size": 160, "intermediate_size": 200}
    folder = save_source(tmp_path, keys)
    expected = stored_form(load(folder, kind))
    monkeypatch.setattr(loading, "CHUNK_BYTES", chunk)
    writes: list[int] = []
    write = PackedWeight.write

    def recording(weight: PackedWeight, rows: np.ndarray, first: int = 0) -> None:
        writes.append(len(rows))
        write(weight, rows, first)

    monkeypatch.setattr(PackedWeight, "write", recording)
    assert same_bits(stored_form(load(folder, kind)), expected)
    assert max(writes) < 333, "in pieces"


@native
def test_a_damaged_weight_is_named(tmp_path: Path) -> None:
    folder = save_source(tmp_path / "source", DENSE)
    tensors = read_folder(folder)
    name = "ernie.layers.1.mlp.down_proj.weight"
    values = as_float32(tensors[name]).copy()
    values[3, 4] = np.nan
    tensors[name] = ("BF16", convert(values, "F32", "BF16"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    broken = write_folder(tmp_path / "broken", config, tensors)
    for kind in QUANTISED:
        with pytest.raises(CheckpointError, match=f"{name}: holds NaN or infinity"):
            load(broken, kind)
    assert np.isnan(load(broken, "bfloat16").state_dict()[name].astype("float32").numpy()[3, 4])


# What is refused.


@pytest.mark.parametrize("library", ["with", "without"])
@pytest.mark.parametrize(("kind", "other"), [QUANTISED, QUANTISED[::-1]])
def test_another_quantization_than_the_files(
    kind: str, other: str, library: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = quantised(save_source(tmp_path / "source", DENSE), tmp_path / "there", kind)
    if library == "without":
        request.getfixturevalue("no_library")
    with pytest.raises(ConfigError, match=f"holds weights in {kind}, not {other}; leave quantization= out"):
        open_model(folder, quantization=other)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@quantised_kinds
def test_quantised_weights_go_with_bfloat16(kind: str, dtype: str, tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", DENSE)
    there = quantised(source, tmp_path / "there", kind)
    message = f"""quantised weights go with dtype="bfloat16" on a CPU, found '{dtype}'"""
    with pytest.raises(ConfigError, match=message):
        open_model(there, dtype=dtype)
    with pytest.raises(ConfigError, match=message):
        open_model(source, dtype=dtype, quantization=kind)


def test_an_unknown_quantization(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'int3' is not supported"):
        open_model(save_source(tmp_path, DENSE), quantization="int3")


# Parameters instead of packed weights.


@kinds
@variants
def test_without_the_native_library(keys: dict[str, Any], kind: str, tmp_path: Path, no_library: None) -> None:
    """Parameters hold, in float32, what the codes stand for."""
    folder = save_source(tmp_path / "source", keys)
    plain = plain_model(folder, kind)
    folders = [(folder, kind)]
    if kind != "bfloat16":
        folders.append((quantised(folder, tmp_path / "there", kind), "bfloat16"))  # quantised already
    ids = token_ids(2, 7)
    for where, how in folders:
        model = load(where, how)
        assert model.dtype == "float32" and model.ernie.fused is None
        assert all(isinstance(weight, paddle.Tensor) for weight in model.weights().values())
        assert same_bits(stored_form(model), stored_form(plain))
        with paddle.no_grad():
            assert difference(model(ids), plain(ids)) == 0
        model.train()


def test_bfloat16_parameters_without_the_native_library(tmp_path: Path, no_library: None) -> None:
    folder = save_source(tmp_path, MOE)
    model = open_model(folder, dtype="bfloat16")
    assert same_bits(stored_form(model), read_folder(folder))
    with paddle.no_grad():
        assert difference(model(token_ids(2, 7)), plain_model(folder, "bfloat16")(token_ids(2, 7))) < 1e-5


@native
@variants
def test_float32_is_for_training(keys: dict[str, Any], tmp_path: Path) -> None:
    folder = save_source(tmp_path, keys)
    model = open_model(folder, dtype="float32")
    assert all(isinstance(weight, paddle.Tensor) for weight in model.weights().values())
    assert model.ernie.fused is None
    model.train()
    loss, _ = model(token_ids(2, 5), labels=token_ids(2, 5))
    loss.backward()
    assert model.ernie.norm.weight.grad is not None
    values = meanings(folder, "bfloat16")
    assert all((tensor.numpy() == values[name]).all() for name, tensor in model.state_dict().items())
