"""Workers: a real process each, with a small class inside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ernie45.bench.worker import PACKAGE_PARENT, Worker, WorkerError

MODULE = """
import os, sys
print("chatter while importing")

class Adder:
    def __init__(self, start):
        if start < 0:
            raise ValueError("negative start")
        self.total = start

    def add(self, number):
        print("chatter in a call")
        self.total += number
        return {"total": self.total, "threads": os.environ.get("OMP_NUM_THREADS")}

    def fill(self, size):
        return len(bytearray(size))

    def fail(self):
        raise KeyError("a reason")

    def leave(self):
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)
"""
TARGET = "adder_for_workers:Adder"


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adder_for_workers.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def state(worker: Worker) -> str:
    """The state of the process, "T" for stopped."""
    return Path(f"/proc/{worker._process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_calls_keep_the_object_and_ignore_what_it_prints() -> None:
    with Worker("adder", TARGET, {"start": 5}, environment={"OMP_NUM_THREADS": "3"}) as worker:
        assert worker.call("add", number=2) == {"total": 7, "threads": "3"}
        assert worker.call("add", number=2)["total"] == 9
        assert worker.peak_bytes > 2**20


def test_growth_is_what_one_call_needs_even_below_an_earlier_peak() -> None:
    with Worker("adder", TARGET, {"start": 5}) as worker:
        worker.call("fill", size=200 * 2**20)
        peak = worker.peak_bytes
        result, growth = worker.call_measured("fill", size=50 * 2**20)
        assert result == 50 * 2**20
        assert growth == pytest.approx(50 * 2**20, rel=0.05)
        assert worker.peak_bytes == peak > 200 * 2**20


def test_growth_is_unknown_where_a_peak_cannot_be_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> int:
        raise PermissionError

    with Worker("adder", TARGET, {"start": 5}, environment={"OMP_NUM_THREADS": "1"}) as worker:
        monkeypatch.setattr(Path, "write_text", refuse)
        assert worker.call_measured("add", number=1) == ({"total": 6, "threads": "1"}, None)


def test_a_failing_call_is_an_error_and_the_next_one_works() -> None:
    with Worker("adder", TARGET, {"start": 5}) as worker:
        with pytest.raises(WorkerError, match="adder: KeyError: 'a reason'"):
            worker.call("fail")
        assert worker.call("add", number=1)["total"] == 6


def test_an_idle_worker_is_stopped_and_ends_with_the_block() -> None:
    with Worker("adder", TARGET, {"start": 5}) as worker:
        for _ in range(2):
            deadline = time.monotonic() + 10
            while state(worker) != "T" and time.monotonic() < deadline:
                time.sleep(0.01)
            assert state(worker) == "T"
            worker.call("add", number=1)
    assert worker._process.returncode is not None


def test_a_process_that_ends_leaves_its_last_words() -> None:
    with Worker("adder", TARGET, {"start": 5}) as worker:
        with pytest.raises(WorkerError, match=r"adder: the process ended with status 3; it said: (.|\n)*last words"):
            worker.call("leave")
        with pytest.raises(WorkerError, match="adder: the process"):
            worker.call("add", number=1)


@pytest.mark.parametrize(
    ("target", "start", "message"),
    [
        (TARGET, -1, "x: ValueError: negative start"),
        ("no_such_module:Adder", 1, "x: ModuleNotFoundError"),
        ("adder_for_workers:Nobody", 1, "x: AttributeError"),
    ],
)
def test_what_cannot_be_built_says_why(target: str, start: int, message: str) -> None:
    with pytest.raises(WorkerError, match=message):
        Worker("x", target, {"start": start})


def test_an_interpreter_that_is_not_there() -> None:
    with pytest.raises(WorkerError, match="x: cannot run /nowhere/python"):
        Worker("x", TARGET, {"start": 1}, python="/nowhere/python")


def test_a_stopped_worker_does_not_outlive_a_killed_parent() -> None:
    script = (
        "import os\nfrom ernie45.bench.worker import Worker\n"
        f"worker = Worker('adder', '{TARGET}', {{'start': 5}})\n"
        "print(worker._process.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    paths = os.pathsep.join([str(PACKAGE_PARENT), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    status = Path(f"/proc/{int(done.stdout)}/stat")
    deadline = time.monotonic() + 10
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.01)
