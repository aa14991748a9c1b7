"""Positions and kinds of tokens: the worked examples, the reference checkpoint, and drawn mixtures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.config import ErnieConfig
from ernie45.errors import ErnieError
from ernie45.processing.positions import Item, items_of, position_ids, split_grid, token_grid, token_types
from tests.helpers.vision import vision_config

CASES = ("image", "two_images", "video", "long_video", "mixed", "text")
VISION = vision_config().vision
assert VISION is not None
TEXT, PLACE = 7, VISION.placeholder_id
IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END = VISION.delimiter_ids

grids = st.tuples(st.sampled_from([1, 2, 4, 10]), st.integers(1, 4), st.integers(1, 4)).map(
    lambda grid: (grid[0], 2 * grid[1], 2 * grid[2])
)
segments = st.lists(st.one_of(st.integers(1, 5), grids), max_size=6)  # so many tokens of text, or an item


def tokens(grid: tuple[int, int, int]) -> int:
    return max(grid[0] // 2, 1) * grid[1] * grid[2] // 4


def row_of(parts: list) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and grid of text (a number of tokens) and bare items (a grid) in that order."""
    ids = [n for part in parts for n in ([TEXT] * part if isinstance(part, int) else [PLACE] * tokens(part))]
    return np.array(ids, "int64"), np.array([part for part in parts if not isinstance(part, int)]).reshape(-1, 3)


