"""Whole models with packed weights: the fused stack, the layers one by one, and plain parameters agree.

Where only the order of float32 additions differs, a value now and then falls on the other side of a rounding to
bfloat16: most logits agree to a few units of float32, the worst to less than `FLIPPED`. Where one side does not round
at all, logits (of size 0.5 here) differ by `ROUNDED` at most and by a tenth of it on average. Ids are chosen so that no
router is near a tie.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
import pytest

from ernie45 import ops
from ernie45.checkpoint.names import checkpoint_tensors, quantised_kind
from ernie45.config import VisionConfig
from ernie45.errors import ErnieError
from ernie45.models import packing
from ernie45.models.cache import KVCache
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.models.moe import Routing
from ernie45.models.vision_language import ErnieForConditionalGeneration
from ernie45.ops import custom
from ernie45.ops.attention import decode_attention
from ernie45.ops.packed import PackedWeight
from ernie45.quantization.config import QuantizationConfig
from tests.helpers.fused import both_instruction_sets, fused
from tests.helpers.packed import CLEAR, KINDS, VARIANTS, clear_ids, load, plain_model, save_source
from tests.helpers.tiny import DENSE, MOE, difference, token_ids
from tests.helpers.vision import vision_config, write_vision_folder

pytestmark = pytest.mark.skipif(custom.library() is None, reason="no native library here")

LENGTH = 11
FLIPPED, ROUNDED = 1e-2, 1e-1
Load = Callable[[str, str], ErnieForCausalLM]

kinds = pytest.mark.parametrize("kind", KINDS)
variants = pytest.mark.parametrize("variant", VARIANTS)
some = pytest.mark.parametrize(
    ("variant", "kind"), [("dense", "bfloat16"), ("moe", "wint8"), ("moe, one expert, ungrouped, tied", "wint4")]
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a variant in bfloat16."""
    return functools.cache(lambda variant: save_source(tmp_path_factory.mktemp("source"), VARIANTS[variant]))


@pytest.fixture(scope="module")
def packed(source: Callable[[str], Path]) -> Load:
    """A variant with its weights packed in some kind."""
    return functools.cache(lambda variant, kind: load(source(variant), kind))


@paddle.no_grad()
def run(model: ErnieForCausalLM, ids: paddle.Tensor, **options: object) -> np.ndarray:
    return model(ids, **options).numpy()


def in_chunks(model: ErnieForCausalLM, ids: paddle.Tensor, sizes: list[int], cache: KVCache) -> np.ndarray:
    edges = np.cumsum([0, *sizes])
    assert edges[-1] == ids.shape[1]
    return np.concatenate(
        [run(model, ids[:, a:b], cache=cache) for a, b in zip(edges, edges[1:], strict=False)], axis=1
    )


def layer_by_layer(model: ErnieForCausalLM, ids: paddle.Tensor, **options: object) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.ernie, "fused", None)
        return run(model, ids, **options)


def assert_rounded(found: np.ndarray, expected: np.ndarray) -> None:
    off = np.abs(found - expected)
    assert off.max() < ROUNDED and off.mean() < ROUNDED / 10


def fused_calls(patch: pytest.MonkeyPatch) -> list[int]:
    """Receives the number of new tokens of every call of the fused stack from now on."""
    calls: list[int] = []
    decoder = ops.decoder

    def recording(ids: paddle.Tensor, *arguments: object) -> paddle.Tensor:
        calls.append(ids.shape[1])
        return decoder(ids, *arguments)

    patch.setattr(ops, "decoder", recording)
    return calls


# The three ways to compute it.


