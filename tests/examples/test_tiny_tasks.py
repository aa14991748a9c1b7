"""The questions that the small model learns: right answers, a clean split, facts as in the published configs."""

from __future__ import annotations

import importlib
import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
tiny_tasks: ModuleType = importlib.import_module("tiny_tasks")

seeds = st.integers(0, 2**32)
arithmetic = st.sampled_from([name for name in tiny_tasks.TASK_NAMES if "digit" in name])


ITEMS = re.compile(r"[0-9]|\b[a-z]\b|[A-Z][a-z]+day|星期.", re.ASCII)  # what is reversed


def numbers_in(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


@settings(max_examples=100)
@given(seed=seeds, task=arithmetic)
def test_sums_and_differences_are_right(seed: int, task: str) -> None:
    question = tiny_tasks.sample(random.Random(seed), task)
    first, second = numbers_in(question.prompt)
    expected = first + second if "addition" in task else abs(first - second)
    assert question.answer == str(expected)
    digits = 2 if task.startswith("two") else 3
    assert max(first, second) < 10**digits


def test_subtraction_takes_the_second_number_from_the_first() -> None:
    for phrasings in tiny_tasks.SUBTRACTION.values():
        for phrasing in phrasings:
            asked = phrasing.format(a=81, b=23)
            backwards = asked == "Subtract 23 from 81."
            assert numbers_in(asked) == ([23, 81] if backwards else [81, 23])


@pytest.mark.parametrize(("phrasings", "asked"), [("ADDITION", "23+58=?"), ("SUBTRACTION", "81-23=?")])
def test_the_plain_forms_are_asked(phrasings: str, asked: str) -> None:
    first, second = numbers_in(asked)
    for language in ("zh", "en"):
        assert asked in [p.format(a=first, b=second) for p in getattr(tiny_tasks, phrasings)[language]]


@settings(max_examples=100)
@given(seed=seeds, task=st.sampled_from(["three-digit addition", "three-digit subtraction"]))
def test_the_columns_are_right_and_make_up_the_answer(seed: int, task: str) -> None:
    question = tiny_tasks.sample(random.Random(seed), task)
    columns = [column.split("=") for column in question.steps.split(", ")]
    assert all(eval(terms) == int(result) for terms, result in columns)
    assert "".join(result[-1] for _, result in reversed(columns)) == question.answer[-3:].rjust(3, "0")


@settings(max_examples=50)
@given(seed=seeds)
def test_comparing_and_sorting_are_right(seed: int) -> None:
    rng = random.Random(seed)
    question = tiny_tasks.sample(rng, "comparing")
    larger = re.search("larger|bigger|大", question.prompt) is not None
    assert int(question.answer) == (max if larger else min)(numbers_in(question.prompt))

    question = tiny_tasks.sample(rng, "sorting")
    descending = re.search("large to small|descending|Descending|从大|降序", question.prompt) is not None
    assert numbers_in(question.answer) == sorted(numbers_in(question.prompt), reverse=descending)


@settings(max_examples=50)
@given(seed=seeds)
def test_reversing_and_continuing_are_right(seed: int) -> None:
    rng = random.Random(seed)
    question = tiny_tasks.sample(rng, "reversing")
    assert ITEMS.findall(question.answer) == ITEMS.findall(question.prompt)[::-1]

    question = tiny_tasks.sample(rng, "continuing")
    terms = [*numbers_in(question.prompt), int(question.answer)]
    assert len(terms) == 5
    assert len({after - before for before, after in zip(terms, terms[1:], strict=False)}) == 1


@pytest.mark.parametrize(
    ("prompt", "reply"),
    [
        ("Today is Monday. What day is it in 3 days?", "1 Tuesday, 2 Wednesday, 3 Thursday. Thursday"),
        ("What day is 1 days before Monday?", "1 Sunday. Sunday"),
        ("星期六过2天是星期几？", "1 星期日、2 星期一. 星期一"),
        ("今天星期日，1天前是星期几？", "1 星期六. 星期六"),
    ],
)
def test_weekdays_are_right(prompt: str, reply: str) -> None:
    rng = random.Random(0)
    for _ in range(20000):
        draft = tiny_tasks.draw_weekday(rng)
        if draft.prompt == prompt:
            assert f"{draft.steps}. {draft.answer}" == reply
            return
    pytest.fail(f"never asked: {prompt}")


def test_counting_counts_the_target_in_the_list() -> None:
    rng = random.Random(0)
    for _ in range(300):
        draft = tiny_tasks.draw_counting(rng)
        _, target, *items = draft.key
        assert ("、" if draft.language == "zh" else " ").join(items) in draft.prompt
        assert draft.answer == str(sum(item == target for item in items))
        named, counted = re.split("[:：]", draft.steps)
        assert named.endswith(target)
        assert re.sub(r"\d", "", counted).strip() == ("、" if draft.language == "zh" else " ").join(items)
        assert (re.findall(r"\d", counted) or ["0"])[-1] == draft.answer


def operands(task: str, prompt: str) -> object:
    """What a prompt asks about, whatever the phrasing: read from the text, not from the generator's keys."""
    if task == "ERNIE 4.5 facts":
        return prompt.replace("ERNIE 4.5 ", "ERNIE-4.5-")
    if task == "weekdays":
        day = next(i for names in tiny_tasks.WEEKDAYS.values() for i, name in enumerate(names) if name in prompt)
        return day, *numbers_in(prompt), re.search("ago|before|minus|前|倒退", prompt) is None
    if task == "counting":
        return prompt
    if task == "reversing":
        return tuple(ITEMS.findall(prompt))
    if task == "continuing":
        return tuple(numbers_in(prompt))
    return frozenset(numbers_in(prompt))


@pytest.mark.parametrize("task", tiny_tasks.TASK_NAMES)
def test_no_operands_are_in_both_splits(task: str) -> None:
    rng = random.Random(1)
    train, heldout = (
        {operands(task, tiny_tasks.sample(rng, task, split).prompt) for _ in range(300)}
        for split in ("train", "heldout")
    )
    assert train and heldout and not train & heldout


@pytest.mark.parametrize("task", tiny_tasks.TASK_NAMES)
def test_one_key_in_ten_is_held_out(task: str) -> None:
    rng = random.Random(0)
    draw, _ = tiny_tasks.TASKS[task]
    keys = {draw(rng).key for _ in range(5000)}
    share = sum(map(tiny_tasks.is_heldout, keys)) / len(keys)
    assert 0.03 < share < 0.2
    assert tiny_tasks.is_heldout(("+", 23, 58)) == tiny_tasks.is_heldout(("+", 23, 58))


def test_the_order_of_a_sum_does_not_change_its_split() -> None:
    rng = random.Random(0)
    for _ in range(200):
        first, second = numbers_in(tiny_tasks.sample(rng, "three-digit addition", "heldout").prompt)
        assert tiny_tasks.is_heldout(("+", min(first, second), max(first, second)))


def test_the_same_seed_gives_the_same_questions() -> None:
    def questions(seed: int) -> list[object]:
        rng = random.Random(seed)
        return [tiny_tasks.sample(rng) for _ in range(50)]

    assert questions(3) == questions(3)
    assert questions(3) != questions(4)


def test_every_task_is_asked_in_both_languages() -> None:
    for task in tiny_tasks.TASK_NAMES:
        rng = random.Random(0)
        assert {tiny_tasks.sample(rng, task).language for _ in range(50)} == {"zh", "en"}


def test_the_shares_of_the_tasks_sum_to_one() -> None:
    assert sum(tiny_tasks.TASK_SHARES) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("reply", "right"),
    [("81", True), (" 81\n", True), ("81.", True), ("81。", True), ("8 1", False), ("181", False), ("81..", False),
     ("", False), ("The answer is 81", False), ("3+8=11, 2+5+1=8. 81", True), ("3+8=11. 81.", True),
     ("81. 82", False), ("3+8=11, 2+5+1=8, 81", False)],
)  # fmt: skip
def test_check_wants_the_answer_alone_or_after_its_steps(reply: str, right: bool) -> None:
    question = tiny_tasks.Question("two-digit addition", "en", "23+58=?", "81")
    assert tiny_tasks.check(question, reply) is right


