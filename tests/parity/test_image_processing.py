"""The sizes and the patches of pictures against transformers' processor, and where the two part."""

from __future__ import annotations

import functools
import importlib
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from ernie45.config import VisionConfig
from ernie45.processing.image import FRAME_LIMITS, PICTURE_LIMITS, ImageLimits, encode_picture, smart_resize

# Imported where they are used: merely collecting this file must not take the seconds that they need.
installed = find_spec("torch") and find_spec("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.skipif(not installed, reason="needs torch and transformers")]

VISION = VisionConfig.from_dict({}, {})
ALL_LIMITS = (PICTURE_LIMITS, FRAME_LIMITS, ImageLimits(max_pixels=16384 * 28 * 28))


@functools.cache
def peer() -> Any:
    """The module whose processor works on PIL images, as ours does; the other one needs torchvision."""
    return importlib.import_module("transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe")


@functools.cache
def processor() -> Any:
    """Leaves pixels as they are, 0 to 255, for exact comparison."""
    return peer().Ernie4_5_VLMoeImageProcessorPil(do_rescale=False, do_normalize=False)


def their_size(height: int, width: int, limits: ImageLimits) -> tuple[int, int]:
    return peer().smart_resize(height, width, 28, limits.min_pixels, limits.max_pixels)


def picture(height: int, width: int) -> Image.Image:
    noise = np.random.default_rng(height + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@given(st.integers(15, 9000), st.integers(15, 9000), st.sampled_from(ALL_LIMITS))
@settings(max_examples=300)
def test_sizes_agree(height: int, width: int, limits: ImageLimits) -> None:
    """Wherever both sides round to a token at least, and neither is more than 200 times the other."""
    assume(max(height, width) <= 200 * min(height, width))
    assert smart_resize(height, width, limits) == their_size(height, width, limits)


def test_the_default_limits_of_pictures_agree() -> None:
    assert dict(processor().size) == {
        "shortest_edge": PICTURE_LIMITS.min_pixels, "longest_edge": PICTURE_LIMITS.max_pixels
    }  # fmt: skip


@pytest.mark.parametrize(("height", "width"), [(5000, 1), (10, 8000), (14, 2801)])
def test_where_one_side_is_more_than_200_times_the_other_transformers_refuses(height: int, width: int) -> None:
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200"):
        their_size(height, width, PICTURE_LIMITS)
    assert max(smart_resize(height, width)) == 200 * min(smart_resize(height, width))


@pytest.mark.parametrize("height", [13, 14])
def test_a_side_that_rounds_to_no_token_has_one_here_and_none_there(height: int) -> None:
    """So transformers finds the picture too small and grows it, where Baidu's rule keeps 1 x 5 tokens."""
    assert smart_resize(height, 140) == (28, 140)
    assert max(their_size(height, 140, PICTURE_LIMITS)) > 140


@pytest.mark.parametrize(("height", "width"), [(56, 56), (28, 140), (448, 448), (224, 1036)])
def test_patches_of_pictures_that_fit_are_equal(height: int, width: int) -> None:
    source = picture(height, width)
    patches, grid = encode_picture(source, PICTURE_LIMITS, VISION)
    expected = processor()(images=source, return_tensors="np")
    assert [grid] == [tuple(row) for row in expected["image_grid_thw"].tolist()]
    np.testing.assert_array_equal(patches, expected["pixel_values"])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (60, 80), (450, 447), (333, 1000), (2500, 2600)])
def test_patches_of_pictures_that_are_resized_agree(height: int, width: int) -> None:
    """Both resize 8-bit values with Pillow's bicubic filter: equal to the last bit."""
    source = picture(height, width)
    patches, grid = encode_picture(source, PICTURE_LIMITS, VISION)
    expected = processor()(images=source, return_tensors="np")
    assert [grid] == [tuple(row) for row in expected["image_grid_thw"].tolist()]
    np.testing.assert_array_equal(patches, expected["pixel_values"])


def test_normalised_patches_agree() -> None:
    """With the constants of the published models, by which the model itself normalises."""
    source = picture(60, 80)
    expected = peer().Ernie4_5_VLMoeImageProcessorPil()(images=source, return_tensors="np")["pixel_values"]
    patches, _ = encode_picture(source, PICTURE_LIMITS, VISION)
    mean = np.repeat([0.48145466, 0.4578275, 0.40821073], 196)
    deviation = np.repeat([0.26862954, 0.26130258, 0.27577711], 196)
    np.testing.assert_allclose((patches / 255 - mean) / deviation, expected, atol=1e-5)
