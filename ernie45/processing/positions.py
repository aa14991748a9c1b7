"""Where pictures and videos stand among the tokens of a prompt, which token is of what kind, and 3-D positions.

Everything here works on one row of token ids without padding, in NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ernie45.config import VisionConfig
from ernie45.errors import ErnieError

TEXT, IMAGE, VIDEO = 0, 1, 2  # values of token_type_ids


@dataclass(frozen=True)
class Item:
    """A picture or a video among the tokens.

    Attributes:
        first: column of its first placeholder.
        grid: frames, rows and columns of patches.
        count: how many placeholders, all side by side, it takes.
        video: whether it has more than one frame.
    """

    first: int
    grid: tuple[int, int, int]
    count: int
    video: bool


def token_grid(grid: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """Frame pairs, rows and columns of tokens of each item, [items, 3] int64; an item takes their product of tokens.

    Args:
        grid: [items, 3] frames, rows and columns of patches. A picture, with its one frame, is a pair of its own.
    """
    steps = np.array([vision.frames_per_token, vision.merge_size, vision.merge_size])
    return np.maximum(np.asarray(grid, "int64").reshape(-1, 3) // steps, 1)


def split_grid(rows: Sequence[np.ndarray], grid: np.ndarray, vision: VisionConfig) -> list[np.ndarray]:
    """The items of each row of a batch: an item belongs to the row that has its first placeholder.

    Args:
        rows: token ids of each row, [s] each.
        grid: [items, 3] frames, rows and columns of patches of the items of all rows.

    Returns:
        [items of that row, 3] for each row. Where the numbers do not fit, `items_of` says so for one of the rows.
    """
    grid = np.asarray(grid, "int64").reshape(-1, 3)
    counts = token_grid(grid, vision).prod(axis=1)
    row_ends = np.cumsum([np.count_nonzero(np.asarray(row) == vision.placeholder_id) for row in rows])
    owners = np.searchsorted(row_ends[:-1], np.cumsum(counts) - counts, side="right")
    return [grid[owners == row] for row in range(len(rows))]


def items_of(ids: np.ndarray, grid: np.ndarray, vision: VisionConfig) -> list[Item]:
    """The items of a row, in order. Two may stand side by side with nothing between them.

    Args:
        ids: [s] token ids.
        grid: [items, 3] frames, rows and columns of patches of the items of this row.

    Raises:
        ErnieError: an item has no placeholders or too few of them in a row, or placeholders are left over.
    """
    grid = np.asarray(grid, "int64").reshape(-1, 3)
    places = np.flatnonzero(np.asarray(ids) == vision.placeholder_id)
    counts = token_grid(grid, vision).prod(axis=1)
    ends = np.cumsum(counts)
    items: list[Item] = []
    for (frames, rows, columns), count, end in zip(grid.tolist(), counts.tolist(), ends.tolist(), strict=True):
        run = places[end - count : end]
        if len(run) < count or run[-1] - run[0] != count - 1:
            _refuse_item(len(items), (frames, rows, columns), count, run, vision)
        items.append(Item(int(run[0]), (frames, rows, columns), count, video=frames > 1))
    taken = int(ends[-1]) if len(ends) else 0
    if len(places) > taken:
        raise ErnieError(
            f"input_ids: placeholders (token {vision.placeholder_id}) from column {places[taken]} on belong to no "
            f"picture or video: found {len(places)}, expected {taken} for the {len(grid)} items of grid_thw. "
            "Give every picture, or remove the placeholders"
        )
    return items


def _refuse_item(number: int, grid: tuple[int, int, int], count: int, run: np.ndarray, vision: VisionConfig) -> None:
    breaks = np.flatnonzero(np.diff(run) != 1)
    found = int(breaks[0]) + 1 if len(breaks) else len(run)
    where = f"{found} in a row from column {run[0]} on" if found else "none left: there are more items than places"
    raise ErnieError(
        f"grid_thw: item {number}, {grid[0]} frames of {grid[1]} x {grid[2]} patches, takes {count} placeholders "
        f"(token {vision.placeholder_id}) in a row of input_ids, found {where}"
    )


def token_types(ids: np.ndarray, grid: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """The kind of each token: [s] int64, 0 text, 1 picture or one of the four delimiters, 2 video.

    That the delimiters of videos count as pictures, and not as videos, is how the models were trained.
    Arguments and errors are those of `items_of`.
    """
    types = np.isin(ids, (vision.placeholder_id, *vision.delimiter_ids)).astype("int64")  # IMAGE or TEXT
    for item in items_of(ids, grid, vision):
        if item.video:
            types[item.first : item.first + item.count] = VIDEO
    return types


def position_ids(ids: np.ndarray, grid: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """The place of each token in time, rows and columns, [s, 3] int64.

    Text counts on by one on all three axes. The tokens of an item have the next position plus their frame pair, row
    and column; what follows continues one after the largest number in it.
    Arguments and errors are those of `items_of`.
    """
    length = len(ids)
    items = items_of(ids, grid, vision)
    shapes = token_grid(grid, vision)
    shifts = np.zeros(length + 1, "int64")
    for item, shape in zip(items, shapes, strict=True):
        shifts[item.first + item.count] += shape.max() - item.count
    positions = np.repeat((np.arange(length) + np.cumsum(shifts)[:length])[:, None], 3, axis=1)
    for item, shape in zip(items, shapes, strict=True):
        places = np.indices(shape).reshape(3, -1).T
        positions[item.first : item.first + item.count] = positions[item.first] + places
    return positions
