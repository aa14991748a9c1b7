"""The time drawn on a frame: its text, where it goes, and that nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from ernie45.processing import timestamps
from ernie45.processing.timestamps import render_timestamp, timestamp_text


def frame(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def changed(width: int, height: int, seconds: float) -> np.ndarray:
    """Whether each pixel changed, [height, width]."""
    before = frame(width, height)
    return (np.asarray(before) != np.asarray(render_timestamp(before, seconds))).any(-1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "time: 00:00:00.00"),
        (1.25, "time: 00:00:01.25"),
        (59.99, "time: 00:00:59.99"),
        (59.996, "time: 00:00:60.00"),
        (60, "time: 00:01:00.00"),
        (3599.5, "time: 00:59:59.50"),
        (3600, "time: 01:00:00.00"),
        (27707.74, "time: 07:41:47.74"),
        (360000, "time: 100:00:00.00"),
    ],
)
def test_text(seconds: float, text: str) -> None:
    assert timestamp_text(seconds) == text


def test_only_the_top_left_corner_changes() -> None:
    pixels = changed(640, 360, 12.5)
    height, width = np.argwhere(pixels).max(axis=0) + 1
    assert pixels.sum() > 1000
    assert height <= 2 * 36 and 6 * 36 < width < 10 * 36


def test_the_pixels_are_those_of_the_described_drawing() -> None:
    expected = frame(300, 500)
    font = ImageFont.truetype(timestamps._FONT_FILE, 30)
    drawing = ImageDraw.Draw(expected)
    drawing.text((0, 0), "time: 00:01:02.50", "black", font, stroke_width=3, stroke_fill="white")
    assert np.array_equal(expected, render_timestamp(frame(300, 500), 62.5))


def test_letters_are_black_with_a_white_outline() -> None:
    stamped = np.asarray(render_timestamp(Image.new("RGB", (640, 640), (200, 0, 0)), 3.0))
    colours, counts = np.unique(stamped.reshape(-1, 3), axis=0, return_counts=True)
    common = {tuple(colours[index].tolist()) for index in np.argsort(counts)[-3:]}
    assert common == {(200, 0, 0), (0, 0, 0), (255, 255, 255)}


def test_the_same_time_gives_the_same_pixels_and_another_time_others() -> None:
    first, again, later = (np.asarray(render_timestamp(frame(320, 240), seconds)) for seconds in (1.0, 1.0, 1.01))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, later)


def test_the_frame_itself_is_left_alone() -> None:
    image = frame(320, 240)
    render_timestamp(image, 1.0)
    assert np.array_equal(image, frame(320, 240))


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (9, 9), (10, 10), (19, 2000), (3000, 1)])
def test_tiny_and_extreme_frames(size: tuple[int, int]) -> None:
    assert render_timestamp(frame(*size), 5.0).size == size


def test_the_font_is_in_the_package_with_its_licence() -> None:
    folder = timestamps._FONT_FILE.parent
    assert ImageFont.truetype(timestamps._FONT_FILE, 12).getname() == ("Roboto", "Regular")
    note = (folder / "README.md").read_text(encoding="utf-8")
    assert "Christian Robertson" in note and "Apache License, Version 2.0" in note
