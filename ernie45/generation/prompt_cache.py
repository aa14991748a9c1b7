"""A key/value cache that knows its tokens, so that a prompt which begins with them only computes the rest."""

from __future__ import annotations

import copy

import numpy as np
import paddle

from ernie45.config import ErnieConfig
from ernie45.models.cache import KVCache


class PromptCache(KVCache):
    """What `generate` and `stream` fill, and continue from when it is passed to them again.

    Only they may fill it. A call always gets the whole prompt; the longest beginning that the cache holds already is
    not computed again. The result is that of a new cache, also after an interrupted call.

        cache = PromptCache(model.config)
        for question in questions:
            messages.append({"role": "user", "content": question})
            answer = "".join(model.stream(messages, tokenizer=tokenizer, cache=cache))
            messages.append({"role": "assistant", "content": answer})

    Args:
        config: architecture of the model.
        capacity: tokens to reserve per row; it doubles when it is exceeded.
    """

    def __init__(self, config: ErnieConfig, capacity: int = 256):
        super().__init__(config, capacity)
        self.features: dict[bytes, paddle.Tensor] = {}  # of the pictures in the prompt: see generation/media.py
        self._ids = np.empty([0, 0], dtype="int64")

    @property
    def ids(self) -> np.ndarray:
        """[rows, length] int64: the tokens that are held, padding included; keys of pictures for their tokens."""
        return self._ids[:, : self.length]

    def announce(self, ids: np.ndarray) -> None:
        """Notes the tokens [rows, new] that are about to be fed; they are held once `length` has grown over them."""
        self._ids = np.concatenate([self.ids, ids], axis=1) if self.length else ids

    def keep_beginning(self, ids: np.ndarray, mask: np.ndarray) -> int:
        """Forgets everything after the longest common beginning with a prompt, and returns its length.

        It is shorter than the prompt: the last token is always computed, because its logits are needed.

        Args:
            ids: [rows, sequence] int64, padded on the left; as many rows as the cache has, if it is not empty.
            mask: [rows, sequence] bool, False for padding.
        """
        columns = min(self.ids.shape[1], ids.shape[1] - 1) if self.length else 0
        held = np.ones([len(ids), columns], dtype=bool)
        if columns and self.padding is not None:
            held = self.padding[:, :columns].numpy()
        same = (self.ids[:, :columns] == ids[:, :columns]) & (held == mask[:, :columns]) if columns else held
        common = int(np.cumprod(same.all(axis=0)).sum())
        self.truncate(common)
        return common

    def reorder(self, rows: paddle.Tensor) -> None:
        """Makes row i what row rows[i] was."""
        super().reorder(rows)
        self._ids = self._ids[rows.numpy()]

    def with_rows(self, rows: np.ndarray) -> PromptCache:
        """Another cache whose row i is row rows[i] of this one, which stays as it is."""
        other = copy.copy(self)  # reorder replaces every tensor, so nothing is shared afterwards
        other.reorder(paddle.to_tensor(rows))
        return other
