"""Trains a small ERNIE 4.5 vision-language model on questions that `tiny_tasks.py` and `tiny_skills.py` write.

    python examples/train_tiny.py --output build/tiny --workers 2                      # from nothing; stop it any time
    python examples/train_tiny.py --output build/tiny --workers 2 --resume
    python examples/train_tiny.py --output build/tiny --workers 2 --text ernie45-tiny  # begin with these text weights
    python tools/tiny_accuracy.py build/tiny

The stages follow the ERNIE 4.5 report: text first; then tower and adapter learn to name pictures; then they and the
vision experts learn to serve the frozen text model; then everything learns together; then the formats of thinking and
of tools; last, right replies are preferred over wrong ones. `STAGES` says what each one trains, and on what. It is a
plain loop on this library's layers. Documents are packed into rows, with a mask that keeps them apart; the loss is that
of the answers, plus the router losses of both expert banks; after each optimizer step the routers' correction biases
move towards an even load. The output folder is a checkpoint in the published -Paddle layout with its tokenizer, beside
`training.json`, the report of the run, and a copy of the model after each stage in `stages/`. The handwritten digits
come with scikit-learn: `pip install ".[tiny]"`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Mapping
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
from tiny_data import Batch, draw_conversations, draw_samples, pack
from tiny_model import make_model, take_text_weights
from tiny_naming import Named, draw_named, name_pictures, naming_loss
from tiny_pictures import LIMITS
from tiny_preferences import answers_of, draw_pairs, pair_loss, side_by_side
from tiny_skills import LESSONS
from tiny_tokenizer import build_tokenizer, copy_tokenizer
from tqdm import tqdm

from ernie45 import ErnieForConditionalGeneration, ErnieProcessor, ErnieTokenizer
from ernie45.chat import VISION_TEMPLATE
from ernie45.losses import IGNORED_LABEL, language_model_loss, router_losses, token_log_probs, update_correction_bias
from ernie45.models.moe import Routing
from ernie45.models.parts import PARTS, freeze, router_weights, unfreeze
from ernie45.processing.processor import SETTINGS_FILE
from ernie45.runtime import set_num_threads

BALANCE, ORTHOGONALITY, Z = 1e-2, 1e-2, 1e-4  # coefficients of the router losses, as in the published configs
BIAS_RATE = 1e-3  # how far a correction bias moves per step
BANKS = ("text", "vision")
NAMES = "names"
KINDS = (*LESSONS, NAMES)  # what a tally counts
# Until the formats are learned, a reply follows "Assistant: " at once.
BARE_TEMPLATE = VISION_TEMPLATE.replace("('<think>' if enable_thinking else '<think>\\n\\n</think>\\n\\n')", "''")


@dataclass(frozen=True)
class Mix:
    """Batches of one kind: rows of `length` tokens, the cost of which grows with their square, filled with lessons.

    Attributes:
        shares: of the kinds of lessons, see `tiny_skills.LESSONS`; none: conversations of text alone.
        length: of a row.
        share: of the steps of the stage.
    """

    shares: Mapping[str, float] = field(default_factory=dict)
    length: int = 128
    share: float = 1.0


@dataclass(frozen=True)
class Stage:
    """A stretch of the training.

    Attributes:
        name: of the stage.
        steps: of the optimizers.
        parts: what learns, of `ernie45.models.parts.PARTS`; the rest is frozen.
        mixes: what it learns from; each step takes one of them.
        names: pictures to name in every step, see `tiny_naming.py`, for each 100 tokens that a batch has room for. What
            tower and adapter know about pictures is lost again unless it is asked for.
        formats: whether prompts have the formats of thinking and tools.
        pairs: learn from pairs of right and wrong replies, compared with the model that the stage before left.
        rate, matrix_rate: peak learning rates of AdamW and of Muon.
    """

    name: str
    steps: int
    parts: tuple[str, ...]
    mixes: tuple[Mix, ...] = ()
    names: int = 0
    formats: bool = False
    pairs: bool = False
    rate: float = 1.5e-3
    matrix_rate: float = 0.02

    @property
    def template(self) -> str:
        """The chat template of the prompts."""
        return VISION_TEMPLATE if self.formats else BARE_TEMPLATE


SIGHT = ("vision", "adapter", "vision_experts")
STAGES = (
    Stage("text", 11000, ("text",), (Mix(),)),
    Stage("names", 1800, ("vision", "adapter"), names=5),
    Stage("vision", 300, SIGHT, (Mix({
        "one digit": 0.2, "several digits": 0.3, "two-digit number": 0.15, "clip, what came after": 0.15,
        "clip, when": 0.2,
    }),), names=1, rate=1e-3, matrix_rate=0.01),
    Stage("joint", 900, PARTS, (Mix({
        "text": 0.38, "three-digit sums, in steps": 0.03, "one digit": 0.07, "several digits": 0.12,
        "two-digit number": 0.07, "sum of two pictures": 0.08, "larger of two pictures": 0.05,
        "clip, what came after": 0.09, "clip, when": 0.11,
    }),), names=1, rate=1e-3, matrix_rate=0.008),
    Stage("formats", 2000, PARTS, (
        Mix({
            "text": 0.35, "one digit": 0.05, "several digits": 0.1, "two-digit number": 0.06,
            "sum of two pictures": 0.06, "larger of two pictures": 0.04, "clip, what came after": 0.08,
            "clip, when": 0.1, "three-digit sums, thinking": 0.05, "three-digit sums, at once": 0.06,
            "any question, thinking": 0.05,
        }, share=0.9),
        Mix({
            "tool calls": 0.4, "answers from tool output": 0.3, "questions beside a tool": 0.3,
        }, length=320, share=0.1),
    ), names=3, formats=True, rate=8e-4, matrix_rate=0.006),
    Stage("preferences", 60, PARTS, (Mix({
        "text": 0.3, "one digit": 0.05, "several digits": 0.1, "sum of two pictures": 0.1,
        "clip, what came after": 0.05, "clip, when": 0.1, "three-digit sums, thinking": 0.1,
        "three-digit sums, at once": 0.2,
    }),), formats=True, pairs=True, rate=2e-5, matrix_rate=2e-4),
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- learning


@dataclass(frozen=True)
class Outcome:
    """What a step gave: the loss, what of the answers was right and of which kind that is, the routers' choices."""

    loss: Tensor
    right: np.ndarray
    kinds: np.ndarray
    routing: list[Routing]


