"""The small model's tokenizer, its packed conversations, and a training run of a few steps."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

from ernie45 import ErnieForCausalLM, ErnieTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tools")]
muon = importlib.import_module("muon")
team = importlib.import_module("team")
tiny_accuracy = importlib.import_module("tiny_accuracy")
tiny_data = importlib.import_module("tiny_data")
tiny_tasks = importlib.import_module("tiny_tasks")
tiny_tokenizer = importlib.import_module("tiny_tokenizer")
train_tiny = importlib.import_module("train_tiny")

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "moe_num_experts": 4,
    "moe_intermediate_size": 8,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tokenizer"
    tiny_tokenizer.build_tokenizer(path, questions=3000)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ErnieTokenizer:
    return ErnieTokenizer.from_pretrained(folder)


# ---- tokenizer


@pytest.mark.parametrize(
    "text", ["23+58=?", "  two  spaces\n\n", "你好，世界🙂", "tab\tﬁ①", "龘", "User: hi\nAssistant: "]
)
def test_text_comes_back_unchanged(tokenizer: ErnieTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_are_laid_out_as_published(tokenizer: ErnieTokenizer, folder: Path) -> None:
    assert tokenizer.decode([0, 1, 2], skip_special_tokens=False) == "<unk><s></s>"
    added = json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
    assert list(added.values()) == list(range(tokenizer.vocab_size, len(tokenizer)))
    assert list(added)[:3] == ["<|IMAGE_PLACEHOLDER|>", "<|AUDIO_PLACEHOLDER|>", "<|LOC_0|>"]
    assert added["<|LOC_BEGIN|>"] - added["<|LOC_0|>"] == 1001


def test_every_digit_is_one_token(tokenizer: ErnieTokenizer) -> None:
    assert len(tokenizer.encode("1234567890")) == 10


def test_the_chat_template_is_the_published_one(tokenizer: ErnieTokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == ("<|begin_of_sentence|>Be brief.\nUser: Hi\nAssistant: Ho<|end_of_sentence|>User: Bye\nAssistant: ")


# ---- data


def test_training_sees_the_prompt_that_the_chat_template_makes(tokenizer: ErnieTokenizer) -> None:
    for seed in range(20):
        ids, labels = tiny_data.draw_conversation(random.Random(seed), tokenizer.encode, 2)
        learned = [label for label in labels if label != tiny_data.IGNORED_LABEL]
        first = next(place for place, label in enumerate(labels) if label != tiny_data.IGNORED_LABEL) + 1
        text = tokenizer.decode(ids[:first], skip_special_tokens=False)
        before, _, question = text.removeprefix("<|begin_of_sentence|>").rpartition("User: ")
        messages = [{"role": "user", "content": question.removesuffix("\nAssistant: ")}]
        if before:
            messages.insert(0, {"role": "system", "content": before.removesuffix("\n")})
        assert tokenizer.apply_chat_template(messages) == ids[:first]
        assert learned[-1] == 2


def test_labels_are_the_answers_one_step_ahead(tokenizer: ErnieTokenizer) -> None:
    ids, labels = tiny_data.draw_conversation(random.Random(4), tokenizer.encode, 2)
    for place, label in enumerate(labels[:-1]):
        if label not in (tiny_data.IGNORED_LABEL, 2):
            assert label == ids[place + 1]
        if label == 2:
            assert ids[place + 1] == tokenizer.sep_token_id


def test_rows_are_whole_conversations_side_by_side() -> None:
    conversations = iter([([5] * 10, [-100] * 9 + [2]), ([6] * 12, [-100] * 11 + [2])] + [([7] * 99, [2] * 99)] * 4)
    batch = tiny_data.pack(conversations, rows=1, length=32)
    assert batch.input_ids[0].tolist() == [5] * 10 + [6] * 12 + [0] * 10
    assert batch.position_ids[0].tolist() == [*range(10), *range(12), *range(10)]
    assert batch.end_rows[0, 0, :, 0].tolist() == [10] * 10 + [22] * 12 + [32] * 10
    assert np.flatnonzero(batch.labels[0] == 2).tolist() == [9, 21]
    assert batch.tokens == 22


# ---- training


def test_orthogonalized_matrices_have_singular_values_around_one() -> None:
    for shape in ([3, 24, 16], [16, 40]):
        values = paddle.linalg.svd(muon.orthogonalize(paddle.randn(shape)))[1]
        assert float(values.min()) > 0.5 and float(values.max()) < 1.5


def run(output: Path, steps: int, resume: bool = False) -> None:
    if not resume:
        tiny_tokenizer.build_tokenizer(output, questions=3000)
    settings = train_tiny.Settings(output, steps, rows=2, length=64, resume=resume, changes=SMALL)
    with paddle.utils.unique_name.guard():  # the optimizer's state goes by names that Paddle counts up in a process
        train_tiny.train(team.Team(), settings)


def test_a_run_leaves_a_checkpoint_that_answers(tmp_path: Path) -> None:
    run(tmp_path, 3)
    report = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert report["steps"] == 3 and report["tokens"] > 200
    assert np.isfinite([point["loss"] for point in report["curve"]]).all()
    assert set(report["expert_load_at_start"]) == {"1"}
    model, tokenizer = ErnieForCausalLM.from_pretrained(tmp_path), ErnieTokenizer.from_pretrained(tmp_path)
    bias = model.ernie.layers[1].mlp.moe_statics.e_score_correction_bias
    assert float(bias.abs().max()) == pytest.approx(3e-3, abs=2.1e-3)
    accuracy = tiny_accuracy.measure_accuracy(model, tokenizer, 3, ["weekdays"])
    assert accuracy["weekdays"][1] == 3
    assert "| weekdays |" in tiny_accuracy.markdown(accuracy)


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path) -> None:
    # So short a run is all warm-up: its learning rates do not depend on its length.
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run(whole, 4)
    run(parted, 2)
    run(parted, 4, resume=True)
    first, second = (ErnieForCausalLM.from_pretrained(path).state_dict() for path in (whole, parted))
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value.numpy(), second[name].numpy(), err_msg=name)
