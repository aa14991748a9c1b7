"""Even work for all ranks, though pictures of any resolution make rows of very different cost.

Two levels: rows of similar cost make up a step, so that no rank waits long for another; within the step they are dealt
to the ranks back and forth, the most expensive row first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ernie45.training.data.encode import Example, Pair

# Of a patch against a token. In ERNIE-4.5-VL-28B-A3B a patch goes through the 0.63 billion parameters of the vision
# tower, and a token through the 3 billion that are active in the decoder.
PATCH_COST = 0.2

Plan = list[list[list[int]]]  # steps, ranks, rows


def cost(row: Sequence[Example | Pair]) -> float:
    """How much work a row is, in tokens without pictures."""
    examples = [example for sequence in row for example in sequence.examples]
    patches = sum(len(example.images) for example in examples if example.images is not None)
    return sum(map(len, examples)) + PATCH_COST * patches


def deal(costs: Sequence[float], groups: int) -> list[list[int]]:
    """As many numbers for each group, give or take one, with similar sums of costs.

    Sorted by cost, dealt to the groups in order, then in reverse order, and so on.
    """
    order = np.argsort(-np.asarray(costs), kind="stable").tolist()
    dealt: list[list[int]] = [[] for _ in range(groups)]
    for place, number in enumerate(order):
        lap, group = divmod(place, groups)
        dealt[groups - 1 - group if lap % 2 else group].append(number)
    return dealt


def in_order(count: int, ranks: int, rows: int) -> Plan:
    """Steps of ranks of rows as they come."""
    return np.arange(count).reshape(-1, ranks, rows).tolist()


def balanced(costs: Sequence[float], ranks: int, rows: int, generator: np.random.Generator) -> Plan:
    """Steps of ranks of rows with even work.

    Args:
        costs: of all rows, as many as fill steps.
        ranks: that work at the same time.
        rows: of a rank in a step.
        generator: puts the steps into random order.
    """
    order = np.argsort(-np.asarray(costs), kind="stable").reshape(-1, ranks * rows)
    steps = [[[int(step[i]) for i in own] for own in deal([costs[i] for i in step], ranks)] for step in order]
    return [steps[index] for index in generator.permutation(len(steps))]


def imbalance(costs: Sequence[float], plan: Plan) -> float:
    """By which factor a plan takes longer than if the work of every step were spread evenly: max / mean over ranks.

    1 is perfect; the mean over steps, weighted by their work.
    """
    loads = np.array([[sum(costs[row] for row in own) for own in step] for step in plan])
    total = loads.sum()
    return float(loads.max(axis=1).sum() * loads.shape[1] / total) if total else 1.0
