"""The vision tower as one operator against its blocks, and in groups of frames.

Where only the order of float32 additions differs, a value now and then falls on the other side of a rounding to
bfloat16: results (of size 1 here) agree to a few units of float32 where no value that leads to them did, and to
`FLIPPED` at most. Where one side does not round at all, they differ by `ROUNDED` at most and by a tenth of it on
average.
"""

from __future__ import annotations

import functools

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45 import ops
from ernie45.models.vision import VisionTransformer
from ernie45.ops import custom
from tests.helpers.fused import both_instruction_sets, fused
from tests.helpers.tower import Grid, encode, packed_tower, pixels, plain_tower, tower_config

pytestmark = pytest.mark.skipif(custom.library() is None, reason="no native library here")

FLIPPED, ROUNDED = 2e-2, 6e-2
MIXED: Grid = [(1, 5, 7), (3, 1, 1), (1, 2, 41), (2, 4, 4), (1, 1, 80)]

HEAD_DIMS = st.sampled_from([4, 16, 20, 64, 72, 80, 84, 96])
GRIDS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 19)), min_size=1, max_size=4)


@functools.cache
def towers(
    heads: int = 2, head_dim: int = 16, wide: int = 40, patch_size: int = 3, depth: int = 2
) -> tuple[VisionTransformer, VisionTransformer]:
    plain = plain_tower(tower_config(heads, head_dim, wide, patch_size, depth))
    return plain, packed_tower(plain)


def narrow(x: paddle.Tensor) -> paddle.Tensor:
    return x.astype("bfloat16").astype("float32")


def rounded_attention(
    query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, lengths: list[int]
) -> paddle.Tensor:
    """`ops.attention_by_frame` with the roundings of the operator, for frames of up to 640 patches."""
    query = narrow(query * float(np.log2(np.e) / np.sqrt(query.shape[-1])))
    parts = []
    for q, k, v in zip(*(paddle.split(x, lengths) for x in (query, narrow(key), narrow(value))), strict=True):
        scores = paddle.einsum("qhd,khd->hqk", q, k)
        powers = 2.0 ** (scores - scores.max(axis=-1, keepdim=True))
        sums = paddle.einsum("hqk,khd->qhd", narrow(powers), v)
        parts.append(narrow(sums / powers.sum(axis=-1).T.unsqueeze(-1)))
    return paddle.concat(parts)


def block_by_block(tower: VisionTransformer, x: paddle.Tensor, grid: Grid) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tower, "fused", None)
        return encode(tower, x, grid)


def assert_rounded(found: np.ndarray, expected: np.ndarray) -> None:
    off = np.abs(found - expected)
    assert off.max() < ROUNDED and off.mean() < ROUNDED / 10


def off_its_blocks(tower: VisionTransformer, x: paddle.Tensor, grid: Grid) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "attention_by_frame", rounded_attention)
        return np.abs(encode(tower, x, grid) - block_by_block(tower, x, grid))


@both_instruction_sets
@settings(deadline=None, max_examples=15)
@given(st.integers(1, 3), HEAD_DIMS, st.integers(1, 90), st.integers(1, 5), GRIDS, st.sampled_from([1, 2, 5]))
def test_it_equals_its_blocks(
    isa: str, heads: int, head_dim: int, wide: int, patch_size: int, grid: Grid, threads: int
) -> None:
    plain, tower = towers(heads, head_dim, wide, patch_size, depth=1)
    x = pixels(tower.config, grid)
    with fused(isa, "vision", "linear", threads=threads):
        off = off_its_blocks(tower, x, grid)
        assert np.median(off) < FLIPPED / 20 and off.max() < FLIPPED
        assert_rounded(encode(tower, x, grid), encode(plain, x, grid))


@both_instruction_sets
@pytest.mark.parametrize("patches", [1, 2, 15, 16, 17, 79, 80, 81, 160, 161, 320])
def test_it_equals_its_blocks_but_for_rounding(isa: str, patches: int) -> None:
    """So few numbers that hardly one falls on the other side."""
    tower, grid = towers(1, 4, 5, 1)[1], [(1, 1, 3), (1, 1, patches), (1, 1, 3)]
    with fused(isa, "vision", "linear"):
        assert np.median(off_its_blocks(tower, pixels(tower.config, grid), grid)) < 1e-6


@both_instruction_sets
@pytest.mark.parametrize("patches", [640, 641, 1300])
def test_long_frames(isa: str, patches: int) -> None:
    """Keys go through the operator in blocks of 640."""
    plain, tower = towers()
    grid = [(1, 1, patches)]
    x = pixels(tower.config, grid)
    with fused(isa, "vision"):
        assert_rounded(encode(tower, x, grid), encode(plain, x, grid))


@both_instruction_sets
def test_scores_far_apart(isa: str) -> None:
    """Queries and keys four times as large: hardly a block of keys fails to change the largest score of some query."""
    plain, grid = plain_tower(tower_config(depth=1)), [(1, 1, 2000)]
    weight = plain.blocks[0].attn.qkv.weight
    weight.set_value(4 * weight)
    tower = packed_tower(plain)
    with fused(isa, "vision", "linear"):
        off = off_its_blocks(tower, pixels(tower.config, grid), grid)
    assert np.median(off) < 1e-6 and off.mean() < FLIPPED / 20


@both_instruction_sets
def test_a_frame_alone_is_the_same_to_the_bit(isa: str) -> None:
    tower = towers(2, 20)[1]
    x = pixels(tower.config, MIXED)
    with fused(isa, "vision", threads=3):
        together = encode(tower, x, MIXED)
        first = 0
        for frames, rows, columns in MIXED:
            for _ in range(frames):
                last = first + rows * columns
                alone = encode(tower, x[first:last], [(1, rows, columns)])
                np.testing.assert_array_equal(alone, together[first:last])
                first = last
    assert first == len(together)


@both_instruction_sets
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_number_of_threads_changes_nothing(isa: str, threads: int) -> None:
    tower = towers()[1]
    x = pixels(tower.config, MIXED)
    with fused(isa, "vision", threads=3):
        expected = encode(tower, x, MIXED)
    with fused(isa, "vision", threads=threads):
        np.testing.assert_array_equal(encode(tower, x, MIXED), expected)


def test_uint8_patches_and_blocks_of_patches() -> None:
    """The whole way of `VisionTransformer.forward`, as a model uses it."""
    plain = plain_tower(tower_config(merge_size=2))
    tower, grid = packed_tower(plain), [(1, 4, 6), (2, 2, 4)]
    x = paddle.to_tensor(np.random.default_rng(0).integers(0, 256, (40, 27)).astype("uint8"))
    with fused("avx2", "vision"):
        assert_rounded(encode(tower, x, grid), encode(plain, x, grid))


def test_no_frames() -> None:
    tower = towers()[1]
    assert encode(tower, pixels(tower.config, []), []).shape == (0, 32)


def test_when_it_is_used() -> None:
    tower = towers()[1]
    assert tower.fused is not None
    x = paddle.zeros([1, 27])
    assert tower.fused.usable(x)
    assert not tower.fused.usable(x.astype("float64"))
    with custom.reference_only():
        assert not tower.fused.usable(x)
