"""The time of a video frame, drawn into its top left corner: this is how the model knows when a frame was shown."""

from __future__ import annotations

import functools
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_FONT_FILE = Path(__file__).parent / "fonts" / "Roboto-Regular.ttf"
_FONT_RATE = 0.1
_STROKE_RATE = 0.1


def timestamp_text(seconds: float) -> str:
    """`time: HH:MM:SS.ss`. Only seconds are rounded, so 59.996 gives `00:00:60.00`, as in the training data."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"time: {hours:02d}:{minutes:02d}:{rest:05.2f}"


def render_timestamp(image: Image.Image, seconds: float) -> Image.Image:
    """A copy of an RGB frame, of any size, with its time in black letters with a white outline.

    The letters are a tenth of the frame's shorter side, so this belongs before any resizing.
    """
    size = max(1, int(_FONT_RATE * min(image.size)))
    stamped = image.copy()
    ImageDraw.Draw(stamped).text(
        (0, 0),
        timestamp_text(seconds),
        font=_font(size),
        fill=(0, 0, 0),
        stroke_width=int(_STROKE_RATE * size),
        stroke_fill=(255, 255, 255),
    )
    return stamped


@functools.lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_FONT_FILE, size)