def slow_positions(parts: list) -> list[tuple[int, int, int]]:
    """The rule token by token."""
    positions: list[tuple[int, int, int]] = []
    for part in parts:
        cur = 1 + max((max(position) for position in positions), default=-1)
        if isinstance(part, int):
            positions += [(cur + n,) * 3 for n in range(part)]
        else:
            pairs, rows, columns = max(part[0] // 2, 1), part[1] // 2, part[2] // 2
            positions += [
                (cur + t, cur + i, cur + j) for t in range(pairs) for i in range(rows) for j in range(columns)
            ]
    return positions


# ---- positions


def test_a_picture_between_text():
    ids = np.array([TEXT, IMAGE_START, *[PLACE] * 6, IMAGE_END, TEXT])
    middle = [(2, 2, 2), (2, 2, 3), (2, 2, 4), (2, 3, 2), (2, 3, 3), (2, 3, 4)]
    expected = [(0, 0, 0), (1, 1, 1), *middle, (5, 5, 5), (6, 6, 6)]
    assert position_ids(ids, np.array([[1, 4, 6]]), VISION).tolist() == [list(place) for place in expected]


def test_a_video_between_text():
    ids = np.array([TEXT] * 3 + [PLACE] * 8 + [TEXT])
    positions = position_ids(ids, np.array([[4, 4, 4]]), VISION)
    expected = [[3 + t, 3 + i, 3 + j] for t in range(2) for i in range(2) for j in range(2)]
    assert positions[3:11].tolist() == expected
    assert positions[11].tolist() == [5, 5, 5]


def test_a_long_video_moves_what_follows_by_its_frame_pairs():
    ids = np.array([TEXT] + [PLACE] * 10 + [TEXT])
    assert position_ids(ids, np.array([[20, 2, 2]]), VISION)[-1].tolist() == [11, 11, 11]


@pytest.mark.parametrize("case", CASES)
def test_the_reference_checkpoint(reference: Path, case: str):
    vision = ErnieConfig.from_pretrained(reference / "vl" / "paddle").vision
    with np.load(reference / "vl" / "reference.npz") as arrays:
        ids, grid = arrays[f"{case}.input_ids"][0], arrays[f"{case}.grid_thw"]
        np.testing.assert_array_equal(position_ids(ids, grid, vision), arrays[f"{case}.position_ids"][0])
        np.testing.assert_array_equal(token_types(ids, grid, vision) > 0, arrays[f"{case}.token_type_ids"][0] > 0)


@given(segments)
def test_any_mixture_follows_the_rule(parts):
    ids, grid = row_of(parts)
    positions = position_ids(ids, grid, VISION)
    assert positions.dtype == np.int64 and positions.shape == (len(ids), 3)
    assert [tuple(place) for place in positions.tolist()] == slow_positions(parts)


def test_a_hundred_thousand_tokens_with_many_pictures():
    parts = [3, (1, 8, 6)] * 6000
    ids, grid = row_of(parts)
    assert len(ids) == 90_000
    positions = position_ids(ids, grid, VISION)
    assert positions[-12].tolist() == [6000 * 3 + 5999 * 4] * 3


# ---- kinds


def test_kinds_of_tokens():
    ids = [TEXT, IMAGE_START, PLACE, IMAGE_END, TEXT, VIDEO_START, PLACE, PLACE, VIDEO_END, 0, 1, 2]
    types = token_types(np.array(ids), np.array([[1, 2, 2], [4, 2, 2]]), VISION)
    assert types.dtype == np.int64
    assert types.tolist() == [0, 1, 1, 1, 0, 1, 2, 2, 1, 0, 0, 0]


@given(segments)
def test_kinds_of_any_mixture(parts):
    ids, grid = row_of(parts)
    kinds = [n for part in parts for n in ([0] * part if isinstance(part, int) else [1 + (part[0] > 1)] * tokens(part))]
    assert token_types(ids, grid, VISION).tolist() == kinds


# ---- items


def test_items_side_by_side():
    ids = np.array([TEXT, PLACE, PLACE, PLACE, TEXT])
    items = items_of(ids, np.array([[1, 2, 4], [2, 2, 2]]), VISION)
    assert items == [Item(1, (1, 2, 4), 2, video=False), Item(3, (2, 2, 2), 1, video=True)]


def test_no_items():
    assert items_of(np.array([TEXT]), np.zeros([0, 3], "int64"), VISION) == []
    assert items_of(np.zeros([0], "int64"), np.zeros([0, 3], "int64"), VISION) == []


def test_token_grid_counts_a_picture_as_one_pair():
    assert token_grid(np.array([[1, 4, 6], [2, 4, 6], [16, 4, 6]]), VISION).tolist() == [
        [1, 2, 3],
        [1, 2, 3],
        [8, 2, 3],
    ]


@pytest.mark.parametrize(
    ("ids", "grid", "message"),
    [
        ([TEXT, PLACE], [], "from column 1 on belong to no picture or video: found 1, expected 0 for the 0 items"),
        ([PLACE, PLACE], [[1, 2, 2]], "from column 1 on belong to no picture or video: found 2, expected 1"),
        ([TEXT], [[1, 2, 2]], "item 0, 1 frames of 2 x 2 patches, takes 1 placeholders .* none left"),
        ([PLACE], [[1, 2, 2], [4, 2, 2]], "item 1, 4 frames of 2 x 2 patches, takes 2 placeholders .* none left"),
        ([PLACE, PLACE], [[1, 2, 2], [1, 4, 4]], "item 1, .* takes 4 placeholders .* found 1 in a row from column 1"),
        ([PLACE, TEXT, PLACE], [[1, 2, 4]], "item 0, .* takes 2 placeholders .* found 1 in a row from column 0"),
    ],
)  # fmt: skip
def test_items_and_placeholders_that_do_not_fit(ids, grid, message):
    for function in (items_of, token_types, position_ids):
        with pytest.raises(ErnieError, match=message):
            function(np.array(ids), np.array(grid).reshape(-1, 3), VISION)


@given(st.lists(segments, min_size=1, max_size=4))
def test_items_of_a_batch_by_row(rows):
    made = [row_of(parts) for parts in rows]
    found = split_grid([ids for ids, _ in made], np.concatenate([grid for _, grid in made]), VISION)
    assert [grid.tolist() for grid in found] == [grid.tolist() for _, grid in made]


def test_too_many_items_for_a_batch_go_to_the_last_row():
    found = split_grid([np.array([PLACE]), np.array([TEXT])], np.array([[1, 2, 2], [1, 2, 4]]), VISION)
    assert [grid.tolist() for grid in found] == [[[1, 2, 2]], [[1, 2, 4]]]