def predict(model: ErnieForConditionalGeneration, batch: Batch) -> tuple[Tensor, Tensor, Tensor, list[Routing]]:
    """The forward pass, in which only the answers go through the head.

    Returns:
        logits [learned tokens, vocab_size], their labels [learned tokens], their places in the flattened batch, and
        what the routers did.
    """
    routing: list[Routing] = []
    hidden = model.ernie(
        paddle.to_tensor(batch.input_ids),
        position_ids=paddle.to_tensor(batch.position_ids),
        attn_mask_startend_row_indices=paddle.to_tensor(batch.end_rows),
        routing=routing,
        banks=paddle.to_tensor(np.minimum(batch.types, 1)),  # that of padding is -1: none
        features=None if batch.images is None else model.encode_images(paddle.to_tensor(batch.images), batch.grid),
    )
    labels = batch.labels.flatten()
    places = paddle.to_tensor(np.flatnonzero(labels != IGNORED_LABEL))
    logits = model.lm_head(paddle.gather(hidden.flatten(0, 1), places))
    return logits, paddle.gather(paddle.to_tensor(labels), places), places, routing


def learn_answers(model: ErnieForConditionalGeneration, batch: Batch) -> Outcome:
    """The mean cross-entropy of the answers."""
    logits, labels, places, routing = predict(model, batch)
    right = (logits.detach().argmax(axis=-1) == labels).numpy()
    return Outcome(language_model_loss(logits, labels), right, batch.kinds.flatten()[places.numpy()], routing)


