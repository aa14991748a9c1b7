"""What sees: prompts with pictures, and whether this library and transformers compute the same when measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie45.bench.ours import Ernie45Vision
from ernie45.bench.vision import VisionImplementation, prompt_with
from ernie45.checkpoint.convert import convert_checkpoint
from ernie45.errors import ErnieError
from tests.helpers import peers
from tests.helpers.peers import relative_error
from tests.helpers.vision import vision_config, write_vision_folder

PICTURES = np.array([[1, 4, 6], [1, 2, 4]])
VIDEO = np.array([[4, 4, 2]])


def patches_of(grid: np.ndarray) -> np.ndarray:
    """[N, 588] uint8 random pixels."""
    return np.random.default_rng(1).integers(0, 256, [grid.prod(axis=1).sum(), 588], dtype=np.uint8)


def test_prompts_have_a_placeholder_for_each_token_and_no_other_special_ids() -> None:
    vision = vision_config().vision
    assert vision is not None
    ids = prompt_with(PICTURES, 50, vision)[0].tolist()
    start, end, place = vision.image_start_id, vision.image_end_id, vision.placeholder_id
    assert ids[:-50] == [start, *[place] * 6, end, start, *[place] * 2, end]
    assert all(3 <= token < place for token in ids[-50:])


class Eye(VisionImplementation):
    """Remembers what it is shown."""

    vocabulary, version, load_seconds = 100, "eye", 0.0

    def __init__(self) -> None:
        vision = vision_config().vision
        assert vision is not None
        self.vision, self.steps = vision, 0

    def start(self, ids: np.ndarray, capacity: int) -> None:
        raise AssertionError("nobody starts without a picture")

    def step(self) -> None:
        self.steps += 1

    def prepare(self, patches: np.ndarray, grid: np.ndarray) -> Any:
        return patches.shape, grid.tolist()

    def features(self, pictures: Any) -> np.ndarray:
        self.shown = pictures
        return np.zeros([1, 1])

    def start_with(self, ids: np.ndarray, pictures: Any, grid: np.ndarray, capacity: int) -> None:
        self.shown, self.prompt, self.capacity = pictures, ids.shape, capacity


def test_sizes_become_grids() -> None:
    eye = Eye()
    assert set(eye.encode(width=112, height=56, frames=1, count=2)) == {"prefill"}
    assert eye.shown == ((64, 588), [[1, 4, 8], [1, 4, 8]])
    eye.encode(width=28, height=56, frames=4, count=1)
    assert eye.shown == ((32, 588), [[4, 4, 2]])
    assert set(eye.answer(width=112, height=56, text=5, new=3, seconds=60)) == {"prefill", "decode"}
    assert (eye.shown, eye.prompt, eye.capacity, eye.steps) == (((32, 588), [[1, 4, 8]]), (1, 15), 18, 3)


def test_ours_answers_as_the_library_does(tmp_path: Path) -> None:
    wide = vision_config(moe_intermediate_size=[24, 200])  # so that the bank of a token matters
    folder = write_vision_folder(tmp_path / "model", wide)
    ours = Ernie45Vision(str(folder), threads=1, options={"dtype": "float32"})
    patches, ids = patches_of(PICTURES), prompt_with(PICTURES, 8, ours.vision)
    expected = ours.model.generate(ids, images=patches, grid_thw=PICTURES, max_new_tokens=6, eos_token_id=[]).ids
    assert ours.answer_greedily(patches, PICTURES, ids, 6) == np.asarray(expected).tolist()


def transformers_of(folder: Path) -> Any:
    from ernie45.bench.peers_vision import TransformersVision

    return TransformersVision(str(folder), threads=1, dtype="float32")


@pytest.mark.parity
@pytest.mark.skipif(not peers.installed, reason="needs torch and transformers")
def test_transformers_computes_the_same(tmp_path: Path) -> None:
    folder = write_vision_folder(tmp_path / "model")
    convert_checkpoint(folder, tmp_path / "pt", layout="pt", progress=False)
    ours = Ernie45Vision(str(folder), threads=1, options={"dtype": "float32"})
    theirs = transformers_of(tmp_path / "pt")
    for grid in (PICTURES, VIDEO):
        patches = patches_of(grid)
        found, expected = (model.features(model.prepare(patches, grid)) for model in (ours, theirs))
        assert relative_error(found, expected) < 1e-4
    patches, ids = patches_of(PICTURES), prompt_with(PICTURES, 8, ours.vision)
    answers = [model.answer_greedily(patches, PICTURES, ids, 6) for model in (ours, theirs)]
    assert answers[0] == answers[1]
    text = [[5, 6, 7, 8]]  # after a picture, whose positions must be forgotten
    assert ours.continue_greedily(text, 6) == theirs.continue_greedily(text, 6)


@pytest.mark.parity
@pytest.mark.skipif(not peers.installed, reason="needs torch and transformers")
def test_what_transformers_cannot_express(tmp_path: Path) -> None:
    config = vision_config(moe_layer_end_index=[2, 1])
    write_vision_folder(tmp_path, config, layout="pt")
    with pytest.raises(ErnieError, match="layer 2 has experts of one bank alone"):
        transformers_of(tmp_path)
