"""Positions, kinds of tokens, patches and prompts against transformers' processor; where the two differ, by name.

transformers' own video processor needs torchvision: in its place stands one that gives the grids of our frames.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from ernie45.models.vision import PIXEL_DEVIATION, PIXEL_MEAN
from ernie45.processing.positions import position_ids, token_types
from ernie45.processing.processor import ErnieProcessor
from tests.helpers import peers
from tests.helpers.vision import vision_config, write_processor_folder

pytestmark = peers.parity

VISION = vision_config().vision
assert VISION is not None
IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END = VISION.delimiter_ids
VIDEO_PLACEHOLDER = 2561  # the first id that the tokenizer of ernie45-tiny leaves free
# Words that are one token for both tokenizers.
A, B, C = "<|LOC_1|>", "<|LOC_2|>", "<|LOC_3|>"
TEMPLATE = (
    "{% for part in messages[0].content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% elif part.type == 'image_url' %}<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>"
    "{% else %}<|VIDEO_START|><|video@placeholder|><|VIDEO_END|>{% endif %}{% endfor %}"
)

grids = st.tuples(st.sampled_from([1, 2, 4, 6]), st.integers(1, 4), st.integers(1, 4)).map(
    lambda grid: (grid[0], 2 * grid[1], 2 * grid[2])
)
mixtures = st.lists(st.one_of(st.integers(1, 5), grids), min_size=1, max_size=6)  # so many tokens of text, or an item


def is_long(grid: tuple[int, int, int]) -> bool:
    return grid[0] > max(grid[1], grid[2])


def row_of(parts: list) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and grid of text and of items between their delimiters."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids += [7] * part
            continue
        start, end = (VIDEO_START, VIDEO_END) if part[0] > 1 else (IMAGE_START, IMAGE_END)
        ids += [start, *[VISION.placeholder_id] * (max(part[0] // 2, 1) * part[1] * part[2] // 4), end]
    return np.array(ids, "int64"), np.array([part for part in parts if not isinstance(part, int)]).reshape(-1, 3)


def their_positions(ids: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """[s, 3] of transformers, which takes pictures and videos apart and knows placeholders by their kind."""
    import torch
    from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeModel

    types = np.where(ids == VISION.placeholder_id, token_types(ids, grid, VISION), 0)
    sizes = SimpleNamespace(temporal_merge_size=2, spatial_merge_size=2)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=sizes))
    model.get_vision_position_ids = partial(Ernie4_5_VLMoeModel.get_vision_position_ids, model)
    positions, _ = Ernie4_5_VLMoeModel.get_rope_index(
        model,
        torch.from_numpy(ids[None]),
        torch.from_numpy(types[None]),
        torch.from_numpy(grid[grid[:, 0] == 1]),
        torch.from_numpy(grid[grid[:, 0] > 1]),
    )
    return positions[:, 0].T.numpy()


class GridsOnly:
    """In the place of a video processor: the grids of videos of 28 x 28 pixels."""

    merge_size, temporal_patch_size = 2, 2

    def __call__(self, videos: Any, **options: Any) -> dict[str, Any]:
        return {"video_grid_thw": np.array([[len(frames), 2, 2] for frames in videos])}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> ErnieProcessor:
    folder = write_processor_folder(tmp_path_factory.mktemp("checkpoint"), chat_template=TEMPLATE)
    return ErnieProcessor.from_pretrained(folder, video_min_pixels=784, video_max_pixels=784)


@pytest.fixture(scope="module")
def theirs(ours: ErnieProcessor) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil
    from transformers.models.ernie4_5_vl_moe.processing_ernie4_5_vl_moe import Ernie4_5_VLMoeProcessor

    video_token = "<|VIDEO_PLACEHOLDER|>"
    vocabulary = ours.tokenizer.vocabulary
    ids = {text: index for index, text in vocabulary.tokens.items()} | {video_token: VIDEO_PLACEHOLDER}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.add_special_tokens([*vocabulary.atomic, video_token])
    names = {f"{kind}{role}_token": f"<|{kind.upper()}{role.upper() or '_PLACEHOLDER'}|>"
             for kind in ("image", "video") for role in ("", "_start", "_end")}  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", extra_special_tokens=names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ernie4_5_VLMoeProcessor, "check_argument_for_proper_class", lambda *arguments: None)
        return Ernie4_5_VLMoeProcessor(Ernie4_5_VLMoeImageProcessorPil(), tokenizer, GridsOnly())


def drawing(height: int, width: int) -> Image.Image:
    """Smooth colours with sharp lines and letters."""
    rows, columns = np.mgrid[:height, :width]
    channels = [rows * 255 // height, columns * 255 // width, (rows * columns) % 256]
    image = Image.fromarray(np.stack(channels, axis=-1).astype("uint8"))
    draw = ImageDraw.Draw(image)
    draw.line([0, 0, width, height], fill="red", width=3)
    draw.text((width // 4, height // 4), "ERNIE 4.5", fill="black")
    return image


# ---- positions and kinds


@settings(max_examples=60)
@given(mixtures.filter(lambda parts: not any(isinstance(part, tuple) and is_long(part) for part in parts)))
def test_positions_agree(parts: list):
    ids, grid = row_of(parts)
    np.testing.assert_array_equal(position_ids(ids, grid, VISION), their_positions(ids, grid))


def test_positions_after_a_long_video_differ():
    """Upstream continues after the largest number of the video; transformers after its rows or columns."""
    ids, grid = row_of([2, (10, 2, 4), 3])
    here, there = position_ids(ids, grid, VISION), their_positions(ids, grid)
    last = len(ids) - 4  # from its end delimiter on
    np.testing.assert_array_equal(here[:last], there[:last])
    assert here[last].tolist() == [3 + 5] * 3
    assert there[last].tolist() == [3 + 2] * 3
    np.testing.assert_array_equal(here[last:] - there[last:], np.full([4, 3], 3))


def test_kinds_agree_in_what_routing_asks(ours: ErnieProcessor, theirs: Any):
    """Both send delimiters to the vision experts; that transformers calls those of videos videos changes nothing."""
    ids, grid = row_of([2, (1, 4, 2), 1, (4, 2, 2), (1, 2, 2), 3])
    here = token_types(ids, grid, VISION)
    split = np.where(here == 2, VIDEO_PLACEHOLDER, ids)
    there = theirs.create_moe_mm_token_type_ids(split)
    np.testing.assert_array_equal(here > 0, there > 0)
    np.testing.assert_array_equal(ids[here != there], [VIDEO_START, VIDEO_END])


# ---- patches


@pytest.mark.parametrize(
    ("height", "width"), [(56, 84), (57, 83), (300, 200), (41, 43), (1, 1), (20, 1999), (97, 640), (2300, 2500)]
)
def test_patches_of_pictures_agree(ours: ErnieProcessor, theirs: Any, height: int, width: int):
    image = drawing(height, width)
    inputs = ours([{"role": "user", "content": [{"type": "image_url", "image_url": image}]}])
    outputs = theirs.image_processor([image], return_tensors="np")
    np.testing.assert_array_equal(inputs["grid_thw"].numpy(), outputs["image_grid_thw"])
    pixels = inputs["images"].numpy().reshape(-1, 3, 196).astype("float32") / 255
    normalised = (pixels - np.array(PIXEL_MEAN, "float32")[:, None]) / np.array(PIXEL_DEVIATION, "float32")[:, None]
    np.testing.assert_allclose(normalised.reshape(-1, 588), outputs["pixel_values"], atol=1e-5)


def test_pictures_lower_than_half_a_token_differ(ours: ErnieProcessor, theirs: Any):
    """Upstream rounds a side to one token at least; transformers to none, and then takes the picture for too small."""
    image = drawing(10, 1999)
    inputs = ours([{"role": "user", "content": [{"type": "image_url", "image_url": image}]}])
    assert inputs["grid_thw"].tolist() == [[1, 2, 142]]
    assert theirs.image_processor([image])["image_grid_thw"].tolist() == [[1, 2, 58]]


def test_very_long_pictures_differ(ours: ErnieProcessor, theirs: Any):
    """Upstream shortens a picture that is more than 200 times as long as wide; transformers refuses it."""
    image = drawing(2, 5000)
    inputs = ours([{"role": "user", "content": [{"type": "image_url", "image_url": image}]}])
    assert inputs["grid_thw"].tolist() == [[1, 2, 400]]
    with pytest.raises(ValueError, match="aspect ratio"):
        theirs.image_processor([image])


# ---- prompts


def test_a_prompt_with_pictures_agrees(ours: ErnieProcessor, theirs: Any):
    images = [drawing(60, 90), drawing(120, 100)]
    content = [
        {"type": "text", "text": A + B},
        {"type": "image_url", "image_url": images[0]},
        {"type": "image_url", "image_url": images[1]},
        {"type": "text", "text": C},
    ]
    inputs = ours([{"role": "user", "content": content}])
    place = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    outputs = theirs(images=images, text=[A + B + place + place + C], return_tensors="np")
    np.testing.assert_array_equal(inputs["input_ids"].numpy(), outputs["input_ids"])
    np.testing.assert_array_equal(inputs["token_type_ids"].numpy(), outputs["moe_mm_token_type_ids"])
    np.testing.assert_array_equal(inputs["grid_thw"].numpy(), outputs["image_grid_thw"])


def test_videos_have_a_placeholder_of_their_own_only_there(ours: ErnieProcessor, theirs: Any):
    """The published checkpoints have one placeholder for both."""
    image, frames = drawing(60, 90), [drawing(28, 28)] * 6
    content = [
        {"type": "video_url", "video_url": frames},
        {"type": "text", "text": A},
        {"type": "image_url", "image_url": image},
    ]
    inputs = ours([{"role": "user", "content": content}])
    text = "<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>" + A + "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    outputs = theirs(images=[image], videos=[[np.asarray(frame) for frame in frames]], text=[text], return_tensors="np")
    here, there = inputs["input_ids"].numpy(), outputs["input_ids"]
    types = inputs["token_type_ids"].numpy()
    assert (here != there).sum() == (types == 2).sum() == 3
    assert set(here[types == 2]) == {VISION.placeholder_id} and set(there[types == 2]) == {VIDEO_PLACEHOLDER}
    np.testing.assert_array_equal(np.where(types == 2, VIDEO_PLACEHOLDER, here), there)
