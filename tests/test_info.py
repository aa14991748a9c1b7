"""ernie45 info: sizes by part, memory, and where the architecture comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ernie45 import info
from ernie45.checkpoint.names import checkpoint_tensors
from ernie45.errors import ErnieError
from ernie45.quantization.config import QuantizationConfig

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize(
    ("name", "config_file"),
    [
        ("baidu/ERNIE-4.5-0.3B-Base-PT", "ernie-4.5-0.3b.json"),
        ("baidu/ERNIE-4.5-21B-A3B-Thinking", "ernie-4.5-21b-a3b.json"),
        ("ernie-4.5-300b-a47b", "ernie-4.5-300b-a47b.json"),
        ("baidu/ERNIE-4.5-VL-28B-A3B-Paddle", "ernie-4.5-vl-28b-a3b.json"),
        ("baidu/ERNIE-4.5-VL-424B-A47B-Base-Paddle", "ernie-4.5-vl-424b-a47b.json"),
    ],
)
def test_published_names_need_no_network(name: str, config_file: str) -> None:
    assert info.find_config(name)[1] == f"configs/{config_file}"


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [  # billions; active as in the models' names: A3B, A47B
        ("ernie-4.5-0.3b", 0.361, 0.361),
        ("ernie-4.5-21b-a3b", 21.949, 3.352),
        ("ernie-4.5-300b-a47b", 299.627, 47.079),
        ("ernie-4.5-vl-28b-a3b", 29.399, 3.357),
    ],
)
def test_parameter_counts(name: str, total: float, active: float) -> None:
    config, _ = info.find_config(name)
    specs = checkpoint_tensors(config)
    assert sum(spec.size for spec in specs) / 1e9 == pytest.approx(total, abs=5e-4)
    assert sum(info.active_parameters(config, spec) for spec in specs) / 1e9 == pytest.approx(active, abs=5e-4)


def test_cache_bytes_per_token() -> None:
    config, _ = info.find_config("ernie-4.5-0.3b")
    assert info.cache_bytes_per_token(config, "bfloat16") == 2 * 18 * 2 * 128 * 2


def test_report_says_whether_the_machine_can_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "available_bytes", lambda: 1_000_000_000)
    rows = [line.split() for line in info.describe("ernie-4.5-0.3b").splitlines()]
    verdicts = {row[0]: " ".join(row) for row in rows if row and row[0] in ("float32", "bfloat16")}
    assert "1.44 GB" in verdicts["float32"] and "does not fit in 1 GB" in verdicts["float32"]
    assert "721 MB" in verdicts["bfloat16"] and "does not fit" not in verdicts["bfloat16"]


def test_report_has_the_sizes_of_quantised_weights(tmp_path: Path) -> None:
    rows = [line.split() for line in info.describe("ernie-4.5-21b-a3b").splitlines()]
    sizes = {row[0]: " ".join(row[1:3]) for row in rows if row and row[0] in ("bfloat16", "wint8", "wint4")}
    assert sizes == {"bfloat16": "43.9 GB", "wint8": "22 GB", "wint4": "11.8 GB"}
    config = json.loads((CONFIGS / "ernie-4.5-21b-a3b.json").read_text())
    config["quantization_config"] = QuantizationConfig.uniform("wint4").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = "stored quantised        linear wint4, experts wint4, embedding and head wint8"
    assert stored in info.describe(str(tmp_path))


def test_report_on_a_vision_language_model_has_the_size_of_its_text_part() -> None:
    report = info.describe("baidu/ERNIE-4.5-VL-28B-A3B-PT")
    whole, part = report.split("loaded with ErnieForCausalLM: the text part alone, 15.2 GB less in bfloat16")
    for text, sizes in ((whole, ["58.8 GB", "30.3 GB", "16.9 GB"]), (part, ["43.7 GB", "21.9 GB", "11.7 GB"])):
        rows = [line.split() for line in text.splitlines()]
        found = [" ".join(row[1:3]) for row in rows if row and row[0] in ("bfloat16", "wint8", "wint4")]
        assert found == sizes
    assert "vision tower            32 blocks of width 1280, 16 heads" in report
    assert "a token for 2 x 2 patches of 14 x 14 pixels, or of 2 frames of a video" in report
    assert "ErnieForCausalLM" not in info.describe("ernie-4.5-21b-a3b")


def test_folder_with_weights_settles_what_the_config_leaves_open(reference: Path) -> None:
    report = info.describe(str(reference / "moe" / "paddle"))
    assert "head untied" in report
    assert "correction bias         yes" in report


def test_an_index_without_its_shards_settles_the_config_and_a_broken_one_does_not(tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "ernie-4.5-21b-a3b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"ernie.norm.weight": "model-00001-of-00001.safetensors"}}))
    assert info.find_config(str(tmp_path))[0].num_nextn_predict_layers == 0
    index.write_text('{"weight_map": ')
    assert info.find_config(str(tmp_path))[0].num_nextn_predict_layers == 1


def test_unknown_name_and_broken_config(tmp_path: Path) -> None:
    with pytest.raises(ErnieError, match="ERNIE-4.5-7B"):
        info.describe("ERNIE-4.5-7B")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 10}))
    with pytest.raises(ErnieError, match="hidden_size"):
        info.describe(str(tmp_path))
