"""Models of transformers with random weights, to compare with. Only for tests that are marked `parity`."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from tests.helpers.tiny import difference

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Imported where they are used: merely collecting such a test must not take the seconds that they need.
installed = find_spec("torch") and find_spec("transformers")
parity = [pytest.mark.parity, pytest.mark.skipif(not installed, reason="needs torch and transformers")]

CLOSE_CALL = 1e-4  # from the first step on whose two best logits are closer than this, greedy tokens may differ

EXPERTS = "eager"  # torch's grouped product refuses expert widths that are not multiples of 4


def build(name: str, config: Any, seed: int) -> Any:
    """A transformers model whose every parameter is random, norms, biases and correction bias included."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config._experts_implementation = EXPERTS
    model = getattr(transformers, name)(config).float().eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.normal_()
            if tensor.ndim == 1:
                tensor.mul_(0.2).add_(0 if key.endswith(".bias") else 1)
            else:
                tensor.mul_(0.05 if key.endswith("e_score_correction_bias") else tensor.shape[-1] ** -0.5)
    return model


def continuation_of(model: Any, inputs: dict[str, Any], steps: int, **options: Any) -> tuple[np.ndarray, int]:
    """Greedy ids [batch, steps], and the number of steps before the first close call of any row."""
    import torch

    found = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=steps,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    best_two = torch.stack(found.scores).topk(2).values
    close = (best_two[..., 0] - best_two[..., 1] < CLOSE_CALL).any(dim=1).nonzero().flatten().tolist()
    return found.sequences[:, -steps:].numpy(), close[0] if close else steps


def relative_error(found: Any, expected: np.ndarray) -> float:
    """Largest difference relative to the largest expected value."""
    return difference(found, expected) / float(np.abs(expected).max())
