"""This library as a measured implementation."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import paddle

import ernie45
from ernie45.bench.implementation import Implementation
from ernie45.bench.vision import VisionImplementation
from ernie45.models.cache import KVCache
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.models.pretrained import PretrainedModel
from ernie45.models.vision_language import ErnieForConditionalGeneration
from ernie45.ops import custom
from ernie45.processing.positions import position_ids, token_types
from ernie45.runtime import set_num_threads


class Ernie45(Implementation):
    """A model of this library.

    Attributes:
        model_class: what reads the checkpoint.

    Args:
        model: checkpoint folder or name.
        threads: CPU threads.
        options: further arguments of `from_pretrained`, such as dtype and quantization.
    """

    model_class: type[PretrainedModel] = ErnieForCausalLM

    def __init__(self, model: str, threads: int, options: dict[str, Any]):
        set_num_threads(threads)
        custom.library()  # built, if it has to be, before anything is timed
        start = time.perf_counter()
        self.model: Any = self.model_class.from_pretrained(model, progress=False, **options)
        self.load_seconds = time.perf_counter() - start
        self.vocabulary = self.model.config.vocab_size
        self.version = f"ernie45 {ernie45.__version__}"

    def start(self, ids: np.ndarray, capacity: int) -> None:
        """See `Implementation.start`."""
        self.cache = KVCache(self.model.config, capacity)
        self._read(paddle.to_tensor(ids))

    def step(self) -> None:
        """See `Implementation.step`."""
        self._read(paddle.to_tensor(self.tokens[:, None]))

    @paddle.no_grad()
    def _read(self, ids: paddle.Tensor, **more: paddle.Tensor) -> None:
        hidden = self.model.ernie(ids, cache=self.cache, **more)
        self.tokens = self.model.lm_head(hidden[:, -1]).numpy().argmax(-1)


class Ernie45Vision(VisionImplementation, Ernie45):
    """A vision-language model of this library. It normalises pixels itself, so that this is in its times."""

    model_class = ErnieForConditionalGeneration

    def __init__(self, model: str, threads: int, options: dict[str, Any]):
        super().__init__(model, threads, options)
        self.vision = self.model.vision

    def prepare(self, patches: np.ndarray, grid: np.ndarray) -> Any:
        """See `VisionImplementation.prepare`: patches [N, patch_bytes] uint8, and the grid."""
        return paddle.to_tensor(patches), grid

    @paddle.no_grad()
    def features(self, pictures: Any) -> np.ndarray:
        """See `VisionImplementation.features`."""
        return self.model.encode_images(*pictures).astype("float32").numpy()

    @paddle.no_grad()
    def start_with(self, ids: np.ndarray, pictures: Any, grid: np.ndarray, capacity: int) -> None:
        """See `VisionImplementation.start_with`."""
        self.cache = KVCache(self.model.config, capacity)
        types = token_types(ids[0], grid, self.vision)
        positions = position_ids(ids[0], grid, self.vision)
        self._read(
            paddle.to_tensor(ids),
            position_ids=paddle.to_tensor(positions[None]),
            banks=paddle.to_tensor((types != 0).astype("int64")[None]),
            features=self.model.encode_images(*pictures),
        )
