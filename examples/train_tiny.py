"""Trains a small ERNIE 4.5 mixture of experts from nothing, on questions that `tiny_tasks.py` writes.

    python examples/train_tiny.py --output build/tiny --workers 2 --rows 8    # two cores, 1.5 hours; stop it any time
    python examples/train_tiny.py --output build/tiny --workers 2 --rows 8 --resume
    python tools/tiny_accuracy.py build/tiny

A plain loop on this library's layers. Conversations in the chat format are packed into rows, with a mask that keeps
them apart; the loss is that of the answers, plus the router losses of every mixture-of-experts layer; after each
optimizer step the routers' correction biases move towards an even load. The output folder is a checkpoint in the
published -Paddle layout with its tokenizer, beside `training.json`, the report of the run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from muon import Muon
from paddle import Tensor
from safetensors import safe_open
from safetensors.numpy import save_file
from team import Team
from tiny_data import Batch, draw_conversations, pack
from tiny_tokenizer import build_tokenizer
from tqdm import tqdm

from ernie45 import ErnieConfig, ErnieForCausalLM, ErnieTokenizer
from ernie45.losses import (
    IGNORED_LABEL,
    language_model_loss,
    load_balance_loss,
    orthogonalization_loss,
    router_z_loss,
    update_correction_bias,
)
from ernie45.models.moe import MoE, Routing
from ernie45.runtime import set_num_threads

# The architecture of ERNIE-4.5-21B-A3B, made small: a dense first layer, then routed experts beside shared ones.
MODEL: dict[str, Any] = {
    "architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe",
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "moe_num_experts": 16, "moe_k": 2, "moe_intermediate_size": 160, "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1, "moe_use_aux_free": True,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BALANCE, ORTHOGONALITY, Z = 1e-2, 1e-2, 1e-4  # coefficients of the router losses, as in the published configs
BIAS_RATE = 1e-3  # how far a correction bias moves per step


# ----------------------------------------------------------------------------------------------------------- learning


def answer_loss(model: ErnieForCausalLM, batch: Batch) -> tuple[Tensor, Tensor, list[Routing]]:
    """Mean cross-entropy of the answers, the share of their tokens predicted rightly, and what the routers did."""
    routing: list[Routing] = []
    hidden = model.ernie(
        paddle.to_tensor(batch.input_ids),
        position_ids=paddle.to_tensor(batch.position_ids),
        attn_mask_startend_row_indices=paddle.to_tensor(batch.end_rows),
        routing=routing,
    )
    labels = batch.labels.flatten()
    places = np.flatnonzero(labels != IGNORED_LABEL)  # only these rows go through the head
    targets = paddle.to_tensor(labels[places])
    logits = model.lm_head(paddle.gather(hidden.flatten(0, 1), paddle.to_tensor(places)))
    right = (logits.detach().argmax(axis=-1) == targets).astype("float32").mean()
    return language_model_loss(logits, targets), right, routing


def router_loss(routing: list[Routing], routers: dict[int, MoE], k: int) -> Tensor:
    """The weighted sum of the three router losses over all mixture-of-experts layers."""
    terms = [
        BALANCE * load_balance_loss(step.probabilities, k)
        + ORTHOGONALITY * orthogonalization_loss(routers[step.layer].gate.weight)
        + Z * router_z_loss(step.logits)
        for step in routing
    ]
    return paddle.add_n(terms)


@paddle.no_grad()
def shrink_residual_outputs(model: ErnieForCausalLM) -> None:
    """Scales what every layer adds to the stream by 1 / sqrt(2 layers) at the start, as ERNIE's pre-training does."""
    for name, parameter in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.set_value(parameter / math.sqrt(2 * model.config.num_hidden_layers))


