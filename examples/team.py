"""Processes on one machine that each compute a part of a batch and average what they found, through shared memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import numpy as np

PATIENCE = 600.0  # seconds to wait for a slower worker before giving up


class Team:
    """`size` workers; the process that creates the team is worker 0.

    Args:
        size: number of workers.
        capacity: most float32 values that `average` may be given.
    """

    def __init__(self, size: int = 1, capacity: int = 2**23):
        self.size, self.rank = size, 0
        if size > 1:
            self._context = multiprocessing.get_context("spawn")
            self._barrier = self._context.Barrier(size)
            self._memory = self._context.RawArray("f", size * capacity)

    def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Calls work(team, *arguments) in every worker and returns what it returns in this one."""
        helpers = [self._context.Process(target=_run_as, args=(self, r, work, arguments), daemon=True)
                   for r in range(1, self.size)]  # fmt: skip
        for helper in helpers:
            helper.start()
        result = work(self, *arguments)
        for helper in helpers:
            helper.join()
        return result

    def meet(self) -> None:
        """Waits until every worker has come here.

        Raises:
            threading.BrokenBarrierError: another worker has failed.
        """
        if self.size > 1:
            self._barrier.wait(PATIENCE)

    def average(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """The mean over all workers of each array; every worker must call this with the same shapes.

        Raises:
            threading.BrokenBarrierError: another worker has failed.
        """
        if self.size == 1:
            return arrays
        flat = np.concatenate([array.ravel() for array in arrays])
        slots = np.frombuffer(self._memory, np.float32).reshape(self.size, -1)
        slots[self.rank, : flat.size] = flat
        self._barrier.wait(PATIENCE)
        mean = slots[:, : flat.size].mean(axis=0)
        self._barrier.wait(PATIENCE)  # nobody may write the next values while another still reads these
        parts = np.split(mean, np.cumsum([array.size for array in arrays])[:-1])
        return [part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True)]


def _run_as(team: Team, rank: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    team.rank = rank
    work(team, *arguments)
