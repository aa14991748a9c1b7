"""Rounds with contenders that only count, in real workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ernie45.bench import measure as module
from ernie45.bench.contenders import Contender
from ernie45.bench.implementation import Implementation
from ernie45.bench.measure import measure
from ernie45.bench.plan import AnswerTask, EncodeTask, Plan, Task
from ernie45.errors import ErnieError

MODULE = """
import time
from ernie45.bench.implementation import Implementation

class Machine:
    count = 0

    def __init__(self, threads):
        self.threads = threads

    def measure(self):
        self.count += 1
        return {"bandwidth": self.count, "float32": 1.0, "bfloat16": 1.0}

    def describe(self):
        return {"processor": "one", "threads": self.threads, "paddle": "none"}

class Counter(Implementation):
    vocabulary, version, load_seconds = 10, "counter 1", 0.5

    def __init__(self, log, name, works=True, lasts=99):
        assert works, "it does not work"
        self.log, self.name, self.lasts = log, name, lasts

    def start(self, ids, capacity):
        self.lasts -= 1
        assert self.lasts >= 0, "tired"
        with open(self.log, "a") as log:
            print(self.name, *ids.shape, capacity, file=log)

    def step(self):
        time.sleep(0.001)

    def encode(self, width, height, frames, count):
        with open(self.log, "a") as log:
            print(self.name, "encode", width, height, frames, count, file=log)
        self.pixels = bytearray(count * frames * width * height)
        del self.pixels
        return {"prefill": 0.25}

    def answer(self, width, height, text, new, seconds):
        with open(self.log, "a") as log:
            print(self.name, "answer", width, height, text, new, seconds, file=log)
        return {"prefill": 0.5, "decode": 0.125}
"""
PLAN = Plan(prompts=(6, 20), contexts=(4, 20), batches=(1, 3), new=2, rounds=2, threads=2)


@pytest.fixture(autouse=True)
def targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counters_for_rounds.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(module, "MACHINE", "counters_for_rounds:Machine")


def counter(tmp_path: Path, name: str, extended: bool = False, **options: object) -> Contender:
    options = {"log": str(tmp_path / "log"), "name": name, **options}
    return Contender(name, "float32", "counters_for_rounds:Counter", options, extended=extended)


def test_everybody_takes_a_turn_in_every_round(tmp_path: Path) -> None:
    found = measure([counter(tmp_path, "a"), counter(tmp_path, "b", extended=True)], PLAN)
    a = ["a 1 6 6", "a 1 4 6"]
    b = ["b 1 6 6", "b 1 4 6", "b 1 20 22", "b 3 4 6"]
    warm_up = ["a 1 6 8", "b 1 6 8"]
    assert (tmp_path / "log").read_text().splitlines() == warm_up + 2 * (a + b)
    assert [result.contender.name for result in found.results] == ["a", "b"]
    assert set(found.results[0].samples) == {Task(1, 6, 0), Task(1, 4, 2)}
    decoded = found.results[1].samples[Task(3, 4, 2)]
    assert len(decoded) == 2
    assert all(sample.decode is not None and sample.decode >= 0.001 for sample in decoded)
    assert all(sample.decode is None for sample in found.results[1].samples[Task(1, 6, 0)])
    assert found.results[0].peak_bytes > 2**20


def test_limits_are_measured_before_each_run_and_at_both_ends(tmp_path: Path) -> None:
    found = measure([counter(tmp_path, "a")], PLAN)
    samples = found.results[0].samples
    assert [sample.machine["bandwidth"] for sample in samples[Task(1, 6, 0)]] == [2, 4]
    assert [sample.machine["bandwidth"] for sample in samples[Task(1, 4, 2)]] == [3, 5]
    assert [limits["bandwidth"] for limits in found.limits] == [1, 2, 3, 4, 5, 6]


def test_pictures_and_videos_come_first(tmp_path: Path) -> None:
    media = (EncodeTask(28, 56), EncodeTask(8000, 4000), EncodeTask(28, 28, frames=4))
    plan = replace(PLAN, media=media, together=2, rounds=1, contexts=(4,), prompts=(6,), batches=(1,))
    found = measure([counter(tmp_path, "a"), counter(tmp_path, "b", extended=True)], plan).results
    warm_up = ["encode 56 56 1 1", "answer 56 56 16 2 0", "1 6 8"]
    pictures = ["encode 8000 4000 1 1", "encode 28 56 1 1", "encode 28 28 4 1", "answer 28 56 16 2 8.0"]
    ordinary = [*pictures, "1 6 6", "1 4 6"]
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if line[0] == "a"] == [f"a {what}" for what in warm_up + ordinary]
    assert lines[-1] == "b encode 8000 4000 1 2"
    assert [sample.prefill for sample in found[0].samples[EncodeTask(8000, 4000)]] == [0.25]
    answer = found[0].samples[AnswerTask(28, 56, 16, 2)][0]
    assert (answer.prefill, answer.decode) == (0.5, 0.125)
    assert found[0].picture_bytes == pytest.approx(32e6, rel=0.05)
    assert found[0].peak_bytes > 32e6


def test_text_models_have_no_memory_of_pictures(tmp_path: Path) -> None:
    assert measure([counter(tmp_path, "a")], PLAN).results[0].picture_bytes is None


def test_who_fails_is_named_and_left_out(tmp_path: Path) -> None:
    contenders = [
        counter(tmp_path, "broken", works=False),
        counter(tmp_path, "weak", lasts=2),
        counter(tmp_path, "good"),
    ]
    found = measure(contenders, PLAN)
    assert [result.contender.name for result in found.results] == ["good"]
    assert found.problems == ["broken: AssertionError: it does not work", "weak: AssertionError: tired"]


def test_nobody_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ErnieError, match="nothing could be measured: broken: AssertionError"):
        measure([counter(tmp_path, "broken", works=False)], PLAN)


class Echo(Implementation):
    """Continues every row by its last token plus one."""

    vocabulary, version, load_seconds = 100, "echo", 0.0

    def __init__(self) -> None:
        self.steps = 0

    def start(self, ids: np.ndarray, capacity: int) -> None:
        self.ids, self.tokens = ids, ids[:, -1] + 1

    def step(self) -> None:
        self.steps += 1
        self.tokens = self.tokens + 1


def test_an_implementation_is_timed_and_stops_when_time_is_up() -> None:
    echo = Echo()
    times = echo.run(batch=2, prompt=5, new=4, seconds=60)
    assert echo.ids.shape == (2, 5) and echo.ids.min() >= 3 and echo.ids.max() < 100
    assert echo.steps == 4 and set(times) == {"prefill", "decode"}
    assert set(echo.run(batch=1, prompt=5, new=0, seconds=60)) == {"prefill"}
    echo.steps = 0
    echo.run(batch=1, prompt=5, new=1000, seconds=0)
    assert echo.steps == 2


def test_greedy_continuation() -> None:
    assert Echo().continue_greedily([[1, 2], [7, 8]], 3) == [[3, 4, 5], [9, 10, 11]]
