"""How close logits are to those of a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ernie45.errors import ErnieError

# Logits compared at once: a few float64 copies of 2**22 values are about 100 MB.
BLOCK = 2**22


@dataclass(frozen=True)
class Agreement:
    """Differences of two models' predictions over some positions.

    Attributes:
        positions: how many positions were compared.
        mean_error: absolute difference of the probabilities, mean over positions and all entries of the vocabulary.
        max_error: the largest of these differences.
        mean_cosine: cosine similarity of the two logit vectors of a position, mean over positions.
        min_cosine: the smallest of these.
        top1: share of the positions at which both find the same token most likely.
    """

    positions: int
    mean_error: float
    max_error: float
    mean_cosine: float
    min_cosine: float
    top1: float


def compare(reference: np.ndarray, logits: np.ndarray) -> Agreement:
    """Compares finite logits [positions, vocab] with those of the reference, in float64.

    Raises:
        ErnieError: the shapes differ, or there is nothing to compare.
    """
    if reference.shape != logits.shape or reference.ndim != 2 or not reference.size:
        raise ErnieError(
            f"logits: expected two non-empty [positions, vocab], found {reference.shape} and {logits.shape}"
        )
    step = max(1, BLOCK // reference.shape[1])
    return combine(
        [
            _compare_block(reference[first : first + step].astype("float64"), logits[first : first + step])
            for first in range(0, len(reference), step)
        ]
    )


def combine(parts: Sequence[Agreement]) -> Agreement:
    """The agreement over the positions of all parts together."""
    weights = [part.positions for part in parts]
    return Agreement(
        positions=sum(weights),
        mean_error=float(np.average([part.mean_error for part in parts], weights=weights)),
        max_error=max(part.max_error for part in parts),
        mean_cosine=float(np.average([part.mean_cosine for part in parts], weights=weights)),
        min_cosine=min(part.min_cosine for part in parts),
        top1=float(np.average([part.top1 for part in parts], weights=weights)),
    )


def _compare_block(reference: np.ndarray, logits: np.ndarray) -> Agreement:
    logits = logits.astype("float64")
    errors = np.abs(_probabilities(logits) - _probabilities(reference))
    cosines = _cosines(reference, logits)
    return Agreement(
        positions=len(reference),
        mean_error=float(errors.mean()),
        max_error=float(errors.max()),
        mean_cosine=float(cosines.mean()),
        min_cosine=float(cosines.min()),
        top1=float((reference.argmax(axis=1) == logits.argmax(axis=1)).mean()),
    )


def _probabilities(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosine similarity per row; two zero vectors count as equal, one alone as orthogonal."""
    products, left_squares, right_squares = (
        np.einsum("ij,ij->i", a, b) for a, b in ((left, right), (left, left), (right, right))
    )
    squares = left_squares * right_squares
    without_direction = (left_squares == right_squares).astype("float64")
    cosines = np.divide(products, np.sqrt(squares), out=without_direction, where=squares > 0)
    return np.clip(cosines, -1, 1)
