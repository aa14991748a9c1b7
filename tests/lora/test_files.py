"""Adapters in a folder: there and back, upstream's names, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie45 import lora
from ernie45.checkpoint import writer
from ernie45.errors import CheckpointError, ErnieError
from ernie45.models.vision_language import ErnieForConditionalGeneration
from ernie45.ops import custom
from tests.helpers.packed import load, save_source
from tests.helpers.tiny import DENSE, MOE, cast, randomise, read_folder, tiny_config, tiny_model, token_ids
from tests.helpers.vision import vision_config

CONFIG, WEIGHTS = "lora_config.json", "peft_model.safetensors"


def adapted(seed: int = 0, **options: Any) -> Any:
    """A model with adapters that matter."""
    model = tiny_model(seed=seed)
    lora.apply(model, **{"rank": 2, **options})
    generator = np.random.default_rng(5)
    for tensor in lora.parameters(model):
        tensor.set_value(generator.standard_normal(tensor.shape, dtype="float32"))
    return model


@paddle.no_grad()
def logits(model: Any) -> np.ndarray:
    return model(token_ids(2, 7)).numpy()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lora.save(adapted(), tmp_path, progress=False)
    return tmp_path


def write(folder: Path, stored: Any) -> None:
    """Replaces the tensors of a folder."""
    plans = [writer.TensorPlan(name, dtype, array.shape, lambda a=array: a) for name, (dtype, array) in stored.items()]
    writer.write_tensors_atomic(folder / WEIGHTS, plans, metadata={}, progress=False)


def change_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | entries
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 3, "alpha": 1.5, "rslora": True, "dropout": 0.25},
        {"targets": ["o_proj", r"layers\.1\.mlp\.experts\.\d\.down_proj"]},
    ],
    ids=str,
)
def test_adapters_go_onto_a_model_that_was_never_trained(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**options)
    lora.save(model, tmp_path / "new" / "folder", progress=False)
    fresh = tiny_model()
    names = lora.load(fresh, tmp_path / "new" / "folder")
    np.testing.assert_array_equal(logits(fresh), logits(model))
    assert lora.adapters.of(fresh).config == lora.adapters.of(model).config
    assert len(names) == len(read_folder(tmp_path / "new" / "folder")) / 2
    trained = {id(parameter) for parameter in fresh.parameters() if not parameter.stop_gradient}
    assert trained == {id(parameter) for parameter in lora.parameters(fresh)}


def test_adapters_of_a_vision_language_model(tmp_path: Path) -> None:
    model, fresh = (randomise(ErnieForConditionalGeneration(vision_config(), initialize=False), 0) for _ in range(2))
    lora.apply(model, rank=2)
    for tensor in lora.parameters(model):
        tensor.set_value(np.random.default_rng(0).standard_normal(tensor.shape, dtype="float32"))
    lora.save(model, tmp_path, progress=False)
    assert "ernie.resampler_model.spatial_linear.2.lora_B" in read_folder(tmp_path)
    lora.load(fresh, tmp_path)
    for one, other in zip(lora.parameters(fresh), lora.parameters(model), strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


@pytest.mark.skipif(custom.library() is None, reason="no native library here")
def test_adapters_go_from_parameters_to_packed_weights_and_back(tmp_path: Path) -> None:
    packed = load(save_source(tmp_path / "base", MOE), "wint4")
    lora.save(adapted(), tmp_path / "one", progress=False)
    lora.load(packed, tmp_path / "one")
    lora.save(packed, tmp_path / "two", progress=False)
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


def test_files_have_the_names_and_shapes_of_upstream(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    config = json.loads((folder / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["rslora"], config["scaling"]) == (2, 4, False, 2.0)
    assert ".*up_gate_proj" in config["target_modules"]
    shapes = {name: list(array.shape) for name, (dtype, array) in read_folder(folder).items() if dtype == "F32"}
    hidden, width = MOE["hidden_size"], MOE["moe_intermediate_size"]
    assert shapes["ernie.layers.0.self_attn.qkv_proj.lora_A"] == [hidden, 2]
    assert shapes["ernie.layers.2.mlp.experts.5.up_gate_proj.lora_B"] == [2, 2 * width]
    assert shapes["ernie.layers.2.mlp.experts.5.down_proj.lora_A"] == [width, 2]
    assert len(shapes) == 2 * (3 * 2 + 2 + 2 * 14)


def test_shards_and_bfloat16_of_upstream_are_read(folder: Path) -> None:
    stored = {name: cast(tensor, "BF16") for name, tensor in read_folder(folder).items()}
    half = len(stored) // 2
    for number, part in enumerate((list(stored)[:half], list(stored)[half:]), 1):
        write(folder, {name: stored[name] for name in part})
        shutil.move(folder / WEIGHTS, folder / f"peft_model-0000{number}-of-00002.safetensors")
    change_config(
        folder,
        target_modules=[".*qkv_proj.*", ".*o_proj.*", ".*up_gate_proj.*", ".*down_proj.*", ".*spatial_linear.0.*"],
    )
    fresh = tiny_model()
    lora.load(fresh, folder)
    for found, expected in zip(lora.parameters(fresh), lora.parameters(adapted()), strict=True):
        np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=2**-8)


def test_saving_again_replaces_and_an_interruption_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora.save(adapted(rank=3), folder, progress=False)
    assert json.loads((folder / CONFIG).read_text())["r"] == 3

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_flush_to_disk", fail)
    with pytest.raises(KeyboardInterrupt):
        lora.save(adapted(rank=4), folder, progress=False)
    assert [path.name for path in folder.iterdir()] == [WEIGHTS]
    with pytest.raises(CheckpointError, match=r"lora_config.json: no such file"):
        lora.load(tiny_model(), folder)


def refuse(folder: Path, message: str, model: Any = None) -> None:
    """Whether loading is refused like this, and the model is as it was."""
    model = model or tiny_model()
    names, before = list(model.state_dict()), logits(model)
    with pytest.raises(CheckpointError, match=message):
        lora.load(model, folder)
    assert list(model.state_dict()) == names and not model.ernie.embed_tokens.weight.stop_gradient
    np.testing.assert_array_equal(logits(model), before)


def test_tensors_that_are_missing_left_over_or_of_another_shape_are_listed(folder: Path) -> None:
    stored = read_folder(folder)
    first, second, third, *_ = stored
    dtype, array = stored.pop(first)
    stored["ernie.layers.9.mlp.down_proj.lora_A"] = (dtype, array)
    stored[second] = (dtype, stored[second][1][:, :-1].copy())
    stored[third] = ("I32", stored[third][1].astype("int32"))
    write(folder, stored)
    refuse(
        folder,
        rf"4 problem\(s\)(?=.*{first}: missing)(?=.*layers.9.*: no place)(?=.*{second}: shape)(?=.*{third}: dtype I32)",
    )


@pytest.mark.parametrize("changes", [{"hidden_size": 32}, {"num_hidden_layers": 4}, {"moe_num_experts": 4}], ids=str)
def test_another_base_is_refused(changes: dict[str, int], folder: Path) -> None:
    refuse(folder, "Were these adapters trained on another model", tiny_model(tiny_config(MOE, **changes)))
    refuse(folder, "no place for it in this model", tiny_model(tiny_config(DENSE)))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"r": 3}, r"shape \[24, 2\], expected \[24, 3\]"),
        ({"r": "8"}, "lora_config.json: lora: rank is '8'"),
        ({"lora_alpha": None}, "lora_config.json: lora: alpha is None"),
        ({"target_modules": None}, "no module of the model matches"),
        ({"target_modules": 5}, "lora_config.json: .*int"),
        ({"target_modules": ["("]}, "is no regular expression"),
        ({"use_mora": True, "pissa": True}, "sets use_mora, pissa; only plain LoRA and rsLoRA"),
    ],
    ids=str,
)
def test_bad_configs_are_refused(entries: dict[str, Any], message: str, folder: Path) -> None:
    change_config(folder, **entries)
    refuse(folder, message)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"r": 8}'], ids=str)
def test_broken_configs_are_refused(content: bytes, folder: Path) -> None:
    (folder / CONFIG).write_bytes(content)
    refuse(folder, r"lora_config.json: (cannot be read|expected an object)")


def test_a_pickle_is_never_opened(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "lora_model_state.pdparams")
    refuse(folder, "lora_model_state.pdparams, a pickle, which can run any code")
    (folder / "lora_model_state.pdparams").unlink()
    refuse(folder, "has no peft_model.safetensors")


def test_a_truncated_file_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4])
    refuse(folder, "peft_model.safetensors")


def test_models_with_and_without_adapters(folder: Path) -> None:
    with pytest.raises(ErnieError, match="has adapters already"):
        lora.load(adapted(), folder)
    with pytest.raises(ErnieError, match="has no adapters"):
        lora.save(tiny_model(), folder)
