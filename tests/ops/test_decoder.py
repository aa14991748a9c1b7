"""The fused stack as an operator: its definition, what it writes where, what NaN reaches, and what it refuses.

That it computes what the layers of whole models compute is tested in tests/models/test_packing.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest

from ernie45 import ops
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.ops import custom
from ernie45.ops.decoder import PackedStack, supports
from tests.helpers.fused import both_instruction_sets, fused
from tests.helpers.packed import CLEAR, KINDS, load, save_source
from tests.helpers.packed_decoder import Prompt, RandomDecoder, defined_decoder, fused_decoder
from tests.helpers.tiny import DENSE, MOE, tiny_config
from tests.helpers.vision import vision_config

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


# Vision: positions in three dimensions, features in the place of embeddings, and several banks of experts.

BANKS = {
    "one": [(6, 16)],
    "two": [(6, 16), (6, 48)],
    "three": [(5, 70), (4, 16), (9, 33)],
}
LENGTH = 11
kinds = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def random_decoder(kind: str, banks: str) -> RandomDecoder:
    return RandomDecoder(kind, BANKS[banks])


@both_instruction_sets
@kinds
@pytest.mark.parametrize("banks", BANKS)
def test_it_equals_its_definition(isa: str, kind: str, banks: str) -> None:
    """On rows of text and rows of all banks for which no router is near a tie: there, rounding may choose others."""
    decoder = random_decoder(kind, banks)
    prompt, caches = Prompt.random(decoder.config, 96, LENGTH, len(BANKS[banks])), decoder.empty_caches(96, LENGTH + 1)
    with fused(isa, "linear", "decode_attention"):
        expected = defined_decoder(decoder, prompt, caches)
    best = np.argsort(-prompt.margins, kind="stable")
    rows = np.concatenate([best[best % 3 == 0][:2], best[best % 3 != 0][:3]])
    assert prompt.margins[rows].min() > CLEAR, "choose other weights or shorter rows"
    written = decoder.empty_caches(len(rows), LENGTH + 1)
    with fused(isa, "decoder", threads=3):
        found = fused_decoder(decoder, prompt.rows(rows), written)
    off = np.abs(found - expected[rows])
    assert np.median(off) < 1e-5 and off.max() < 2e-2
    for one, other in zip(written, caches, strict=True):
        held, wanted = (cache[:, :LENGTH].astype("float32").numpy() for cache in (one, other[paddle.to_tensor(rows)]))
        assert np.abs(held - wanted).max() < 5e-2 and np.isnan(one[:, LENGTH:].astype("float32").numpy()).all()


@kinds
@pytest.mark.parametrize("threads", [1, 4])
def test_a_row_does_not_depend_on_the_others(kind: str, threads: int) -> None:
    """Bit for bit, though tokens of other rows and banks share the experts' work."""
    decoder = random_decoder(kind, "three")
    prompt = Prompt.random(decoder.config, 5, LENGTH, 3)
    with fused("avx2", "decoder", threads=threads):
        together = fused_decoder(decoder, prompt, decoder.empty_caches(5, LENGTH))
        for row in range(5):
            alone = fused_decoder(decoder, prompt.rows(np.array([row])), decoder.empty_caches(1, LENGTH))
            np.testing.assert_array_equal(alone[0], together[row])


