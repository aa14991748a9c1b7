"""The adapter: a slow definition in float64, and the laws that hold for any weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle
import pytest

from ernie45 import ops
from ernie45.config import ErnieConfig
from ernie45.models.adapter import GELU, Adapter
from ernie45.ops import custom
from tests.helpers.numeric import check_gradients, layer_norm, weights_of
from tests.helpers.tiny import difference, randomise
from tests.helpers.vision import vision_config

GRID = np.array([[1, 4, 6], [4, 2, 4], [1, 2, 2], [2, 4, 2]])
CLOSE = 1e-5


def tiny_config(width: int = 8) -> ErnieConfig:
    tower = {"depth": 1, "embed_dim": width, "num_heads": 1, "patch_size": 2}
    return vision_config(vision_config=tower, pixel_hidden_size=width, hidden_size=12)


def tiny_adapter(dtype: str = "float32", width: int = 8) -> Adapter:
    return randomise(Adapter(tiny_config(width), dtype), seed=0).eval()


def random_vectors(grid: np.ndarray, width: int = 8) -> np.ndarray:
    return np.random.default_rng(1).standard_normal([int(grid.prod(axis=1).sum()), width]).astype("float32")


@paddle.no_grad()
def run(adapter: Adapter, x: np.ndarray, grid: Any) -> np.ndarray:
    return adapter(paddle.to_tensor(x), np.array(grid)).numpy()


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return tiny_adapter()


# The definition.


def shuffled(weights: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    """Linear, exact GELU, linear, LayerNorm."""
    inner = x @ weights[f"{name}.0.weight"] + weights[f"{name}.0.bias"]
    inner = inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2
    inner = inner @ weights[f"{name}.2.weight"] + weights[f"{name}.2.bias"]
    return layer_norm(inner, weights[f"{name}.3.weight"], weights[f"{name}.3.bias"])


def definition(weights: dict[str, np.ndarray], x: np.ndarray, grid: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    """Token by token: the two frames' vectors of the four patches of a block, one after the other."""
    tokens, first = [], 0
    for frames, rows, columns in grid:
        blocks = x[first : first + frames * rows * columns].reshape(frames, rows * columns // 4, -1)
        first += frames * rows * columns
        merged = shuffled(weights, "spatial_linear", blocks)
        for start in range(0, frames, 2):
            both = merged[start], merged[min(start + 1, frames - 1)]
            tokens += [np.concatenate(vectors) for vectors in zip(*both, strict=True)]
    x = shuffled(weights, "temporal_linear", np.stack(tokens)) @ weights["mlp.weight"] + weights["mlp.bias"]
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * weights["after_norm.weight"]


def test_is_its_definition(adapter: Adapter) -> None:
    x = random_vectors(GRID)
    found = run(adapter, x, GRID)
    assert found.shape == (6 + 4 + 1 + 2, 12)
    assert difference(found, definition(weights_of(adapter), x.astype("float64"), GRID)) < CLOSE


def test_the_epsilons_of_norms() -> None:
    """1e-6 of the LayerNorms, and that of the decoder for the last norm: weights so small that both matter."""
    adapter = tiny_adapter()
    for name, weight in adapter.named_parameters():
        if not (".3." in name or name == "after_norm.weight"):
            weight.set_value(weight * 0.01)
    x, grid = random_vectors(GRID[:2]), GRID[:2]
    expected = definition(weights_of(adapter), x.astype("float64"), grid)
    assert difference(run(adapter, x, grid), expected) < CLOSE
    for part in (adapter.spatial_linear, adapter.temporal_linear):
        part[3].epsilon = 1e-5
    assert difference(run(adapter, x, grid), expected) > 100 * CLOSE
    assert difference(definition(weights_of(adapter), x.astype("float64"), grid, epsilon=1e-6), expected) > 100 * CLOSE


def test_gelu_is_exact() -> None:
    x = np.linspace(-6, 6, 101)
    expected = [value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in x]
    assert difference(GELU()(paddle.to_tensor(x.astype("float32"))), np.array(expected)) < 1e-6


def test_gradients_are_those_of_the_definition() -> None:
    adapter = tiny_adapter(width=4)
    grid = np.array([[1, 2, 2], [2, 2, 2]])
    x = random_vectors(grid, width=4)
    check_gradients(
        adapter, lambda weights: definition(weights, x.astype("float64"), grid), adapter(paddle.to_tensor(x), grid)
    )


def test_gradients_of_vectors_add_up_where_a_picture_stands_beside_itself(adapter: Adapter) -> None:
    x = random_vectors(GRID[2:3])
    alone = paddle.to_tensor(x, stop_gradient=False)
    (adapter(alone, GRID[2:3]) ** 3).sum().backward()
    twice = paddle.to_tensor(np.concatenate([x, x]), stop_gradient=False)
    (adapter(twice, np.array([[2, 2, 2]])) ** 3).sum().backward()
    assert float(alone.grad.abs().max()) > 0.01
    assert difference(alone.grad, (twice.grad[:4] + twice.grad[4:]).numpy()) < CLOSE


# Which rows go together.


def rows_of(adapter: Adapter, *items: tuple[int, int, int]) -> list[list[int]]:
    return adapter.frame_rows(np.array(items, "int64").reshape(-1, 3)).tolist()


def test_frame_rows_by_hand(adapter: Adapter) -> None:
    assert rows_of(adapter, (1, 2, 4)) == [[0, 0], [1, 1]]
    assert rows_of(adapter, (2, 2, 4)) == [[0, 2], [1, 3]]
    assert rows_of(adapter, (4, 2, 4)) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert rows_of(adapter, (1, 2, 2), (4, 2, 2), (1, 2, 4), (2, 2, 2)) == [
        [0, 0],
        [1, 2],
        [3, 4],
        [5, 5],
        [6, 6],
        [7, 8],
    ]
    assert rows_of(adapter) == []


# Laws.


def test_items_do_not_see_each_other_and_keep_their_order(adapter: Adapter) -> None:
    x = random_vectors(GRID)
    parts = np.split(x, np.cumsum(GRID.prod(axis=1))[:-1])
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        together = run(adapter, np.concatenate([parts[i] for i in order]), GRID[order])
        alone = [run(adapter, parts[i], GRID[i : i + 1]) for i in order]
        assert difference(together, np.concatenate(alone)) < CLOSE


def test_a_picture_is_a_video_that_shows_it_twice(adapter: Adapter) -> None:
    x = random_vectors(GRID[:1])
    assert difference(run(adapter, x, [[1, 4, 6]]), run(adapter, np.concatenate([x, x]), [[2, 4, 6]])) < CLOSE


def test_the_order_of_frames_matters(adapter: Adapter) -> None:
    x = random_vectors(np.array([[2, 2, 2]]))
    assert difference(run(adapter, x, [[2, 2, 2]]), run(adapter, np.roll(x, 4, axis=0), [[2, 2, 2]])) > 0.1


def test_a_token_comes_from_one_block_of_two_frames(adapter: Adapter) -> None:
    """Frames of two blocks: a patch of block 1 of frame 2 changes the token of pair 1 and block 1 alone."""
    x = random_vectors(np.array([[4, 2, 4]]))
    before = run(adapter, x, [[4, 2, 4]])
    x[2 * 8 + 4 + 3] += 1
    changed = np.abs(run(adapter, x, [[4, 2, 4]]) - before).max(axis=1) > CLOSE
    assert changed.tolist() == [False, False, False, True]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_compute_as_their_values(dtype: str) -> None:
    stored, wide = tiny_adapter(dtype), tiny_adapter()
    for name, weight in wide.named_parameters():
        weight.set_value(dict(stored.named_parameters())[name].astype("float32"))
    activations = ops.compute_dtype(stored.mlp.weight.dtype)
    x = random_vectors(GRID)
    with paddle.no_grad(), custom.reference_only():  # the fused products round activations
        found = stored(paddle.to_tensor(x).astype(activations), GRID)
    assert found.dtype == activations
    assert difference(found, run(wide, x, GRID)) < (CLOSE if activations == paddle.float32 else 0.1)
