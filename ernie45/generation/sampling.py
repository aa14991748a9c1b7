"""From logits to the next token: penalties, filters and the draw.

All of it is NumPy on the host: for one row of 103424 logits the copy, the argmax and the log-softmax together take
about a fifth of a millisecond there, a tenth of what the same operations cost in Paddle on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ernie45.errors import ErnieError
from ernie45.generation.config import GenerationConfig


@dataclass(frozen=True)
class Context:
    """The tokens so far.

    Attributes:
        prompts: one int64 array per row, without padding.
        replies: [rows, new tokens so far] int64; rows that ended go on with the pad token.
    """

    prompts: list[np.ndarray]
    replies: np.ndarray


LogitsProcessor = Callable[[Context, np.ndarray], np.ndarray]
"""New logits [rows, vocab] float32 from those given, which stay as they are; -inf forbids a token."""


def processors_of(config: GenerationConfig, vocab_size: int, allowed: int) -> list[LogitsProcessor]:
    """The processors that the options ask for, in the order in which they work.

    Args:
        config: the options.
        vocab_size: number of logits.
        allowed: ids from here on have no token and are never chosen.
    """
    eos = np.array([i for i in config.eos_token_id if i < vocab_size], dtype="int64")
    processors: list[LogitsProcessor] = []
    if allowed < vocab_size:
        processors.append(partial(forbid, ids=np.arange(allowed, vocab_size)))
    if config.min_new_tokens and eos.size:
        processors.append(partial(forbid, ids=eos, until=config.min_new_tokens))
    if config.repetition_penalty != 1:
        processors.append(partial(penalize_repetition, penalty=config.repetition_penalty))
    if config.presence_penalty or config.frequency_penalty:
        processors.append(
            partial(penalize_occurrence, presence=config.presence_penalty, frequency=config.frequency_penalty)
        )
    return processors


def forbid(context: Context, logits: np.ndarray, ids: np.ndarray, until: int | None = None) -> np.ndarray:
    """Makes ids impossible: always, or until a reply has `until` tokens."""
    if until is not None and context.replies.shape[1] >= until:
        return logits
    logits = logits.copy()
    logits[:, ids] = -np.inf
    return logits


def penalize_repetition(context: Context, logits: np.ndarray, penalty: float) -> np.ndarray:
    """Divides positive and multiplies negative logits of tokens in prompt or reply (CTRL, arXiv 1909.05858)."""
    logits = logits.copy()
    for row, prompt, reply in zip(logits, context.prompts, context.replies, strict=True):
        seen = np.concatenate([prompt, reply])
        row[seen] = np.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    return logits


def penalize_occurrence(context: Context, logits: np.ndarray, presence: float, frequency: float) -> np.ndarray:
    """Subtracts `presence` once, and `frequency` per occurrence, from tokens in the reply."""
    logits = logits.copy()
    for row, reply in zip(logits, context.replies, strict=True):
        ids, counts = np.unique(reply, return_counts=True)
        row[ids] -= presence + frequency * counts
    return logits


def process(processors: Iterable[LogitsProcessor], context: Context, logits: np.ndarray) -> np.ndarray:
    """Applies the processors one after the other.

    Raises:
        ErnieError: one returned another shape, or left a row without a token to choose.
    """
    for processor in processors:
        processed = np.asarray(processor(context, logits), dtype="float32")
        if processed.shape != logits.shape:
            raise ErnieError(
                f"logits processor {processor!r}: expected logits of shape {logits.shape}, found {processed.shape}"
            )
        logits = processed
    best = logits.max(axis=-1)
    if not np.isfinite(best).all():
        row = int(np.flatnonzero(~np.isfinite(best))[0])
        raise ErnieError(
            f"logits of row {row} at new token {context.replies.shape[1]}: the largest is {best[row]}; either the "
            "weights or activations overflow (try dtype float32), or the processors forbid every token"
        )
    return logits


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities [..., vocab] float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def log_probabilities(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Log-probabilities [rows] float32 of one token in each row of logits [rows, vocab]."""
    best = logits.max(axis=-1, keepdims=True)
    total = np.exp(logits - best).sum(axis=-1)
    return logits[np.arange(len(ids)), ids] - best[:, 0] - np.log(total)


def candidates(logits: np.ndarray, config: GenerationConfig) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that sampling may choose from, and their probabilities up to a common factor.

    Temperature first, then top-k (exactly k), then top-p of what is left (the smallest set that reaches p), min-p last.

    Args:
        logits: [vocab] float32
        config: the options.

    Returns:
        ids [n] int64, weights [n] float64, all above 0.
    """
    ids = np.arange(logits.size)
    if 0 < config.top_k < logits.size:
        ids = np.argpartition(logits, -config.top_k)[-config.top_k :]
    weights = np.exp((logits[ids] - logits[ids].max()) / np.float32(config.temperature))
    weights /= weights.sum()
    # Tokens below (1 - p) / n have less than 1 - p together: top-p would drop them all, so they need not be sorted.
    floor = max(config.min_p * weights.max(), (1 - config.top_p) / ids.size, np.finfo("float32").tiny)
    likely = weights >= floor
    ids, weights = ids[likely], weights[likely].astype("float64")
    if config.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        order = order[before < config.top_p]
        ids, weights = ids[order], weights[order]
    return ids, weights


def choose(logits: np.ndarray, config: GenerationConfig, generator: np.random.Generator) -> int:
    """The next token of one row, logits [vocab]: the most likely one, or one drawn among the `candidates`."""
    if not config.do_sample:
        return int(logits.argmax())
    ids, weights = candidates(logits, config)
    bounds = np.cumsum(weights)
    drawn = int(np.searchsorted(bounds, generator.random() * bounds[-1], side="right"))
    return int(ids[min(drawn, ids.size - 1)])


def generators(config: GenerationConfig, prompts: int) -> list[np.random.Generator]:
    """One random generator per row, so that a row draws the same whatever else is in the batch.

    With a seed it depends on the number of the reply to a prompt only: equal prompts get equal replies.
    """
    if config.seed is None:
        return [np.random.default_rng() for _ in range(prompts * config.num_return_sequences)]
    return [
        np.random.default_rng([config.seed, reply])
        for _ in range(prompts)
        for reply in range(config.num_return_sequences)
    ]
