"""Pictures and videos in prompts: what the decoder gets for them, and how a cache recognises them.

It hides that placeholders of different pictures are the same token, that positions have three axes, and which pictures
have been encoded already.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle
from paddle import Tensor

from ernie45.config import VisionConfig
from ernie45.errors import ErnieError
from ernie45.generation.prompt import read_rows
from ernie45.models.vision import read_grid
from ernie45.processing.positions import Item, items_of, position_ids, split_grid, token_types

if TYPE_CHECKING:
    from ernie45.generation.prompt_cache import PromptCache
    from ernie45.models.vision_language import ErnieForConditionalGeneration


@dataclass(frozen=True)
class Media:
    """What `generate` of a vision-language model gets beside the ids; see there."""

    images: Any = None
    grid_thw: Any = None
    token_type_ids: Any = None
    position_ids: Any = None


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture or a video of a prompt.

    Attributes:
        item: where it stands in the row.
        patches: [n, patch_bytes], uint8 or normalised floats.
        digest: what it shows, in 8 bytes: equal for equal patches.
    """

    item: Item
    patches: np.ndarray
    digest: bytes

    @property
    def key(self) -> int:
        """A negative number to take the place of the placeholders where prompts are compared."""
        return _negative(self.digest)


@dataclass(frozen=True, eq=False)
class VisionPrompt:
    """One row without padding.

    Attributes:
        keys: [length] int64: its ids, with `Picture.key` for placeholders.
        banks: [length] int64, expert bank of each token.
        positions: [length, 3] int64.
        pictures: in order.
    """

    keys: np.ndarray
    banks: np.ndarray
    positions: np.ndarray
    pictures: list[Picture]


def read_media(
    media: Media, prompts: Sequence[np.ndarray], attention_mask: Any, vision: VisionConfig
) -> list[VisionPrompt]:
    """Checks what was given against the prompts.

    Args:
        media: as the caller gave it.
        prompts: the ids of each row without padding.
        attention_mask: what stripped them of it, or None.
        vision: of the model.

    Raises:
        ErnieError: pictures and placeholders do not go together, or something has a wrong shape.
    """
    grid = read_grid([] if media.grid_thw is None and media.images is None else media.grid_thw, vision)
    patches = _read_patches(media.images, grid, vision)
    grids = split_grid(prompts, grid, vision)
    types = _given_rows("token_type_ids", media.token_type_ids, attention_mask, prompts, [])
    positions = _given_rows("position_ids", media.position_ids, attention_mask, prompts, [3])
    read, first = [], 0
    for row, (ids, own) in enumerate(zip(prompts, grids, strict=True)):
        pictures = []
        for item in items_of(ids, own, vision):
            size = int(np.prod(item.grid))
            pictures.append(_picture(item, patches[first : first + size]))
            first += size
        keys = ids.copy()
        for picture in pictures:
            keys[picture.item.first : picture.item.first + picture.item.count] = picture.key
        banks, places = (token_types(ids, own, vision) != 0).astype("int64"), position_ids(ids, own, vision)
        taken_banks = banks if types is None else (types[row] != 0).astype("int64")
        taken_places = places if positions is None else positions[row]
        if not (np.array_equal(taken_banks, banks) and np.array_equal(taken_places, places)):
            keys = _unusual_keys(keys, taken_banks, taken_places)
        read.append(VisionPrompt(keys, taken_banks, taken_places, pictures))
    return read


