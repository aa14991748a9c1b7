"""The small model's tokenizer, its packed lessons, and a training run of a few steps."""

from __future__ import annotations

import dataclasses
import importlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from PIL import Image

from ernie45 import ErnieConfig, ErnieForCausalLM, ErnieForConditionalGeneration, ErnieProcessor, ErnieTokenizer
from ernie45.chat import VISION_TEMPLATE
from ernie45.models.parts import parts

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tools")]
muon = importlib.import_module("muon")
team = importlib.import_module("team")
tiny_accuracy = importlib.import_module("tiny_accuracy")
tiny_data = importlib.import_module("tiny_data")
tiny_naming = importlib.import_module("tiny_naming")
tiny_model = importlib.import_module("tiny_model")
tiny_pictures = importlib.import_module("tiny_pictures")
tiny_skills = importlib.import_module("tiny_skills")
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
    "moe_num_experts": [4, 4],
    "moe_intermediate_size": [8, 4],
    "moe_layer_end_index": [1, 1],
    "freq_allocation": 1,
    "pixel_hidden_size": 8,
    "vision_config": {"depth": 1, "embed_dim": 8, "hidden_size": 8, "num_heads": 1, "mlp_ratio": 1, "patch_size": 14},
}
TEXT = train_tiny.Stage("text", 2, ("text",), (train_tiny.Mix(length=64),))
VISION = train_tiny.Stage("vision", 2, train_tiny.SIGHT, (train_tiny.Mix({"one digit": 1.0}, 96),), names=1)
NAMES = train_tiny.Stage("names", 2, ("vision", "adapter"), names=5)
FORMATS = train_tiny.Stage(
    "formats", 2, train_tiny.PARTS, (train_tiny.Mix({"text": 0.5, "one digit": 0.5}, 96),), formats=True
)


PREFERENCES = dataclasses.replace(
    FORMATS, name="preferences", mixes=(train_tiny.Mix({"one digit": 1.0}, 96),), pairs=True
)


