"""The tool that writes random checkpoints: complete, repeatable, and with weights that a model can run on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie45 import ErnieForConditionalGeneration, ErnieProcessor
from ernie45.assistant import user_message
from ernie45.checkpoint.folder import CheckpointFolder
from ernie45.checkpoint.names import checkpoint_tensors
from ernie45.checkpoint.reader import QuantisedSource, find_sources, quantised_sources, read_quantised
from ernie45.config import ErnieConfig
from ernie45.errors import ErnieError
from ernie45.quantization.weights import dequantize
from tests.helpers.tiny import DENSE, MOE, as_float32, read_folder
from tests.helpers.vision import VISION

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tools")]

import make_random_checkpoint  # noqa: E402

LARGE = {**DENSE, "hidden_size": 256, "intermediate_size": 640, "vocab_size": 3001, "head_dim": 32}
MTP = {**MOE, "num_nextn_predict_layers": 1}


def write(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str, keys: dict[str, Any] = LARGE, status: int = 0
) -> Path:
    config = folder.parent / "architecture.json"
    config.write_text(json.dumps(keys), encoding="utf-8")
    arguments = ["make_random_checkpoint", "--config", str(config), "--output", str(folder), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    assert make_random_checkpoint.main() == status
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("keys", [LARGE, MTP, VISION], ids=["dense", "moe", "vision-language"])
@pytest.mark.parametrize("layout", ["paddle", "pt"])
def test_every_tensor_of_the_architecture(
    keys: dict[str, Any], layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "new", monkeypatch, "--layout", layout, "--shard-bytes", "100000", keys=keys)
    with CheckpointFolder(folder) as opened:
        sources, problems = find_sources(opened, checkpoint_tensors(ErnieConfig.from_pretrained(folder)))
        assert not problems and opened.tensors.keys() == {name for source in sources for name in source.names}


@pytest.mark.parametrize("keys", [LARGE, MTP, VISION], ids=["dense", "moe", "vision-language"])
@pytest.mark.parametrize("embedding", ["wint8", "wint4", "bfloat16"])
@pytest.mark.parametrize("kind", ["wint8", "wint4"])
def test_every_tensor_of_the_quantised_architecture(
    keys: dict[str, Any], kind: str, embedding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "new", monkeypatch, "--quantization", kind, "--embedding", embedding, keys=keys)
    config = ErnieConfig.from_pretrained(folder)
    assert config.quantization_config is not None
    with CheckpointFolder(folder) as opened:
        sources, problems = quantised_sources(opened, checkpoint_tensors(config), config.quantization_config)
        assert not problems and opened.tensors.keys() == {name for source in sources for name in source.names}


@pytest.mark.parametrize("options", [[], ["--quantization", "wint8"], ["--quantization", "wint4"]])
def test_weights_have_the_deviation_of_the_initialisation(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "new", monkeypatch, *options)
    expected = (0.3333 / 256) ** 0.5
    config = ErnieConfig.from_pretrained(folder)
    specs = checkpoint_tensors(config)
    with CheckpointFolder(folder) as opened:
        if config.quantization_config is None:
            weights = [as_float32(stored) for stored in read_folder(folder).values() if stored[1].ndim == 2]
        else:
            sources, _ = quantised_sources(opened, specs, config.quantization_config)
            weights = [dequantize(read_quantised(opened, s)) for s in sources if isinstance(s, QuantisedSource)]
    assert len(weights) == 9
    for weight in weights:
        assert weight.std() == pytest.approx(expected, rel=0.05)
        assert abs(weight.mean()) < 0.02 * expected
        assert np.abs(weight).max() < 6 * expected
        assert not (weight[0] == weight[1]).all()


@pytest.mark.parametrize("options", [[], ["--layout", "pt"], ["--quantization", "wint4"]])
def test_norms_are_1_and_biases_0(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The correction bias too; routers, of which there are two in a layer, are drawn like matrices."""
    tensors = read_folder(write(tmp_path / "new", monkeypatch, *options, keys=VISION))
    constant = {name for name, (_, array) in tensors.items() if len(np.unique(array)) == 1}
    biases = {name for name in tensors if name.endswith("bias")}
    norms = {name for name in tensors if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", ".ln.weight"))}
    norms |= {name for name in tensors if name.endswith("_linear.3.weight")}
    assert len(biases) == 2 + 6 * 2 + 1 + 7 and len(norms) == 7 + 2 * 2 + 1 + 3 and constant == biases | norms
    assert all((as_float32(tensors[name]) == 0).all() for name in biases)
    assert all((as_float32(tensors[name]) == 1).all() for name in norms)


@pytest.mark.parametrize("options", [[], ["--quantization", "wint4"]])
def test_the_seed_decides(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = (
        contents(write(tmp_path / name, monkeypatch, *options, "--seed", seed))
        for name, seed in (("first", "1"), ("again", "1"), ("other", "2"))
    )
    assert first == again != other


def test_quantised_weights_have_no_names_in_the_other_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "new", monkeypatch, "--layout", "pt", "--quantization", "wint8", status=1)
    assert "quantised checkpoints have -Paddle names" in capsys.readouterr().err and not folder.exists()


def test_with_a_tokenizer_a_vision_checkpoint_answers_about_pictures(tmp_path: Path) -> None:
    config = ErnieConfig.from_dict({**VISION, "vocab_size": 2561, "im_patch_id": 7})
    config = make_random_checkpoint.copy_tokenizer("ernie45-tiny", config, tmp_path)
    assert config.vision is not None and config.vision.placeholder_id == 1536
    make_random_checkpoint.write_random_checkpoint(config, tmp_path, "paddle", "float32", 0, 10**9, progress=False)
    processor = ErnieProcessor.from_pretrained(tmp_path)
    model = ErnieForConditionalGeneration.from_pretrained(tmp_path, progress=False)
    inputs = processor([user_message("What?", [np.zeros([30, 60, 3], "uint8")])])
    assert model.generate(**inputs, max_new_tokens=2, eos_token_id=[]).ids.shape == [1, 2]
    with pytest.raises(ErnieError, match="has 2561 tokens, but vocab_size is 512"):
        make_random_checkpoint.copy_tokenizer("ernie45-tiny", config.replace(vocab_size=512), tmp_path / "none")
