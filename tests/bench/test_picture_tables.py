"""The tables about pictures, from measurements that are written down here."""

from __future__ import annotations

from typing import Any

import pytest

from ernie45.bench.contenders import Contender
from ernie45.bench.limits import (
    STORAGES,
    bytes_per_token,
    operations_per_token,
    operations_per_vision_token,
    picture_operations,
)
from ernie45.bench.measure import Measurements, Result, Sample
from ernie45.bench.plan import AnswerTask, EncodeTask, Plan, Task
from ernie45.bench.report import Report
from tests.helpers.vision import vision_config

CONFIG = vision_config()
SMALL, LARGE, VIDEO = EncodeTask(56, 56), EncodeTask(112, 56), EncodeTask(56, 56, frames=4)
EIGHT, ANSWER, TEXT = EncodeTask(112, 56, count=8), AnswerTask(56, 56, 16, 5), Task(1, 10, 5)
PLAN = Plan((10,), (10,), (1,), new=5, rounds=3, threads=2, media=(SMALL, LARGE, VIDEO))
# A machine that encodes 10 small pictures per second in bfloat16 and 2 in float32, and decodes 100 tokens.
SMALL_OPERATIONS = picture_operations(CONFIG, 1, 56, 56)
MACHINE = {
    "bandwidth": 100 * bytes_per_token(CONFIG, STORAGES["bfloat16"]),
    "float32": 2 * SMALL_OPERATIONS,
    "bfloat16": 10 * SMALL_OPERATIONS,
}


def samples(seconds: list[float], decode: float | None = None) -> list[Sample]:
    return [Sample(one, decode, MACHINE) for one in seconds]


def result(name: str, storage: str, seconds: float, **more: Any) -> Result:
    """Whose pictures take `seconds`, the large ones twice as long, and whose tokens a fiftieth of a second.

    Answers are impossibly fast, so that two digits of their share show what is counted.
    """
    extended = not name.startswith("transformers")
    contender = Contender(name, storage, "nobody", extended=extended, peer=not extended)
    found = Result(contender, "a version", 1.0, peak_bytes=10**9, **more)
    found.samples = {
        SMALL: samples([seconds, 0.5 * seconds, 2 * seconds]),
        LARGE: samples([2 * seconds, seconds, 4 * seconds]),
        VIDEO: samples([3 * seconds] * 3),
        ANSWER: samples([0.004 * seconds] * 3, 1 / 50),
        TEXT: samples([1.0] * 3, 1 / 50),
    }
    if extended:
        found.samples[EIGHT] = samples([16 * seconds, 7 * seconds, 36 * seconds])
    return found


OURS = result("ernie45 bfloat16", "bfloat16", 0.2, picture_bytes=5_000_000)
THEIRS = [result("transformers bfloat16", "bfloat16", 0.8), result("transformers float32", "float32", 0.6)]


def lines_of(*results: Result) -> list[str]:
    machine = {"processor": "a processor", "threads": 2, "paddle": "3"}
    report = Report("a model", CONFIG, PLAN, Measurements(machine, [MACHINE], list(results), []))
    return report.markdown().splitlines()


def rows_below(head: str, lines: list[str]) -> list[str]:
    """The rows of the table whose first cell begins so."""
    first = next(i for i, line in enumerate(lines) if line.startswith(f"| {head}"))
    return lines[first + 2 : lines.index("", first)]


def test_seconds_shares_and_comparison_with_the_faster_transformers() -> None:
    assert rows_below("one picture of 56x56: 4 tokens", lines_of(OURS, *THEIRS)) == [
        "| ernie45 bfloat16 | 0.2 (0.1 to 0.4) | 20 | 0.50 | 3.00 |",
        "| transformers bfloat16 | 0.8 (0.4 to 1.6) | 5 | 0.12 | 0.75 |",
        "| transformers float32 | 0.6 (0.3 to 1.2) | 6.67 | 0.83 | 1.00 |",
    ]


def test_without_transformers_nothing_is_compared() -> None:
    share = picture_operations(CONFIG, 4, 56, 56) / MACHINE["bfloat16"] / 0.6
    assert rows_below("one video of 4 frames of 56x56: 8 tokens", lines_of(OURS)) == [
        f"| ernie45 bfloat16 | 0.6 (0.6 to 0.6) | 13.3 | {share:.2f} |"
    ]


def test_several_at_once_are_compared_with_one_of_the_same_round() -> None:
    share = 8 * picture_operations(CONFIG, 1, 56, 112) / MACHINE["bfloat16"] / 3.2
    assert rows_below("8 pictures of 112x56, at once", lines_of(OURS, *THEIRS)) == [
        f"| ernie45 bfloat16 | 3.2 (1.4 to 7.2) | {share:.2f} | 8 (7 to 9) |"
    ]


def test_the_first_token_and_what_follows() -> None:
    rows = rows_below("prompt of a picture of 56x56 and 16 tokens of text", lines_of(OURS, *THEIRS))
    decoder = 6 * operations_per_vision_token(CONFIG) + 16 * operations_per_token(CONFIG)
    share = (SMALL_OPERATIONS + decoder) / MACHINE["bfloat16"] / 0.0008
    first = f"0.0008 (0.0008 to 0.0008) | {share:.2f} | 3.00"
    assert rows[0] == f"| ernie45 bfloat16 | {first} | 50 (50 to 50) | 0.50 | 5 MB |"
    assert rows[2].startswith("| transformers float32 | 0.0024 (0.0024 to 0.0024) |")
    assert rows[2].endswith("| unknown |")


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (SMALL, "one picture of 56x56"),
        (EIGHT, "8 pictures of 112x56"),
        (VIDEO, "one video of 4 frames of 56x56"),
        (EncodeTask(56, 28, frames=2, count=3), "3 videos of 2 frames of 56x28"),
    ],
)
def test_tasks_have_names(task: EncodeTask, text: str) -> None:
    assert str(task) == text
