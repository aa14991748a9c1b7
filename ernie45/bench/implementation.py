"""The interface that every measured implementation has, and the timing that is the same for all."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np


class Implementation(ABC):
    """A loaded model that continues prompts greedily; lives in a worker.

    Attributes:
        vocabulary: number of tokens.
        version: name and version of the library behind it.
        load_seconds: how long loading took, without the import of libraries.
        tokens: [batch] the token that follows each row, after `start` or `step`.
    """

    vocabulary: int
    version: str
    load_seconds: float
    tokens: np.ndarray

    @abstractmethod
    def start(self, ids: np.ndarray, capacity: int) -> None:
        """Forgets everything, reads a prompt, and sets `tokens`.

        Args:
            ids: [batch, prompt] int64.
            capacity: tokens per row that prompt and continuation will have at most.
        """

    @abstractmethod
    def step(self) -> None:
        """Appends `tokens` to the context and sets the next ones."""

    def describe(self) -> dict[str, Any]:
        """Version and seconds of loading."""
        return {"version": self.version, "load_seconds": self.load_seconds}

    def run(self, batch: int, prompt: int, new: int, seconds: float) -> dict[str, float]:
        """Times one prompt of random tokens and what follows.

        Args:
            batch: rows.
            prompt: tokens per row.
            new: tokens to decode per row, 0 for none.
            seconds: decode no longer than that (but two tokens), for the sake of very slow implementations.

        Returns:
            "prefill": seconds until the first token is known; "decode": seconds per further step, if new > 0.
        """
        ids = np.random.default_rng(0).integers(3, self.vocabulary, [batch, prompt])
        return self.timed(lambda: self.start(ids, prompt + new), new, seconds)

    def timed(self, start: Callable[[], None], new: int, seconds: float) -> dict[str, float]:
        """Times `start`, which reads a prompt, and what follows; see `run`."""
        begin = time.perf_counter()
        start()
        first = time.perf_counter()
        steps = 0
        while steps < new and (steps < 2 or time.perf_counter() - first < seconds):
            self.step()
            steps += 1
        decode = {"decode": (time.perf_counter() - first) / steps} if steps else {}
        return {"prefill": first - begin, **decode}

    def continue_greedily(self, ids: list[list[int]], new: int) -> list[list[int]]:
        """The next `new` tokens of each row: to see whether implementations compute the same."""
        self.start(np.array(ids), len(ids[0]) + new)
        return self.continue_started(new)

    def continue_started(self, new: int) -> list[list[int]]:
        """The `new` tokens that follow the prompt which was started last."""
        columns = [self.tokens]
        for _ in range(new - 1):
            self.step()
            columns.append(self.tokens)
        return np.stack(columns, axis=1).tolist()