class Optimizers:
    """Muon for the matrices of attention and MLPs, AdamW for all else: experts, routers, embedding, norms."""

    def __init__(self, model: ErnieForCausalLM, rate: float, matrix_rate: float):
        trained = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
        matrices = {name: p for name, p in trained.items() if name.endswith("_proj.weight")}
        self.rate, self.matrix_rate = rate, matrix_rate
        self.muon = Muon(list(matrices.values()))
        self.adamw = paddle.optimizer.AdamW(
            learning_rate=rate,
            beta1=0.9,
            beta2=0.98,
            weight_decay=0.05,
            parameters=[p for name, p in trained.items() if name not in matrices],
            grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0),
            apply_decay_param_fun={p.name for p in trained.values() if p.ndim > 1}.__contains__,
        )

    def step(self, schedule: float) -> None:
        """One update with `schedule` times the peak rates; clears the gradients."""
        self.adamw.set_lr(self.rate * schedule)
        self.adamw.step()
        self.adamw.clear_grad()
        self.muon.step(self.matrix_rate * schedule)

    def state_dict(self) -> dict[str, Tensor]:
        """Momenta and moments of both optimizers."""
        moments = {f"adamw.{name}": v for name, v in self.adamw.state_dict().items() if isinstance(v, Tensor)}
        return moments | {f"muon.{name}": value for name, value in self.muon.state_dict().items()}

    def set_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state_dict` gave."""
        self.adamw.set_state_dict({name[6:]: v for name, v in state.items() if name.startswith("adamw.")})
        self.muon.set_state_dict({name[5:]: v for name, v in state.items() if name.startswith("muon.")})


def schedule(step: int, progress: float, warmup: int = 50) -> float:
    """Factor of the learning rates: a linear warm-up, then 1, then a linear descent to 0 over the last two thirds."""
    return min(1.0, (step + 1) / warmup, max(0.0, 1.0 - progress) * 1.5)


def average_over_team(team: Team, model: ErnieForCausalLM, counts: dict[int, Tensor], seconds: float) -> float:
    """Averages gradients and the experts' token counts over the team, in place; returns the mean of the clocks.

    With one clock for all, all workers stop at the same step.
    """
    if team.size == 1:
        return seconds
    shared = [p.grad for p in model.parameters() if p.grad is not None] + list(counts.values())
    arrays = [tensor.numpy().astype(np.float32) for tensor in shared]
    *means, clock = team.average([*arrays, np.array([seconds], np.float32)])
    for tensor, mean in zip(shared, means, strict=True):
        tensor.set_value(mean)
    return float(clock[0])


def expert_load(counts: dict[int, Tensor]) -> dict[str, float]:
    """How many times the mean load the busiest expert of each layer carries: 1 is even, the expert count the worst."""
    return {str(layer): round(float(count.max() / count.mean()), 3) for layer, count in counts.items()}


# -------------------------------------------------------------------------------------------------------------- files


CHECKPOINT, REPORT = "checkpoint.safetensors", "training.json"


@dataclass
class Report:
    """The record of a run, written as training.json and kept through checkpoints."""

    seed: int
    rows: int
    length: int
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    expert_load_at_start: dict[str, float] = field(default_factory=dict)
    expert_load_at_end: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, then puts it in place: never half a file."""
    unfinished = path.with_name(f".{path.name}.tmp")
    write(unfinished)
    os.replace(unfinished, path)


def save(output: Path, model: ErnieForCausalLM, optimizers: Optimizers, report: Report) -> None:
    """Writes the model in bfloat16, the report, and all that a resumed run needs in one safetensors file."""
    model.save_pretrained(output, dtype="bfloat16", progress=False)
    tensors = {f"model.{name}": value.numpy() for name, value in model.named_parameters()}
    tensors |= {f"optimizer.{name}": value.numpy() for name, value in optimizers.state_dict().items()}
    text = json.dumps(asdict(report), indent=1) + "\n"
    replace_file(output / CHECKPOINT, lambda unfinished: save_file(tensors, unfinished, metadata={"report": text}))
    replace_file(output / REPORT, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def load_checkpoint(path: Path, model: ErnieForCausalLM, optimizers: Optimizers) -> Report:
    """Puts a checkpoint's state into the model and the optimizer; returns the report so far."""
    parameters, state = dict(model.named_parameters()), {}
    with safe_open(path, "np") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            owner, _, name = key.partition(".")
            if owner == "model":
                parameters[name].set_value(file.get_tensor(key))
            else:
                state[name] = paddle.to_tensor(file.get_tensor(key))
        report = Report(**json.loads(file.metadata()["report"]))
    optimizers.set_state_dict(state)
    return report


# ---------------------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Settings:
    """What a run is made of: the folder, its length, the seed, the batch, and the peaks of the learning rates.

    `steps` and `minutes`: whichever is used up first ends the run; parts before a resume are counted in.
    `rows` rows of `length` tokens make the batch of one worker. `changes` are config keys that differ from `MODEL`.
    """

    output: Path
    steps: int = 11000
    minutes: float = math.inf
    seed: int = 0
    workers: int = 1
    rows: int = 16
    length: int = 128
    rate: float = 1.5e-3
    matrix_rate: float = 0.02
    save_minutes: float = 3.0
    resume: bool = False
    changes: dict[str, Any] = field(default_factory=dict)


def train(team: Team, settings: Settings) -> Report:
    """Trains and leaves a checkpoint folder with training.json at `settings.output`; one call per worker."""
    paddle.seed(settings.seed)
    first = team.rank == 0
    tokenizer = ErnieTokenizer.from_pretrained(settings.output)
    vocabulary = math.ceil(len(tokenizer) / 64) * 64
    config = ErnieConfig.from_dict({**MODEL, "vocab_size": vocabulary, **settings.changes})
    model = ErnieForCausalLM(config)
    model.train()
    if team.size > 1:
        set_num_threads(1)
    shrink_residual_outputs(model)
    routers = {index: layer.mlp for index, layer in enumerate(model.ernie.layers) if isinstance(layer.mlp, MoE)}
    optimizers = Optimizers(model, settings.rate, settings.matrix_rate)
    report = Report(settings.seed, team.size * settings.rows, settings.length)
    if settings.resume:
        report = load_checkpoint(settings.output / CHECKPOINT, model, optimizers)

    bar = tqdm(total=settings.steps, initial=report.steps, unit="step", mininterval=1.0, disable=not first)
    saved, now = report.seconds, time.monotonic()
    while (progress := max(report.steps / settings.steps, report.seconds / 60 / settings.minutes)) < 1:
        rng = random.Random(f"{settings.seed} {report.steps} {team.rank}")
        batch = pack(draw_conversations(rng, tokenizer.encode, config.eos_token_id), settings.rows, settings.length)
        loss, right, routing = answer_loss(model, batch)
        (loss + router_loss(routing, routers, config.moe_k)).backward()
        counts = {step.layer: step.counts.astype("float32") for step in routing}
        previous, now = now, time.monotonic()
        clock = average_over_team(team, model, counts, report.seconds + now - previous)
        optimizers.step(schedule(report.steps, progress))
        for layer, count in counts.items():
            update_correction_bias(routers[layer].moe_statics.e_score_correction_bias, count.unsqueeze(0), BIAS_RATE)

        if report.steps % 20 == 0:
            point = {"step": report.steps, "loss": round(float(loss), 4), "right": round(float(right), 4)}
            report.curve.append(point)
            report.expert_load_at_end = expert_load(counts)
            report.expert_load_at_start = report.expert_load_at_start or report.expert_load_at_end
            bar.set_postfix(point | {"tokens/s": int(report.tokens / max(report.seconds, 1e-9))}, refresh=False)
        report.steps += 1
        report.tokens += batch.tokens * team.size
        report.seconds = clock
        bar.update()
        if first and report.seconds - saved > settings.save_minutes * 60:
            save(settings.output, model, optimizers, report)
            saved = report.seconds
    bar.close()
    if first:
        save(settings.output, model, optimizers, report)
    return report


def parse_arguments() -> Settings:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Train a small ERNIE 4.5 mixture of experts.")
    parser.add_argument("--output", type=Path, default=Path("build/tiny"), help="checkpoint folder (build/tiny)")
    parser.add_argument("--steps", type=int, default=11000, help="optimizer steps (11000)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this much training time")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the questions (0)")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the batch, one thread each (1)")
    parser.add_argument("--rows", type=int, default=16, help="rows of 128 tokens in the batch of a worker (16)")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate of AdamW (1.5e-3)")
    parser.add_argument("--matrix-rate", type=float, default=0.02, help="peak learning rate of Muon (0.02)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    return Settings(**vars(parser.parse_args()))


if __name__ == "__main__":
    settings = parse_arguments()
    if not settings.resume:
        build_tokenizer(settings.output)
    report = Team(settings.workers).run(train, settings)
    print(f"{report.tokens:,} tokens in {report.seconds:.0f} s; busiest expert, times the mean load:")
    print(f"  at the start {report.expert_load_at_start}, at the end {report.expert_load_at_end}")
