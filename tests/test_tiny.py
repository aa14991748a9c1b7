"""The model that comes with the package: small enough to ship, and it answers questions it was never trained on."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ernie45 import ErnieForCausalLM, ErnieTokenizer
from ernie45.checkpoint.hub import resolve_folder
from ernie45.checkpoint.names import detect_layout
from ernie45.checkpoint.safetensors_file import SafetensorsFile

ROOT = Path(__file__).parents[1]
FOLDER = resolve_folder("ernie45-tiny")


@pytest.fixture(scope="module")
def accuracy_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_accuracy", ROOT / "tools" / "tiny_accuracy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> ErnieTokenizer:
    return ErnieTokenizer.from_pretrained("ernie45-tiny")


@pytest.fixture(scope="module")
def model() -> ErnieForCausalLM:
    return ErnieForCausalLM.from_pretrained("ernie45-tiny")


@pytest.fixture
def answer(model: ErnieForCausalLM, tokenizer: ErnieTokenizer) -> Callable[..., str]:
    def ask(question: str, **options: Any) -> str:
        messages = [{"role": "user", "content": question}]
        return "".join(model.stream(messages, tokenizer=tokenizer, max_new_tokens=32, **options))

    return ask


def test_it_is_a_published_paddle_checkpoint_of_at_most_16_megabytes() -> None:
    with SafetensorsFile(FOLDER / "model.safetensors") as file:
        assert detect_layout(file.tensors, "tiny") == "paddle"
        router = {name for name in file.tensors if name.endswith((".gate.weight", ".e_score_correction_bias"))}
        assert {name for name, entry in file.tensors.items() if entry.dtype != "BF16"} == router
        parameters = sum(entry.byte_count // (2 if entry.dtype == "BF16" else 4) for entry in file.tensors.values())
    assert 4e6 <= parameters <= 8e6
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 16e6


def test_it_has_the_architecture_of_the_large_model(model: ErnieForCausalLM) -> None:
    config = model.config
    assert not config.is_moe_layer(0)
    assert config.is_moe_layer(1)
    assert config.moe_num_shared_experts
    assert config.moe_use_aux_free
    bias = model.state_dict()["ernie.layers.1.mlp.moe_statics.e_score_correction_bias"]
    assert float(bias.abs().max()) > 0  # the update in the training loop has moved it


def test_training_evened_the_load_of_the_experts() -> None:
    report = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    start, end = report["expert_load_at_start"], report["expert_load_at_end"]
    assert start.keys() == end.keys()
    assert all(end[layer] < start[layer] for layer in start)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("23+58=?", "3+8=11, 2+5+1=8. 81"),
        ("81-23=?", "1+10-3=8, 8-1-2=5. 58"),
        ("从小到大排列：42、7、19", "7、19、42"),
        ("What is the number of layers of ERNIE-4.5-21B-A3B?", "28"),
        ("45和54哪个大？", "54"),
    ],
)
def test_plain_questions(answer: Callable[..., str], question: str, expected: str) -> None:
    assert answer(question) == expected


def test_half_precision_weights_answer_too(tokenizer: ErnieTokenizer) -> None:
    model = ErnieForCausalLM.from_pretrained("ernie45-tiny", dtype="bfloat16")
    messages = [{"role": "user", "content": "23+58=?"}]
    assert "".join(model.stream(messages, tokenizer=tokenizer)).endswith(" 81")


def test_held_out_questions(model: ErnieForCausalLM, tokenizer: ErnieTokenizer, accuracy_tool: ModuleType) -> None:
    accuracy = accuracy_tool.measure_accuracy(model, tokenizer, 60)
    shares = {task: right / asked for task, (right, asked) in accuracy.items()}
    weak = {task: share for task, share in shares.items() if share < 0.85}  # the README's table asks many more
    assert not weak
