"""llama.cpp as a measured implementation, through the bindings of llama-cpp-python.

This module is imported by the interpreter that has these bindings, which need not have Paddle.
"""

from __future__ import annotations

import ctypes
import os
import time
from importlib.metadata import version
from typing import Any

import llama_cpp
import numpy as np

from ernie45.bench.implementation import Implementation
from ernie45.errors import ErnieError

CHUNK = 512  # tokens per call of llama_decode: n_batch and n_ubatch


class LlamaCpp(Implementation):
    """A GGUF file.

    Args:
        model: the file.
        threads: CPU threads.
        flash: use flash attention.
    """

    def __init__(self, model: str, threads: int, flash: bool):
        self.threads, self.flash = threads, flash
        self.context: Any = None
        start = time.perf_counter()
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise ErnieError(f"{model}: llama.cpp cannot load it")
        self.load_seconds = time.perf_counter() - start
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.version = f"llama-cpp-python {version('llama-cpp-python')}"
        self.room = (0, 0)

    def start(self, ids: np.ndarray, capacity: int) -> None:
        """See `Implementation.start`."""
        room = (len(ids), capacity)
        if room != self.room:
            self._make_context(*room)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        self.length = 0
        width = max(1, CHUNK // len(ids))
        for first in range(0, ids.shape[1], width):
            self._read(ids[:, first : first + width], wanted=first + width >= ids.shape[1])

    def step(self) -> None:
        """See `Implementation.step`."""
        self._read(self.tokens[:, None], wanted=True)

    def _make_context(self, rows: int, capacity: int) -> None:
        if self.context:
            llama_cpp.llama_free(self.context)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = rows * (-(-capacity // 256) * 256), rows
        parameters.n_batch = parameters.n_ubatch = CHUNK
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if self.flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise ErnieError(f"llama.cpp cannot make a context of {rows} x {capacity} tokens")
        self.room = (rows, capacity)

    def _read(self, ids: np.ndarray, wanted: bool) -> None:
        """Appends [rows, new] tokens; takes the logits of each row's last one if they are wanted."""
        rows, new = ids.shape
        batch = llama_cpp.llama_batch_init(rows * new, 0, 1)
        batch.n_tokens = rows * new
        for i, token in enumerate(ids.ravel().tolist()):
            row, column = divmod(i, new)
            batch.token[i], batch.pos[i] = token, self.length + column
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
            batch.logits[i] = wanted and column == new - 1
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise ErnieError(f"llama_decode failed with status {status}")
        self.length += new
        if wanted:
            self.tokens = np.array([self._most_likely(row * new + new - 1) for row in range(rows)])

    def _most_likely(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, [self.vocabulary]).argmax())


class Quantizer:
    """Makes quantised GGUF files as llama.cpp's own tool does."""

    def quantize(self, source: str, destination: str, kind: str, threads: int) -> None:
        """Writes `destination`, of the kind "Q8_0" or "Q4_0", from a bfloat16 file."""
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        parameters.nthread = threads
        partial = f"{destination}.partial"
        status = llama_cpp.llama_model_quantize(source.encode(), partial.encode(), ctypes.byref(parameters))
        if status:
            raise ErnieError(f"{source}: llama_model_quantize to {kind} failed with status {status}")
        os.replace(partial, destination)