@both_instruction_sets
@kinds
@variants
def test_the_fused_stack_equals_its_layers(
    variant: str, kind: str, isa: str, packed: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the attention of the fused stack, which rounds keys, values and probabilities to bfloat16."""
    model = packed(variant, kind)
    ids = clear_ids(model, 3, LENGTH)

    def attention(query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, scale: float, _: object) -> object:
        lengths = paddle.full([key.shape[0]], key.shape[1], dtype="int64")
        return decode_attention(query, key.astype("bfloat16"), value.astype("bfloat16"), lengths, scale)

    monkeypatch.setattr(ops, "attention", attention)
    with fused(isa, "decoder", "decode_attention", "linear", threads=3):
        off = np.abs(run(model, ids) - layer_by_layer(model, ids))
    assert np.median(off) < FLIPPED / 100 and off.max() < FLIPPED


@kinds
@variants
def test_the_fused_stack_is_near_its_layers_without_rounded_keys(variant: str, kind: str, packed: Load) -> None:
    model = packed(variant, kind)
    ids = clear_ids(model, 3, LENGTH)
    assert_rounded(run(model, ids), layer_by_layer(model, ids))
    cache = KVCache(model.config)
    assert_rounded(run(model, ids), layer_by_layer(model, ids, cache=cache))
    assert cache.reserve(3, 0, paddle.float32)[0].dtype == paddle.float32


@kinds
@variants
def test_definitions_with_packed_weights_equal_a_float32_model(
    variant: str, kind: str, packed: Load, source: Callable[[str], Path]
) -> None:
    """A model whose parameters hold what the codes in the file stand for."""
    model, plain, ids = packed(variant, kind), plain_model(source(variant), kind), token_ids(2, LENGTH)
    with custom.reference_only():
        assert difference(run(model, ids), run(plain, ids)) < 1e-6
    ids = clear_ids(model, 3, LENGTH)
    assert_rounded(run(model, ids), run(plain, ids))


@pytest.mark.parametrize("threads", [1, 2, 7])
@some
def test_the_number_of_threads_changes_rounding_only(variant: str, kind: str, threads: int, packed: Load) -> None:
    model = packed(variant, kind)
    ids = clear_ids(model, 2, LENGTH)
    with fused("avx2", "decoder", threads=3):
        expected = run(model, ids)
    with fused("avx2", "decoder", threads=threads):
        off = np.abs(run(model, ids) - expected)
    assert np.median(off) < FLIPPED / 100 and off.max() < FLIPPED


# The cache.


@kinds
@variants
@pytest.mark.parametrize("sizes", [[1] * LENGTH, [4, 1, 6], [10, 1]], ids=str)
def test_a_cache_changes_nothing(variant: str, kind: str, sizes: list[int], packed: Load) -> None:
    """Bit for bit: every token is computed in the same order, alone or among others."""
    model, ids = packed(variant, kind), token_ids(2, LENGTH)
    cache = KVCache(model.config, capacity=1)
    with fused("avx2", "decoder"):
        np.testing.assert_array_equal(in_chunks(model, ids, sizes, cache), run(model, ids))
    assert cache.length == LENGTH and cache.reserve(2, 0, paddle.bfloat16)[0].dtype == paddle.bfloat16


@some
def test_a_prompt_longer_than_a_block_of_keys(variant: str, kind: str, packed: Load) -> None:
    model, ids = packed(variant, kind), token_ids(2, 140)
    whole = run(model, ids)
    with_cache = in_chunks(model, ids, [63, 1, 1, 64, 11], KVCache(model.config))
    np.testing.assert_array_equal(with_cache, whole)


@some
@pytest.mark.parametrize("chunk", [1, 8, 30])
def test_long_prompts_go_through_in_chunks(
    variant: str, kind: str, chunk: int, packed: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, following = packed(variant, kind), token_ids(2, 40), token_ids(2, 1, seed=3)
    caches = [KVCache(model.config), KVCache(model.config)]
    expected = [run(model, ids, cache=caches[0]), run(model, following, cache=caches[0])]
    calls = fused_calls(monkeypatch)
    monkeypatch.setattr(packing, "CHUNK_TOKENS", chunk)
    found = [run(model, ids, cache=caches[1]), run(model, following, cache=caches[1])]
    step = max(1, chunk // 2)
    assert calls == [step] * (40 // step) + [40 % step] * (40 % step > 0) + [1]
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@some
def test_truncating_and_reordering(variant: str, kind: str, packed: Load) -> None:
    model, ids, following = packed(variant, kind), token_ids(2, LENGTH), token_ids(3, 2, seed=3)
    cache = KVCache(model.config, capacity=2)
    run(model, ids, cache=cache)
    cache.truncate(5)
    rows = paddle.to_tensor([1, 0, 1])
    cache.reorder(rows)
    expected = run(model, paddle.concat([ids[rows][:, :5], following], axis=1))[:, 5:]
    np.testing.assert_array_equal(run(model, following, cache=cache), expected)


@some
def test_from_layers_to_the_fused_stack_and_back(variant: str, kind: str, packed: Load) -> None:
    """The cache goes over from float32 to bfloat16, and stays so."""
    model = packed(variant, kind)
    ids, cache = clear_ids(model, 2, LENGTH), KVCache(model.config, capacity=1)
    parts = [
        layer_by_layer(model, ids[:, :4], cache=cache),
        run(model, ids[:, 4:7], cache=cache),
        layer_by_layer(model, ids[:, 7:9], cache=cache),
        run(model, ids[:, 9:], cache=cache),
    ]
    assert_rounded(np.concatenate(parts, axis=1), run(model, ids))


# Masks.


def padded_batch(ids: paddle.Tensor, real: np.ndarray) -> tuple[paddle.Tensor, list[paddle.Tensor]]:
    """Rows whose real tokens are the first ones of `ids`, and those by themselves."""
    batch, rows = np.zeros(real.shape, np.int64), []
    for row, where in enumerate(real):
        rows.append(ids[row : row + 1, : where.sum()])
        batch[row, where] = rows[-1].numpy()[0]
    return paddle.to_tensor(batch), rows


def assert_rows_alone(
    model: ErnieForCausalLM, ids: paddle.Tensor, real: np.ndarray, run_batch: Callable[..., np.ndarray] = run
) -> None:
    """A padded batch, and one token more for every row, give what the rows give alone."""
    last = [int(where.sum()) for where in real]
    batch, rows = padded_batch(ids, real)
    following = paddle.concat([ids[row : row + 1, count : count + 1] for row, count in enumerate(last)])
    cache = KVCache(model.config, capacity=4)
    found = run_batch(model, batch, attention_mask=paddle.to_tensor(real.astype("int64")), cache=cache)
    after = run_batch(model, following, cache=cache)
    for row, where in enumerate(real):
        expected = run(model, paddle.concat([rows[row], following[row : row + 1]], axis=1))[0]
        assert_rounded(np.concatenate([found[row, where], after[row]]), expected)


@kinds
@variants
def test_padding_on_the_left(variant: str, kind: str, packed: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(variant, kind)
    real = np.arange(LENGTH - 1) >= np.array([[0], [3], [9]])
    ids = clear_ids(model, 3, LENGTH)
    calls = fused_calls(monkeypatch)
    assert_rows_alone(model, ids, real)
    assert calls == [LENGTH - 1, 1, LENGTH, LENGTH - 3, 2]


@kinds
def test_long_padding_on_the_left(kind: str, packed: Load) -> None:
    """Whole blocks of keys that nobody sees."""
    assert_rows_alone(packed("dense", kind), token_ids(3, 151), np.arange(150) >= np.array([[0], [70], [149]]))


OTHER_PADDING = {
    "right": np.arange(LENGTH - 1) < np.array([[10], [7], [1]]),
    "holes": np.array([[True] * 10, [False, True, False, True] + [True] * 6, [True, False] * 5]),
}


@some
@pytest.mark.parametrize("where", OTHER_PADDING)
def test_other_padding_goes_layer_by_layer(
    variant: str, kind: str, where: str, packed: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed(variant, kind)
    ids = clear_ids(model, 3, LENGTH)
    calls = fused_calls(monkeypatch)

    def alone(*arguments: object, **options: object) -> np.ndarray:
        before = len(calls)
        result = run(*arguments, **options)
        assert len(calls) == before
        return result

    assert_rows_alone(model, ids, OTHER_PADDING[where], alone)


@some
def test_a_row_of_padding_only(variant: str, kind: str, packed: Load) -> None:
    model, ids = packed(variant, kind), token_ids(2, 6)
    mask = paddle.to_tensor([[1] * 6, [0] * 6])
    found = run(model, ids, attention_mask=mask)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, layer_by_layer(model, ids, attention_mask=mask))


@some
def test_explicit_masks_and_documents_go_layer_by_layer(
    variant: str, kind: str, packed: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two documents in a row, given either way, are what each is alone."""
    model = packed(variant, kind)
    ids = clear_ids(model, 2, 7)
    positions = paddle.to_tensor([[0, 1, 2, 3, 0, 1, 2]] * 2)
    block = np.tril(np.ones([7, 7], bool))
    block[4:, :4] = False
    ends = paddle.to_tensor(np.array([4] * 4 + [7] * 3).reshape([1, 1, 7, 1]).repeat(2, axis=0))
    expected = run(model, ids[:, :4]), layer_by_layer(model, ids[:, 4:])
    calls = fused_calls(monkeypatch)
    explicit = paddle.to_tensor(block[None, None].repeat(2, axis=0))
    for mask in ({"attention_mask": explicit}, {"attn_mask_startend_row_indices": ends}):
        found = run(model, ids, position_ids=positions, **mask)
        assert_rounded(found[:, :4], expected[0])
        assert difference(found[:, 4:], expected[1]) < FLIPPED
    assert not calls


def test_routing_is_recorded_layer_by_layer(packed: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model, routing = packed("moe", "bfloat16"), []
    calls = fused_calls(monkeypatch)
    run(model, token_ids(2, 5), routing=routing)
    assert [decision.layer for decision in routing] == [1, 2] and not calls


def test_positions_reach_the_fused_stack(packed: Load) -> None:
    model, ids = packed("dense", "wint8"), token_ids(2, 5)
    positions = paddle.to_tensor([[0, 5, 6, 90, 91], [3, 4, 5, 6, 7]])
    found = run(model, ids, position_ids=positions)
    assert_rounded(found, layer_by_layer(model, ids, position_ids=positions))
    assert difference(found, run(model, ids)) > 2e-2


# Vision.


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ErnieForConditionalGeneration]:
    """A vision-language model with its weights packed in some kind."""
    folder = write_vision_folder(tmp_path_factory.mktemp("vision"))
    return functools.cache(lambda kind: load_vision(folder, kind))


def load_vision(folder: Path, kind: str, **options: object) -> ErnieForConditionalGeneration:
    quantization = None if kind in ("bfloat16", "float32") else kind
    dtype = "float32" if kind == "float32" else "bfloat16"
    return ErnieForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, quantization=quantization, progress=False, **options
    )


