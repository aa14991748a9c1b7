"""The vision tower: a slow definition in float64, and the laws that hold for any weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45 import ops
from ernie45.config import VisionConfig
from ernie45.errors import ErnieError
from ernie45.models.vision import (
    PIXEL_DEVIATION,
    PIXEL_MEAN,
    VisionTransformer,
    encoder_batches,
    frame_lengths,
    patch_places,
    read_grid,
    rotary_2d,
)
from ernie45.ops import custom, reference
from tests.helpers.numeric import check_gradients, layer_norm, softmax, weights_of
from tests.helpers.tiny import difference, randomise
from tests.helpers.vision import vision_config

GRID = np.array([[1, 4, 6], [4, 2, 4], [1, 2, 2], [2, 4, 2]])
CLOSE = 1e-5


def tiny_vision(**tower: Any) -> VisionConfig:
    keys = {"depth": 2, "embed_dim": 24, "num_heads": 2, "mlp_ratio": 2, "patch_size": 2, **tower}
    config = vision_config(vision_config=keys, pixel_hidden_size=keys["embed_dim"])
    assert config.vision is not None
    return config.vision


def tiny_tower(seed: int = 0, dtype: str = "float32", **tower: Any) -> VisionTransformer:
    return randomise(VisionTransformer(tiny_vision(**tower), dtype), seed).eval()


def random_patches(grid: np.ndarray, config: VisionConfig, seed: int = 1) -> np.ndarray:
    size = (int(grid.prod(axis=1).sum()), config.patch_bytes)
    return np.random.default_rng(seed).integers(0, 256, size).astype("uint8")


@paddle.no_grad()
def run(tower: VisionTransformer, patches: np.ndarray, grid: np.ndarray) -> np.ndarray:
    return tower(paddle.to_tensor(patches), grid).numpy()


@pytest.fixture(scope="module")
def tower() -> VisionTransformer:
    return tiny_tower()


# The definition.


def turned(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """x [N, heads, head_dim]: element j of the first half and of the second as a complex number, turned."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-2 * np.arange(half // 2) / half)
    angles = np.concatenate([places[:, :1] * frequencies, places[:, 1:] * frequencies], axis=1)
    numbers = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


def definition(
    weights: dict[str, np.ndarray], pixels: np.ndarray, grid: np.ndarray, config: VisionConfig
) -> np.ndarray:
    """What the tower makes of normalised pixels, with one mask for all frames instead of a frame at a time."""
    frame_of = np.repeat(np.arange(len(frame_lengths(grid))), frame_lengths(grid))
    places = patch_places(grid, config.merge_size)
    x = pixels @ weights["patch_embed.proj.weight"]
    for number in range(config.depth):
        own = {name.split(".", 2)[2]: weight for name, weight in weights.items() if f"blocks.{number}." in name}
        normed = layer_norm(x, own["norm1.weight"], own["norm1.bias"])
        fused = (normed @ own["attn.qkv.weight"] + own["attn.qkv.bias"]).reshape(len(x), 3, config.num_heads, -1)
        query, key, value = turned(fused[:, 0], places), turned(fused[:, 1], places), fused[:, 2]
        scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(config.head_dim)
        chances = softmax(np.where(frame_of[:, None] == frame_of, scores, -np.inf))
        mixed = np.einsum("hqk,khd->qhd", chances, value).reshape(len(x), -1)
        x = x + mixed @ own["attn.proj.weight"] + own["attn.proj.bias"]
        inner = layer_norm(x, own["norm2.weight"], own["norm2.bias"]) @ own["mlp.fc1.weight"] + own["mlp.fc1.bias"]
        x = x + (inner / (1 + np.exp(-1.702 * inner))) @ own["mlp.fc2.weight"] + own["mlp.fc2.bias"]
    return layer_norm(x, weights["ln.weight"], weights["ln.bias"])