def _unusual_keys(keys: np.ndarray, banks: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Keys that tell tokens apart by bank and position too, for rows where these do not follow from the ids."""
    rows = np.concatenate([keys[:, None], banks[:, None], positions], axis=1)
    return np.array([_negative(_digest(row, b"")) for row in rows], "int64")


def media_inputs(
    model: ErnieForConditionalGeneration, prompts: Sequence[VisionPrompt], cache: PromptCache, held: int
) -> dict[str, Tensor | None]:
    """What the decoder gets beside the ids for the columns that the cache does not hold; pictures among them are
    encoded, unless the cache remembers them.

    Args:
        model: encodes pictures.
        prompts: rows, padded on the left to the longest of them.
        cache: of the conversation.
        held: columns that it holds.

    Returns:
        position_ids [rows, new, 3], banks [rows, new] or None, features [count, hidden_size] or None.
    """
    longest = max(len(prompt.keys) for prompt in prompts)
    positions = np.zeros([len(prompts), longest, 3], "int64")
    banks = np.zeros([len(prompts), longest], "int64")
    missing: list[tuple[Picture, int]] = []  # with the number of its tokens that are held
    for row, prompt in enumerate(prompts):
        padding = longest - len(prompt.keys)
        positions[row, padding:], banks[row, padding:] = prompt.positions, prompt.banks
        for picture in prompt.pictures:
            known = max(0, held - padding - picture.item.first)
            if known < picture.item.count:
                missing.append((picture, known))
    features = _encode(model, [picture for picture, _ in missing], cache, prompts)
    parts = [features[picture.digest][known:] for picture, known in missing]
    return {
        "position_ids": paddle.to_tensor(positions[:, held:]),
        "banks": paddle.to_tensor(banks[:, held:]) if banks[:, held:].any() else None,
        "features": paddle.concat(parts) if parts else None,
    }


def _encode(
    model: ErnieForConditionalGeneration,
    pictures: Sequence[Picture],
    cache: PromptCache,
    prompts: Sequence[VisionPrompt],
) -> dict[bytes, Tensor]:
    """Features of pictures by digest. The cache keeps those of all pictures in the prompts, and no others."""
    new = list({p.digest: p for p in pictures if p.digest not in cache.features}.values())
    if new:
        grid = np.array([picture.item.grid for picture in new])
        joined = model.encode_images(paddle.to_tensor(np.concatenate([picture.patches for picture in new])), grid)
        parts = paddle.split(joined, [picture.item.count for picture in new], axis=0)
        cache.features.update(zip((picture.digest for picture in new), parts, strict=True))
    current = {picture.digest for prompt in prompts for picture in prompt.pictures}
    cache.features = {digest: part for digest, part in cache.features.items() if digest in current}
    return cache.features


def _picture(item: Item, patches: np.ndarray) -> Picture:
    return Picture(item, patches, _digest(patches, str(item.grid).encode()))


def _digest(array: np.ndarray, key: bytes) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=8, key=key).digest()


def _negative(digest: bytes) -> int:
    return -1 - (int.from_bytes(digest, "little") >> 1)


def _read_patches(images: Any, grid: np.ndarray, vision: VisionConfig) -> np.ndarray:
    expected = (int(grid.prod(axis=1).sum()), vision.patch_bytes)
    if images is None:
        images = np.zeros([0, vision.patch_bytes], "uint8")
    patches = np.asarray(images.numpy() if isinstance(images, Tensor) else images)
    if patches.shape != expected or (patches.dtype != np.uint8 and patches.dtype.kind != "f"):
        raise ErnieError(
            f"images: expected uint8 {list(expected)}, as grid_thw {grid.tolist()} says, "
            f"found {patches.dtype} {list(patches.shape)}"
        )
    return patches


def _given_rows(
    name: str, value: Any, attention_mask: Any, prompts: Sequence[np.ndarray], inner: list[int]
) -> list[np.ndarray] | None:
    """Rows of an argument that goes along with input_ids, without padding; None if it was not given."""
    if value is None:
        return None
    rows = read_rows(name, value, len(inner))
    if attention_mask is not None:
        masks = [mask != 0 for mask in read_rows("attention_mask", attention_mask)]
        # Upstream's token types have one column more than the ids.
        rows = [row[: len(mask)][mask[: len(row)]] for row, mask in zip(rows, masks, strict=False)]
    rows = [row[: len(prompt)] for row, prompt in zip(rows, prompts, strict=False)]
    found, expected = [list(row.shape) for row in rows], [[len(prompt), *inner] for prompt in prompts]
    if found != expected:
        raise ErnieError(f"{name}: expected rows of {expected} like input_ids, found {found}")
    return rows
