"""The vision-language model against outputs of an independent implementation, and the laws that it has to keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import pytest

from ernie45 import ops
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.models.vision_language import ErnieForConditionalGeneration
from tests.helpers.tiny import difference

TOLERANCE = 1e-4
CASES = ("image", "two_images", "video", "long_video", "mixed", "text")
TEXT_IDS = 490  # the references choose greedily among the ids below

layouts = pytest.mark.parametrize("layout", ["paddle", "pt"])
cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def models(reference: Path) -> dict[str, ErnieForConditionalGeneration]:
    return {layout: load(reference, layout) for layout in ("paddle", "pt")}


def load(reference: Path, layout: str) -> ErnieForConditionalGeneration:
    return ErnieForConditionalGeneration.from_pretrained(reference / "vl" / layout, dtype="float32", progress=False)


@pytest.fixture(scope="module")
def data(reference: Path) -> dict[str, np.ndarray]:
    with np.load(reference / "vl" / "reference.npz") as file:
        return dict(file)


def inputs(data: dict[str, np.ndarray], case: str, *names: str) -> dict[str, paddle.Tensor]:
    """Arguments of the model; by default all of them."""
    names = names or ("images", "grid_thw", "token_type_ids", "position_ids")
    return {name: paddle.to_tensor(data[f"{case}.{name}"]) for name in ("input_ids", *names)}


@layouts
@cases
@paddle.no_grad()
def test_logits_are_those_of_the_reference(models, data, layout: str, case: str) -> None:
    logits = models[layout](**inputs(data, case))
    assert difference(logits, data[f"{case}.logits"]) < TOLERANCE


@cases
@paddle.no_grad()
def test_types_and_positions_follow_from_ids_and_grid(models, data, case: str) -> None:
    logits = models["paddle"](**inputs(data, case, "images", "grid_thw"))
    assert difference(logits, data[f"{case}.logits"]) < TOLERANCE


@layouts
@pytest.mark.parametrize("case", ["image", "video"])
def test_greedy_tokens_are_those_of_the_reference(models, data, layout: str, case: str) -> None:
    result = models[layout].generate(**inputs(data, case), max_new_tokens=8, vocab_size=TEXT_IDS, eos_token_id=[])
    assert result.ids.tolist() == data[f"{case}.greedy_ids"].tolist()