def learn_preferences(
    model: ErnieForConditionalGeneration, reference: ErnieForConditionalGeneration, batch: Batch
) -> Outcome:
    """Direct preference optimisation over rows of right and then of wrong replies."""
    logits, labels, places, routing = predict(model, batch)
    policy = answers_of(token_log_probs(logits, labels), places, batch)
    with paddle.no_grad():
        fixed = answers_of(token_log_probs(predict(reference, batch)[0], labels), places, batch)
    loss, ordered = pair_loss(policy, fixed)
    return Outcome(loss, ordered.numpy(), batch.kinds[: len(batch.kinds) // 2, 0], routing)


def learn_names(model: ErnieForConditionalGeneration, processor: ErnieProcessor, batch: Named) -> Outcome:
    """Digits as the names of pictures; the decoder takes no part."""
    digit_ids = [processor.tokenizer.encode(str(digit))[0] for digit in range(10)]
    loss, right = naming_loss(name_pictures(model, digit_ids, batch), batch)
    return Outcome(loss, right, np.full(len(right), KINDS.index(NAMES)), [])


def learn(
    model: ErnieForConditionalGeneration,
    reference: ErnieForConditionalGeneration | None,
    processor: ErnieProcessor,
    batch: Batch | None,
    named: Named | None,
) -> Outcome:
    """The forward pass of a step; its loss is the sum of those of lessons and names."""
    outcomes = []
    if batch is not None:
        outcomes.append(
            learn_answers(model, batch) if reference is None else learn_preferences(model, reference, batch)
        )
    if named is not None:
        outcomes.append(learn_names(model, processor, named))
    return Outcome(
        paddle.add_n([outcome.loss for outcome in outcomes]),
        np.concatenate([outcome.right for outcome in outcomes]),
        np.concatenate([outcome.kinds for outcome in outcomes]),
        [step for outcome in outcomes for step in outcome.routing],
    )


class Optimizers:
    """Muon for the matrices of attention, MLPs, tower and adapter, AdamW for all else: experts, embedding, norms."""

    def __init__(self, model: ErnieForConditionalGeneration, rate: float, matrix_rate: float):
        trained = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
        matrices = {name: p for name, p in trained.items() if p.ndim == 2 and not _has_own_scale(name)}
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


def _has_own_scale(name: str) -> bool:
    """Whether a matrix is one whose rows or columns stand for themselves: embedding, routers, patches."""
    return "embed" in name or ".gate." in name


def schedule(step: int, progress: float, warmup: int = 50) -> float:
    """Factor of the learning rates: a linear warm-up, then 1, then a linear descent to 0 over the last two thirds."""
    return min(1.0, (step + 1) / warmup, max(0.0, 1.0 - progress) * 1.5)


def average_over_team(team: Team, model: ErnieForConditionalGeneration, counts: Tensor, seconds: float) -> float:
    """Averages gradients and the experts' token counts over the team, in place; returns the mean of the clocks.

    With one clock for all, all workers stop at the same step. A parameter that no token of this worker's batch needed
    counts as one with a gradient of zeros.
    """
    trained = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    if team.size == 1:
        return seconds
    arrays = [np.zeros(p.shape, "float32") if p.grad is None else p.grad.numpy() for p in trained]
    *means, load, clock = team.average([*arrays, counts.numpy(), np.array([seconds], np.float32)])
    for parameter, mean in zip(trained, means, strict=True):
        if parameter.grad is None:
            parameter.grad = paddle.to_tensor(mean)
        else:
            parameter.grad.set_value(mean)
    counts.set_value(load)
    return float(clock[0])


def expert_counts(routing: list[Routing], layers: list[int], experts: int) -> Tensor:
    """Assignments [layers, banks, experts] float32."""
    counts = np.zeros((len(layers), len(BANKS), experts), "float32")
    for step in routing:
        counts[layers.index(step.layer), step.bank] = step.counts.numpy()
    return paddle.to_tensor(counts)


def expert_load(counts: Tensor, layers: list[int]) -> dict[str, dict[str, list[float]]]:
    """By bank and layer, how many times the mean load each expert carries: 1 is even."""
    load = counts.numpy() / np.maximum(counts.numpy().mean(axis=-1, keepdims=True), 1e-9)
    return {
        bank: {str(layer): [round(float(v), 3) for v in load[row, number]] for row, layer in enumerate(layers)}
        for number, bank in enumerate(BANKS)
    }


# -------------------------------------------------------------------------------------------------------------- files


CHECKPOINT, REPORT = "checkpoint.safetensors", "training.json"


@dataclass
class StageReport:
    """The record of one stage.

    Attributes:
        expert_load_at_start, expert_load_at_end: see `expert_load`.
        curve: every few steps the loss, the share of what was right (tokens of answers, names of pictures), and the
            same by kind of lesson.
    """

    name: str
    steps: int = 0
    tokens: int = 0
    patches: int = 0
    seconds: float = 0.0
    expert_load_at_start: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    expert_load_at_end: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Report:
    """The record of a run, written as training.json and kept through checkpoints."""

    seed: int
    tokens_per_step: int
    text: str | None
    stages: list[StageReport] = field(default_factory=list)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Reads what `to_json` wrote."""
        content = json.loads(text)
        stages = [StageReport(**stage) for stage in content.pop("stages")]
        return cls(**content, stages=stages)

    def to_json(self) -> str:
        """The content of training.json."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, then puts it in place: never half a file."""
    unfinished = path.with_name(f".{path.name}.tmp")
    write(unfinished)
    os.replace(unfinished, path)


def save(output: Path, model: ErnieForConditionalGeneration, optimizers: Optimizers, report: Report) -> None:
    """Writes the model in bfloat16, the report, and all that a resumed run needs in one safetensors file."""
    model.save_pretrained(output, dtype="bfloat16", progress=False)
    write_limits(output)
    tensors = {f"model.{name}": value.numpy() for name, value in model.named_parameters()}
    tensors |= {f"optimizer.{name}": value.numpy() for name, value in optimizers.state_dict().items()}
    text = report.to_json()
    replace_file(output / CHECKPOINT, lambda unfinished: save_file(tensors, unfinished, metadata={"report": text}))
    replace_file(output / REPORT, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def write_limits(folder: Path) -> None:
    """Tells the processor how large pictures are at most."""
    text = json.dumps(LIMITS, indent=2) + "\n"
    replace_file(folder / SETTINGS_FILE, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def load_model(path: Path, model: ErnieForConditionalGeneration) -> Report:
    """Puts a checkpoint's parameters into the model; returns the report so far."""
    parameters = dict(model.named_parameters())
    with safe_open(path, "np") as file:
        for name, parameter in parameters.items():
            parameter.set_value(file.get_tensor(f"model.{name}"))
        return Report.from_json(file.metadata()["report"])


def load_optimizers(path: Path, optimizers: Optimizers) -> None:
    """Puts a checkpoint's momenta into the optimizers of the same stage."""
    with safe_open(path, "np") as file:
        names = [name for name in file.keys() if name.startswith("optimizer.")]  # noqa: SIM118 - not a dict
        optimizers.set_state_dict({name[10:]: paddle.to_tensor(file.get_tensor(name)) for name in names})


# ---------------------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Settings:
    """What a run is made of.

    Attributes:
        output: the folder.
        stages: in their order; `scale` stretches or shortens all of them.
        text: a text checkpoint to begin with, instead of the stage "text".
        tokens: of a batch of one worker, padding included.
        changes: config keys that differ from `tiny_model.MODEL`.
    """

    output: Path
    stages: tuple[Stage, ...] = STAGES
    scale: float = 1.0
    text: str | None = None
    seed: int = 0
    workers: int = 1
    tokens: int = 1280
    save_minutes: float = 3.0
    resume: bool = False
    changes: dict[str, Any] = field(default_factory=dict)


def next_batch(stage: Stage, processor: ErnieProcessor, settings: Settings, step: int, rank: int) -> Batch | None:
    """The lessons of one worker in one step; all workers take the same mix."""
    if not stage.mixes:
        return None
    mix = random.Random(f"{settings.seed} {stage.name} {step}").choices(stage.mixes, [m.share for m in stage.mixes])[0]
    rng = random.Random(f"{settings.seed} {stage.name} {step} {rank}")
    rows, end = settings.tokens // mix.length, processor.tokenizer.eos_token_id
    if stage.pairs:
        return side_by_side(draw_pairs(rng, mix.shares, processor, stage.template, end), rows, mix.length)
    if mix.shares:
        return pack(draw_samples(rng, mix.shares, processor, stage.template, end), rows, mix.length)
    return pack(draw_conversations(rng, processor.tokenizer.encode, end), rows, mix.length)


def next_names(
    stage: Stage, processor: ErnieProcessor, settings: Settings, step: int, progress: float, rank: int
) -> Named | None:
    """The pictures that one worker names in one step; they begin easy where naming is all there is to learn."""
    if not stage.names:
        return None
    rng = random.Random(f"{settings.seed} {stage.name} {step} {rank} {NAMES}")
    count = settings.tokens * stage.names // 100
    return draw_named(rng, count, processor, 1.0 if stage.mixes else progress)


def train_stage(
    team: Team, settings: Settings, stage: Stage, model: ErnieForConditionalGeneration, report: Report, resume: bool
) -> None:
    """Trains one stage to its end; the last of `report.stages` is its own."""
    processor = ErnieProcessor(ErnieTokenizer.from_pretrained(settings.output), model.config, **LIMITS)
    freeze(model, [part for part in PARTS if part not in stage.parts])
    unfreeze(model, stage.parts)
    optimizers = Optimizers(model, stage.rate, stage.matrix_rate)
    if resume:
        load_optimizers(settings.output / CHECKPOINT, optimizers)
    reference = None
    if stage.pairs:
        before = settings.output / "stages" / report.stages[-2].name
        reference = ErnieForConditionalGeneration.from_pretrained(before, dtype="float32")
    own, weights = report.stages[-1], router_weights(model)
    layers = list(weights)
    experts = model.ernie.layers[layers[0]].mlp.moe_statics.e_score_correction_bias.shape[-1]
    steps = max(1, round(stage.steps * settings.scale))
    tally = np.zeros((2, len(KINDS)))
    bar = tqdm(total=steps, initial=own.steps, desc=stage.name, unit="step", mininterval=1, disable=team.rank > 0)
    saved, now = own.seconds, time.monotonic()
    while own.steps < steps:
        batch = next_batch(stage, processor, settings, own.steps, team.rank)
        named = next_names(stage, processor, settings, own.steps, own.steps / steps, team.rank)
        outcome = learn(model, reference, processor, batch, named)
        router = router_losses(
            outcome.routing, weights, model.config.moe_k, balance=BALANCE, orthogonality=ORTHOGONALITY, z=Z
        )
        (outcome.loss + router.total).backward()
        counts = expert_counts(outcome.routing, layers, experts)
        previous, now = now, time.monotonic()
        own.seconds = average_over_team(team, model, counts, own.seconds + now - previous)
        optimizers.step(schedule(own.steps, own.steps / steps))
        update_biases(model, layers, counts, stage.parts)

        for place, values in enumerate((outcome.right, np.ones(len(outcome.right)))):
            np.add.at(tally[place], outcome.kinds, values)
        own.tokens += 0 if batch is None else batch.tokens * team.size
        shown = [part.images for part in (batch, named) if part is not None and part.images is not None]
        own.patches += sum(map(len, shown)) * team.size
        if own.steps % 20 == 0:
            note(own, float(outcome.loss), tally, expert_load(counts, layers), bar)
            tally[:] = 0
        own.steps += 1
        bar.update()
        if team.rank == 0 and own.seconds - saved > settings.save_minutes * 60:
            save(settings.output, model, optimizers, report)
            saved = own.seconds
    bar.close()
    if team.rank == 0:
        save(settings.output, model, optimizers, report)
        folder = settings.output / "stages" / stage.name
        copy_tokenizer(settings.output, folder, stage.template)
        write_limits(folder)
        model.save_pretrained(folder, dtype="bfloat16", progress=False)
    team.meet()  # the next stage may read what this one wrote


def update_biases(
    model: ErnieForConditionalGeneration, layers: list[int], counts: Tensor, trained: tuple[str, ...]
) -> None:
    """Moves the correction biases of the banks whose experts learn."""
    for row, layer in enumerate(layers):
        bias = model.ernie.layers[layer].mlp.moe_statics.e_score_correction_bias
        before = bias.clone()
        update_correction_bias(bias, counts[row], BIAS_RATE)
        for bank, part in enumerate(("text", "vision_experts")):
            if part not in trained:
                bias[bank] = before[bank]


def note(own: StageReport, loss: float, tally: np.ndarray, load: dict[str, Any], bar: tqdm) -> None:
    """Adds a point to the curve, and shows it."""
    by_kind = {
        kind: round(right / count, 4) for kind, right, count in zip(KINDS, *tally, strict=True) if count
    }  # fmt: skip
    right = round(tally[0].sum() / max(tally[1].sum(), 1), 4)
    own.curve.append({"step": own.steps, "loss": round(loss, 4), "right": right, "right_by_kind": by_kind})
    own.expert_load_at_end = load
    own.expert_load_at_start = own.expert_load_at_start or load
    rate = int(own.tokens / max(own.seconds, 1e-9))
    bar.set_postfix({"loss": own.curve[-1]["loss"], "right": right, "tokens/s": rate}, refresh=False)


def train(team: Team, settings: Settings) -> Report:
    """Trains and leaves a checkpoint folder with training.json at `settings.output`; one call per worker."""
    paddle.seed(settings.seed)
    if team.size > 1:
        set_num_threads(1)
    model = make_model(ErnieTokenizer.from_pretrained(settings.output), **settings.changes)
    model.train()
    report = Report(settings.seed, team.size * settings.tokens, settings.text)
    stages = [stage for stage in settings.stages if not (settings.text and stage.name == "text")]
    if settings.resume:
        report = load_model(settings.output / CHECKPOINT, model)
    elif settings.text:
        take_text_weights(model, settings.text)
    begun = len(report.stages)
    for number, stage in enumerate(stages):
        if number < begun - 1:
            continue
        if number >= begun:
            report.stages.append(StageReport(stage.name))
        with paddle.utils.unique_name.guard():  # the optimizer's state goes by names that Paddle counts up
            train_stage(team, settings, stage, model, report, resume=number < begun)
    return report


def parse_arguments() -> Settings:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Train a small ERNIE 4.5 vision-language model.")
    parser.add_argument("--output", type=Path, default=Path("build/tiny"), help="checkpoint folder (build/tiny)")
    parser.add_argument("--text", help="begin with the weights of this text checkpoint, for example ernie45-tiny")
    parser.add_argument("--scale", type=float, default=1.0, help="stretches or shortens all stages (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the lessons (0)")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the batch, one thread each (1)")
    parser.add_argument("--tokens", type=int, default=1280, help="tokens in the batch of a worker (1280)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    return Settings(**vars(parser.parse_args()))


if __name__ == "__main__":
    settings = parse_arguments()
    if not settings.resume:
        copy_tokenizer(settings.text, settings.output) if settings.text else build_tokenizer(settings.output)
    report = Team(settings.workers).run(train, settings)
    for stage in report.stages:
        print(f"{stage.name}: {stage.steps} steps, {stage.tokens:,} tokens, {stage.seconds:.0f} s")