def by_hand(patches: np.ndarray, config: VisionConfig) -> np.ndarray:
    """Normalised pixels in float64; columns are channel, y, x."""
    pixels = patches.reshape(len(patches), config.channels, -1) / 255
    mean, deviation = np.array(PIXEL_MEAN)[:, None], np.array(PIXEL_DEVIATION)[:, None]
    return ((pixels - mean) / deviation).reshape(patches.shape)


@pytest.mark.parametrize("changes", [{}, {"num_heads": 1}, {"num_heads": 6, "mlp_ratio": 3}, {"patch_size": 14}])
def test_is_its_definition(changes: dict[str, Any]) -> None:
    tower = tiny_tower(**changes)
    patches = random_patches(GRID, tower.config)
    expected = definition(weights_of(tower), by_hand(patches, tower.config), GRID, tower.config)
    assert difference(run(tower, patches, GRID), expected) < CLOSE


def test_the_epsilon_of_norms_is_a_millionth() -> None:
    """Pixels and weights so small that it matters: another epsilon changes the output by far more than rounding."""
    tower = tiny_tower()
    for name, weight in tower.named_parameters():
        if not name.startswith("ln."):
            weight.set_value(weight * 0.05)
    pixels = 0.05 * np.random.default_rng(1).standard_normal([24, tower.config.patch_bytes])
    expected = definition(weights_of(tower), pixels, GRID[:1], tower.config)
    assert difference(run(tower, pixels.astype("float32"), GRID[:1]), expected) < CLOSE
    for block in tower.blocks:
        block.norm1.epsilon = block.norm2.epsilon = 1e-5
    tower.ln.epsilon = 1e-5
    assert difference(run(tower, pixels.astype("float32"), GRID[:1]), expected) > 1000 * CLOSE


def test_gradients_are_those_of_the_definition() -> None:
    tower = tiny_tower(depth=1, embed_dim=8, patch_size=1)
    grid = np.array([[1, 2, 4], [2, 2, 2]])
    patches = random_patches(grid, tower.config)
    pixels = by_hand(patches, tower.config)
    check_gradients(
        tower,
        lambda weights: definition(weights, pixels, grid, tower.config),
        tower(paddle.to_tensor(patches), grid),
    )


# Laws.


def test_a_frame_does_not_see_the_others(tower: VisionTransformer) -> None:
    patches = random_patches(GRID, tower.config)
    together, first = run(tower, patches, GRID), 0
    for _, rows, columns in np.repeat(GRID, GRID[:, 0], axis=0):
        own = slice(first, first + rows * columns)
        alone = run(tower, patches[own], np.array([[1, rows, columns]]))
        assert difference(alone, together[own]) < CLOSE
        first += rows * columns
    assert first == len(patches)


def test_the_order_of_items_is_the_order_of_outputs(tower: VisionTransformer) -> None:
    patches = random_patches(GRID, tower.config)
    bounds = np.cumsum(GRID.prod(axis=1))[:-1]
    order = [2, 0, 3, 1]
    inputs = np.concatenate([np.split(patches, bounds)[i] for i in order])
    expected = np.concatenate([np.split(run(tower, patches, GRID), bounds)[i] for i in order])
    assert difference(run(tower, inputs, GRID[order]), expected) < CLOSE


def test_a_video_is_its_frames_as_pictures(tower: VisionTransformer) -> None:
    patches = random_patches(np.array([[4, 2, 4]]), tower.config)
    pictures = run(tower, patches, np.array([[1, 2, 4]] * 4))
    assert difference(run(tower, patches, np.array([[4, 2, 4]])), pictures) < CLOSE


def test_every_patch_of_a_frame_sees_every_other(tower: VisionTransformer) -> None:
    patches = random_patches(GRID[:1], tower.config)
    before = run(tower, patches, GRID[:1])
    patches[-1] ^= 255
    assert (np.abs(run(tower, patches, GRID[:1]) - before).max(axis=1) > CLOSE).all()


