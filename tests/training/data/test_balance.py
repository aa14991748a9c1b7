"""Dealing rows of different cost to ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.training.data import Example, Pair
from ernie45.training.data.balance import PATCH_COST, balanced, cost, deal, imbalance, in_order


def example(tokens: int, patches: int | None = None) -> Example:
    ids = np.zeros(tokens, "int64")
    return Example(ids, ids, ids, images=None if patches is None else np.zeros([patches, 588], "uint8"))


def test_the_cost_of_a_row_is_its_tokens_and_patches() -> None:
    assert cost([example(3), Pair(example(4), example(5))]) == 12
    assert cost([example(3, 0), example(10, 16)]) == 13 + 16 * PATCH_COST


def test_dealing_goes_back_and_forth() -> None:
    assert deal([6, 5, 4, 3, 2, 1], 2) == [[0, 3, 4], [1, 2, 5]]
    assert deal([1, 2, 3], 2) == [[2], [1, 0]]


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=60), st.integers(1, 8))
@settings(max_examples=100)
def test_groups_get_as_many_and_differ_by_one_item_at_most(costs: list[float], groups: int) -> None:
    dealt = deal(costs, groups)
    assert sorted(number for group in dealt for number in group) == list(range(len(costs)))
    sizes = [len(group) for group in dealt]
    assert max(sizes) - min(sizes) <= 1
    if len(costs) % groups == 0:
        loads = [sum(costs[number] for number in group) for group in dealt]
        assert max(loads) - min(loads) <= max(costs) - min(costs) + 1e-9


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=60)
def test_a_plan_has_every_row_once_and_is_no_worse(steps: int, ranks: int, rows: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    costs = generator.lognormal(sigma=1.0, size=steps * ranks * rows).tolist()
    plan = balanced(costs, ranks, rows, generator)
    assert sorted(row for step in plan for own in step for row in own) == list(range(len(costs)))
    assert {len(own) for step in plan for own in step} == {rows} and {len(step) for step in plan} == {ranks}
    if rows == 1:  # then neighbours in cost at the same time are the best there is
        assert imbalance(costs, plan) <= imbalance(costs, in_order(len(costs), ranks, rows)) + 1e-9


def test_variable_resolution_is_evened_out() -> None:
    generator = np.random.default_rng(0)
    costs = generator.lognormal(sigma=1.0, size=8 * 4 * 16).tolist()  # 16 steps of 8 ranks of 4 rows
    before = imbalance(costs, in_order(len(costs), 8, 4))
    after = imbalance(costs, balanced(costs, 8, 4, generator))
    assert before > 1.5 and after < 1.1


@pytest.mark.parametrize(("costs", "expected"), [([1, 1], 1.0), ([3, 1], 1.5), ([0, 0], 1.0)])
def test_imbalance_is_max_over_mean(costs: list[float], expected: float) -> None:
    assert imbalance(costs, in_order(2, 2, 1)) == expected
