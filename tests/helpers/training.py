"""A tiny training run: a stream of random documents, and a process that trains until it is killed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ernie45.losses import IGNORED_LABEL
from ernie45.training.data.encode import Example, Pair
from ernie45.training.data.packing import Batch, pack
from ernie45.training.objectives import LanguageModelling
from ernie45.training.recipe import Recipe
from ernie45.training.trainer import Trainer
from tests.helpers.tiny import DENSE, MOE, tiny_config, tiny_model


def example(length: int, generator: np.random.Generator, learned: float = 0.7) -> Example:
    """A document of random tokens, of which some are learned, the last one in any case."""
    ids, labels = generator.integers(3, DENSE["vocab_size"], [2, length])
    kept = generator.random(length) < learned
    kept[-1] = True
    return Example(ids, np.where(kept, labels, IGNORED_LABEL), np.arange(length))


class RandomStream(Iterator[Batch]):
    """Batches that follow from the seed and their number; `pairs`: of preferred and other documents."""

    def __init__(self, rows: int = 2, length: int = 16, seed: int = 0, pairs: bool = False):
        self.rows, self.length, self.seed, self.pairs, self.given = rows, length, seed, pairs, 0

    def __next__(self) -> Batch:
        generator = np.random.default_rng([self.seed, self.given])
        self.given += 1
        return pack([self._row(generator) for _ in range(self.rows)], self.length)

    def state(self) -> dict[str, Any]:
        return {"given": self.given}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.given = state["given"]

    def _row(self, generator: np.random.Generator) -> list[Example | Pair]:
        first, second = (example(int(generator.integers(3, self.length // 2)), generator) for _ in range(2))
        return [Pair(first, second)] if self.pairs else [first, second]


def tiny_recipe(folder: Path, **changes: Any) -> Recipe:
    """A recipe whose model and data are the test's own business."""
    keys: dict[str, Any] = {
        "model_name_or_path": "none",
        "train_dataset_path": ["none"],
        "output_dir": str(folder),
        "max_steps": 6,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
    }
    return Recipe.from_dict({**keys, **changes})


def tiny_trainer(folder: Path, base: dict[str, Any] = MOE, dtype: str = "float32", **changes: Any) -> Trainer:
    """A trainer of a tiny model on random documents."""
    model = tiny_model(tiny_config(base), dtype=dtype)
    return Trainer(model, tiny_recipe(folder, **changes), RandomStream(), LanguageModelling())


def train_with_everything(folder: Path, steps: int, resume: bool) -> None:
    """In a process of its own: bfloat16 with masters, a mixture of experts, and a checkpoint at every step."""
    trainer = tiny_trainer(
        folder,
        MOE,
        "bfloat16",
        max_steps=steps,
        save_steps=1,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        moe_aux_loss_lambda=1e-2,
        moe_use_aux_free_update_coef=1e-3,
    )
    trainer.run(resume=resume)
