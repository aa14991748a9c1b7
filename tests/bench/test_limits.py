"""Bytes and operations per token, counted by hand for small architectures."""

from __future__ import annotations

from pathlib import Path

import pytest

from ernie45.bench.limits import STORAGES, bytes_per_token, operations_per_token
from ernie45.config import ErnieConfig
from tests.helpers.tiny import DENSE, MOE

CONFIGS = Path(__file__).parents[2] / "configs"

# Per layer of DENSE: Q, K, V and O of 4 heads and 2 groups of 8, and an MLP of 40; inputs first.
ATTENTION = ((24, 64), (32, 24))
DENSE_LAYER = (*ATTENTION, (24, 80), (40, 24))
NORMS = 2 * 24


def weights(shapes: tuple[tuple[int, int], ...]) -> int:
    return sum(inputs * outputs for inputs, outputs in shapes)


def outputs(shapes: tuple[tuple[int, int], ...]) -> int:
    return sum(width for _, width in shapes)


@pytest.mark.parametrize(
    ("storage", "linear", "vocabulary"),
    [
        ("float32", 4 * weights(DENSE_LAYER), 4 * 61 * 24),
        ("bfloat16", 2 * weights(DENSE_LAYER), 2 * 61 * 24),
        ("wint8", weights(DENSE_LAYER) + 4 * outputs(DENSE_LAYER), 61 * 24 + 4 * 61),
        ("wint4", 0.53125 * weights(DENSE_LAYER), 61 * 24 + 4 * 61),
        ("Q8_0", 1.0625 * weights(DENSE_LAYER), 1.0625 * 61 * 24),
        ("Q4_0", 0.5625 * weights(DENSE_LAYER), 0.8203125 * 61 * 24),
    ],
)
def test_every_weight_is_read_once_and_a_tied_embedding_as_the_head(
    storage: str, linear: float, vocabulary: float
) -> None:
    expected = 2 * (linear + 4 * NORMS) + 4 * 24 + vocabulary
    assert bytes_per_token(ErnieConfig.from_dict(DENSE), STORAGES[storage]) == pytest.approx(expected)


def test_only_chosen_experts_and_one_row_of_an_untied_embedding_are_read() -> None:
    shared, chosen = weights(((24, 40), (20, 24))), 2 * weights(((24, 20), (10, 24)))
    moe_layer = 2 * (weights(ATTENTION) + shared + chosen) + 4 * (NORMS + 24 * 6 + 6)
    expected = 2 * weights(DENSE_LAYER) + 4 * NORMS + 2 * moe_layer + 4 * 24 + 2 * 24 + 2 * 24 * 61
    assert bytes_per_token(ErnieConfig.from_dict(MOE), STORAGES["bfloat16"]) == pytest.approx(expected)


def test_operations_leave_out_the_head_and_experts_that_are_not_chosen() -> None:
    assert operations_per_token(ErnieConfig.from_dict(DENSE)) == 2 * 2 * weights(DENSE_LAYER)
    shared, chosen, router = weights(((24, 40), (20, 24))), 2 * weights(((24, 20), (10, 24))), 24 * 6
    moe_layer = weights(ATTENTION) + shared + chosen + router
    assert operations_per_token(ErnieConfig.from_dict(MOE)) == pytest.approx(
        2 * (weights(DENSE_LAYER) + 2 * moe_layer), abs=2 * 2 * 6
    )


def test_the_published_sizes() -> None:
    small = ErnieConfig.from_pretrained(CONFIGS / "ernie-4.5-0.3b.json")
    assert bytes_per_token(small, STORAGES["bfloat16"]) == pytest.approx(2 * 361e6, rel=0.01)
    large = ErnieConfig.from_pretrained(CONFIGS / "ernie-4.5-21b-a3b.json")
    assert operations_per_token(large) == pytest.approx(2 * 3e9, rel=0.15)