def test_bytes_are_normalised_and_floats_are_not(tower: VisionTransformer) -> None:
    patches = random_patches(GRID, tower.config)
    floats = by_hand(patches, tower.config).astype("float32")
    assert difference(tower.normalised(paddle.to_tensor(patches)), floats) < 1e-6
    assert difference(run(tower, floats, GRID), run(tower, patches, GRID)) < CLOSE


def test_scores_never_reach_beyond_a_frame(tower: VisionTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, correct = [], reference.attention

    def recording(query: paddle.Tensor, key: paddle.Tensor, *others: Any) -> paddle.Tensor:
        shapes.append((query.shape[:2], key.shape[:2]))
        return correct(query, key, *others)

    monkeypatch.setattr(reference, "attention", recording)
    monkeypatch.setattr(ops, "attention_by_frame", reference.attention_by_frame)
    run(tower, random_patches(GRID, tower.config), GRID)
    sizes, counts = np.unique(frame_lengths(GRID), return_counts=True)  # frames of one size share a product
    expected = [([count, size], [count, size]) for size, count in zip(sizes.tolist(), counts.tolist(), strict=True)]
    assert shapes == expected * tower.config.depth


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_compute_as_their_values(dtype: str) -> None:
    """On a CPU activations are float32, so that nothing but the rounding of the weights is lost."""
    stored, wide = tiny_tower(dtype=dtype), tiny_tower()
    for name, weight in wide.named_parameters():
        weight.set_value(dict(stored.named_parameters())[name].astype("float32"))
    patches = random_patches(GRID, wide.config)
    with paddle.no_grad(), custom.reference_only():  # the fused products round activations
        found = stored(paddle.to_tensor(patches), GRID)
    assert found.dtype == ops.compute_dtype(stored.ln.weight.dtype)
    assert found.dtype == paddle.float32 or paddle.device.get_device() != "cpu"
    assert difference(found, run(wide, patches, GRID)) < (CLOSE if found.dtype == paddle.float32 else 0.1)


# Where patches are.


def test_patch_places_by_hand() -> None:
    picture = [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    below = [[2, 0], [2, 1], [3, 0], [3, 1], [2, 2], [2, 3], [3, 2], [3, 3]]
    tall = [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1], [3, 0], [3, 1]]
    assert patch_places(np.array([[1, 2, 4]]), 2).tolist() == picture
    assert patch_places(np.array([[1, 4, 4]]), 2).tolist() == picture + below
    assert patch_places(np.array([[2, 2, 4], [1, 4, 2]]), 2).tolist() == picture * 2 + tall
    assert patch_places(np.array([[1, 2, 2]]), 1).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert patch_places(np.zeros([0, 3], "int64"), 2).shape == (0, 2)


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), frames=st.integers(1, 3), merge=st.integers(1, 3))
@settings(max_examples=30)
def test_patch_places_are_all_places_block_by_block(rows: int, columns: int, frames: int, merge: int) -> None:
    grid = np.array([[frames, rows * merge, columns * merge]])
    places = patch_places(grid, merge)
    assert frame_lengths(grid) == [rows * merge * columns * merge] * frames
    for frame in np.split(places, frames):
        assert len({tuple(place) for place in frame.tolist()}) == rows * merge * columns * merge
        blocks = frame.reshape(-1, merge * merge, 2) // merge
        assert (blocks == blocks[:, :1]).all()
        assert blocks[:, 0].tolist() == [[row, column] for row in range(rows) for column in range(columns)]


def test_frame_lengths_are_plain_integers() -> None:
    assert frame_lengths(GRID) == [24, 8, 8, 8, 8, 4, 8, 8]
    assert {type(length) for length in frame_lengths(GRID)} == {int}


