"""The fused stack as an operator: what it writes where, what NaN reaches, and what it refuses.

That it computes what the layers compute is tested with whole models in tests/models/test_packing.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest

from ernie45 import ops
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.ops import custom
from ernie45.ops.decoder import supports
from tests.helpers.fused import both_instruction_sets, fused
from tests.helpers.packed import load, save_source
from tests.helpers.tiny import DENSE, MOE, tiny_config

pytestmark = pytest.mark.skipif(custom.library() is None, reason="no native library here")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ErnieForCausalLM]:
    folders = {
        name: save_source(tmp_path_factory.mktemp("source"), keys) for name, keys in (("dense", DENSE), ("moe", MOE))
    }
    return {name: load(folder, "wint8") for name, folder in folders.items()}


class Call:
    """Arguments of one call on random ids with `cached` random keys and values before them."""

    def __init__(self, model: ErnieForCausalLM, batch: int = 2, new: int = 3, cached: int = 4, capacity: int = 9):
        config, generator = model.config, np.random.default_rng(0)
        assert model.ernie.fused is not None
        self.stack = model.ernie.fused.stack
        self.ids = paddle.to_tensor(generator.integers(0, config.vocab_size, (batch, new)))
        self.positions = paddle.arange(cached, cached + new).unsqueeze(0).tile([batch, 1])
        self.first = paddle.zeros([batch], dtype="int64")
        shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
        self.caches = [
            paddle.to_tensor(generator.standard_normal(shape, dtype=np.float32)).astype("bfloat16")
            for _ in range(2 * config.num_hidden_layers)
        ]
        for cache in self.caches:
            cache[:, cached + new :] = float("nan")
        self.cached = cached

    def run(self) -> np.ndarray:
        return ops.decoder(self.ids, self.positions, self.first, self.stack, self.caches, self.cached).numpy()

    def cached_values(self) -> np.ndarray:
        return np.stack([cache.astype("float32").numpy() for cache in self.caches])


both = pytest.mark.parametrize("name", ["dense", "moe"])


@both_instruction_sets
@both
@pytest.mark.parametrize("threads", [1, 5])
def test_it_writes_the_new_tokens_and_nothing_else(
    isa: str, name: str, threads: int, models: dict[str, ErnieForCausalLM]
) -> None:
    call = Call(models[name])
    before = call.cached_values()
    with fused(isa, "decoder", threads=threads):
        found = call.run()
    after = call.cached_values()
    assert np.isfinite(found).all(), "nothing behind the last token was read"
    np.testing.assert_array_equal(after[:, :, :4], before[:, :, :4])
    assert np.isnan(after[:, :, 7:]).all()
    assert np.isfinite(after[:, :, 4:7]).all() and (after[:, :, 4:7] != before[:, :, 4:7]).any(axis=(1, 2, 3, 4)).all()


@both
def test_what_is_in_front_of_the_first_key_is_not_read(name: str, models: dict[str, ErnieForCausalLM]) -> None:
    results = []
    for garbage in (7.0, float("nan")):
        call = Call(models[name])
        call.first = paddle.to_tensor([0, 3])
        for cache in call.caches:
            cache[1, :3] = garbage
        results.append(call.run())
    np.testing.assert_array_equal(results[0], results[1])


@both_instruction_sets
@both
def test_nan_stays_in_its_row(isa: str, name: str, models: dict[str, ErnieForCausalLM]) -> None:
    clean, call = Call(models[name], new=1), Call(models[name], new=1)
    call.caches[0][1, 2] = float("nan")
    with fused(isa, "decoder"):
        expected, found = clean.run(), call.run()
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[0], expected[0])


@both
@pytest.mark.parametrize(("batch", "new"), [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_do(name: str, batch: int, new: int, models: dict[str, ErnieForCausalLM]) -> None:
    assert Call(models[name], batch, new).run().shape == (batch, new, 24)


def change(**values: Any) -> Callable[[Call], None]:
    return lambda call: vars(call).update(values)


def without_last_weight(call: Call) -> None:
    call.stack = replace(call.stack, weights=call.stack.weights[:-1])


def with_one_more_weight(call: Call) -> None:
    call.stack = replace(call.stack, weights=[*call.stack.weights, call.stack.weights[0]])


def too_many_experts(call: Call) -> None:
    call.stack = replace(call.stack, sizes=[*call.stack.sizes[:4], 7, *call.stack.sizes[5:]])


def float_cache(call: Call) -> None:
    call.caches[2] = call.caches[2].astype("float32")


def short_cache(call: Call) -> None:
    call.caches[3] = paddle.zeros([2, 8, 2, 8], dtype="bfloat16")


def other_heads(call: Call) -> None:
    call.caches[0] = paddle.zeros([2, 9, 1, 8], dtype="bfloat16")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change(cached=7), "7 \\+ 3 tokens do not fit into a cache of 9"),
        (change(cached=-1), "-1 \\+ 3 tokens do not fit"),
        (change(ids=paddle.zeros([2, 3], dtype="int32")), "ids is int32, expected int64"),
        (change(ids=paddle.full([2, 3], 61, dtype="int64")), "id 61 is outside the vocabulary of 61"),
        (change(ids=paddle.full([2, 3], -1, dtype="int64")), "id -1 is outside the vocabulary of 61"),
        (change(positions=paddle.zeros([2, 4], dtype="int64")), "positions has shape \\[2, 4\\], expected \\[2, 3\\]"),
        (change(first=paddle.zeros([3], dtype="int64")), "first has shape"),
        (change(first=paddle.zeros([2], dtype="int32")), "first is int32, expected int64"),
        (change(caches=[]), "expected keys and values of every layer"),
        (float_cache, "caches is float32, expected bfloat16"),
        (short_cache, "caches has shape \\[2, 8, 2, 8\\], expected \\[2, 9, 2, 8\\]"),
        (other_heads, "caches has shape"),
        (without_last_weight, "the list of weights is too short"),
        (with_one_more_weight, "more weights than 3 layers need"),
        (too_many_experts, "moe_k exceeds the experts"),
    ],
)
def test_what_is_refused(spoil: Callable[[Call], None], message: str, models: dict[str, ErnieForCausalLM]) -> None:
    call = Call(models["moe"])
    spoil(call)
    with pytest.raises((OSError, RuntimeError, ValueError), match=f"decoder: {message}"):
        call.run()


def test_which_architectures_it_supports() -> None:
    assert supports(tiny_config(DENSE)) and supports(tiny_config(MOE))
    assert supports(tiny_config(DENSE, head_dim=512)) and not supports(tiny_config(DENSE, head_dim=514))
