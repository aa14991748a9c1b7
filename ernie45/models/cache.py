"""The key/value cache: preallocated, grown by doubling, and aware of padding."""

from __future__ import annotations

from collections.abc import Sequence

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
        self.kv_shape = [config.num_key_value_heads, config.head_dim]
        self.capacity = max(1, capacity)
        self.length = 0
        self.padding: Tensor | None = None
        self.next_position: Tensor | None = None
        self._following: list[Tensor] = []  # per call, [batch, new]: the position after each token, 0 for padding
        self._buffers: list[Tensor | None] = [None] * (2 * self.num_layers)  # keys and values, layer by layer
        # Rows and dtype of all buffers after `reserve`, which then has nothing to do for most tokens.
        self._reserved: tuple[int, paddle.dtype] | None = None

    @property
    def batch_size(self) -> int:
        """Rows of the cache (0 while it is empty)."""
        return 0 if self._buffers[0] is None else self._buffers[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return sum(t.numel().item() * t.element_size() for t in self._buffers if t is not None)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new tokens of one layer after the first `length` ones and returns all of them.

        Args:
            key, value: [batch, new, kv_heads, head_dim]

        Returns:
            keys, values: [batch, length + new, kv_heads, head_dim] in the dtype of key and value
        """
        batch, new = key.shape[:2]
        end = self.length + new
        results = []
        for index, tensor in ((2 * layer, key), (2 * layer + 1, value)):
            held = self._buffers[index]
            buffer = self._reserve(index, batch, end, tensor.dtype if held is None else held.dtype)
            buffer[:, self.length : end] = tensor.detach().astype(buffer.dtype)
            results.append(buffer[:, :end].astype(tensor.dtype))
        return results[0], results[1]

    def reserve(self, batch: int, new: int, dtype: paddle.dtype) -> Sequence[Tensor | None]:
        """The buffers [batch, capacity, kv_heads, head_dim] of keys and values, layer by layer, with room for more.

        Whoever asks for them writes the new tokens after the first `length` ones. What the cache holds in another
        dtype is converted.
        """
        end = self.length + new
        self._reserved = self._reserved if self._reserved == (batch, dtype) and end <= self.capacity else None
        if self._reserved is None:
            for index in range(len(self._buffers)):
                self._reserve(index, batch, end, dtype)
            self._reserved = (batch, dtype)
        return self._buffers

    def advance(self, padding: Tensor | None, following: Tensor, next_position: Tensor) -> None:
        """Counts new tokens as seen, once all layers have appended them.

        Args:
            padding: [batch, length + new] bool, False for padding, or None.
            following: [batch, new] int64, the position after each new token, 0 for padding.
            next_position: [batch] int64, position of the token that would follow: the largest of all of those.
        """
        self.length += following.shape[1]
        self.padding = padding
        self.next_position = next_position
        self._following.append(following)

    def truncate(self, length: int) -> None:
        """Forgets every token from `length` on, so that a prompt can be continued in another way."""
        if not 0 <= length <= self.length:
            raise ErnieError(f"cache: cannot cut {self.length} tokens to {length}")
        if length < self.length:
            kept = paddle.concat(self._following, axis=1)[:, :length] if length else None
            self._following = [] if kept is None else [kept]
            self.next_position = None if kept is None else kept.max(axis=1)
        self.padding = None if self.padding is None or not length else self.padding[:, :length]
        self.length = length

    def reorder(self, rows: Tensor) -> None:
        """Makes row i of the cache what row rows[i] was (rows [new_batch] int64): for beams and repeated prompts."""
        self._buffers = [None if t is None else paddle.index_select(t, rows, axis=0) for t in self._buffers]
        self._reserved = None
        self._following = [paddle.index_select(part, rows, axis=0) for part in self._following]
        if self.padding is not None:
            self.padding = paddle.index_select(self.padding, rows, axis=0)
        if self.next_position is not None:
            self.next_position = paddle.index_select(self.next_position, rows, axis=0)

    def _reserve(self, index: int, batch: int, end: int, dtype: paddle.dtype) -> Tensor:
        buffer = self._buffers[index]
        while self.capacity < end:
            self.capacity *= 2
        fits = buffer is not None and buffer.shape[1] >= end and buffer.dtype == dtype
        if buffer is None or not fits or (not self.length and buffer.shape[0] != batch):
            grown = paddle.empty([batch, self.capacity, *self.kv_shape], dtype=dtype)
            if buffer is not None and self.length:
                grown[:, : self.length] = buffer[:, : self.length].astype(dtype)
            self._buffers[index] = buffer = grown
            self._reserved = None
        return buffer
