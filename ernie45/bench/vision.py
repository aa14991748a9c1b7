"""The interface of implementations that see, and the timing of pictures that is the same for all."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import Any

import numpy as np

from ernie45.bench.implementation import Implementation
from ernie45.config import VisionConfig
from ernie45.processing.positions import token_grid


class VisionImplementation(Implementation):
    """A loaded vision-language model.

    Attributes:
        vision: how it sees.
    """

    vision: VisionConfig

    @abstractmethod
    def prepare(self, patches: np.ndarray, grid: np.ndarray) -> Any:
        """Pictures as the implementation's own processor hands them to the model; this is not timed.

        Args:
            patches: [N, patch_bytes] uint8, in the order of `VisionTransformer.forward`.
            grid: [items, 3] frames, rows and columns of patches; either pictures or videos.
        """

    @abstractmethod
    def features(self, pictures: Any) -> np.ndarray:
        """What vision tower and adapter make of prepared pictures, [tokens, hidden_size] float32."""

    @abstractmethod
    def start_with(self, ids: np.ndarray, pictures: Any, grid: np.ndarray, capacity: int) -> None:
        """As `start`, for one row of ids [1, prompt] with prepared pictures."""

    def encode(self, width: int, height: int, frames: int, count: int) -> dict[str, float]:
        """Times vision tower and adapter on random pixels.

        Args:
            width, height, frames, count: see `EncodeTask`.

        Returns:
            "prefill": seconds.
        """
        pictures = self.prepare(*self._random_pictures(width, height, frames, count))
        begin = time.perf_counter()
        self.features(pictures)
        return {"prefill": time.perf_counter() - begin}

    def answer(self, width: int, height: int, text: int, new: int, seconds: float) -> dict[str, float]:
        """Times a prompt of one picture and random text, and what follows.

        Args:
            width, height, text, new: see `AnswerTask`.
            seconds: see `run`.

        Returns:
            as `run`.
        """
        patches, grid = self._random_pictures(width, height, 1, 1)
        ids = prompt_with(grid, text, self.vision)
        pictures = self.prepare(patches, grid)
        return self.timed(lambda: self.start_with(ids, pictures, grid, ids.shape[1] + new), new, seconds)

    def answer_greedily(self, patches: np.ndarray, grid: np.ndarray, ids: np.ndarray, new: int) -> list[list[int]]:
        """The next `new` tokens: to see whether implementations compute the same."""
        self.start_with(ids, self.prepare(patches, grid), grid, ids.shape[1] + new)
        return self.continue_started(new)

    def _random_pictures(self, width: int, height: int, frames: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Patches and grid; sides are rounded down to whole tokens, but one at least."""
        rows, columns = (max(side // self.vision.factor, 1) * self.vision.merge_size for side in (height, width))
        grid = np.array([[frames, rows, columns]] * count, "int64")
        size = (int(grid.prod(axis=1).sum()), self.vision.patch_bytes)
        return np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8), grid


def prompt_with(grid: np.ndarray, text: int, vision: VisionConfig) -> np.ndarray:
    """A prompt of pictures and then random tokens of text: ids [1, prompt] int64."""
    ids: list[int] = []
    for tokens in token_grid(grid, vision).prod(axis=1).tolist():
        ids += [vision.image_start_id, *[vision.placeholder_id] * tokens, vision.image_end_id]
    first_special = min(vision.placeholder_id, *vision.delimiter_ids)
    ids += np.random.default_rng(0).integers(3, first_special, text).tolist()
    return np.array([ids], "int64")
