"""Fifty steps of gradient descent beside transformers, from the same checkpoint on the same batches, in float32.

There are no router losses and the correction bias stays as it is, so all that moves weights is the gradient of the
language model's loss. Both libraries send a token to the same experts as long as that is no close call; that none of
the choices in fifty steps is one was seen to when the seeds were picked, and is checked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie45.losses import IGNORED_LABEL
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.models.moe import MoE, Routing
from ernie45.models.pretrained import PretrainedModel
from ernie45.models.vision_language import ErnieForConditionalGeneration
from tests.helpers import peers, peers_text, peers_vision
from tests.helpers.tiny import as_float32, read_folder

pytestmark = peers.parity

STEPS = 50
BATCHES = 5  # over which the steps go again and again
LEARNING_RATE = 0.02  # at higher rates the difference that rounding makes grows too fast, in transformers alone as well
TOLERANCE = 1e-4  # of the loss at every step, relative
LOOSE = 1e-2  # of how far all steps moved a tensor, relative to the value in it that moved farthest
CLOSE_CALL = 1e-5  # between the scores of the last chosen expert and of the best other one


@dataclass(frozen=True)
class Step:
    """One batch with labels, as each library wants it."""

    ours: dict[str, Any]
    theirs: dict[str, Any]


@pytest.mark.parametrize("seed", [0, 9, 7, 14])  # two that are dense and two with experts
def test_text(seed: int, tmp_path: Path) -> None:
    keys = peers_text.draw(seed)
    theirs = peers_text.build(keys, seed)
    theirs.save_pretrained(tmp_path / "start")
    ours = ErnieForCausalLM.from_pretrained(tmp_path / "start", dtype="float32", progress=False)
    steps = [text_step(keys["vocab_size"], 100 * seed + number) for number in range(BATCHES)]
    compare(ours, theirs, steps, tmp_path)


@pytest.mark.parametrize("seed", [0, 3, 8])
def test_vision_language(seed: int, tmp_path: Path) -> None:
    keys = peers_vision.draw(seed)
    theirs = peers.build("Ernie4_5_VLMoeForConditionalGeneration", peers_vision.their_config(keys), seed)
    theirs.save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "config.json").write_text(json.dumps(keys), encoding="utf-8")
    ours = ErnieForConditionalGeneration.from_pretrained(tmp_path / "start", dtype="float32", progress=False)
    steps = []
    for number in range(BATCHES):
        prompts = ("mixed", "padded")[number % 2]  # either has pictures as well as videos
        batch = peers_vision.batch_of(prompts, ours.config, 100 * seed + number)
        is_text = batch.ours()["input_ids"].numpy() < peers_vision.TEXT_IDS
        steps.append(with_labels(batch.ours(), batch.theirs(), is_text))
    compare(ours, theirs, steps, tmp_path)


def compare(ours: PretrainedModel, theirs: Any, batches: Sequence[Step], folder: Path) -> None:
    """Trains both, and checks the loss of every step and where every weight has gone from `folder / "start"`."""
    steps = [batches[number % len(batches)] for number in range(STEPS)]
    found, margin = train_ours(ours, steps)
    expected = train_theirs(theirs, steps)
    assert np.mean(expected[-BATCHES:]) < 0.8 * np.mean(expected[:BATCHES]), "nothing is learned"
    closest = f"the closest choice between experts had a margin of {margin:.1e}"
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, err_msg=closest)
    assert margin > CLOSE_CALL, f"{closest}; draw other batches"

    theirs.save_pretrained(folder / "theirs")
    ours.save_pretrained(folder / "ours", layout="pt", progress=False)
    start, our_end, their_end = (tensors_of(folder / name) for name in ("start", "ours", "theirs"))
    assert start.keys() == our_end.keys() == their_end.keys()
    for name, tensor in start.items():
        farthest = np.abs(their_end[name] - tensor).max()
        assert (farthest == 0) == name.endswith("e_score_correction_bias"), name
        assert np.abs(our_end[name] - their_end[name]).max() <= LOOSE * farthest, name


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """By -PT name; files differ in whether the names of the vision tower begin with "model."."""
    return {name.removeprefix("model."): as_float32(stored) for name, stored in read_folder(folder).items()}


def text_step(vocab_size: int, seed: int) -> Step:
    """Two rows, the second one padded on the left; three quarters of the tokens are learned."""
    import torch

    generator = np.random.default_rng(seed)
    ids, mask = generator.integers(3, vocab_size, (2, 17)), np.ones((2, 17), "int64")
    mask[1, :5] = 0
    arrays = {"input_ids": ids, "attention_mask": mask}
    ours = {name: paddle.to_tensor(array) for name, array in arrays.items()}
    theirs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return with_labels(ours, theirs, generator.random(ids.shape) < 0.75)


def with_labels(ours: dict[str, Any], theirs: dict[str, Any], learned: np.ndarray) -> Step:
    """Labels for the tokens that are `learned` [batch, sequence] and follow a token; transformers shifts its own."""
    import torch

    follows = np.pad(ours["attention_mask"].numpy()[:, :-1], [(0, 0), (1, 0)]) == 1
    labels = np.where(learned & follows, ours["input_ids"].numpy(), IGNORED_LABEL)
    shifted = np.pad(labels[:, 1:], [(0, 0), (0, 1)], constant_values=IGNORED_LABEL)
    return Step(ours | {"labels": paddle.to_tensor(shifted)}, theirs | {"labels": torch.from_numpy(labels)})


def train_ours(model: PretrainedModel, steps: Sequence[Step]) -> tuple[list[float], float]:
    """The loss of every step, and the smallest margin by which an expert was chosen; infinite without experts."""
    model.train()
    optimizer = paddle.optimizer.SGD(LEARNING_RATE, model.parameters())
    losses, margins = [], [np.inf]
    for step in steps:
        routing: list[Routing] = []
        loss, _ = model(**step.ours, routing=routing)
        margins += [margin_of(model, decision) for decision in routing]
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(loss.item())
    return losses, min(margins)


def margin_of(model: PretrainedModel, routing: Routing) -> float:
    """The least by which the score of a chosen expert is above those of the others."""
    mlp = model.ernie.layers[routing.layer].mlp
    assert isinstance(mlp, MoE) and mlp.moe_statics is not None
    bias = mlp.moe_statics.e_score_correction_bias[routing.bank]
    scores = np.sort((routing.probabilities + bias).numpy(), axis=-1)
    return float((scores[:, -model.config.moe_k] - scores[:, -model.config.moe_k - 1]).min())


def train_theirs(model: Any, steps: Sequence[Step]) -> list[float]:
    import torch

    model.train()
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], LEARNING_RATE)
    losses = []
    for step in steps:
        loss = model(**step.theirs, use_cache=False, output_router_logits=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
