"""Peers that read the -PT layout of the same weights: transformers and PaddleFormers."""

from __future__ import annotations

import time

import numpy as np

from ernie45.bench.implementation import Implementation


class Transformers(Implementation):
    """The Hugging Face implementation, on PyTorch.

    Args:
        model: folder in the -PT layout.
        threads: CPU threads.
        dtype: dtype of weights and products.
    """

    def __init__(self, model: str, threads: int, dtype: str):
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        start = time.perf_counter()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.load_seconds = time.perf_counter() - start
        self.vocabulary = self.model.config.vocab_size
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def start(self, ids: np.ndarray, capacity: int) -> None:
        """See `Implementation.start`."""
        self.cache = None
        self._read(ids)

    def step(self) -> None:
        """See `Implementation.step`."""
        self._read(self.tokens[:, None])

    def _read(self, ids: np.ndarray) -> None:
        import torch

        found = self.model(torch.from_numpy(ids), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = found.past_key_values
        self.tokens = found.logits[:, -1].argmax(-1).numpy()


class PaddleFormers(Implementation):
    """PaddleFormers, in float32: on a CPU Paddle multiplies nothing narrower.

    Args:
        model: folder in the -PT layout.
        threads: CPU threads.
    """

    def __init__(self, model: str, threads: int):
        import paddle
        import paddleformers
        from paddleformers.transformers import AutoConfig, AutoModelForCausalLM

        from ernie45.runtime import prepare_cpu, set_num_threads

        prepare_cpu()
        set_num_threads(threads)
        paddle.set_grad_enabled(False)
        config = AutoConfig.from_pretrained(model)
        config.fuse_rms_norm = False  # version 1.2 has no fused norm for CPUs, and uses it unless told not to
        start = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype="float32", convert_from_hf=True
        ).eval()
        self.load_seconds = time.perf_counter() - start
        self.vocabulary = config.vocab_size
        self.version = f"paddleformers {paddleformers.__version__}, paddle {paddle.__version__}"

    def start(self, ids: np.ndarray, capacity: int) -> None:
        """See `Implementation.start`."""
        self.cache, self.length = None, 0
        self._read(ids)

    def step(self) -> None:
        """See `Implementation.step`."""
        self._read(self.tokens[:, None])

    def _read(self, ids: np.ndarray) -> None:
        import paddle

        positions = paddle.arange(self.length, self.length + ids.shape[1]).unsqueeze(0).tile([len(ids), 1])
        found = self.model(
            paddle.to_tensor(ids),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        self.cache, self.length = found.past_key_values, self.length + ids.shape[1]
        self.tokens = found.logits[:, -1].argmax(-1).numpy()
