"""Pictures and clips of handwritten digits: what the small model of `train_tiny.py` learns to see.

The handwriting is that which comes with scikit-learn (Optical Recognition of Handwritten Digits, E. Alpaydin and
C. Kaynak, UCI, 1998): 1797 digits of 8 x 8 pixels. A fixed tenth of them is never trained on. Every picture is drawn
anew: at another size and aspect ratio, turned, slanted, with other colours, strokes and places.

    python examples/tiny_pictures.py examples/media     # held-out samples, and a sheet of them; needs scikit-learn
"""

from __future__ import annotations

import functools
import hashlib
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ernie45.errors import ErnieError

HELDOUT_SHARE = 10  # one digit in this many is held out
MARGIN = 2  # pixels of paper around the 8 x 8 of a digit
FINE = 2  # how much finer the 8 x 8 become when they are bent
BEND = 1.0  # of the 8 x 8, how far a stroke moves at most
TOKEN = 28  # pixels along a side of a token
# Rows and columns of tokens of a picture, and how often. The processor enlarges what is smaller than 2 x 2.
SHAPES = {(2, 2): 6, (2, 3): 3, (3, 2): 3, (3, 3): 3, (2, 4): 1, (4, 2): 1, (3, 4): 1, (4, 3): 1}
WIDE_SHAPES = {(2, 3): 3, (2, 4): 3, (3, 4): 2, (3, 3): 1}
FRAME_SIDES = (112, 112, 128, 140, 168)  # timestamps are a tenth as high

# What the processor of the small model has to be told: as large as the pictures that it was trained on, not larger.
LIMITS = {
    "image_min_pixels": 4 * TOKEN**2,
    "image_max_pixels": 16 * TOKEN**2,
    "video_min_pixels": 4 * TOKEN**2,
    "video_max_pixels": 16 * TOKEN**2,
}


@functools.lru_cache(maxsize=2)
def handwriting(split: str) -> dict[int, list[Image.Image]]:
    """The digits of a split, "train" or "heldout": for each value 0..9 pictures in mode L, ink white."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ErnieError('the handwriting comes with scikit-learn: pip install ".[tiny]"') from error
    digits = load_digits()
    found: dict[int, list[Image.Image]] = {value: [] for value in range(10)}
    for number, (pixels, value) in enumerate(zip(digits.images, digits.target, strict=True)):
        if is_heldout(number) == (split == "heldout"):
            paper = np.pad((pixels * (255 / 16)).astype("uint8"), MARGIN)  # else strokes would end in straight cuts
            found[int(value)].append(Image.fromarray(paper))
    return found


def is_heldout(number: int) -> bool:
    """Whether the digit with this number in the data set is held out; the same in every process and version."""
    digest = hashlib.blake2b(f"digit {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELDOUT_SHARE == 0


def draw_colours(rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Paper and ink [3] float32 in 0..255, at least 110 apart in brightness; often black on white, or the reverse."""
    if rng.random() < 0.3:
        pair = (np.full(3, 255, "float32"), np.zeros(3, "float32"))
    else:
        bright = rng.uniform(150, 255)
        dark = rng.uniform(0, bright - 110)
        pair = (_tinted(rng, bright), _tinted(rng, dark))
    return pair if rng.random() < 0.65 else pair[::-1]


def _tinted(rng: random.Random, brightness: float) -> np.ndarray:
    tint = np.array([rng.uniform(-40, 40) for _ in range(3)], "float32")
    return np.clip(brightness + tint - tint.mean(), 0, 255)


