"""The report, from measurements that are written down here."""

from __future__ import annotations

from pathlib import Path

import pytest

from ernie45.bench.contenders import Contender
from ernie45.bench.limits import STORAGES, Storage, bytes_per_token, operations_per_token
from ernie45.bench.measure import Measurements, Result, Sample
from ernie45.bench.plan import Plan, Task
from ernie45.bench.report import Report
from ernie45.bench.speeds import DECODE, PREFILL, Figure, speed, table
from ernie45.config import ErnieConfig
from tests.helpers.tiny import DENSE

CONFIG = ErnieConfig.from_dict(DENSE)
BYTES = bytes_per_token(CONFIG, STORAGES["bfloat16"])
OPERATIONS = operations_per_token(CONFIG)
PLAN = Plan(prompts=(100, 400), contexts=(10, 400), batches=(1, 8), new=5, rounds=3, threads=2)
# A machine that decodes 40, 50 and 80 tokens per second at most, and reads 1000 tokens of a prompt.
MACHINES = [{"bandwidth": rate * BYTES, "float32": 1.0, "bfloat16": 1000 * OPERATIONS} for rate in (40.0, 50.0, 80.0)]


def samples(prefill: float, decode: float | None) -> list[Sample]:
    return [Sample(prefill, decode, machine) for machine in MACHINES]


def result(name: str, decode: float, extended: bool = False, peer: bool = True) -> Result:
    contender = Contender(name, "bfloat16", "nobody", extended=extended, peer=peer)
    found = Result(contender, f"version of {name}", 1.25, 500_000_000)
    found.samples = {Task(1, 100, 0): samples(0.2, None), Task(1, 10, 5): samples(0.1, decode)}
    if extended:
        found.samples[Task(1, 400, 5)] = samples(1.6, 2 * decode)
        found.samples[Task(8, 10, 5)] = samples(0.1, 2 * decode)
    return found


def report() -> Report:
    results = [
        result("ernie45 bfloat16", 1 / 40, extended=True, peer=False),
        result("llama.cpp BF16", 1 / 20),
        result("llama.cpp BF16", 1 / 25),
    ]
    machine = {"processor": "a processor", "threads": 2, "paddle": "3"}
    return Report("a model", CONFIG, PLAN, Measurements(machine, MACHINES, results, ["someone: fell over"]))


def test_shares_are_those_of_each_run() -> None:
    found = speed(CONFIG, STORAGES["bfloat16"], DECODE, Task(1, 10, 5), samples(0.1, 1 / 20))
    assert found.rate == Figure(pytest.approx(20), pytest.approx(20), pytest.approx(20))
    assert found.limit == Figure(pytest.approx(50), pytest.approx(40), pytest.approx(80))
    assert found.share == Figure(pytest.approx(0.4), pytest.approx(0.25), pytest.approx(0.5))


def test_a_batch_counts_all_its_tokens_and_shares_the_weights() -> None:
    found = speed(CONFIG, STORAGES["bfloat16"], DECODE, Task(8, 10, 5), samples(0.1, 0.1))
    assert found.rate.median == pytest.approx(80)
    assert found.limit.median == pytest.approx(8 * 50)


def test_prefill_without_bfloat16_is_held_against_float32() -> None:
    machine = {"bandwidth": 1.0, "float32": 500 * OPERATIONS, "bfloat16": 0.0}
    found = speed(CONFIG, Storage(2, 2), PREFILL, Task(2, 100, 0), [Sample(1.0, None, machine)])
    assert (found.rate.median, found.limit.median) == (pytest.approx(200), pytest.approx(500))


def test_tables_show_medians_the_better_setting_and_what_went_wrong() -> None:
    text = report().markdown()
    lines = text.splitlines()
    ours = next(line for line in lines if line.startswith("| ernie45 bfloat16 | 500"))
    assert ours == ("| ernie45 bfloat16 | 500 (500 to 500) | 0.50 | 0.2 s | 40 (40 to 40) | 0.80 | 500 MB | 1.2 s |")
    assert [line for line in lines if line.startswith("| llama.cpp BF16")] == [
        "| llama.cpp BF16 | 500 (500 to 500) | 0.50 | 0.2 s | 25 (25 to 25) | 0.50 | 500 MB | 1.2 s |"
    ]
    assert "| prompt of 400 | 250 (250 to 250) | 0.25 | 2.00 x time per token |" in lines
    assert "| decode 5 after 400 | 20 (20 to 20) | 0.40 | 2.00 x time per token |" in lines
    assert "| decode 5 after 10, 8 rows | 160 (160 to 160) | 0.40 | 4.00 x tokens/s |" in lines
    assert "2 threads of a processor, Paddle 3. version of ernie45 bfloat16, version of llama.cpp BF16." in text
    assert text.endswith("Not measured:\n\n- someone: fell over\n")


def test_numbers_have_three_digits() -> None:
    assert Figure.of([0.12345, 1234.5, 41.25]).text() == "41.2 (0.123 to 1234)"


def test_tables_are_markdown() -> None:
    assert table(["a", "b"], [["c", "1"]]) == "| a | b |\n| --- | ---: |\n| c | 1 |"


def test_the_chart_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report().chart(tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["cpu.png"]