@pytest.mark.parametrize(("task", "split"), [("division", "train"), (None, "test")])
def test_unknown_task_or_split_is_refused(task: str | None, split: str) -> None:
    with pytest.raises(ValueError, match="unknown"):
        tiny_tasks.sample(random.Random(0), task, split)


CONFIG_KEYS = {
    "number of layers": "num_hidden_layers",
    "hidden size": "hidden_size",
    "feed-forward width": "intermediate_size",
    "number of attention heads": "num_attention_heads",
    "number of KV heads": "num_key_value_heads",
    "number of experts per token": "moe_k",
    "number of shared experts": "moe_num_shared_experts",
    "number of text experts": "moe_num_experts",
    "width of a text expert": "moe_intermediate_size",
    "vocabulary size": "vocab_size",
    "context length": "max_position_embeddings",
}


@pytest.mark.parametrize("model", tiny_tasks.MODELS)
def test_facts_agree_with_the_published_configs(model: str) -> None:
    path = ROOT / "configs" / f"{model.lower()}.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    place = tiny_tasks.MODELS.index(model)
    by_name = {name: attribute.values[place] for attribute in tiny_tasks.ATTRIBUTES for name in attribute.en}
    for name, key in CONFIG_KEYS.items():
        if by_name[name] is not None:
            found = config.get(key, 0)
            assert by_name[name] == (found[0] if isinstance(found, list) else found), name
