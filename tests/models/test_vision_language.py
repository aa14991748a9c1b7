"""The vision-language model against outputs of an independent implementation, and the laws that it has to keep."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import pytest

from ernie45.errors import ConfigError, ErnieError
from ernie45.models import vision_language
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.models.vision_language import ErnieForConditionalGeneration
from tests.helpers.tiny import as_float32, difference, read_folder

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


@pytest.mark.parametrize("most", [1, 40, 64])
@paddle.no_grad()
def test_encoding_in_batches_changes_nothing(models, data, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """A video is cut between its pairs of frames, several pictures between them."""
    images = np.concatenate([data["long_video.images"], data["mixed.images"]])
    grid = np.concatenate([data["long_video.grid_thw"], data["mixed.grid_thw"]])
    expected = models["paddle"].encode_images(images, grid)
    monkeypatch.setattr(vision_language, "ENCODER_PATCHES", most)
    assert difference(models["paddle"].encode_images(images, grid), expected) < 1e-5


# What does not go together.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "images: missing"),
        ({"images": None, "grid_thw": None}, "images: missing"),
        ({"grid_thw": None}, "grid_thw: missing"),
        ({"images": lambda images: images[:-1]}, r"images: expected \[24, 588\] for grid_thw .* found \[23, 588\]"),
        ({"images": lambda images: images.astype("int32")}, "images: expected uint8 pixels, or floats"),
        ({"input_ids": lambda ids: ids[:, :7]}, "takes 6 placeholders"),
        ({"token_type_ids": paddle.zeros([1, 3], "int64")}, "token_type_ids: expected"),
        ({"position_ids": paddle.zeros([1, 17, 2], "int64")}, "position_ids: expected"),
        ({"labels": paddle.zeros([1, 3], "int64")}, "labels: expected"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_arguments_that_do_not_go_together(models, data, changes: dict, message: str) -> None:
    arguments = inputs(data, "image", "images", "grid_thw")
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(ErnieError, match=message):
        models["paddle"](**arguments)


@paddle.no_grad()
def test_numpy_pictures_and_no_pictures(models, data) -> None:
    arguments = inputs(data, "image", "grid_thw")
    found = models["paddle"](**arguments, images=data["image.images"])
    assert difference(found, data["image.logits"]) < TOLERANCE
    nothing = models["paddle"].encode_images(paddle.zeros([0, 588], "uint8"), [])
    assert nothing.shape == [0, 64]


# The text part of a vision-language checkpoint.


@layouts
@paddle.no_grad()
def test_the_text_model_inside(reference: Path, data, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = ErnieForCausalLM.from_pretrained(reference / "vl" / layout, dtype="float32")
    logits = model(paddle.to_tensor(data["text.input_ids"]))
    assert difference(logits, data["text.logits"]) < TOLERANCE
    assert not [name for name in model.state_dict() if "vision" in name or "resampler" in name or "weight_1" in name]
    assert "MB of vision weights are left out" in capsys.readouterr().err
    assert model.config.vision is None and len(model.config.banks) == 1


@layouts
def test_the_text_model_inside_is_saved_as_a_text_model(reference: Path, tmp_path: Path, layout: str) -> None:
    model = ErnieForCausalLM.from_pretrained(reference / "vl" / "paddle", dtype="float32", progress=False)
    model.save_pretrained(tmp_path, layout=layout, progress=False)
    again = ErnieForCausalLM.from_pretrained(tmp_path, dtype="float32", progress=False)
    own, other = model.state_dict(), again.state_dict()
    assert own.keys() == other.keys() and all(difference(own[name], other[name]) == 0 for name in own)
    with pytest.raises(ConfigError, match="holds a text model; use ErnieForCausalLM"):
        ErnieForConditionalGeneration.from_pretrained(tmp_path, progress=False)


def test_state_dict_is_the_published_checkpoint(reference: Path, models) -> None:
    stored = read_folder(reference / "vl" / "paddle")
    own = models["pt"].state_dict()
    assert own.keys() == stored.keys()
    assert all(difference(own[name], as_float32(stored[name])) == 0 for name in stored)
