"""The key/value cache: preallocated, grown by doubling, and aware of padding."""

from __future__ import annotations

import paddle
from paddle import Tensor

from ernie45.config import ErnieConfig
from ernie45.errors import ErnieError


class KVCache:
    """Keys (after RoPE) and values of every layer for the tokens seen so far.

    It also remembers which of its columns are padding and the next position of each row, so that a later call with
    only new tokens continues correctly.

    Args:
        config: architecture of the model.
        capacity: tokens to reserve per row; it doubles when it is exceeded.
    """

    def __init__(self, config: ErnieConfig, capacity: int = 256):
        self.num_layers = config.num_hidden_layers
        self.capacity = max(1, capacity)
        self.length = 0
        self.padding: Tensor | None = None
        self.next_position: Tensor | None = None
        self._keys: list[Tensor | None] = [None] * self.num_layers
        self._values: list[Tensor | None] = [None] * self.num_layers

    @property
    def batch_size(self) -> int:
        """Rows of the cache (0 while it is empty)."""
        return 0 if self._keys[0] is None else self._keys[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(t.numel().item() * t.element_size() for t in [*self._keys, *self._values] if t is not None)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new tokens of one layer after the first `length` ones and returns all of them.

        Args:
            key, value: [batch, new, kv_heads, head_dim]

        Returns:
            keys, values: [batch, length + new, kv_heads, head_dim]
        """
        end = self.length + key.shape[1]
        keys = self._write(self._keys, layer, key, end)
        values = self._write(self._values, layer, value, end)
        return keys[:, :end], values[:, :end]

    def advance(self, padding: Tensor | None, next_position: Tensor, new: int) -> None:
        """Counts `new` tokens as seen, once all layers have appended them.

        Args:
            padding: [batch, length + new] bool, False for padding, or None.
            next_position: [batch] position of the token that would follow.
        """
        self.length += new
        self.padding = padding
        self.next_position = next_position

    def truncate(self, length: int) -> None:
        """Forgets every token from `length` on, so that a prompt can be continued in another way."""
        if not 0 <= length <= self.length:
            raise ErnieError(f"cache: cannot cut {self.length} tokens to {length}")
        if length and self.next_position is not None:
            dropped = self.length - length
            real = dropped if self.padding is None else self.padding[:, length:].astype("int64").sum(axis=1)
            self.next_position = self.next_position - real
        else:
            self.next_position = None
        self.padding = None if self.padding is None or not length else self.padding[:, :length]
        self.length = length

    def reorder(self, rows: Tensor) -> None:
        """Makes row i of the cache what row rows[i] was (rows [new_batch] int64): for beams and repeated prompts."""
        self._keys = [None if t is None else paddle.index_select(t, rows, axis=0) for t in self._keys]
        self._values = [None if t is None else paddle.index_select(t, rows, axis=0) for t in self._values]
        if self.padding is not None:
            self.padding = paddle.index_select(self.padding, rows, axis=0)
        if self.next_position is not None:
            self.next_position = paddle.index_select(self.next_position, rows, axis=0)

    def _write(self, buffers: list[Tensor | None], layer: int, new: Tensor, end: int) -> Tensor:
        buffer = buffers[layer]
        while self.capacity < end:
            self.capacity *= 2
        if buffer is None or buffer.shape[1] < end or (not self.length and buffer.shape[0] != new.shape[0]):
            grown = paddle.empty([new.shape[0], self.capacity, *new.shape[2:]], dtype=new.dtype)
            if buffer is not None and self.length:
                grown[:, : self.length] = buffer[:, : self.length]
            buffers[layer] = buffer = grown
        buffer[:, self.length : end] = new.detach()
        return buffer
