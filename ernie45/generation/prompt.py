"""Prompts in every form a caller may have them, as one: the real tokens of each row."""

from __future__ import annotations

from typing import Any

import numpy as np
from paddle import Tensor

from ernie45.errors import ErnieError


def read_prompts(input_ids: Any, attention_mask: Any = None) -> list[np.ndarray]:
    """The tokens of each row without padding.

    Padding may be on either side, or in between: positions count real tokens only, so leaving it out changes nothing.

    Args:
        input_ids: [batch, sequence] or [sequence] integers as a tensor, an array or a list; or a list of rows of
            different lengths.
        attention_mask: the same form, 0 for padding.

    Returns:
        one int64 array [length] per row.

    Raises:
        ErnieError: not such a form, or a row without a token.
    """
    rows = read_rows("input_ids", input_ids)
    if attention_mask is not None:
        masks = read_rows("attention_mask", attention_mask)
        if [len(mask) for mask in masks] != [len(row) for row in rows]:
            raise ErnieError(
                f"attention_mask: expected {_form(rows)} like input_ids, found {_form(masks)}; "
                "generation takes one number per token, 0 for padding"
            )
        rows = [row[mask != 0] for row, mask in zip(rows, masks, strict=True)]
    for index, row in enumerate(rows):
        if not row.size:
            raise ErnieError(f"input_ids: row {index} has no token; begin the prompt with at least one, such as bos")
    return rows


def left_pad(rows: list[np.ndarray], pad_token_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as one array, so that all of them end in the last column.

    Returns:
        ids [rows, longest] int64, mask [rows, longest] bool, False for padding.
    """
    longest = max(len(row) for row in rows)
    ids = np.full([len(rows), longest], pad_token_id, dtype="int64")
    mask = np.zeros([len(rows), longest], dtype=bool)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = True
    return ids, mask


def read_rows(name: str, value: Any, inner: int = 0) -> list[np.ndarray]:
    """The rows of an argument that has one integer per token, or an array of them with `inner` further axes.

    Raises:
        ErnieError: it has no such form; the message calls it `name`.
    """
    value = value.numpy() if isinstance(value, Tensor) else value
    if isinstance(value, list | tuple) and value and np.ndim(value[0]) == inner:
        value = np.asarray(value)
    if isinstance(value, np.ndarray) and value.ndim == 1 + inner:
        value = [value]
    if not isinstance(value, list | tuple | np.ndarray) or not len(value):
        raise ErnieError(f"{name}: expected [batch, sequence] integers or a list of rows, found {_short(value)}")
    return [_row(f"{name}, row {index}", row, inner) for index, row in enumerate(value)]


def _row(where: str, value: Any, inner: int) -> np.ndarray:
    row = np.asarray(value)
    if row.ndim != 1 + inner or (row.size and row.dtype.kind not in "iub"):
        raise ErnieError(f"{where}: expected one integer per token, found {_short(value)}; encode text to ids first")
    return row.astype("int64")


def _form(rows: list[np.ndarray]) -> str:
    lengths = sorted({len(row) for row in rows})
    return f"[{len(rows)}, {' or '.join(map(str, lengths))}]"


def _short(value: Any) -> str:
    text = f"shape {list(value.shape)} {value.dtype}" if isinstance(value, np.ndarray) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
