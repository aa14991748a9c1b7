"""Measuring in rounds: everybody takes a turn in each, right after the limits have been measured again."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm import tqdm

from ernie45.bench.contenders import Contender
from ernie45.bench.worker import Worker, WorkerError
from ernie45.errors import ErnieError

MACHINE = "ernie45.bench.machine:Machine"


@dataclass(frozen=True)
class Task:
    """A prompt of `prompt` tokens in each of `batch` rows, then `new` tokens (0: only the prompt)."""

    batch: int
    prompt: int
    new: int


@dataclass(frozen=True)
class Plan:
    """What is measured. The first prompt, context and batch are for every contender, the others for extended ones.

    Attributes:
        prompts: tokens of the prompts whose time is measured.
        contexts: tokens after which decoding is measured.
        batches: rows.
        new: tokens to decode.
        rounds: how often.
        threads: CPU threads.
        seconds: decoding stops after so many, however few tokens it made.
    """

    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    new: int
    rounds: int
    threads: int
    seconds: float = 8.0

    def prefill_task(self, prompt: int) -> Task:
        """The task that shows the time of this prompt; the one that decodes after it, if there is one."""
        return Task(self.batches[0], prompt, self.new if prompt in self.contexts else 0)

    def decode_task(self, context: int, batch: int | None = None) -> Task:
        """The task that shows the time of decoding."""
        return Task(batch or self.batches[0], context, self.new)

    def tasks(self, extended: bool) -> list[Task]:
        """What a contender has to do, each task once, ordinary ones first."""
        found = [self.prefill_task(self.prompts[0]), self.decode_task(self.contexts[0])]
        if extended:
            found += [self.prefill_task(prompt) for prompt in self.prompts]
            found += [self.decode_task(context) for context in self.contexts]
            found += [self.decode_task(self.contexts[0], batch) for batch in self.batches]
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Sample:
    """One run of a task.

    Attributes:
        prefill: seconds until the first token.
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
    """

    contender: Contender
    version: str
    load_seconds: float
    peak_bytes: int = 0
    samples: dict[Task, list[Sample]] = field(default_factory=dict)


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

    def run(self, task: Task, plan: Plan, machine: dict[str, float]) -> None:
        times = self.worker.call("run", **asdict(task), seconds=plan.seconds)
        self.result.samples.setdefault(task, []).append(Sample(times["prefill"], times.get("decode"), machine))
        if task == plan.decode_task(plan.contexts[0]) and not self.result.peak_bytes:
            self.result.peak_bytes = self.worker.peak_bytes


def _start(contender: Contender, plan: Plan, environment: dict[str, str]) -> _Racer:
    """Loads a model and lets it run once, so that no later run pays for first uses."""
    worker = Worker(
        contender.name, contender.target, contender.options, python=contender.python, environment=environment
    )
    try:
        worker.call("run", batch=1, prompt=plan.prompts[0], new=2, seconds=0)
        return _Racer(worker, Result(contender, **worker.call("describe")))
    except BaseException:
        worker.close()
        raise
