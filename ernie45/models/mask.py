"""Which keys a query may look at: causal order, padding, packed documents, or an explicit mask.

The full [rows, columns] mask is never built; attention asks for the part that it is working on.
"""

from __future__ import annotations

from dataclasses import dataclass

import paddle
from paddle import Tensor

from ernie45.errors import ErnieError


@dataclass(frozen=True)
class AttentionMask:
    """Visibility of keys.

    Attributes:
        offset: number of keys that precede the first query row (the length of the cache).
        padding: [batch, columns] bool, False for keys that are padding; None if there is no padding.
        end_rows: [batch, columns] int, first query row that may no longer see the key (packed documents).
        explicit: [batch, 1 or heads, rows, columns] bool: replaces the causal order altogether.
    """

    offset: int = 0
    padding: Tensor | None = None
    end_rows: Tensor | None = None
    explicit: Tensor | None = None

    def visible(self, first: int, last: int, columns: int) -> Tensor | None:
        """Mask of query rows first..last-1 over the first `columns` keys; None if all of them are visible.

        Returns:
            bool, broadcastable to [batch, heads, last - first, columns].
        """
        if self.explicit is not None:
            return self.explicit[:, :, first:last, :columns]
        sees_all = self.offset + first + 1 >= columns
        if sees_all and self.padding is None and self.end_rows is None:
            return None
        rows = paddle.arange(self.offset + first, self.offset + last).reshape([1, 1, -1, 1])
        allowed = None
        if not sees_all:
            allowed = paddle.arange(columns).reshape([1, 1, 1, -1]) <= rows
        if self.padding is not None:
            allowed = _both(allowed, self.padding[:, None, None, :columns])
        if self.end_rows is not None:
            allowed = _both(allowed, rows < self.end_rows[:, None, None, :columns])
        return allowed

    @property
    def causal(self) -> bool:
        """Whether no key stands before the first query row, and the causal order holds."""
        return self.explicit is None and self.offset == 0

    def key_ends(self) -> Tensor | None:
        """For each key [batch, columns] int64 the first row that may no longer see it, 0 for padding; None: no row."""
        if self.padding is None:
            return None if self.end_rows is None else self.end_rows.astype("int64")
        ends: int | Tensor = self.padding.shape[1] if self.end_rows is None else self.end_rows.astype("int64")
        return ends * self.padding.astype("int64")

    def first_visible(self, batch: int) -> Tensor | None:
        """The first key [batch] int64 that each row sees, if there is only causal order and padding on the left."""
        if self.explicit is not None or self.end_rows is not None:
            return None
        if self.padding is None:
            return paddle.zeros([batch], dtype="int64")
        first = self.padding.astype("int64").argmax(axis=1)
        expected = paddle.arange(self.padding.shape[1]).unsqueeze(0) >= first.unsqueeze(1)
        return first if bool((expected == self.padding).all()) else None


def _both(left: Tensor | None, right: Tensor) -> Tensor:
    return right if left is None else paddle.logical_and(left, right)


def explicit_mask(mask: Tensor, batch: int, rows: int, columns: int) -> Tensor:
    """Checks a [batch, rows, columns] or [batch, heads, rows, columns] mask (nonzero = may look) and makes it 4-D."""
    mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
    if paddle.is_floating_point(mask):
        raise ErnieError("attention_mask: expected booleans or integers (1 = may look), found an additive float mask")
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[2:] != [rows, columns]:
        raise ErnieError(
            f"attention_mask: expected [batch, {columns}] or [batch, 1, {rows}, {columns}], found {list(mask.shape)}"
        )
    return mask.astype("bool")


def document_ends(indices: Tensor, batch: int, columns: int) -> Tensor:
    """Checks `attn_mask_startend_row_indices` [batch, 1, columns, 1] (or [batch, 1, columns]) -> [batch, columns].

    For key column j the value is the first query row that may no longer see j.
    """
    found = list(indices.shape)
    indices = indices.squeeze(-1) if indices.ndim == 4 and found[-1] == 1 else indices
    if indices.ndim != 3 or indices.shape != [batch, 1, columns]:
        raise ErnieError(
            f"attn_mask_startend_row_indices: expected [{batch}, 1, {columns}, 1] "
            f"(one causal end row per key), found {found}"
        )
    return indices.squeeze(1).astype("int64")
