"""Attention over a bfloat16 cache against its definition in float64.

The tolerance is a bound: probabilities are rounded to bfloat16, which is off by 1 in 256 at most.
"""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.checkpoint.dtypes import convert
from ernie45.ops import custom, reference
from ernie45.ops.attention import decode_attention
from tests.helpers.fused import both_instruction_sets, fused

ROUNDING = 2.0**-8  # of bfloat16
THREADS = st.sampled_from([1, 2, 7])
LENGTHS = st.one_of(st.sampled_from([1, 63, 64, 65, 127, 128, 129, 192, 193]), st.integers(1, 200))

native = pytest.mark.skipif(custom.library() is None, reason="no native library here")


def narrow(array: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, as float32."""
    return convert(convert(np.ascontiguousarray(array), "F32", "BF16"), "BF16", "F32")


class Problem:
    """Queries and caches; whatever no token may see is NaN."""

    def __init__(
        self,
        new: int,
        lengths: list[int],
        first: list[int],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 64,
        room: int = 3,
        seed: int = 0,
    ):
        generator = np.random.default_rng(seed)
        batch, self.group = len(lengths), heads // kv_heads
        self.query = 2 * generator.standard_normal((batch, new, heads, head_dim), dtype=np.float32)
        shape = (2, batch, max(lengths) + room, kv_heads, head_dim)
        self.keys, self.values = narrow(generator.standard_normal(shape, dtype=np.float32))
        self.lengths, self.first, self.scale = lengths, first, head_dim**-0.5
        for row in range(batch):
            for cache in (self.keys, self.values):
                cache[row, : first[row]] = np.nan
                cache[row, lengths[row] :] = np.nan

    def run(self, function: object = decode_attention, dtype: str = "bfloat16") -> np.ndarray:
        keys, values = (paddle.to_tensor(cache).astype(dtype) for cache in (self.keys, self.values))
        query, lengths, first = map(paddle.to_tensor, (self.query, self.lengths, self.first))
        assert callable(function)
        return function(query, keys, values, lengths, self.scale, first).numpy()

    def visible(self, row: int, token: int) -> slice:
        return slice(self.first[row], max(self.first[row], self.lengths[row] - self.query.shape[1] + 1 + token))

    def define(self, *, rounded_query: bool) -> tuple[np.ndarray, np.ndarray, float]:
        """The result, the same with absolute values, and the largest error of a score that rounding its query makes."""
        query = self.query * np.float32(self.scale)
        query = (narrow(query) if rounded_query else query).astype(np.float64)
        result, sizes, off = np.zeros(query.shape), np.zeros(query.shape), 0.0
        for row, token, head in np.ndindex(query.shape[:3]):
            seen = self.visible(row, token)
            keys, values = (c[row, seen, head // self.group].astype(np.float64) for c in (self.keys, self.values))
            if not len(keys):
                continue
            with np.errstate(invalid="ignore"):
                scores = keys @ query[row, token, head]
                powers = np.exp(scores - scores.max())
                weights = powers / powers.sum()
                result[row, token, head], sizes[row, token, head] = weights @ values, weights @ np.abs(values)
                off = max(off, ROUNDING * (np.abs(keys) @ np.abs(query[row, token, head])).max())
        return result, sizes, off


def assert_near(found: np.ndarray, problem: Problem) -> None:
    assert np.isfinite(found).all()
    expected, sizes, _ = problem.define(rounded_query=True)
    assert np.all(np.abs(found - expected) <= (ROUNDING + 1e-5) * sizes + 1e-6)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    batch, new = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 5, 70]))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    lengths = [max(new, draw(LENGTHS)) for _ in range(batch)]
    first = [draw(st.sampled_from([0, 0, 1, length // 2, length - 1, length, length + 2])) for length in lengths]
    return Problem(
        new,
        lengths,
        first,
        heads=kv_heads * draw(st.sampled_from([1, 2, 5])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 6, 64, 80, 128])),
        room=draw(st.integers(0, 70)),
    )


@both_instruction_sets
@settings(max_examples=40)
@given(problem=problems(), threads=THREADS)
def test_decode_attention(isa: str, problem: Problem, threads: int) -> None:
    with fused(isa, "decode_attention", threads=threads):
        found = problem.run()
    assert found.shape == problem.query.shape
    assert_near(found, problem)


@both_instruction_sets
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize(("new", "heads"), [(1, 4), (5, 20), (70, 4)])
def test_near_the_reference(isa: str, threads: int, new: int, heads: int) -> None:
    """Rounding the query moves a score by `off` at most, and so a probability by a factor exp(2 off)."""
    problem = Problem(new, [200, 133], [0, 7], heads=heads)
    with fused(isa, "decode_attention", threads=threads):
        found = problem.run()
    for cache in (problem.keys, problem.values):  # plain matrix products let it through, times 0
        cache[np.isnan(cache)] = 0
    with custom.reference_only():
        expected = problem.run()
    _, sizes, off = problem.define(rounded_query=False)
    assert np.all(np.abs(found - expected) <= (ROUNDING + np.expm1(2 * off) + 1e-5) * sizes + 1e-6)
    exact = problem.define(rounded_query=False)[0]
    assert np.all(np.abs(expected - exact) <= 1e-5 * sizes + 1e-6)


@both_instruction_sets
@settings(max_examples=10)
@given(problem=problems())
def test_splits_of_the_keys_change_rounding_only(isa: str, problem: Problem) -> None:
    results = []
    for threads in (1, 2, 7):
        with fused(isa, "decode_attention", threads=threads):
            results.append(problem.run())
    sizes = problem.define(rounded_query=True)[1]
    for other in results[1:]:
        assert np.all(np.abs(other - results[0]) <= 2 * ROUNDING * sizes + 1e-6)


@both_instruction_sets
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("new", [1, 3, 130])
def test_a_token_gets_what_it_would_get_alone(isa: str, threads: int, new: int) -> None:
    """Tokens of a chunk, one after another."""
    problem = Problem(new, [150, 141], [0, 66])
    with fused(isa, "decode_attention", threads=threads):
        together = problem.run()
        assert_near(together, problem)
        for token in {0, new // 2, new - 1}:
            alone = Problem(new, [150, 141], [0, 66])
            alone.query = problem.query[:, token : token + 1]
            alone.lengths = [length - new + 1 + token for length in problem.lengths]
            found = alone.run()
            sizes = alone.define(rounded_query=True)[1]
            assert np.all(np.abs(found - together[:, token : token + 1]) <= 2 * ROUNDING * sizes + 1e-6)


@both_instruction_sets
def test_very_large_and_very_small_scores(isa: str) -> None:
    """The running maximum keeps exp from overflowing, whichever block holds the largest score."""
    for place in (0, 70, 199):
        problem = Problem(1, [200], [0], heads=2, kv_heads=1)
        problem.keys[0, place] *= 100
        problem.query *= 100
        with fused(isa, "decode_attention", threads=2):
            found = problem.run()
        assert_near(found, problem)


@both_instruction_sets
@pytest.mark.parametrize("threads", [1, 7])
@pytest.mark.parametrize("where", ["keys", "values", "query", "all keys"])
def test_nan_reaches_those_who_see_it(isa: str, threads: int, where: str) -> None:
    """And nobody else: other rows, other heads."""
    clean, problem = (Problem(1, [150, 141], [0, 66]) for _ in range(2))
    if where == "query":
        problem.query[0, 0, 2] = np.nan
    elif where == "all keys":
        problem.keys[0, :, 1] = np.nan
    else:
        getattr(problem, where)[0, 90, 1] = np.nan
    with fused(isa, "decode_attention", threads=threads):
        expected, found = clean.run(), problem.run()
    spoilt = np.zeros(found.shape, bool)
    spoilt[0, :, 2 : 3 if where == "query" else 4] = True
    assert np.isnan(found[spoilt]).all()
    np.testing.assert_array_equal(found[~spoilt], expected[~spoilt])


@both_instruction_sets
def test_without_first_every_row_starts_at_zero(isa: str) -> None:
    problem = Problem(2, [70, 9], [0, 0])
    with fused(isa, "decode_attention"):
        expected = problem.run()
        found = problem.run(lambda *arguments: decode_attention(*arguments[:-1]))
    np.testing.assert_array_equal(found, expected)


@both_instruction_sets
@pytest.mark.parametrize(("batch", "new"), [(0, 1), (0, 0), (2, 0)])
def test_nothing_to_do(isa: str, batch: int, new: int) -> None:
    caches = paddle.zeros([batch, 8, 2, 64], dtype="bfloat16")
    lengths = paddle.full([batch], 5, dtype="int64")
    with fused(isa, "decode_attention"):
        found = decode_attention(paddle.zeros([batch, new, 4, 64]), caches, caches, lengths, 0.125)
    assert found.shape == [batch, new, 4, 64]


@native
def test_other_caches_take_the_reference() -> None:
    problem = Problem(2, [70, 9], [0, 3], room=0)
    for cache in (problem.keys, problem.values):
        cache[np.isnan(cache)] = 0
    found = problem.run(dtype="float32")
    np.testing.assert_array_equal(found, problem.run(reference.decode_attention, dtype="float32"))
    expected, sizes, _ = problem.define(rounded_query=False)
    assert np.all(np.abs(found - expected) <= 1e-5 * sizes + 1e-6)


@native
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [71, 9]}, "row 0 sees keys 0 to 71 with 2 new tokens, but the cache holds 70"),
        ({"lengths": [70, 1]}, "row 1 sees keys 3 to 1 with 2 new tokens"),
        ({"first": [-1, 0]}, "row 0 sees keys -1 to 70"),
        ({"first": [0]}, "first has shape"),
        ({"query": np.zeros((2, 2, 3, 64), np.float32)}, "3 heads are no multiple of 2 kv heads"),
        ({"query": np.zeros((2, 2, 4, 32), np.float32)}, "keys has shape"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, object], message: str) -> None:
    problem = Problem(2, [70, 9], [0, 3], room=0)
    vars(problem).update(changes)
    with pytest.raises((OSError, RuntimeError, ValueError), match=message):
        problem.run()
