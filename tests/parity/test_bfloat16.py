"""bfloat16 weights: our logits are closer to float32 than those of transformers in bfloat16."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.ops import custom
from tests.helpers.tiny import DENSE, tiny_config, tiny_model

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

installed = find_spec("torch") and find_spec("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.skipif(not installed, reason="needs torch and transformers")]

# A part of the 0.3B's shape: the same widths, fewer layers and words.
PART_OF_THE_SMALLEST = {
    **DENSE,
    "vocab_size": 1000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


def theirs(folder: Path, ids: np.ndarray, dtype: str) -> np.ndarray:
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


def ours(folder: Path, ids: np.ndarray) -> np.ndarray:
    with paddle.no_grad():
        model = ErnieForCausalLM.from_pretrained(folder, dtype="bfloat16", progress=False)
        return model(paddle.to_tensor(ids)).numpy()


def published(name: str, folder: Path) -> Path:
    """A text checkpoint in bfloat16 and in the -PT layout."""
    if name == "ernie45-tiny":
        model = ErnieForCausalLM.from_pretrained(name, progress=False)
    else:
        model = tiny_model(tiny_config(PART_OF_THE_SMALLEST))
    model.save_pretrained(folder, layout="pt", dtype="bfloat16", progress=False)
    return folder


@pytest.mark.skipif(custom.library() is None, reason="no native library here")
@pytest.mark.parametrize("name", ["ernie45-tiny", "part of the 0.3B's shape"])
def test_logits_are_closer_to_float32(name: str, tmp_path: Path) -> None:
    folder = published(name, tmp_path)
    ids = np.random.default_rng(0).integers(3, 1000, (4, 64))
    exact = theirs(folder, ids, "float32")
    our_error = np.abs(ours(folder, ids) - exact)
    their_error = np.abs(theirs(folder, ids, "bfloat16") - exact)
    assert 0 < our_error.mean() < 0.75 * their_error.mean()
