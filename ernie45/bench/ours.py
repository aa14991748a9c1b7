"""This library as a measured implementation."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import paddle

import ernie45
from ernie45.bench.implementation import Implementation
from ernie45.models.cache import KVCache
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.ops import custom
from ernie45.runtime import set_num_threads


class Ernie45(Implementation):
    """A model of this library.

    Args:
        model: checkpoint folder or name.
        threads: CPU threads.
        options: further arguments of `from_pretrained`, such as dtype and quantization.
    """

    def __init__(self, model: str, threads: int, options: dict[str, Any]):
        set_num_threads(threads)
        custom.library()  # built, if it has to be, before anything is timed
        start = time.perf_counter()
        self.model = ErnieForCausalLM.from_pretrained(model, progress=False, **options)
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
    def _read(self, ids: paddle.Tensor) -> None:
        hidden = self.model.ernie(ids, cache=self.cache)
        self.tokens = self.model.lm_head(hidden[:, -1]).numpy().argmax(-1)