@pytest.mark.parametrize("head_dim", [4, 8, 12, 80])
def test_rotary_is_its_definition(head_dim: int) -> None:
    places = np.array([[0, 0], [0, 1], [1, 0], [3, 5], [127, 96]])
    x = np.random.default_rng(0).standard_normal([len(places), 3, head_dim])
    cos, sin = rotary_2d(places, head_dim)
    assert cos.shape == sin.shape == [len(places), 1, head_dim // 2]
    assert cos.dtype == sin.dtype == paddle.float32
    found = ops.rope_halves(paddle.to_tensor(x.astype("float32")), cos, sin)
    assert difference(found, turned(x, places)) < 5e-5


def test_rotary_products_depend_on_distances_alone() -> None:
    query, key = np.random.default_rng(0).standard_normal([2, 1, 1, 16])

    def product(first: tuple[int, int], second: tuple[int, int]) -> float:
        sides = [
            ops.rope_halves(paddle.to_tensor(x.astype("float32")), *rotary_2d(np.array([place]), 16))
            for x, place in ((query, first), (key, second))
        ]
        return float((sides[0] * sides[1]).sum())

    assert product((7, 2), (4, 3)) == pytest.approx(product((13, 9), (10, 10)), abs=1e-4)
    assert product((7, 2), (4, 3)) != pytest.approx(product((2, 7), (3, 4)), abs=1e-2)


# The grid.


def test_read_grid_takes_tensors_arrays_and_lists() -> None:
    for grid in (GRID, GRID.tolist(), paddle.to_tensor(GRID), GRID.astype("int32"), GRID.astype("uint8")):
        read = read_grid(grid, tiny_vision())
        assert read.dtype == np.int64 and read.tolist() == GRID.tolist()
    for empty in ([], np.zeros([0, 3], "int64"), paddle.zeros([0, 3], "int64")):
        assert read_grid(empty, tiny_vision()).shape == (0, 3)


def test_read_grid_leaves_padding_out() -> None:
    assert read_grid([[1, 4, 6], [0, 0, 0], [2, 2, 2]], tiny_vision()).tolist() == [[1, 4, 6], [2, 2, 2]]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([1, 4, 6], r"expected integers \[items, 3\] as \(frames, rows, columns\), found int64 \[3\]"),
        ([[4, 6]], r"found int64 \[1, 2\]"),
        ([[1.0, 4.0, 6.0]], r"found float64 \[1, 3\]"),
        ([[1, 4, 6], [1, 3, 4]], "item 1 has 3 x 4 patches; both must be multiples of 2"),
        ([[1, 4, 5]], "item 0 has 4 x 5 patches; both must be multiples of 2"),
        ([[3, 4, 4]], "item 0 has 3 frames; a video needs a multiple of 2: repeat the last frame"),
    ],
)
def test_read_grid_refuses(grid: list[Any], message: str) -> None:
    with pytest.raises(ErnieError, match=message):
        read_grid(grid, tiny_vision())


# Batches of the encoder.

SIDES = st.tuples(st.sampled_from([1, 1, 2, 4, 6, 10]), st.integers(1, 4), st.integers(1, 4))


@given(st.lists(SIDES, max_size=6), st.integers(1, 60))
def test_batches_are_as_large_as_they_may_be(items: list[tuple[int, int, int]], most: int) -> None:
    grid = np.array(items, "int64").reshape(-1, 3)
    batches = list(encoder_batches(grid, 2, most))
    assert frame_lengths(np.concatenate([grid[:0], *batches])) == frame_lengths(grid)
    for batch in batches:
        frames, rows, columns = batch[0]
        assert batch.prod(axis=1).sum() <= most or (len(batch) == 1 and frames <= 2)
        assert all(piece[0] == 1 or piece[0] % 2 == 0 for piece in batch)
    pieces = [piece.prod() for batch in batches for piece in batch[:1]]
    totals = [batch.prod(axis=1).sum() for batch in batches]
    assert all(total + piece > most for total, piece in zip(totals, pieces[1:], strict=False))