def pictures(vision: VisionConfig, grids: list[tuple[int, int, int]], seed: int = 0) -> dict[str, paddle.Tensor]:
    """Text, then text around each picture or video, one a row, padded on the left."""
    generator = np.random.default_rng(seed)
    rows = [generator.integers(3, 500, 6)]
    for frames, height, width in grids:
        seen = np.full(max(1, frames // 2) * height * width // 4, vision.placeholder_id)
        start, end = vision.delimiter_ids[:2] if frames == 1 else vision.delimiter_ids[2:]
        rows.append(
            np.concatenate([generator.integers(3, 500, 3), [start], seen, [end], generator.integers(3, 500, 2)])
        )
    longest = max(map(len, rows))
    count = sum(frames * height * width for frames, height, width in grids)
    return {
        "input_ids": paddle.to_tensor(np.stack([np.pad(row, (longest - len(row), 0)) for row in rows])),
        "attention_mask": paddle.to_tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        "images": paddle.to_tensor(generator.integers(0, 256, (count, vision.patch_bytes), dtype=np.uint8)),
        "grid_thw": paddle.to_tensor(np.array(grids).reshape(-1, 3)),
    }


GRIDS = [(1, 4, 4), (4, 2, 4)]


@paddle.no_grad()
def clear_pictures(model: ErnieForConditionalGeneration) -> dict[str, paddle.Tensor]:
    """Such rows for which no router of either bank is near a tie."""
    for seed in range(50):
        inputs, routing = pictures(model.vision, GRIDS, seed), []
        model(**inputs, routing=routing)
        assert {decision.bank for decision in routing} == {0, 1}
        if min(smallest_gap(model, decision) for decision in routing) > CLEAR:
            return inputs
    raise AssertionError("choose other weights")


def smallest_gap(model: ErnieForConditionalGeneration, decision: Routing) -> float:
    bias = model.ernie.layers[decision.layer].mlp.moe_statics.e_score_correction_bias[decision.bank]
    ordered, k = -np.sort(-(decision.probabilities + bias).numpy(), axis=-1), decision.indices.shape[1]
    return float((ordered[:, k - 1] - ordered[:, k]).min())


@both_instruction_sets
@kinds
@paddle.no_grad()
def test_pictures_in_the_fused_stack_and_in_its_layers(
    kind: str, isa: str, seeing: Callable[[str], ErnieForConditionalGeneration], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seeing(kind)
    inputs = clear_pictures(model)
    real = inputs["attention_mask"].numpy() == 1
    calls = fused_calls(monkeypatch)
    with fused(isa, "decoder"):
        found = model(**inputs).numpy()[real]
    assert calls == [inputs["input_ids"].shape[1]]
    monkeypatch.setattr(model.ernie, "fused", None)
    with fused(isa):
        assert_rounded(found, model(**inputs).numpy()[real])
    assert len(calls) == 1


@kinds
@paddle.no_grad()
def test_packed_vision_is_near_a_float32_model(kind: str, tmp_path: Path) -> None:
    folder = write_vision_folder(tmp_path)
    model = load_vision(folder, kind)
    inputs = pictures(model.vision, GRIDS)
    found = model.encode_images(inputs["images"], inputs["grid_thw"])
    expected = load_vision(folder, "float32").encode_images(inputs["images"], inputs["grid_thw"])
    assert difference(found, expected) < 5e-2 * float(expected.abs().max())


@kinds
@pytest.mark.parametrize("chunk", [1, 7, 30])
@paddle.no_grad()
def test_pictures_go_through_in_chunks(
    kind: str,
    chunk: int,
    seeing: Callable[[str], ErnieForConditionalGeneration],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the text after them continues from the cache."""
    model, following = seeing(kind), token_ids(3, 2, 500)
    inputs, results = pictures(model.vision, GRIDS), []
    for size in (packing.CHUNK_TOKENS, chunk):
        monkeypatch.setattr(packing, "CHUNK_TOKENS", size)
        cache = KVCache(model.config)
        with fused("avx2", "decoder"):
            results.append([model(**inputs, cache=cache).numpy(), model(following, cache=cache).numpy()])
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


@paddle.no_grad()
def test_a_picture_longer_than_a_chunk(
    seeing: Callable[[str], ErnieForConditionalGeneration], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = seeing("wint8")
    inputs = pictures(model.vision, [(1, 46, 48)])
    calls = fused_calls(monkeypatch)
    with fused("avx2", "decoder"):
        found = model(**inputs).numpy()
        monkeypatch.setattr(packing, "CHUNK_TOKENS", 10**6)
        expected = model(**inputs).numpy()
    length = inputs["input_ids"].shape[1]
    assert length > 512 and calls == [256] * (length // 256) + [length % 256, length]
    np.testing.assert_array_equal(found, expected)


@kinds
def test_vision_tower_and_adapter_are_never_quantised(
    kind: str, seeing: Callable[[str], ErnieForConditionalGeneration]
) -> None:
    model = seeing(kind)
    held = {name: weight for name, weight in model.weights().items() if isinstance(weight, PackedWeight)}
    for spec in checkpoint_tensors(model.config):
        if len(spec.shape) == 2 and not spec.float32:
            quantised = None if kind == "bfloat16" else quantised_kind(spec, QuantizationConfig.uniform(kind))
            assert held.pop(spec.name).kind == (quantised or "bfloat16"), spec.name
    assert not held


@kinds
@paddle.no_grad()
def test_a_layer_without_one_of_the_banks_goes_layer_by_layer(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_vision(write_vision_folder(tmp_path, vision_config(moe_layer_end_index=[2, 1])), kind)
    assert model.ernie.fused is None
    calls = fused_calls(monkeypatch)
    inputs = pictures(model.vision, GRIDS)
    assert np.isfinite(model(**inputs).numpy()[inputs["attention_mask"].numpy() == 1]).all() and not calls


# What a packed model is.


def expected_bytes(kind: str, inputs: int, outputs: int) -> int:
    """From the description of the panels: 64 outputs wide; pairs, fours or groups of 64 inputs."""
    columns = -(-outputs // 64) * 64
    if kind == "bfloat16":
        return columns * 2 * (-(-inputs // 2) * 2)
    if kind == "wint8":
        return columns * (-(-inputs // 4) * 4 + 4)
    return columns * -(-inputs // 64) * (32 + 2)


@kinds
@variants
def test_no_matrix_is_a_parameter(variant: str, kind: str, packed: Load) -> None:
    """Memory is that of the packed weights, of norms, of the router and of its bias."""
    model = packed(variant, kind)
    for name, parameter in model.named_parameters():
        routing = name.endswith((".gate.weight", ".e_score_correction_bias"))
        assert parameter.dtype == (paddle.float32 if routing else paddle.bfloat16), name
        assert routing or parameter.ndim == 1, name
        assert parameter.stop_gradient, name
    weights = dict(packing.packed_weights(model))
    for name, weight in weights.items():
        shared = name in ("ernie.embed_tokens.weight", "head.weight")
        assert weight.kind == ("wint8" if shared and kind != "bfloat16" else kind), name
        size = expected_bytes(weight.kind, weight.in_features, weight.out_features)
        assert weight.nbytes == size * (weight.count or 1), name
    config = model.config
    dense = config.num_hidden_layers if not config.banks else config.moe_layer_start_index
    per_moe_layer = 4 + 2 * bool(config.shared_intermediate_size)
    moe = (config.num_hidden_layers - dense) * per_moe_layer
    assert len(weights) == 1 + (not config.tie_word_embeddings) + 4 * dense + moe
    held = {name for name, weight in model.weights().items() if isinstance(weight, PackedWeight)}
    assert held | {name for name, _ in model.named_parameters()} == model.weights().keys()


@some
def test_it_is_for_inference(variant: str, kind: str, packed: Load) -> None:
    model = packed(variant, kind)
    assert not model.training
    with pytest.raises(ErnieError, match='train: the weights are packed .* load the model with dtype="float32"'):
        model.train()
    with pytest.raises(ErnieError, match='set_state_dict: the weights are packed.* dtype="float32"'):
        model.set_state_dict({})
    assert not model.training


@kinds
def test_multi_token_prediction(kind: str, tmp_path: Path) -> None:
    folder = save_source(tmp_path, {**MOE, "num_nextn_predict_layers": 2})
    model, plain = load(folder, kind, mtp=True), plain_model(folder, kind)
    ids = clear_ids(model, 2, LENGTH)
    with paddle.no_grad():
        found, expected = model.next_n_logits(ids), plain.next_n_logits(ids)
    assert len(found) == 3
    for one, other in zip(found, expected, strict=True):
        assert_rounded(one.numpy(), other.numpy())
    assert load(folder, kind).ernie.mtp_depth == 0


@kinds
def test_an_architecture_that_the_fused_stack_lacks_goes_layer_by_layer(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**DENSE, "head_dim": 514, "num_attention_heads": 2, "num_key_value_heads": 1}
    folder = save_source(tmp_path, keys)
    model, ids = load(folder, kind), token_ids(2, 5)
    assert model.ernie.fused is None
    assert_rounded(run(model, ids), run(plain_model(folder, kind), ids))


@pytest.mark.parametrize("variant", ["dense", "moe"])
@pytest.mark.parametrize("kind", ["wint8", "wint4"])
def test_a_quantised_model_is_saved_as_it_is(variant: str, kind: str, packed: Load, tmp_path: Path) -> None:
    model = packed(variant, kind)
    model.save_pretrained(tmp_path, progress=False)
    again = ErnieForCausalLM.from_pretrained(tmp_path, progress=False)
    assert again.config.quantization_config == model.config.quantization_config
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(difference(before[name], after[name]) == 0 for name in before)


def test_a_quantised_model_is_saved_as_floats_on_request(packed: Load, tmp_path: Path) -> None:
    model, ids = packed("dense", "wint4"), token_ids(1, 5)
    for layout in ("paddle", "pt"):
        model.save_pretrained(tmp_path / layout, layout=layout, dtype="float32", progress=False)
        again = ErnieForCausalLM.from_pretrained(tmp_path / layout, progress=False)
        with custom.reference_only():
            assert difference(run(again, ids), run(model, ids)) < 1e-6
    with pytest.raises(ErnieError, match='quantised weights have names in the "paddle" layout only'):
        model.save_pretrained(tmp_path / "quantised", layout="pt", progress=False)
    assert not (tmp_path / "quantised").exists()
