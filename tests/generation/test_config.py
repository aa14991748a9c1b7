"""GenerationConfig: what a checkpoint says, what a call overrides, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ernie45.errors import ConfigError
from ernie45.generation.config import GenerationConfig
from tests.helpers.tiny import tiny_config


def write(folder: Path, content: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_without_a_file_the_ids_of_the_model_count(tmp_path: Path) -> None:
    config = tiny_config(eos_token_id=[2, 7], pad_token_id=3)
    assert GenerationConfig.from_pretrained(tmp_path, config) == GenerationConfig(eos_token_id=(2, 7), pad_token_id=3)


def test_a_file_sets_the_defaults_but_not_sampling_itself(tmp_path: Path) -> None:
    raw = {"do_sample": True, "top_p": 0.8, "temperature": None, "eos_token_id": [[5], [6]], "frequency": {"of": 1}}
    read = GenerationConfig.from_pretrained(write(tmp_path, raw), tiny_config())
    assert read.top_p == 0.8 and read.temperature == 1 and read.eos_token_id == (5, 6)
    assert not read.do_sample and read.override(do_sample=True).do_sample
    again = GenerationConfig.from_pretrained(write(tmp_path, read.to_dict()), tiny_config())
    assert again == read and again.to_dict()["frequency"] == {"of": 1} and again.to_dict()["do_sample"] is True


@pytest.mark.parametrize("content", [[], {"top_p": 7}, {"top_p": "high"}, {"eos_token_id": "</s>"}, {"top_k": True}])
def test_a_wrong_file_is_named(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ConfigError, match="generation_config.json"):
        GenerationConfig.from_pretrained(write(tmp_path, content), tiny_config())


def test_override_ignores_none_and_takes_one_eos_or_several() -> None:
    config = GenerationConfig(top_k=7)
    assert config.override(top_k=None, seed=None) == config
    assert config.override(eos_token_id=9).eos_token_id == (9,)
    assert config.override(eos_token_id=[9, 8]).eos_token_id == (9, 8)
    assert config.override(eos_token_id=[]).eos_token_id == ()


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 2, "min_new_tokens": 3},
        {"min_new_tokens": -1},
        {"temperature": 0},
        {"temperature": float("nan")},
        {"temperature": True},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 1},
        {"repetition_penalty": 0},
        {"presence_penalty": float("nan")},
        {"num_beams": 0},
        {"num_beams": 2, "do_sample": True},
        {"num_return_sequences": 3, "num_beams": 2},
        {"eos_token_id": -1},
        {"pad_token_id": -1},
        {"seed": 0.5},
        {"top_q": 1},
    ],
    ids=str,
)
def test_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"generation: .*({next(iter(options))}|beam search)"):
        GenerationConfig().override(**options)
