"""Sequences of different lengths, several to a row, that do not see each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from ernie45.errors import ErnieError
from ernie45.losses import IGNORED_LABEL
from ernie45.training.data.encode import Example, Pair

if TYPE_CHECKING:
    from paddle import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of documents.

    Every document has positions from 0 on and sees only itself. The padding at the end of a row is one more document:
    it has something to attend to, and nothing else sees it.

    Attributes:
        input_ids: [b, s] int64.
        labels: [b, s] int64, shifted; -100 where nothing is learned.
        position_ids: [b, s] int64, or of a vision-language model [b, s, 3].
        attn_mask_startend_row_indices: [b, 1, s, 1] int32, where the document of a token ends.
        document_ids: [b, s] int64, number of the document, counted over all rows; -1 for padding.
        token_type_ids: [b, s] int64; None for a text model.
        images: [patches, patch_bytes] uint8 of all rows in order; None for a text model.
        grid_thw: [items, 3] int64; None for a text model.
        pairs: [pairs, 2] int64, numbers of the chosen and the rejected document; [0, 2] where there are no pairs.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    attn_mask_startend_row_indices: np.ndarray
    document_ids: np.ndarray
    token_type_ids: np.ndarray | None
    images: np.ndarray | None
    grid_thw: np.ndarray | None
    pairs: np.ndarray

    @property
    def tokens(self) -> int:
        """How many tokens are not padding."""
        return int((self.document_ids >= 0).sum())

    @property
    def learned(self) -> int:
        """How many tokens have a label."""
        return int((self.labels != IGNORED_LABEL).sum())

    def inputs(self) -> dict[str, Tensor]:
        """What the model takes: `loss, logits = model(**batch.inputs())`."""
        import paddle

        others = ("document_ids", "pairs")
        arrays = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in others}
        return {name: paddle.to_tensor(array) for name, array in arrays.items() if array is not None}


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows that hold all sequences: the longest first, each in the first row that has room for it.

    Args:
        lengths: of the sequences, none above `capacity`.
        capacity: of a row.

    Returns:
        The numbers of the sequences in each row. These, and the rows by their first one, are in ascending order.
    """
    rows: list[list[int]] = []
    room = np.empty(len(lengths), "int64")
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        fits = room[: len(rows)] >= lengths[number]
        row = int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = capacity
        rows[row].append(number)
        room[row] -= lengths[number]
    return sorted(sorted(row) for row in rows)


def pack(rows: Sequence[Sequence[Example | Pair]], length: int | None = None, pad_token_id: int = 0) -> Batch:
    """A batch of rows, each of which holds some sequences one behind the other.

    Args:
        rows: at least one row, and a sequence in one of them.
        length: of a row; None: as long as the longest.
        pad_token_id: what fills the rest of a row.

    Raises:
        ErnieError: a row is longer than `length`, or sequences are mixed of a text and a vision-language model.
    """
    documents = [[example for sequence in row for example in sequence.examples] for row in rows]
    flat = [example for row in documents for example in row]
    longest = max(1, *(sum(map(len, row)) for row in documents))
    length = longest if length is None else length
    if longest > length:
        raise ErnieError(f"a row holds {longest} tokens, which are more than its length of {length}")
    if len({example.images is None for example in flat}) > 1:
        raise ErnieError("some sequences were made with a processor and some without: make all of them with one")
    arrays = _empty_rows(flat[0], (len(rows), length), pad_token_id)
    number = 0
    for index, row in enumerate(documents):
        start = 0
        for example in row:
            _place(example, arrays, (index, slice(start, start + len(example))), number)
            start, number = start + len(example), number + 1
    return Batch(
        **arrays,
        images=_joined(flat, "images"),
        grid_thw=_joined(flat, "grid_thw"),
        pairs=np.array(list(_pairs(rows)), "int64").reshape(-1, 2),
    )


def _empty_rows(like: Example, shape: tuple[int, int], pad_token_id: int) -> dict[str, Any]:
    """Arrays of rows that are padding only; of a vision-language model where `like` is."""
    rows, length = shape
    positions = np.tile(np.arange(length), (rows, 1))
    return {
        "input_ids": np.full(shape, pad_token_id, "int64"),
        "labels": np.full(shape, IGNORED_LABEL, "int64"),
        "position_ids": positions if like.position_ids.ndim == 1 else np.stack([positions] * 3, axis=-1),
        "attn_mask_startend_row_indices": np.full([rows, 1, length, 1], length, "int32"),
        "document_ids": np.full(shape, -1, "int64"),
        "token_type_ids": None if like.token_type_ids is None else np.zeros(shape, "int64"),
    }


def _place(example: Example, arrays: Mapping[str, Any], place: tuple[int, slice], number: int) -> None:
    """Writes document `number` into a row, from the beginning of `place` on; what follows is padding so far."""
    row, columns = place
    for name in ("input_ids", "labels", "position_ids", "token_type_ids"):
        if arrays[name] is not None:
            arrays[name][place] = getattr(example, name)
    arrays["attn_mask_startend_row_indices"][row, 0, columns] = columns.stop
    arrays["document_ids"][place] = number
    rest = arrays["position_ids"][row, columns.stop :]
    rest[...] = np.arange(len(rest)).reshape(-1, *[1] * (rest.ndim - 1))


def _joined(examples: Sequence[Example], name: str) -> np.ndarray | None:
    arrays = [getattr(example, name) for example in examples]
    return None if arrays[0] is None else np.concatenate(arrays)


def _pairs(rows: Sequence[Sequence[Example | Pair]]) -> Iterator[tuple[int, int]]:
    number = 0
    for sequence in (sequence for row in rows for sequence in row):
        if isinstance(sequence, Pair):
            yield number, number + 1
        number += len(sequence.examples)
