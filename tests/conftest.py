"""What every test runs in: no network, quiet and single-threaded Paddle, fixed seeds, the reference checkpoints."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# These are read when Paddle, torch and huggingface_hub are first imported: set before any test module does so.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("GLOG_minloglevel", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run: a failure always comes from the change that is tested.
settings.register_profile("ernie45", deadline=None, derandomize=True)
settings.load_profile("ernie45")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same state, in Paddle and torch too where they are loaded.

    The benchmark's peers, which have processes of their own otherwise, switch torch's gradients off.
    """
    random.seed(0)
    np.random.seed(0)
    if "paddle" in sys.modules:
        sys.modules["paddle"].seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
        sys.modules["torch"].set_grad_enabled(True)


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of the reference checkpoints, described in its README.

    ``reference / "dense"`` and ``reference / "moe"`` hold ``paddle/`` and ``pt/``, the same small random model in the
    two published layouts, and ``reference.npz`` with inputs and float32 outputs.
    """
    return Path(__file__).parent / "data" / "reference"
