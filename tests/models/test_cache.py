"""The key/value cache by itself, and that a model with a cache gives what it gives without one."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import ErnieError
from ernie45.models.cache import KVCache
from ernie45.models.causal_lm import ErnieForCausalLM
from tests.helpers.tiny import difference, tiny_config, tiny_model, token_ids

LENGTH = 11


@pytest.fixture(scope="module")
def model() -> ErnieForCausalLM:
    return tiny_model()


def in_chunks(
    model: ErnieForCausalLM,
    ids: paddle.Tensor,
    sizes: list[int],
    cache: KVCache | None = None,
    mask: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """Logits of all tokens, computed a chunk at a time."""
    cache = cache or KVCache(model.config, capacity=1)
    parts, start = [], 0
    with paddle.no_grad():
        for size in sizes:
            chunk = slice(start, start + size)
            parts.append(model(ids[:, chunk], attention_mask=None if mask is None else mask[:, chunk], cache=cache))
            start += size
    assert start == ids.shape[1]
    return paddle.concat(parts, axis=1)


@st.composite
def splits(draw: st.DrawFn) -> list[int]:
    sizes, left = [], LENGTH
    while left:
        sizes.append(draw(st.integers(1, left)))
        left -= sizes[-1]
    return sizes


@settings(max_examples=20)
@given(sizes=splits(), capacity=st.sampled_from([1, 3, 64]))
def test_any_split_into_chunks_equals_one_pass(sizes: list[int], capacity: int) -> None:
    model, ids = tiny_model(), token_ids(2, LENGTH)
    with paddle.no_grad():
        whole = model(ids)
    assert difference(in_chunks(model, ids, sizes, KVCache(model.config, capacity)), whole) < 2e-5


@settings(max_examples=20)
@given(sizes=splits(), pads=st.lists(st.integers(0, LENGTH - 1), min_size=3, max_size=3), left=st.booleans())
def test_any_split_of_a_padded_batch_equals_the_rows_alone(sizes: list[int], pads: list[int], left: bool) -> None:
    model, ids = tiny_model(), token_ids(3, LENGTH)
    real = np.ones([3, LENGTH], dtype=bool)
    for row, count in enumerate(pads):
        if count:
            real[row, slice(0, count) if left else slice(LENGTH - count, LENGTH)] = False
    cache = KVCache(model.config, capacity=2)
    logits = in_chunks(model, ids, sizes, cache, paddle.to_tensor(real.astype("int64")))
    assert cache.next_position.tolist() == real.sum(axis=1).tolist()
    following = token_ids(3, 1, seed=5)
    with paddle.no_grad():
        next_logits = model(following, cache=cache)
        for row in range(3):
            alone = paddle.concat([ids[row][paddle.to_tensor(real[row])], following[row]]).unsqueeze(0)
            expected = model(alone)[0]
            assert difference(logits[row][paddle.to_tensor(real[row])], expected[:-1]) < 2e-5
            assert difference(next_logits[row, 0], expected[-1]) < 2e-5


def advance(cache: KVCache, new: int) -> None:
    """Two rows of tokens that count on by one."""
    following = 1 + cache.length + paddle.arange(new).tile([2, 1])
    cache.advance(None, following, following[:, -1])


def test_capacity_doubles_and_what_was_there_stays() -> None:
    config = tiny_config()
    cache = KVCache(config, capacity=3)
    written: list[np.ndarray] = []
    for step, (new, capacity) in enumerate([(2, 3), (1, 3), (1, 6), (9, 24)]):
        for layer in range(config.num_hidden_layers):
            key = np.full((2, new, 2, 8), 100 * layer + step, np.float32)
            keys, values = cache.append(layer, paddle.to_tensor(key), paddle.to_tensor(-key))
            expected = np.concatenate([*[w + 100 * layer for w in written], key], axis=1)
            assert difference(keys, expected) == 0 and difference(values, -expected) == 0
        written.append(np.full((2, new, 2, 8), step, np.float32))
        advance(cache, new)
        assert cache.capacity == capacity
    assert cache.length == 13
    assert cache.nbytes == 2 * config.num_hidden_layers * (2 * 24 * 2 * 8) * 4


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_keys_and_values_are_held_in_the_dtype_they_come_in(dtype: str, size: int) -> None:
    cache = KVCache(tiny_config(), capacity=4)
    key = paddle.to_tensor(np.random.default_rng(0).standard_normal((2, 3, 2, 8)).astype(np.float32)).astype(dtype)
    for layer in range(cache.num_layers):
        keys, values = cache.append(layer, key, -key)
        assert keys.dtype == values.dtype == key.dtype
        assert difference(keys, key) == 0 and difference(values, -key) == 0
    assert cache.nbytes == 2 * cache.num_layers * (2 * 4 * 2 * 8) * size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reserved_buffers_are_the_cache_itself(dtype: str) -> None:
    """They have room for more, grow with what is in them, and are seen by whoever appends later."""
    config = tiny_config()
    cache = KVCache(config, capacity=3)
    for new, capacity in [(2, 3), (1, 3), (6, 12)]:
        buffers = cache.reserve(2, new, getattr(paddle, dtype))
        assert len(buffers) == 2 * config.num_hidden_layers
        assert all(b.shape == [2, capacity, 2, 8] and str(b.dtype) == f"paddle.{dtype}" for b in buffers)
        for number, buffer in enumerate(buffers):  # keys and values, layer by layer
            buffer[:, cache.length : cache.length + new] = 10 * number + cache.length
        advance(cache, new)
    assert cache.capacity == 12
    cached = np.array([0, 0, 2, 3, 3, 3, 3, 3, 3], np.float32)
    for layer in range(config.num_hidden_layers):
        keys, values = cache.append(layer, paddle.full([2, 1, 2, 8], 77.0), paddle.full([2, 1, 2, 8], 78.0))
        assert difference(keys[1, :, 1, 3], np.append(cached + 20 * layer, 77)) == 0
        assert difference(values[1, :, 1, 3], np.append(cached + 20 * layer + 10, 78)) == 0


def test_a_cache_may_change_its_dtype_on_the_way() -> None:
    """`reserve` converts what is there; `append` takes the dtype that it finds and gives back the one it got."""
    cache = KVCache(tiny_config(), capacity=2)
    key = paddle.to_tensor(np.random.default_rng(0).standard_normal((2, 2, 2, 8)).astype(np.float32))
    for layer in range(cache.num_layers):
        cache.append(layer, key, -key)
    advance(cache, 2)
    rounded = key.astype("bfloat16").astype("float32")
    buffers = cache.reserve(2, 0, paddle.bfloat16)
    assert all(buffer.dtype == paddle.bfloat16 for buffer in buffers)
    assert difference(buffers[0], rounded) == 0 and difference(buffers[1], -rounded) == 0
    keys, values = cache.append(0, key, -key)
    assert keys.dtype == paddle.float32 and cache.reserve(2, 0, paddle.bfloat16)[0].dtype == paddle.bfloat16
    both = paddle.concat([rounded, rounded], axis=1)
    assert difference(keys, both) == 0 and difference(values, -both) == 0


def test_reserving_for_another_batch_size_once_the_cache_is_empty() -> None:
    cache = KVCache(tiny_config(), capacity=4)
    cache.reserve(2, 3, paddle.float32)
    assert [buffer.shape[0] for buffer in cache.reserve(3, 3, paddle.float32)] == [3] * 2 * cache.num_layers
    assert cache.batch_size == 3


def test_an_empty_cache() -> None:
    cache = KVCache(tiny_config(), capacity=0)
    assert (cache.capacity, cache.length, cache.batch_size, cache.nbytes) == (1, 0, 0, 0)


@pytest.mark.parametrize("kept", [0, 1, 6, LENGTH])
def test_a_truncated_cache_continues_as_if_the_rest_had_never_been(model: ErnieForCausalLM, kept: int) -> None:
    ids, other = token_ids(2, LENGTH), token_ids(2, 4, seed=7)
    cache = KVCache(model.config)
    in_chunks(model, ids, [LENGTH], cache)
    cache.truncate(kept)
    with paddle.no_grad():
        expected = model(paddle.concat([ids[:, :kept], other], axis=1))[:, kept:]
        assert difference(model(other, cache=cache), expected) < 2e-5
    assert cache.length == kept + 4


@pytest.mark.parametrize("kept", [0, 2, 5, 9])
def test_truncating_padded_rows(model: ErnieForCausalLM, kept: int) -> None:
    ids, other = token_ids(2, LENGTH), token_ids(2, 2, seed=7)
    real = np.ones([2, LENGTH], dtype=bool)
    real[0, :4] = False
    cache = KVCache(model.config)
    in_chunks(model, ids, [LENGTH], cache, paddle.to_tensor(real))
    cache.truncate(kept)
    with paddle.no_grad():
        found = model(other, cache=cache)
        for row in range(2):
            before = ids[row, :kept][paddle.to_tensor(real[row, :kept])] if real[row, :kept].any() else other[row, :0]
            alone = paddle.concat([before, other[row]]).unsqueeze(0)
            assert difference(found[row], model(alone)[0, -2:]) < 2e-5


@pytest.mark.parametrize("length", [-1, 5])
def test_truncating_to_an_impossible_length(model: ErnieForCausalLM, length: int) -> None:
    cache = KVCache(model.config)
    in_chunks(model, token_ids(1, 4), [4], cache)
    with pytest.raises(ErnieError, match=f"cannot cut 4 tokens to {length}"):
        cache.truncate(length)


def test_an_emptied_cache_takes_another_batch_size(model: ErnieForCausalLM) -> None:
    cache = KVCache(model.config)
    in_chunks(model, token_ids(2, 4), [4], cache)
    cache.truncate(0)
    ids = token_ids(3, 5)
    with paddle.no_grad():
        assert difference(model(ids, cache=cache), model(ids)) < 2e-5


@pytest.mark.parametrize("rows", [[1, 0], [0, 0, 1, 1], [1]])
def test_reordered_rows_continue_as_the_rows_they_came_from(model: ErnieForCausalLM, rows: list[int]) -> None:
    ids = token_ids(2, 6)
    real = np.ones([2, 6], dtype=bool)
    real[1, :3] = False
    following = token_ids(2, 1, seed=3)
    caches = [KVCache(model.config), KVCache(model.config)]
    for cache in caches:
        in_chunks(model, ids, [6], cache, paddle.to_tensor(real))
    caches[1].reorder(paddle.to_tensor(rows))
    assert caches[1].batch_size == len(rows)
    with paddle.no_grad():
        expected = model(following, cache=caches[0])
        found = model(following[paddle.to_tensor(rows)], cache=caches[1])
    assert difference(found, expected[paddle.to_tensor(rows)]) < 5e-6


def test_another_batch_size_is_refused(model: ErnieForCausalLM) -> None:
    cache = KVCache(model.config)
    in_chunks(model, token_ids(2, 4), [4], cache)
    with pytest.raises(ErnieError, match="cache: holds 2 rows, but input_ids has 3"):
        model(token_ids(3, 1), cache=cache)


def test_no_gradient_reaches_the_cache(model: ErnieForCausalLM) -> None:
    cache = KVCache(model.config)
    model(token_ids(1, 3), cache=cache)
    keys, values = cache.append(0, paddle.zeros([1, 1, 2, 8]), paddle.zeros([1, 1, 2, 8]))
    assert keys.stop_gradient and values.stop_gradient


def test_an_explicit_mask_over_a_padded_cache(model: ErnieForCausalLM) -> None:
    """The mask of one call does not disturb what the cache remembers about padding."""
    ids = token_ids(2, 8)
    real = np.ones([2, 4], dtype=bool)
    real[0, :2] = False
    plain, masked = KVCache(model.config), KVCache(model.config)
    for cache in (plain, masked):
        in_chunks(model, ids[:, :4], [4], cache, paddle.to_tensor(real))
    columns = np.concatenate([real, np.ones([2, 2], dtype=bool)], axis=1)
    causal = np.arange(6) <= np.arange(4, 6)[:, None]
    explicit = paddle.to_tensor(columns[:, None, None] & causal[None, None])
    with paddle.no_grad():
        expected = model(ids[:, 4:6], cache=plain)
        assert difference(model(ids[:, 4:6], attention_mask=explicit, cache=masked), expected) < 1e-6
        assert difference(model(ids[:, 6:], cache=masked), model(ids[:, 6:], cache=plain)) < 1e-6


def test_truncation_finds_the_next_position_after_jumps() -> None:
    """Behind a picture positions go on past its largest side, so they cannot be counted back."""
    cache = KVCache(tiny_config(), capacity=8)
    following = paddle.to_tensor([[1, 2, 7, 7, 8], [0, 0, 1, 2, 3]])
    cache.advance(None, following, following.max(axis=1))
    cache.advance(None, paddle.to_tensor([[9], [4]]), paddle.to_tensor([9, 4]))
    for length, expected in [(6, [9, 4]), (5, [8, 3]), (4, [7, 2]), (2, [2, 0])]:
        cache.truncate(length)
        assert cache.next_position is not None and cache.next_position.tolist() == expected
    cache.truncate(0)
    assert cache.next_position is None
