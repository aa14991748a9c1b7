"""The first lessons of tower and adapter: a picture of one digit shall resemble the embedding of that digit.

This is contrastive learning of pictures and words (CLIP, arXiv 2103.00020) where the words are the embeddings that the
text model has for the ten digits. Some pictures show two digits, half of the tokens each; some are frames of a video,
whose upper tokens shall resemble the last digit of the second that is stamped there. No decoder takes part, so a step
costs a fraction of one through it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor
from PIL import Image
from tiny_pictures import draw_clip, draw_picture

from ernie45 import ErnieForConditionalGeneration, ErnieProcessor
from ernie45.processing.image import ImageLimits, encode_picture, patches_of, resize, smart_resize
from ernie45.processing.timestamps import render_timestamp

FULL_VARIETY = 0.6  # share of the stage after which pictures are as different as they get
FRAME_SHARE = 0.35
NUMBER_SHARE = 0.15  # of pictures with two digits

Region = tuple[slice | int, slice]  # rows and columns of tokens


@dataclass(frozen=True)
class Named:
    """Pictures, and what stands in them.

    Attributes:
        images: patches [N, patch_bytes] uint8.
        grid: [pictures, 3].
        tokens: [T] int64, places of the tokens that show the first name, then those of the second, and so on.
        owners: [T] int64 ascending, the name that each of them shows.
        digits: [names] int64.
    """

    images: np.ndarray
    grid: np.ndarray
    tokens: np.ndarray
    owners: np.ndarray
    digits: np.ndarray


def draw_named(
    rng: random.Random, count: int, processor: ErnieProcessor, progress: float, split: str = "train"
) -> Named:
    """Pictures that grow more different with the progress of the stage, 0..1."""
    patches, grid, tokens, digits = [], [], [], []
    first = 0
    for _ in range(count):
        encoded, size, shown = draw_shown(rng, processor, min(1.0, progress / FULL_VARIETY), split)
        merge_size = processor.vision.merge_size
        places = first + np.arange(size[1] * size[2] // merge_size**2).reshape(-1, size[2] // merge_size)
        patches.append(encoded)
        grid.append(size)
        for digit, where in shown:
            tokens.append(places[where].flatten())
            digits.append(digit)
        first += places.size
    owners = np.repeat(np.arange(len(tokens)), [len(part) for part in tokens])
    return Named(np.concatenate(patches), np.array(grid), np.concatenate(tokens), owners, np.array(digits))


def draw_shown(
    rng: random.Random, processor: ErnieProcessor, variety: float, split: str
) -> tuple[np.ndarray, tuple[int, int, int], list[tuple[int, Region]]]:
    """One picture or pair of frames: its patches, its grid, and which digits stand in which tokens."""
    vision, limits = processor.vision, processor.limits
    digit, other, second, what = rng.randrange(10), rng.randrange(10), rng.randrange(20), rng.random()
    if what < FRAME_SHARE:
        patches, grid = patches_of(draw_frames(rng, digit, second, limits.video, split), vision)
        return patches, grid, [(second % 10, np.s_[0, :]), (digit, np.s_[1:, :])]
    digits = [digit, other] if what < FRAME_SHARE + NUMBER_SHARE else [digit]
    patches, grid = encode_picture(draw_picture(rng, digits, split, variety), limits.image, vision)
    if len(digits) == 1:
        return patches, grid, [(digit, np.s_[:, :])]
    half = grid[2] // vision.merge_size // 2
    return patches, grid, [(digit, np.s_[:, :half]), (other, np.s_[:, -half:])]


def draw_frames(rng: random.Random, digit: int, second: int, limits: ImageLimits, split: str) -> np.ndarray:
    """Two frames [2, height, width, 3] uint8 of a clip, in the size that the processor gives them, with their times."""
    gap = rng.choice([0.25, 0.5])
    stamped = [
        render_timestamp(Image.fromarray(frame), second + place * gap)
        for place, frame in enumerate(draw_clip(rng, [digit], 2, split))
    ]
    size = smart_resize(stamped[0].height, stamped[0].width, limits)
    return np.stack([np.asarray(resize(frame, size)) for frame in stamped])


def name_pictures(model: ErnieForConditionalGeneration, digit_ids: list[int], batch: Named) -> Tensor:
    """Logits [names, 10]: the mean over the vectors that show a name, times the embedding of each digit."""
    vectors = model.encode_images(paddle.to_tensor(batch.images), batch.grid)
    shown = paddle.gather(vectors, paddle.to_tensor(batch.tokens))
    names = paddle.gather(model.ernie.embed_tokens.weight.detach(), paddle.to_tensor(digit_ids))
    return paddle.matmul(paddle.geometric.segment_mean(shown, paddle.to_tensor(batch.owners)), names, transpose_y=True)


def naming_loss(logits: Tensor, batch: Named) -> tuple[Tensor, np.ndarray]:
    """Mean cross-entropy, and which names were right."""
    right = logits.detach().numpy().argmax(axis=1) == batch.digits
    return F.cross_entropy(logits, paddle.to_tensor(batch.digits)), right
