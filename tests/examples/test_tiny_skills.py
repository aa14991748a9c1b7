"""Pictures, clips, thinking and tools for the small model: right answers, a clean split, the forms of replies."""

from __future__ import annotations

import importlib
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ernie45.chat import VISION_TEMPLATE, parse_response, render_chat

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples")]
tiny_pictures = importlib.import_module("tiny_pictures")
tiny_preferences = importlib.import_module("tiny_preferences")
tiny_skills = importlib.import_module("tiny_skills")
tiny_tasks = importlib.import_module("tiny_tasks")

SEEN = ("one digit", "several digits", "two-digit number", "sum of two pictures", "larger of two pictures")
CLIPS = ("clip, what came after", "clip, when")
seeds = st.integers(0, 2**32)


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The digits that were drawn since the last lesson began, in order, with blank handwriting."""
    digits: list[int] = []

    class Recording(dict[int, list[Image.Image]]):
        def __missing__(self, digit: int) -> list[Image.Image]:
            digits.append(digit)
            return [Image.new("L", (12, 12), 200)]

    monkeypatch.setattr(tiny_pictures, "handwriting", lambda split: Recording())
    return digits


def draw(kind: str, seed: int, drawn: list[int], split: str = "train") -> tuple[Any, list[int]]:
    """A lesson and the digits in its pictures; those of drafts for the other split come first and are dropped."""
    drawn.clear()
    lesson = tiny_skills.draw_lesson(random.Random(seed), kind, split)
    parts = lesson.messages[-1]["content"]
    shown = sum(1 for part in parts if part["type"] == "image_url") if isinstance(parts, list) else 0
    count = {"two-digit number": 2}.get(kind, shown)
    return lesson, drawn[-count:] if count else []


def words_of(lesson: Any) -> str:
    content = lesson.messages[-1]["content"]
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


# ---- pictures


def test_a_tenth_of_the_handwriting_is_held_out() -> None:
    heldout = [number for number in range(1797) if tiny_pictures.is_heldout(number)]
    assert 140 < len(heldout) < 220


def test_both_splits_together_are_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.undo()
    train, heldout = tiny_pictures.handwriting("train"), tiny_pictures.handwriting("heldout")
    assert sum(map(len, train.values())) + sum(map(len, heldout.values())) == 1797
    assert min(map(len, heldout.values())) >= 10
    assert not {p.tobytes() for ps in train.values() for p in ps} & {p.tobytes() for ps in heldout.values() for p in ps}


@settings(max_examples=50)
@given(seed=seeds)
def test_paper_and_ink_can_be_told_apart(seed: int) -> None:
    paper, ink = tiny_pictures.draw_colours(random.Random(seed))
    assert abs(paper.mean() - ink.mean()) > 60
    assert min(paper.min(), ink.min()) >= 0 and max(paper.max(), ink.max()) <= 255


def test_a_bent_digit_is_another_and_stays_near() -> None:
    """As much ink in another form, no further off than `BEND`."""
    ink = Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), 2))
    rng, fine = random.Random(0), tiny_pictures.FINE
    first, second = (np.asarray(tiny_pictures.bend(rng, ink), "float32") / 255 for _ in range(2))
    assert first.shape == (12 * fine, 12 * fine) and np.abs(first - second).max() > 0.1
    for bent in (first, second):
        for axis in (0, 1):
            inked = np.flatnonzero(bent.max(axis) > 0.5) / fine
            assert abs(inked[0] - 2) <= 1 and abs(inked[-1] - 10) <= 1


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_only_what_is_learned_from_is_bent(split: str, drawn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    bent = []
    monkeypatch.setattr(tiny_pictures, "bend", lambda rng, ink: bent.append(1) or ink)
    tiny_pictures.draw_picture(random.Random(0), [4, 2], split)
    tiny_pictures.draw_clip(random.Random(0), [7], 2, split)
    assert drawn == [4, 2, 7] and len(bent) == (3 if split == "train" else 0)


def test_strokes_stand_where_they_should() -> None:
    ink = Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), 2))
    strokes = tiny_pictures.draw_strokes(random.Random(1), ink, (80, 120), (90, 30), 40)
    rows, columns = np.nonzero(strokes > 0.5)
    assert strokes.shape == (80, 120) and strokes.max() == 1 and strokes.min() == 0
    assert abs(columns.mean() - 90) < 3 and abs(rows.mean() - 30) < 3
    assert 30 < np.ptp(rows) < 60


def test_a_clip_shows_each_digit_for_its_frames(drawn: list[int]) -> None:
    frames = tiny_pictures.draw_clip(random.Random(2), [3, 1, 4], 2)
    assert drawn == [3, 1, 4] and len(frames) == 6
    assert len({frame.shape for frame in frames}) == 1 and frames[0].shape[0] >= 110
    for first in range(0, 6, 2):
        np.testing.assert_array_equal(frames[first], frames[first + 1])


# ---- lessons


@pytest.mark.parametrize("seed", range(15))
def test_what_is_said_of_pictures_is_true(seed: int, drawn: list[int]) -> None:
    lesson, (digit,) = draw("one digit", seed, drawn)
    assert lesson.answer == lesson.reply == str(digit)

    lesson, digits = draw("several digits", seed, drawn)
    assert re.findall(r"\d", lesson.reply) == list(map(str, digits)) and len(digits) >= 2

    lesson, digits = draw("two-digit number", seed, drawn)
    assert lesson.answer == "".join(map(str, digits)) and digits[0] > 0

    lesson, (first, second) = draw("sum of two pictures", seed, drawn)
    assert lesson.reply == f"{first}+{second}={first + second}. {first + second}"

    lesson, pair = draw("larger of two pictures", seed, drawn)
    where = re.search("icture |哪张|第几张", words_of(lesson)) is not None
    assert int(lesson.answer) == (pair.index(max(pair)) + 1 if where else max(pair))
    assert re.findall(r"\d", lesson.reply)[:2] == list(map(str, pair))


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("seed", range(8))
def test_what_is_said_of_clips_is_true(seed: int, split: str, drawn: list[int]) -> None:
    for kind in CLIPS:
        lesson, _ = draw(kind, seed, drawn, split)
        (film,) = (part for part in lesson.messages[0]["content"] if part["type"] == "video_url")
        frames, fps = film["video_url"]["url"], film["video_url"]["fps"]
        changes = [0] + [n for n in range(1, len(frames)) if frames[n] is not frames[n - 1]]
        digits = drawn[-len(changes) :]
        assert len(frames) % 2 == 0 and all(change % 2 == 0 for change in changes)  # pairs show one digit
        assert tiny_tasks.is_heldout(("clip", *digits)) == (split == "heldout")
        asked = int(re.search(r"\d", words_of(lesson))[0])
        if kind == CLIPS[0]:
            assert lesson.answer == str(digits[digits.index(asked) + 1])
            read = list(map(str, digits[: digits.index(asked) + 2]))
            assert lesson.reply.split(". ")[0] in (", ".join(read), "、".join(read))
        else:
            seconds = [change / fps for change in changes]
            assert lesson.answer in (f"{seconds[digits.index(asked)]:g} s", f"{seconds[digits.index(asked)]:g}秒")
            said = re.findall(r"(\d+)(?: s|秒) (\d)", lesson.reply)
            read = list(zip(seconds, digits, strict=True))[: digits.index(asked) + 1]
            assert [(int(second), int(digit)) for second, digit in said] == read


@pytest.mark.parametrize("kind", tiny_skills.LESSONS)
def test_the_right_reply_counts_and_no_other(kind: str) -> None:
    for seed in range(10):
        rng = random.Random(seed)
        lesson = tiny_skills.draw_lesson(rng, kind, "heldout")
        assert tiny_skills.is_right(lesson, lesson.reply)
        assert not tiny_skills.is_right(lesson, lesson.reply + "7")
        assert not tiny_skills.is_right(lesson, "")


def test_a_wrong_call_may_be_well_formed() -> None:
    for seed in range(20):
        lesson = tiny_skills.draw_lesson(random.Random(seed), "tool calls")
        wrong = lesson.reply.replace('"expression": "', '"expression": "1')
        assert not tiny_skills.is_right(lesson, wrong)
        assert all(tiny_skills.is_well_formed_call(lesson, reply) for reply in (lesson.reply, wrong))
        call = lesson.reply[lesson.reply.index("<tool_call>") :]
        for broken in ("7", lesson.reply + "7", lesson.reply[:-14], lesson.reply + call, call.replace("expr", "Expr")):
            assert not tiny_skills.is_well_formed_call(lesson, broken), broken


@pytest.mark.parametrize("kind", tiny_skills.LESSONS)
def test_the_same_seed_gives_the_same_lesson(kind: str) -> None:
    first, second = (tiny_skills.draw_lesson(random.Random(5), kind) for _ in range(2))
    assert first.reply == second.reply and words_of(first) == words_of(second)
    assert first.tools == second.tools and first.thinking == second.thinking


def test_a_three_digit_sum_is_worked_in_thoughts_or_answered_at_once() -> None:
    thought = tiny_skills.draw_lesson(random.Random(3), "three-digit sums, thinking")
    response = parse_response(thought.reply, prompt_opened_thinking=True)
    assert response.content == thought.answer and thought.thinking
    columns = [line.split("=") for line in response.reasoning.split("\n")]
    assert all(eval(terms) == int(result) for terms, result in columns) and len(columns) == 3

    at_once = tiny_skills.draw_lesson(random.Random(3), "three-digit sums, at once")
    assert at_once.reply == at_once.answer == thought.answer and not at_once.thinking
    for kind in ("text", "questions beside a tool"):
        for seed in range(100):
            lesson = tiny_skills.draw_lesson(random.Random(seed), kind)
            assert not re.fullmatch(r".*\d{3}\s*\+\s*\d{3}.*", words_of(lesson))


@settings(max_examples=30)
@given(seed=seeds, split=st.sampled_from(["train", "heldout"]))
def test_products_are_calls_of_the_calculator(seed: int, split: str) -> None:
    lesson = tiny_skills.draw_lesson(random.Random(seed), "tool calls", split)
    response = parse_response(lesson.reply, prompt_opened_thinking=lesson.thinking)
    (call,) = response.tool_calls
    first, second = re.findall(r"\d+", words_of(lesson))
    assert call.name == lesson.tools[0]["function"]["name"] == "calculator"
    assert call.arguments == {"expression": f"{first}*{second}"} and response.content == ""
    assert (response.reasoning is not None) == lesson.thinking
    numbers = sorted((int(first), int(second)))
    assert tiny_tasks.is_heldout(("*", *numbers)) == (split == "heldout")
    assert lesson.tools[0]["function"]["parameters"]["properties"].keys() == {"expression"}


def test_what_a_tool_gave_is_the_answer() -> None:
    for seed in range(20):
        lesson = tiny_skills.draw_lesson(random.Random(seed), "answers from tool output")
        asked, call, output = lesson.messages
        product = eval(call["tool_calls"][0]["function"]["arguments"]["expression"])
        value = json.loads(output["content"])
        assert lesson.answer == str(product) == str(value if isinstance(value, int) else value["result"])
        prompt = render_chat(
            VISION_TEMPLATE, lesson.messages, tools=lesson.tools, add_generation_prompt=True, cls_token="", sep_token=""
        )
        assert f"<tool_output>\n{output['content']}\n</tool_output>" in prompt
        assert str(asked["content"]) in prompt


def test_a_reply_that_has_been_generated_reads_the_same_in_the_history() -> None:
    """What the template makes of a call is what the model was taught to generate after its prompt."""
    lesson = next(
        lesson
        for lesson in (tiny_skills.draw_lesson(random.Random(seed), "tool calls") for seed in range(9))
        if not lesson.thinking
    )
    call = {"type": "function", "function": {"name": "calculator", "arguments": lesson.call}}
    messages = [*lesson.messages, {"role": "assistant", "content": "", "tool_calls": [call]}]
    prompt = render_chat(VISION_TEMPLATE, messages, tools=lesson.tools, cls_token="", sep_token="")
    assert prompt.endswith(lesson.reply)


# ---- preferences


@settings(max_examples=100)
@given(seed=seeds, kind=st.sampled_from(["text", "three-digit sums, at once", "tool calls", "any question, thinking"]))
def test_a_spoiled_reply_is_another_one(seed: int, kind: str) -> None:
    lesson = tiny_skills.draw_lesson(random.Random(seed), kind)
    wrong = tiny_preferences.spoil(random.Random(seed), lesson.reply)
    assert wrong != lesson.reply
    if any(character.isdigit() for character in lesson.reply):
        assert sum(a != b for a, b in zip(wrong, lesson.reply, strict=True)) == 1


@pytest.mark.parametrize(
    ("reply", "wrong"), [("cat dog", "dog cat"), ("一、二", "二、一"), ("ab", "ba"), ("aaa", "aa")]
)
def test_without_digits_neighbours_are_swapped(reply: str, wrong: str) -> None:
    assert tiny_preferences.spoil(random.Random(0), reply) == wrong