@pytest.fixture(autouse=True)
def handwriting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits that need no scikit-learn: as many bars as the digit says."""
    digits = {}
    for value in range(10):
        pixels = np.zeros([12, 12], np.uint8)
        pixels[1 : 1 + value, 2:10] = 255
        digits[value] = [Image.fromarray(pixels)]
    monkeypatch.setattr(tiny_pictures, "handwriting", lambda split: digits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tokenizer"
    tiny_tokenizer.build_tokenizer(path, questions=3000)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ErnieTokenizer:
    return ErnieTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(tokenizer: ErnieTokenizer) -> ErnieProcessor:
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in tiny_model.VISION_TOKENS.items()}
    config = ErnieConfig.from_dict({**tiny_model.MODEL, **ids, "vocab_size": 2624})
    return ErnieProcessor(tokenizer, config, **tiny_pictures.LIMITS)


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


def test_the_chat_template_is_that_of_vision_language_models(tokenizer: ErnieTokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    before = "<|begin_of_sentence|>Be brief.\nUser: Hi\nAssistant: Ho<|end_of_sentence|>User: Bye\nAssistant: "
    assert text == before + "<think>\n\n</think>\n\n"
    bare = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=train_tiny.BARE_TEMPLATE)
    assert bare == before


def test_a_copied_tokenizer_has_the_other_template(folder: Path, tmp_path: Path) -> None:
    tiny_tokenizer.copy_tokenizer(folder, tmp_path, train_tiny.BARE_TEMPLATE)
    copy, original = ErnieTokenizer.from_pretrained(tmp_path), ErnieTokenizer.from_pretrained(folder)
    assert original.chat_templates == {"default": VISION_TEMPLATE}
    assert copy.chat_templates == {"default": train_tiny.BARE_TEMPLATE}
    assert copy.encode("23+58=?") == original.encode("23+58=?")


# ---- data


def test_training_sees_the_prompt_that_the_chat_template_makes(tokenizer: ErnieTokenizer) -> None:
    for seed in range(20):
        document = tiny_data.draw_conversation(random.Random(seed), tokenizer.encode, 2)
        learned = [label for label in document.labels if label != tiny_data.IGNORED_LABEL]
        first = document.labels.index(learned[0]) + 1
        text = tokenizer.decode(document.ids[:first], skip_special_tokens=False)
        before, _, question = text.removeprefix("<|begin_of_sentence|>").rpartition("User: ")
        messages = [{"role": "user", "content": question.removesuffix("\nAssistant: ")}]
        if before:
            messages.insert(0, {"role": "system", "content": before.removesuffix("\n")})
        prompt = tokenizer.apply_chat_template(messages, chat_template=train_tiny.BARE_TEMPLATE)
        assert prompt == document.ids[:first]
        assert learned[-1] == 2


def test_labels_are_the_answers_one_step_ahead(tokenizer: ErnieTokenizer) -> None:
    document = tiny_data.draw_conversation(random.Random(4), tokenizer.encode, 2)
    for place, label in enumerate(document.labels[:-1]):
        if label not in (tiny_data.IGNORED_LABEL, 2):
            assert label == document.ids[place + 1]
        if label == 2:
            assert document.ids[place + 1] == tokenizer.sep_token_id


@pytest.mark.parametrize("kind", ["text", "sum of two pictures", "clip, when", "three-digit sums, thinking"])
def test_a_lesson_is_the_prompt_of_the_processor_and_the_reply(processor: ErnieProcessor, kind: str) -> None:
    lesson = tiny_skills.draw_lesson(random.Random(3), kind)
    document = tiny_data.encode_lesson(lesson, processor, VISION_TEMPLATE, 2)
    inputs = processor(lesson.messages, enable_thinking=lesson.thinking, chat_template=VISION_TEMPLATE)
    length = inputs["input_ids"].shape[1]
    assert document.ids[:length] == inputs["input_ids"][0].tolist()
    assert processor.decode(document.ids[length:]) == lesson.reply
    assert document.labels[: length - 1] == [tiny_data.IGNORED_LABEL] * (length - 1)
    assert document.labels[length - 1 :] == [*document.ids[length:], 2]
    np.testing.assert_array_equal(document.positions[:length], inputs["position_ids"][0].numpy())
    following = document.positions[length:] - document.positions[:length].max()
    assert following.tolist() == [[place] * 3 for place in range(1, len(document.ids) - length + 1)]
    assert document.types.tolist() == inputs["token_type_ids"][0].tolist() + [0] * (len(document.ids) - length)
    np.testing.assert_array_equal(document.images, inputs["images"].numpy())


def test_rows_are_whole_documents_side_by_side() -> None:
    def document(token: int, count: int) -> object:
        return tiny_data.Sample([token] * count, [-100] * (count - 1) + [2])

    batch = tiny_data.pack(iter([document(5, 10), document(6, 12)] + [document(7, 99)] * 4), rows=1, length=32)
    assert batch.input_ids[0].tolist() == [5] * 10 + [6] * 12 + [0] * 10
    assert batch.position_ids[0].tolist() == [[place] * 3 for place in (*range(10), *range(12), *range(10))]
    assert batch.end_rows[0, 0, :, 0].tolist() == [10] * 10 + [22] * 12 + [32] * 10
    assert np.flatnonzero(batch.labels[0] == 2).tolist() == [9, 21]
    assert batch.types[0].tolist() == [0] * 22 + [tiny_data.PADDING] * 10
    assert batch.tokens == 22 and batch.images is None


def test_packed_pictures_follow_their_tokens(processor: ErnieProcessor) -> None:
    """Documents are packed first-fit, which is not the order in which their rows are read."""
    lessons = [tiny_skills.draw_lesson(random.Random(seed), "one digit") for seed in range(4)]
    documents = [tiny_data.encode_lesson(lesson, processor, VISION_TEMPLATE, 2) for lesson in lessons]
    long = tiny_data.Sample([9] * 140, [2] * 140)
    order = iter([documents[0], long, documents[1], documents[2], documents[3], *[long] * 4])
    batch = tiny_data.pack(order, rows=3, length=160)
    marks = {tuple(document.images[0].tolist()): number for number, document in enumerate(documents)}
    firsts = np.cumsum([0, *batch.grid.prod(axis=1)])[:-1]
    shown = [marks[tuple(batch.images[first].tolist())] for first in firsts]
    placed = [
        number
        for row in batch.input_ids
        for number in sorted(
            (n for n in range(4) if _find(row, documents[n].ids) >= 0), key=lambda n: _find(row, documents[n].ids)
        )
    ]
    assert shown == placed and len(shown) >= 3
    assert batch.grid.shape == (len(shown), 3)


def _find(row: np.ndarray, ids: list[int]) -> int:
    return next((place for place in range(len(row)) if row[place : place + len(ids)].tolist() == ids), -1)


def test_each_name_stands_in_tokens_of_its_own(processor: ErnieProcessor) -> None:
    """Frames: the time in the first row, the digit below. Two digits: the left half and the right one."""
    batch = tiny_naming.draw_named(random.Random(0), 60, processor, 1.0)
    frames, rows, columns = batch.grid.T
    assert set(frames.tolist()) == {1, 2} and len(batch.images) == (frames * rows * columns).sum()
    merge_size, first, name, numbers = processor.vision.merge_size, 0, 0, 0
    for shown, height, width in zip(frames, rows // merge_size, columns // merge_size, strict=True):
        places = first + np.arange(height * width).reshape(height, width)
        left, right = places[:, : width // 2], places[:, -(width // 2) :]
        own = [batch.tokens[batch.owners == name + offset].tolist() for offset in range(2)]
        if shown == 2:
            expected = [places[:1], places[1:]]
        elif own[0] == places.flatten().tolist():
            expected = [places]
        else:
            expected, numbers = [left, right], numbers + 1
        assert own[: len(expected)] == [part.flatten().tolist() for part in expected]
        name, first = name + len(expected), first + places.size
    assert numbers >= 3 and len(batch.digits) == name == batch.owners[-1] + 1
    assert batch.digits.min() >= 0 and batch.digits.max() <= 9


# ---- training


def test_orthogonalized_matrices_have_singular_values_around_one() -> None:
    for shape in ([3, 24, 16], [16, 40]):
        values = paddle.linalg.svd(muon.orthogonalize(paddle.randn(shape)))[1]
        assert float(values.min()) > 0.5 and float(values.max()) < 1.5


def test_the_model_has_the_size_that_is_promised(tokenizer: ErnieTokenizer) -> None:
    model = tiny_model.make_model(tokenizer)
    counts = {part: sum(p.size for p in found) for part, found in parts(model).items()}
    assert counts["vision"] + counts["adapter"] + counts["vision_experts"] < 2.1e6
    assert 2 * sum(counts.values()) < 16e6


def run(output: Path, *stages: object, resume: bool = False, text: str | None = None) -> None:
    if not resume:
        tiny_tokenizer.build_tokenizer(output, questions=3000)
    settings = train_tiny.Settings(output, stages, tokens=192, resume=resume, text=text, changes=SMALL)
    with paddle.utils.unique_name.guard():
        train_tiny.train(team.Team(), settings)


def test_a_run_leaves_a_checkpoint_that_answers(tmp_path: Path) -> None:
    run(tmp_path, TEXT, NAMES, VISION, FORMATS, PREFERENCES)
    report = train_tiny.Report.from_json((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert [stage.name for stage in report.stages] == ["text", "names", "vision", "formats", "preferences"]
    assert [stage.steps for stage in report.stages] == [2, 2, 2, 2, 2]
    assert [stage.patches > 0 for stage in report.stages] == [False, True, True, True, True]
    assert all(stage.tokens > 50 for stage in report.stages if stage.name != "names")
    kinds = [set(stage.curve[0]["right_by_kind"]) for stage in report.stages]
    assert [train_tiny.NAMES in found for found in kinds] == [False, True, True, False, False]
    assert kinds[1] == {train_tiny.NAMES} and kinds[2] == {train_tiny.NAMES, "one digit"}
    assert np.isfinite([point["loss"] for stage in report.stages for point in stage.curve]).all()
    assert set(report.stages[-1].expert_load_at_start["vision"]) == {"1"}
    model, processor = ErnieForConditionalGeneration.from_pretrained(tmp_path), ErnieProcessor.from_pretrained(tmp_path)
    bias = model.ernie.layers[1].mlp.moe_statics.e_score_correction_bias.abs().max(axis=1)
    assert (bias > 0).all() and float(bias.max()) < 8.1e-3
    accuracy = tiny_accuracy.measure_accuracy(model, processor, 3, ["weekdays", "sum of two pictures", "tool calls"])
    assert [count for _, count in accuracy.values()] == [3, 3, 3, 3]
    assert list(accuracy)[-1] == "tool calls, well-formed"
    assert "| weekdays |" in tiny_accuracy.markdown(accuracy)


def test_what_a_stage_does_not_train_stays_as_it_is(tmp_path: Path) -> None:
    run(tmp_path, TEXT, dataclasses.replace(VISION, rate=0.1, matrix_rate=1.0))
    after_text, after_vision = (
        parts(ErnieForConditionalGeneration.from_pretrained(tmp_path / "stages" / name, dtype="float32"))
        for name in ("text", "vision")
    )
    for part, before in after_text.items():
        changed = {
            old.name: bool((old != new).any())
            for old, new in zip(before, after_vision[part], strict=True)
            if old.ndim > 1 and old.shape != [2, 4]
        }
        assert set(changed.values()) == {part != "text"}, (part, changed)
    old, new = ([p for p in found["text"] if p.shape == [2, 4]][0] for found in (after_text, after_vision))
    assert bool((old[0] == new[0]).all()) and not bool((old[1] == new[1]).all())  # the correction biases of both banks


def test_a_run_can_begin_with_a_text_model(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run(first, TEXT)
    run(second, TEXT, VISION, text=str(first))
    report = train_tiny.Report.from_json((second / "training.json").read_text(encoding="utf-8"))
    assert [stage.name for stage in report.stages] == ["vision"]
    before, after = (ErnieForCausalLM.from_pretrained(path).state_dict() for path in (first, second))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value.numpy(), after[name].numpy(), err_msg=name)


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path) -> None:
    # So short a stage is all warm-up: its learning rates do not depend on its length.
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run(whole, TEXT, VISION, FORMATS, PREFERENCES)
    run(parted, TEXT, dataclasses.replace(VISION, steps=1))
    run(parted, TEXT, VISION, resume=True)
    run(parted, TEXT, VISION, dataclasses.replace(FORMATS, steps=1), resume=True)
    run(parted, TEXT, VISION, FORMATS, dataclasses.replace(PREFERENCES, steps=1), resume=True)
    run(parted, TEXT, VISION, FORMATS, PREFERENCES, resume=True)
    first, second = (
        ErnieForConditionalGeneration.from_pretrained(path, dtype="float32").state_dict() for path in (whole, parted)
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value.numpy(), second[name].numpy(), err_msg=name)
