"""Measuring in rounds: everybody takes a turn in each, right after the limits have been measured again."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm import tqdm

from ernie45.bench.contenders import Contender
from ernie45.bench.plan import AnyTask, EncodeTask, Plan
from ernie45.bench.worker import Worker, WorkerError
from ernie45.errors import ErnieError

MACHINE = "ernie45.bench.machine:Machine"


SMALL_SIDE = 56  # pixels of a picture that warms a model up, and needs next to no time and memory


@dataclass(frozen=True)
class Sample:
    """One run of a task.

    Attributes:
        prefill: seconds until the first token, or, of an `EncodeTask`, until the features.
        decode: seconds per further step, None where there was none.
        machine: the limits measured just before: see `Machine.measure`.
    """

    prefill: float
    decode: float | None
    machine: dict[str, float]


@dataclass
class Result:
    """Everything measured of one contender.

    Attributes:
        contender: which one.
        version: of the library behind it.
        load_seconds: how long loading took.
        peak_bytes: peak resident memory of its process after the first round of ordinary tasks.
        samples: those of each task.
        picture_bytes: how much resident memory the largest picture took in the first round, on top of what the process
            held before; None without pictures, or if unknown.
    """

    contender: Contender
    version: str
    load_seconds: float
    peak_bytes: int = 0
    samples: dict[AnyTask, list[Sample]] = field(default_factory=dict)
    picture_bytes: int | None = None


@dataclass(frozen=True)
class Measurements:
    """A whole run.

    Attributes:
        machine: processor, threads and versions: see `Machine.describe`.
        limits: every measurement of the limits, in the order of time.
        results: of each contender.
        problems: who could not be measured, and why.
    """

    machine: dict[str, Any]
    limits: list[dict[str, float]]
    results: list[Result]
    problems: list[str]


def measure(contenders: Sequence[Contender], plan: Plan) -> Measurements:
    """Starts every contender and lets them take turns.

    Raises:
        ErnieError: the limits cannot be measured, or no contender is left.
    """
    problems: list[str] = []
    environment = {"OMP_NUM_THREADS": str(plan.threads)}
    with contextlib.ExitStack() as stack:
        options = {"threads": plan.threads}
        machine = stack.enter_context(Worker("machine", MACHINE, options, environment=environment))
        racers: list[_Racer] = []
        for contender in tqdm(contenders, desc="Loading", unit="model"):
            try:
                racer = _start(contender, plan, environment)
            except WorkerError as error:
                problems.append(str(error))
                continue
            stack.callback(racer.worker.close)
            racers.append(racer)
        limits = [machine.call("measure")]
        turns = sum(len(plan.tasks(racer.result.contender.extended)) for racer in racers) * plan.rounds
        with tqdm(total=turns, desc="Measuring", unit="run") as bar:
            for _ in range(plan.rounds):
                for racer in list(racers):
                    try:
                        for task in plan.tasks(racer.result.contender.extended):
                            limits.append(machine.call("measure"))
                            racer.run(task, plan, limits[-1])
                            bar.update()
                    except WorkerError as error:
                        problems.append(str(error))
                        racers.remove(racer)
        limits.append(machine.call("measure"))
        results = [racer.result for racer in racers]
        if not results:
            raise ErnieError("nothing could be measured: " + "; ".join(problems))
        return Measurements(machine.call("describe"), limits, results, problems)


@dataclass(frozen=True)
class _Racer:
    """A contender that is running."""

    worker: Worker
    result: Result

    def run(self, task: AnyTask, plan: Plan, machine: dict[str, float]) -> None:
        limit = {} if isinstance(task, EncodeTask) else {"seconds": plan.seconds}
        times, growth = self.worker.call_measured(task.method, **asdict(task), **limit)
        self.result.samples.setdefault(task, []).append(Sample(times["prefill"], times.get("decode"), machine))
        if task == plan.decode_task(plan.contexts[0]) and not self.result.peak_bytes:
            self.result.peak_bytes = self.worker.peak_bytes
        if plan.media and task == plan.largest_picture and self.result.picture_bytes is None:
            self.result.picture_bytes = growth


def _start(contender: Contender, plan: Plan, environment: dict[str, str]) -> _Racer:
    """Loads a model and lets it run once, so that no later run pays for first uses."""
    worker = Worker(
        contender.name, contender.target, contender.options, python=contender.python, environment=environment
    )
    try:
        if plan.media:
            worker.call("encode", width=SMALL_SIDE, height=SMALL_SIDE, frames=1, count=1)
            worker.call("answer", width=SMALL_SIDE, height=SMALL_SIDE, text=plan.text, new=2, seconds=0)
        worker.call("run", batch=1, prompt=plan.prompts[0], new=2, seconds=0)
        return _Racer(worker, Result(contender, **worker.call("describe")))
    except BaseException:
        worker.close()
        raise