@kinds
@pytest.mark.parametrize("sizes", [[1] * LENGTH, [4, 1, 6]], ids=str)
def test_a_prompt_with_features_can_be_cut_anywhere(kind: str, sizes: list[int]) -> None:
    decoder = random_decoder(kind, "two")
    prompt, edges = Prompt.random(decoder.config, 4, LENGTH, 2), np.cumsum([0, *sizes]).tolist()
    caches = decoder.empty_caches(4, LENGTH)
    with fused("avx2", "decoder"):
        whole = fused_decoder(decoder, prompt, decoder.empty_caches(4, LENGTH))
        parts = [
            fused_decoder(decoder, prompt.columns(a, b), caches, a) for a, b in zip(edges, edges[1:], strict=False)
        ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@both_instruction_sets
def test_text_is_the_same_in_every_notation(isa: str) -> None:
    """Three equal positions are one position, no bank is the first one, and an unused feature changes nothing."""
    decoder = random_decoder("bfloat16", "two")
    text = Prompt.random(decoder.config, 3, LENGTH, 1)
    positions = paddle.arange(LENGTH).unsqueeze(0).tile([3, 1])
    features = paddle.full([0, decoder.config.hidden_size], float("nan"))
    plain = Prompt(text.ids, positions, text.first)
    full = Prompt(text.ids, positions.unsqueeze(-1).tile([1, 1, 3]), text.first, paddle.zeros_like(text.ids), features)
    with fused(isa, "decoder"):
        expected = fused_decoder(decoder, plain, decoder.empty_caches(3, LENGTH))
        found = fused_decoder(decoder, full, decoder.empty_caches(3, LENGTH))
    np.testing.assert_array_equal(found, expected)


@both_instruction_sets
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_position_matters(isa: str, axis: int) -> None:
    decoder = random_decoder("wint8", "one")
    prompt = Prompt.random(decoder.config, 2, 4, 1)
    prompt.first = paddle.zeros_like(prompt.first)
    moved = prompt.rows(np.arange(2))
    moved.positions[1, 2, axis] = 50
    with fused(isa, "decoder"):
        before, after = (fused_decoder(decoder, one, decoder.empty_caches(2, 4)) for one in (prompt, moved))
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_array_equal(after[1, :2], before[1, :2])
    assert np.abs(after[1, 2:] - before[1, 2:]).max(axis=-1).min() > 1e-3


@both_instruction_sets
def test_experts_that_nobody_chose_are_not_read(isa: str) -> None:
    """Text does not touch the experts of vision: they may hold anything."""
    decoder = RandomDecoder("wint8", BANKS["two"])
    prompt = Prompt.random(decoder.config, 2, LENGTH, 1)
    with fused(isa, "decoder"):
        expected = fused_decoder(decoder, prompt, decoder.empty_caches(2, LENGTH))
        for layer in decoder.layers[1:]:
            for weight in (layer.banks[1].up_gate, layer.banks[1].down):
                assert weight.scales is not None
                weight.scales[:] = float("nan")
            layer.banks[1].router[:] = float("nan")
        found = fused_decoder(decoder, prompt, decoder.empty_caches(2, LENGTH))
    np.testing.assert_array_equal(found, expected)


def with_a_foreign_bank(prompt: Prompt) -> None:
    prompt.banks[1, 2] = 2


def with_a_negative_bank(prompt: Prompt) -> None:
    prompt.banks[0, 0] = -1


def without_features(prompt: Prompt) -> None:
    prompt.ids, prompt.features = paddle.full_like(prompt.ids, -1), None


def with_too_few_features(prompt: Prompt) -> None:
    prompt.ids[0, 1] = -1 - prompt.features.shape[0]


def with_narrow_features(prompt: Prompt) -> None:
    prompt.features = prompt.features[:, :-1]


def with_four_positions(prompt: Prompt) -> None:
    prompt.positions = paddle.zeros([2, 6, 4], dtype="int64")


def with_short_banks(prompt: Prompt) -> None:
    prompt.banks = prompt.banks[:, 1:]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (with_a_foreign_bank, "a token belongs to bank 2 of 2"),
        (with_a_negative_bank, "a token belongs to bank -1 of 2"),
        (without_features, "id -1 stands for row 0 of 0 features"),
        (with_too_few_features, r"id -\d+ stands for row (\d+) of \1 features"),
        (with_narrow_features, r"features has shape \[\d+, 23\], expected \[any, 24\]"),
        (with_four_positions, r"positions has shape \[2, 6, 4\], expected \[2, 6, 3\]"),
        (with_short_banks, r"banks has shape \[2, 5\], expected \[2, 6\]"),
    ],
)
def test_what_is_refused_of_vision(spoil: Callable[[Prompt], None], message: str) -> None:
    decoder = random_decoder("bfloat16", "two")
    prompt = Prompt.random(decoder.config, 2, 6, 2, seed=4)
    spoil(prompt)
    with pytest.raises((OSError, RuntimeError, ValueError), match=f"decoder: {message}"):
        fused_decoder(decoder, prompt, decoder.empty_caches(2, 6))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [(7, 7, "7 of 6 rotary pairs"), (7, -1, "-1 of 6 rotary pairs"), (4, 0, "moe_k is 0, expected 1 to the 6 experts")],
)
def test_sizes_that_cannot_be(place: int, value: int, message: str) -> None:
    decoder = RandomDecoder("bfloat16", BANKS["two"])
    decoder.stack.sizes[place] = value
    with pytest.raises((OSError, RuntimeError, ValueError), match=f"decoder: {message}"):
        fused_decoder(decoder, Prompt.random(decoder.config, 2, 6, 2, seed=4), decoder.empty_caches(2, 6))


def test_a_layer_with_some_of_the_banks_is_refused() -> None:
    decoder = RandomDecoder("bfloat16", BANKS["two"])
    whole = decoder.layers[1]
    decoder.layers[1] = replace(whole, banks=[whole.banks[0]])
    stack = PackedStack.collect(decoder.config, 1.0, decoder.embedding, decoder.layers, decoder.final_norm)
    decoder.stack = stack
    with pytest.raises((OSError, RuntimeError, ValueError), match="decoder: a layer has 1 of 2 banks"):
        fused_decoder(decoder, Prompt.random(decoder.config, 2, 6, 2, seed=4), decoder.empty_caches(2, 6))


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
        (change(ids=paddle.full([2, 3], -1, dtype="int64")), "id -1 stands for row 0 of 0 features"),
        (change(positions=paddle.zeros([2, 4], dtype="int64")), "positions has shape \\[2, 4\\], expected \\[2, 3\\]"),
        (change(first=paddle.zeros([3], dtype="int64")), "first has shape"),
        (change(first=paddle.zeros([2], dtype="int32")), "first is int32, expected int64"),
        (change(caches=[]), "expected keys and values of every layer"),
        (float_cache, "caches is float32, expected bfloat16"),
        (short_cache, "caches has shape \\[2, 8, 2, 8\\], expected \\[2, 9, 2, 8\\]"),
        (other_heads, "caches has shape"),
        (without_last_weight, "the list of weights is too short"),
        (with_one_more_weight, "more weights than 3 layers need"),
        (too_many_experts, "moe_k is 7, expected 1 to the 6 experts"),
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
    assert supports(vision_config()) and supports(vision_config(moe_layer_end_index=[29, 28]))
    assert not supports(vision_config(moe_layer_end_index=[2, 1]))
    assert not supports(vision_config(moe_layer_start_index=[0, 1]))
