"""The training loop."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import paddle
from tqdm import tqdm

from ernie45.checkpoint.folder import SINGLE_NAME
from ernie45.checkpoint.names import PADDLE
from ernie45.errors import ErnieError
from ernie45.lora import files as lora_files
from ernie45.losses.router import attach
from ernie45.models.parts import freeze, parts
from ernie45.models.pretrained import PretrainedModel
from ernie45.training.checkpoints import (
    LATEST,
    OPTIMIZER_FILE,
    STATE_FILE,
    CheckpointWriter,
    Snapshot,
    fill,
    pointed,
    read_state,
)
from ernie45.training.data.packing import Batch
from ernie45.training.log import STEP, Board, CsvLog, Log
from ernie45.training.objectives import Objective
from ernie45.training.optimizer import AdamW, Rates, clip_scale, global_norm, parameter_groups
from ernie45.training.recipe import Recipe
from ernie45.training.recompute import recompute
from ernie45.training.routers import Routers
from ernie45.training.schedules import factor

LOG_FILE = "training.csv"
COLUMNS = ("loss", "learning_rate", "gradient_norm", "learned", "tokens", "tokens_per_second", "eval_loss")
_SEEDS_PER_RUN = 1_000_003


class Stream(Protocol):
    """An endless source of batches that knows how to go on where it was."""

    def __next__(self) -> Batch:
        """The next batch."""
        ...

    def state(self) -> dict[str, Any]:
        """Where it is, as JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Goes there."""
        ...


class Trainer:
    """Trains a model by a recipe.

    A run is determined by model, recipe and stream: random numbers are drawn anew at every step from the seed and the
    number of the step, so a run that is resumed gives the same losses to the bit.

    Args:
        model: with adapters if the recipe says LoRA; it is switched to training, and parts are frozen.
        recipe: of it, only what concerns the loop itself is heeded; data and model are the caller's.
        stream: what to learn from.
        objective: the loss.
        evaluation: gives the batches to evaluate on, the same ones every time; None: no evaluation.
        files: small files that every checkpoint gets a copy of, such as those of the tokenizer.

    Raises:
        ErnieError: the recipe does not go with the model.
    """

    def __init__(
        self,
        model: PretrainedModel,
        recipe: Recipe,
        stream: Stream,
        objective: Objective,
        evaluation: Callable[[], Iterable[Batch]] | None = None,
        files: Iterable[Path] = (),
    ):
        self.model, self.recipe, self.stream, self.objective = model, recipe, stream, objective
        self.evaluation, self.files = evaluation, tuple(files)
        self.folder = Path(recipe.output_dir)
        self.adapters = getattr(model, "lora", None)
        _freeze(model, recipe.freeze)
        model.train()
        self.optimizer = _optimizer(model, recipe)
        self.routers = Routers(model, recipe)
        if recipe.recompute:
            recompute(model, recipe.recompute_granularity)
        self.step, self.tokens, self.best_loss = 0, 0, math.inf

    def run(self, resume: bool = False) -> None:
        """Trains to the last step of the recipe, with checkpoints, evaluations and the record in its output folder.

        Args:
            resume: go on from the latest checkpoint there; from the start if there is none.

        Raises:
            ErnieError: the loss is not finite, a checkpoint could not be written, or the folder holds another run.
        """
        if resume:
            self.restore()
        elif pointed(self.folder) is not None:
            raise ErnieError(f"{self.folder}: holds checkpoints of an earlier run; go on with --resume, or move them")
        with contextlib.ExitStack() as stack:
            writer = stack.enter_context(
                contextlib.closing(CheckpointWriter(self.folder, self.recipe.save_total_limit))
            )
            logs = [stack.enter_context(contextlib.closing(log)) for log in self._logs()]
            bar = stack.enter_context(self._progress_bar())
            while self.step < self.recipe.max_steps:
                row = self.train_step(before_update=writer.wait_until_copied)
                bar.update()
                bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['tokens_per_second']:.0f} tokens/s", refresh=False)
                self._after_step(row, writer, logs)

    def train_step(self, before_update: Callable[[], None] = lambda: None) -> dict[str, float]:
        """One step of the optimizer; returns what is recorded of it.

        The loss is the mean over the learned tokens (or the pairs) of all micro batches together: each of them enters
        with its share of these, so that how a step is cut into micro batches makes no difference. Router losses, which
        are means over all tokens, enter with equal shares. They reach the gradients, not the loss that is reported.

        Args:
            before_update: called when the gradients are there, before anything changes.

        Raises:
            ErnieError: loss or gradients are not finite. The weights are those of the step before.
        """
        start, recipe = time.perf_counter(), self.recipe
        paddle.seed((recipe.seed * _SEEDS_PER_RUN + self.step) % 2**31)
        batches = [next(self.stream) for _ in range(recipe.gradient_accumulation_steps)]
        counts = [self.objective.count(batch) for batch in batches]
        loss, report = 0.0, dict.fromkeys(self.objective.columns, 0.0)
        for batch, count in zip(batches, counts, strict=True):
            share = count / max(1, sum(counts))
            value, details = self._backward(batch, share, 1 / len(batches))
            loss += share * value
            report = {name: total + share * details[name] for name, total in report.items()}
            if batch is not batches[-1]:
                self.optimizer.accumulate()
        gradients = self.optimizer.gradients()
        norm = global_norm(gradients)
        self._check_finite(loss, norm)
        before_update()
        rate = self.learning_rate
        self.optimizer.step(rate, gradients, clip_scale(norm, recipe.max_grad_norm))
        self.routers.update(rate)
        self.step += 1
        tokens = sum(batch.tokens for batch in batches)
        self.tokens += tokens
        return {
            STEP: self.step,
            "loss": loss,
            "learning_rate": rate,
            "gradient_norm": norm,
            "learned": sum(batch.learned for batch in batches),
            "tokens": self.tokens,
            "tokens_per_second": tokens / (time.perf_counter() - start),
            **report,
            **self.routers.report(),
        }

    @property
    def learning_rate(self) -> float:
        """Of the coming step, before the factors of parameter groups."""
        recipe = self.recipe
        floor = recipe.min_lr / recipe.learning_rate
        name, steps = recipe.lr_scheduler_type, recipe.max_steps
        return recipe.learning_rate * factor(name, self.step, steps, recipe.warmup_steps, floor)

    @paddle.no_grad()
    def evaluate(self) -> float:
        """The mean loss over the evaluation's batches."""
        assert self.evaluation is not None
        self.model.eval()
        total, weight = 0.0, 0
        for _, batch in zip(range(self.recipe.max_evaluate_steps), self.evaluation(), strict=False):
            count = self.objective.count(batch)
            total += count * float(self.objective(self.model, batch).loss)
            weight += count
        self.model.train()
        if not weight:
            raise ErnieError("eval_dataset_path: holds nothing to evaluate on")
        return total / weight

    def snapshot(self, best: bool = False) -> Snapshot:
        """All that a resumed run needs, as it is now."""
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "best_loss": None if math.isinf(self.best_loss) else self.best_loss,
            "stream": self.stream.state(),
            "recipe": asdict(self.recipe),
        }
        documents = {STATE_FILE: state}
        if self.adapters is not None:
            documents[lora_files.CONFIG_NAME] = lora_files.to_dict(self.adapters.config)
        else:
            config = self.model.config.replace(dtype=self.model.dtype, quantization_config=None)
            documents["config.json"] = config.to_dict(PADDLE)
            documents["generation_config.json"] = self.model.generation_config.to_dict()
        tensors = {self._weights_file: self._weights(), OPTIMIZER_FILE: self.optimizer.state_dict()}
        return Snapshot(self.step, tensors, documents, self.files, best)

    def restore(self) -> None:
        """Goes back to the latest checkpoint in the output folder, if there is one.

        Raises:
            CheckpointError: it cannot be read, or belongs to another run.
        """
        checkpoint = pointed(self.folder, LATEST)
        if checkpoint is None:
            return
        state = read_state(checkpoint)
        fill(self._weights(), checkpoint, self._weights_file)
        fill(self.optimizer.state_dict(), checkpoint, OPTIMIZER_FILE)
        self.stream.restore(state["stream"])
        self.step, self.tokens = state["step"], state["tokens"]
        self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]

    def _backward(self, batch: Batch, share: float, router_share: float) -> tuple[float, dict[str, float]]:
        """The loss of a micro batch and its report, after its gradients were added to the others'."""
        notes = self.routers.notes()
        result = self.objective(self.model, batch, notes)
        term, loss = self.routers.take(notes), result.loss * share
        (loss if term is None else attach(loss, term * router_share)).backward()
        return float(result.loss), result.report

    def _after_step(self, row: dict[str, float], writer: CheckpointWriter, logs: list[Log]) -> None:
        recipe, last = self.recipe, self.step == self.recipe.max_steps
        best = False
        if self.evaluation is not None and recipe.eval_steps and (self.step % recipe.eval_steps == 0 or last):
            row["eval_loss"] = self.evaluate()
            best = row["eval_loss"] < self.best_loss
            self.best_loss = min(self.best_loss, row["eval_loss"])
        if self.step % recipe.logging_steps == 0 or "eval_loss" in row or last:
            for log in logs:
                log.write(row)
        if self.step % recipe.save_steps == 0 or best or last:
            writer.save(self.snapshot(best))

    def _check_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        raise ErnieError(
            f"step {self.step + 1}: the loss is {loss}, the norm of the gradients {norm}; the weights were left as "
            f"they were, and the checkpoints in {self.folder} are whole. Lower learning_rate, or look at the data"
        )

    def _logs(self) -> list[Log]:
        columns = (STEP, *COLUMNS, *self.objective.columns, *self.routers.columns)
        logs: list[Log] = [CsvLog(self.folder / LOG_FILE, columns, after=self.step)]
        if self.recipe.report_to != "none":
            logs.append(Board(self.recipe.report_to, self.folder / self.recipe.report_to))
        return logs

    def _progress_bar(self) -> tqdm:
        steps, hidden = self.recipe.max_steps, self.recipe.disable_tqdm
        return tqdm(total=steps, initial=self.step, desc="training", unit="step", disable=hidden)

    @property
    def _weights_file(self) -> str:
        return SINGLE_NAME if self.adapters is None else lora_files.WEIGHTS_NAME

    def _weights(self) -> dict[str, paddle.Tensor]:
        return self.model.state_dict() if self.adapters is None else lora_files.tensors(self.model)


def _freeze(model: PretrainedModel, names: Iterable[str]) -> None:
    """Adapters in these parts as well; then the weights are frozen already, and may be packed."""
    if getattr(model, "lora", None) is None:
        freeze(model, names)
        return
    for name in names:
        for parameter in parts(model)[name]:
            parameter.stop_gradient = True


def _optimizer(model: PretrainedModel, recipe: Recipe) -> AdamW:
    rates = Rates(recipe.moe_gate_lr_ratio, recipe.vit_lr_ratio, recipe.lora_plus_scale)
    depth = 0 if model.config.vision is None else model.config.vision.depth
    groups = parameter_groups(model.named_parameters(), recipe.weight_decay, rates, depth)
    return AdamW(groups, recipe.adam_beta1, recipe.adam_beta2, recipe.adam_epsilon)