def bend(rng: random.Random, ink: Image.Image) -> Image.Image:
    """The digit in another hand: nine points of the paper move, all else follows; `FINE` times as many pixels."""
    side = ink.width * FINE
    corner = {
        (x, y): tuple(np.clip(at * ink.width / 2 + rng.uniform(-BEND, BEND), 0, ink.width) for at in (x, y))
        for x in range(3)
        for y in range(3)
    }
    quarters = [
        (
            (x * side // 2, y * side // 2, (x + 1) * side // 2, (y + 1) * side // 2),
            (*corner[x, y], *corner[x, y + 1], *corner[x + 1, y + 1], *corner[x + 1, y]),
        )
        for x in range(2)
        for y in range(2)
    ]
    return ink.transform((side, side), Image.Transform.MESH, quarters, Image.Resampling.BICUBIC)


def draw_strokes(
    rng: random.Random, ink: Image.Image, size: tuple[int, int], centre: tuple[float, float], side: float
) -> np.ndarray:
    """How much ink is where, [height, width] float32 in 0..1: one digit about `side` pixels high around `centre`.

    Args:
        ink: one of `handwriting`, or such a one bent.
        size: height and width of the picture.
        centre: x and y.
        side: of the square that the 8 x 8 pixels become, before it is turned, slanted and stretched.
    """
    angle, slant, stretch = rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2), rng.uniform(0.85, 1.15)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    fine = ink.width / (8 + 2 * MARGIN)
    shape = np.array([[stretch, slant], [0, 1 / stretch]]) * side / (8 * fine)
    back = np.linalg.inv(turn @ shape)  # from a place in the picture to one in the pixels of the digit
    first = (4 + MARGIN) * fine - back @ np.array(centre)
    coefficients = (*back[0], first[0], *back[1], first[1])
    drawn = ink.transform(size[::-1], Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    faint, full = rng.uniform(0.05, 0.35), rng.uniform(0.6, 1.0)
    return np.clip((np.asarray(drawn, "float32") / 255 - faint) / (full - faint), 0, 1)


def paint(strokes: np.ndarray, colours: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Strokes in colours: [height, width, 3] uint8."""
    paper, ink = colours
    return (paper + (ink - paper) * strokes[..., None]).astype("uint8")


def draw_size(rng: random.Random, shapes: dict[tuple[int, int], int] = SHAPES) -> tuple[int, int]:
    """Height and width in pixels: mostly whole tokens, else what the processor has to resize."""
    rows, columns = rng.choices(list(shapes), list(shapes.values()))[0]
    height, width = rows * TOKEN, columns * TOKEN
    if rng.random() < 0.2:
        scale = rng.uniform(0.6, 2.0)
        height, width = round(height * scale * rng.uniform(0.9, 1.1)), round(width * scale * rng.uniform(0.9, 1.1))
    return height, width


def draw_picture(rng: random.Random, digits: Sequence[int], split: str = "train", variety: float = 1.0) -> np.ndarray:
    """A picture [height, width, 3] uint8 with these digits side by side, in colours and sizes of chance.

    Args:
        variety: 0 for digits that fill pictures of 56 x 56, 1 for all sizes and places: a tower that has seen nothing
            yet learns the former within minutes, and the latter from there.
    """
    shapes = SHAPES if len(digits) == 1 else WIDE_SHAPES
    height, width = draw_size(rng, shapes) if rng.random() < variety else (2 * TOKEN, 2 * TOKEN * len(digits))
    cell = width / len(digits)
    strokes = np.zeros((height, width), "float32")
    share = rng.uniform(0.95 - 0.25 * variety, 0.98)
    for place, digit in enumerate(digits):
        side = min(height, cell * (1.0 if len(digits) == 1 else 1.15)) * share
        room_x, room_y = (variety * max(0.0, room - side) / 2 for room in (cell, height))
        centre = (cell * (place + 0.5) + rng.uniform(-room_x, room_x), height / 2 + rng.uniform(-room_y, room_y))
        strokes = np.maximum(strokes, draw_strokes(rng, _choose(rng, digit, split), (height, width), centre, side))
    return paint(strokes, draw_colours(rng))


def draw_clip(rng: random.Random, digits: Sequence[int], frames_each: int, split: str = "train") -> list[np.ndarray]:
    """The frames of a clip, each [height, width, 3] uint8, in which each digit is shown for some frames."""
    side = rng.choice(FRAME_SIDES)
    colours = draw_colours(rng)
    frames: list[np.ndarray] = []
    for digit in digits:
        size = side * rng.uniform(0.55, 0.8)
        room = (side - size) / 2
        centre = (side / 2 + rng.uniform(-room, room), side * 0.55 + rng.uniform(-room / 2, room / 2))
        strokes = draw_strokes(rng, _choose(rng, digit, split), (side, side), centre, size)
        frames += [paint(strokes, colours)] * frames_each
    return frames


def _choose(rng: random.Random, digit: int, split: str) -> Image.Image:
    """Handwriting; what is learned from is bent, what is held out is as it was written."""
    ink = rng.choice(handwriting(split)[digit])
    return bend(rng, ink) if split == "train" else ink


def draw_sheet(rng: random.Random) -> Image.Image:
    """A sheet of held-out pictures, for people."""
    sheet = Image.new("RGB", (10 * 120, 6 * 120), (128, 128, 128))
    for place in range(60):
        digits = [place % 10] if place < 40 else [place % 10, rng.randrange(10)]
        picture = Image.fromarray(draw_picture(rng, digits, "heldout"))
        picture.thumbnail((116, 116))
        sheet.paste(picture, (place % 10 * 120, place // 10 * 120))
    return sheet


def write_samples(folder: Path, seed: int = 0) -> None:
    """The pictures and the clip that the demo and the examples show."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for name, digit in (("seven", 7), ("three", 3)):
        Image.fromarray(draw_picture(rng, [digit], "heldout")).save(folder / f"{name}.png")
    # Pillow joins frames that are the same: every other one differs in the last bit.
    frames = [frame ^ (place & 1) for place, frame in enumerate(draw_clip(rng, [4, 9, 2], 2, "heldout"))]
    first, *others = map(Image.fromarray, frames)
    first.save(folder / "clip.gif", save_all=True, append_images=others, duration=500, loop=0)
    draw_sheet(rng).save(folder / "sheet.png")


if __name__ == "__main__":
    write_samples(Path(sys.argv[1]))
