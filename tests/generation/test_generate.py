"""`generate`: the laws that hold for any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie45.errors import ErnieError
from ernie45.generation.prompt_cache import PromptCache
from ernie45.generation.sampling import Context, log_softmax
from ernie45.models.cache import KVCache
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.tokenizer import ErnieTokenizer
from tests.helpers.tiny import DENSE, MOE, difference, tiny_config, tiny_model

NO_EOS: dict[str, Any] = {"eos_token_id": []}
PROMPTS = [[5, 9, 11], [7], [8, 30, 31, 32, 33, 12, 40]]

bases = pytest.mark.parametrize("base", [DENSE, MOE], ids=["dense", "moe"])


@pytest.fixture(scope="module")
def model() -> ErnieForCausalLM:
    return tiny_model()


@paddle.no_grad()
def slow_greedy(model: ErnieForCausalLM, prompt: list[int], new: int) -> tuple[list[int], list[float]]:
    """Greedy decoding that computes the whole row again for every token."""
    ids, log_probs = list(prompt), []
    for _ in range(new):
        logits = model(paddle.to_tensor([ids]))[0, -1].numpy()
        ids.append(int(logits.argmax()))
        log_probs.append(float(log_softmax(logits)[ids[-1]]))
    return ids[len(prompt) :], log_probs


@bases
def test_greedy_is_what_computing_everything_again_gives(base: dict[str, Any]) -> None:
    model = tiny_model(tiny_config(base))
    expected, log_probs = slow_greedy(model, PROMPTS[0], 12)
    result = model.generate(PROMPTS[0], max_new_tokens=12, **NO_EOS)
    assert result.ids.numpy().tolist() == [expected]
    assert difference(result.log_probs, [log_probs]) < 1e-4
    assert difference(result.scores, [np.mean(log_probs)]) < 1e-4


def test_the_result_unpacks_as_ids_and_scores(model: ErnieForCausalLM) -> None:
    result = model.generate([PROMPTS[0]], max_new_tokens=3)
    ids, scores = result
    assert ids is result.ids is result[0] and scores is result.scores is result[1]
    assert ids.dtype == paddle.int64 and scores.dtype == result.log_probs.dtype == paddle.float32


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_reference(reference: Path, kind: str) -> None:
    model = ErnieForCausalLM.from_pretrained(reference / kind / "paddle", dtype="float32", progress=False)
    with np.load(reference / kind / "reference.npz") as data:
        ids, _ = model.generate(data["greedy_prompt"], max_new_tokens=24)
        assert ids.numpy().tolist() == data["greedy_ids"].tolist()
        ids, _ = model.generate(data["batch_ids"], data["batch_mask"], max_new_tokens=12)
        assert ids.numpy().tolist() == data["batch_greedy"].tolist()


def padded(rows: list[list[int]], side: str) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, rows)) + 1
    ids, mask = np.zeros((len(rows), width), "int64"), np.zeros((len(rows), width), "int64")
    for i, row in enumerate(rows):
        start = {"left": width - len(row), "right": 0, "middle": 1 if len(row) < width - 1 else 0}[side]
        ids[i, start : start + len(row)], mask[i, start : start + len(row)] = row, 1
    return ids, mask


@bases
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_each_row_of_a_batch_equals_the_row_alone(base: dict[str, Any], sampled: bool) -> None:
    model = tiny_model(tiny_config(base))
    options = {"max_new_tokens": 8, "do_sample": sampled, "seed": 3, "repetition_penalty": 1.3} | NO_EOS
    alone = [model.generate(prompt, **options) for prompt in PROMPTS]
    expected = np.concatenate([result.ids.numpy() for result in alone])
    for side in ("left", "right", "middle"):
        ids, mask = padded(PROMPTS, side)
        for given in ((ids, mask), (paddle.to_tensor(ids), paddle.to_tensor(mask)), (ids.tolist(), mask.astype(bool))):
            assert model.generate(*given, **options).ids.numpy().tolist() == expected.tolist(), side
    batch = model.generate(PROMPTS, **options)
    assert batch.ids.numpy().tolist() == expected.tolist()
    assert difference(batch.log_probs, np.concatenate([result.log_probs.numpy() for result in alone])) < 1e-4


def test_masked_tokens_inside_a_row_are_left_out(model: ErnieForCausalLM) -> None:
    holes = model.generate([[5, 44, 9, 11]], [[1, 0, 1, 1]], max_new_tokens=6)
    assert holes.ids.numpy().tolist() == model.generate([5, 9, 11], max_new_tokens=6).ids.numpy().tolist()


def test_eos_ends_rows_one_by_one(model: ErnieForCausalLM) -> None:
    free = model.generate(PROMPTS, max_new_tokens=10, **NO_EOS)
    replies, log_probs = free.ids.numpy(), free.log_probs.numpy()
    eos = [int(replies[0, 2]), int(replies[1, 5])]
    result = model.generate(PROMPTS, max_new_tokens=10, eos_token_id=eos, pad_token_id=1)
    lengths = [next((i + 1 for i, token in enumerate(row) if token in eos), 10) for row in replies]
    assert len(set(lengths)) > 1
    width = max(lengths)
    for row, length in enumerate(lengths):
        expected = [*replies[row, :length], *[1] * (width - length)]
        assert result.ids[row].numpy().tolist() == expected
        assert not result.log_probs[row].numpy()[length:].any()
        assert difference(result.scores[row], log_probs[row, :length].mean()) < 1e-5


def test_min_new_tokens_holds_back_every_eos(model: ErnieForCausalLM) -> None:
    eos = model.generate(PROMPTS[0], max_new_tokens=3, **NO_EOS).ids.numpy()[0].tolist()
    assert model.generate(PROMPTS[0], max_new_tokens=9, eos_token_id=eos).ids.shape == [1, 1]
    ids = model.generate(PROMPTS[0], max_new_tokens=9, min_new_tokens=5, eos_token_id=eos).ids.numpy()[0]
    assert len(ids) > 5 and not np.isin(ids[:5], eos).any()


def test_sampling_is_reproducible_and_leaves_global_generators_alone(model: ErnieForCausalLM) -> None:
    def draw(seed: int | None) -> list[list[int]]:
        return model.generate(PROMPTS, max_new_tokens=12, do_sample=True, seed=seed, **NO_EOS).ids.numpy().tolist()

    def global_draws() -> tuple[float, float]:
        return paddle.rand([1]).item(), float(np.random.rand())

    paddle.seed(4)
    np.random.seed(4)
    expected = global_draws()
    paddle.seed(4)
    np.random.seed(4)
    first = draw(1)
    assert global_draws() == expected
    paddle.seed(5)
    assert draw(1) == first
    assert draw(2) != first
    assert draw(None) != draw(None)


def test_num_return_sequences(model: ErnieForCausalLM) -> None:
    options = {"max_new_tokens": 8, "do_sample": True, "seed": 1} | NO_EOS
    ids = model.generate(PROMPTS[:2], num_return_sequences=3, **options).ids.numpy()
    assert ids.shape == (6, 8)
    assert len({tuple(row) for row in ids[:3].tolist()}) == 3
    for index, prompt in enumerate(PROMPTS[:2]):
        alone = model.generate(prompt, num_return_sequences=3, **options).ids.numpy()
        assert alone.tolist() == ids[3 * index : 3 * index + 3].tolist()


def counted(model: ErnieForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of columns of every call of the decoder from now on."""
    columns, forward = [], model.ernie.forward

    def count(input_ids: paddle.Tensor, *args: Any, **kwargs: Any) -> paddle.Tensor:
        columns.append(input_ids.shape[1])
        return forward(input_ids, *args, **kwargs)

    monkeypatch.setattr(model.ernie, "forward", count)
    return columns


@pytest.mark.parametrize("rows", [1, 3])
def test_a_cache_is_continued_from(model: ErnieForCausalLM, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    prompts = np.random.default_rng(0).integers(3, 60, (rows, 6))
    first = model.generate(prompts, max_new_tokens=5, **NO_EOS)
    longer = np.concatenate([prompts, first.ids.numpy(), prompts[:, :2]], axis=1)
    expected = model.generate(longer, max_new_tokens=5, **NO_EOS)
    columns = counted(model, monkeypatch)
    again = model.generate(longer, max_new_tokens=5, cache=first.cache, **NO_EOS)
    assert columns == [3, 1, 1, 1, 1]  # the last generated token and the two new ones
    assert again.ids.numpy().tolist() == expected.ids.numpy().tolist()
    assert difference(again.log_probs, expected.log_probs) < 1e-4
    columns.clear()
    changed = longer.copy()
    changed[-1, 4] += 1
    other = model.generate(changed, max_new_tokens=2, cache=again.cache, **NO_EOS)
    assert columns == [13 - 4, 1]
    assert other.ids.numpy().tolist() == model.generate(changed, max_new_tokens=2, **NO_EOS).ids.numpy().tolist()
    columns.clear()
    model.generate(changed, max_new_tokens=1, cache=other.cache, **NO_EOS)
    assert columns == [1]


def test_a_cache_with_padding_is_continued_from(model: ErnieForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model.generate(PROMPTS, max_new_tokens=4, **NO_EOS)
    longer = [[*p, *reply, 3] for p, reply in zip(PROMPTS, first.ids.numpy().tolist(), strict=True)]
    expected = model.generate(longer, max_new_tokens=4, **NO_EOS).ids.numpy().tolist()
    columns = counted(model, monkeypatch)
    assert model.generate(longer, max_new_tokens=4, cache=first.cache, **NO_EOS).ids.numpy().tolist() == expected
    assert columns[0] == 2
    # The same columns hold the same ids, but one of them is padding now.
    cache = model.generate([[0, 9, 5], [4, 3, 5]], max_new_tokens=1).cache
    fewer = model.generate([[9, 5], [4, 3, 5]], max_new_tokens=4, cache=cache, **NO_EOS)
    fresh = model.generate([[9, 5], [4, 3, 5]], max_new_tokens=4, **NO_EOS)
    assert fewer.ids.numpy().tolist() == fresh.ids.numpy().tolist()
    assert difference(fewer.log_probs, fresh.log_probs) < 1e-4


@pytest.mark.parametrize("several", [{"do_sample": True, "seed": 0}, {"num_beams": 3}], ids=["samples", "beams"])
def test_several_replies_leave_the_prompt_in_the_cache(
    model: ErnieForCausalLM, monkeypatch: pytest.MonkeyPatch, several: dict[str, Any]
) -> None:
    options = {"max_new_tokens": 5, "num_return_sequences": 3, **several, **NO_EOS}
    first = model.generate(PROMPTS[2], **options)
    assert first.cache.ids.tolist() == [PROMPTS[2]]
    columns = counted(model, monkeypatch)
    assert model.generate(PROMPTS[2], cache=first.cache, **options).ids.numpy().tolist() == first.ids.numpy().tolist()
    assert columns[0] == 1


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("call", [0, 1, 3])
def test_an_interrupted_call_leaves_the_cache_consistent(
    model: ErnieForCausalLM, monkeypatch: pytest.MonkeyPatch, call: int, layer: int
) -> None:
    cache, calls = PromptCache(model.config), iter(range(100))
    forward = model.ernie.layers[layer].forward

    def interrupt(*args: Any, **kwargs: Any) -> paddle.Tensor:
        if next(calls) == call:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    expected = model.generate(PROMPTS[2], max_new_tokens=6, **NO_EOS).ids.numpy().tolist()
    with monkeypatch.context() as patch:
        patch.setattr(model.ernie.layers[layer], "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate(PROMPTS[2], max_new_tokens=6, cache=cache, **NO_EOS)
    assert cache.length == (0 if call == 0 else len(PROMPTS[2]) + call - 1)
    assert cache.ids.tolist() == [[*PROMPTS[2], *expected[0]][: cache.length]]
    assert model.generate(PROMPTS[2], max_new_tokens=6, cache=cache, **NO_EOS).ids.numpy().tolist() == expected


def test_ids_beyond_the_tokenizer_are_never_chosen(speaker: ErnieForCausalLM, tokenizer: ErnieTokenizer) -> None:
    options = {"max_new_tokens": 30, "do_sample": True, "temperature": 50.0, "num_return_sequences": 8, "seed": 0}
    free = speaker.generate([5, 6], **options, **NO_EOS).ids.numpy()
    assert (free >= len(tokenizer)).any() and (free >= 100).any()
    assert (speaker.generate([5, 6], tokenizer=tokenizer, **options, **NO_EOS).ids.numpy() < len(tokenizer)).all()
    limited = speaker.generate([5, 6], vocab_size=100, **options, **NO_EOS)
    assert (limited.ids.numpy() < 100).all()
    assert np.isfinite(limited.log_probs.numpy()).all()


def test_own_processors_see_the_tokens_so_far_and_come_last(model: ErnieForCausalLM) -> None:
    seen: list[tuple[list[list[int]], list[list[int]]]] = []

    def count_up(context: Context, logits: np.ndarray) -> np.ndarray:
        seen.append(([p.tolist() for p in context.prompts], context.replies.tolist()))
        forced = np.full_like(logits, -np.inf)
        forced[:, 10 + context.replies.shape[1]] = 0
        return forced

    result = model.generate(PROMPTS[:2], max_new_tokens=3, logits_processors=[count_up])
    assert result.ids.numpy().tolist() == [[10, 11, 12]] * 2
    assert difference(result.log_probs, np.zeros((2, 3))) == 0
    assert seen[2] == (PROMPTS[:2], [[10, 11]] * 2)


def test_only_the_last_position_goes_through_the_head(model: ErnieForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, head = [], model.lm_head

    def count(hidden: paddle.Tensor) -> paddle.Tensor:
        shapes.append(list(hidden.shape))
        assert not paddle.is_grad_enabled()
        return head(hidden)

    monkeypatch.setattr(model, "lm_head", count)
    model.generate(PROMPTS, max_new_tokens=3, **NO_EOS)
    assert shapes == [[3, model.config.hidden_size]] * 3
    assert paddle.is_grad_enabled()


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "input_ids: expected .*found \\[\\]"),
        ([[5], []], {}, "row 1 has no token"),
        ("hello", {}, "input_ids: expected .*'hello'"),
        ([[5.5, 1.0]], {}, "input_ids, row 0: expected one integer"),
        ([[5, 61]], {}, "outside the vocabulary"),
        (np.zeros((1, 2, 3), "int64"), {}, "input_ids, row 0: expected one integer per token"),
        ([5, 6], {"attention_mask": [[1, 1, 1]]}, "attention_mask: expected \\[1, 2\\] .*found \\[1, 3\\]"),
        ([5, 6], {"attention_mask": [[0, 0]]}, "row 0 has no token"),
        ([5, 6], {"max_new_tokens": 131071}, "2 tokens of prompt and 131071 new ones exceed the 131072"),
        ([5, 6], {"max_new_tokens": 2.5}, "max_new_tokens must be an integer"),
        ([5, 6], {"seed": -1}, "seed must be"),
        ([5, 6], {"temperature": 0.0}, "temperature must be"),
        ([5, 6], {"max_length": 5}, "unknown option max_length; known: .*max_new_tokens"),
        ([5, 6], {"stop_strings": "x"}, "stop_strings: .*pass tokenizer="),
        ([5, 6], {"stop_strings": [""]}, "stop_strings: expected texts"),
        ([5, 6], {"vocab_size": 0}, "vocab_size: expected at least 1"),
        ([5, 6], {"pad_token_id": 61}, "pad_token_id: expected an id below vocab_size 61"),
        ([5, 6], {"num_return_sequences": 2}, "num_return_sequences 2 needs do_sample"),
        ([5, 6], {"num_beams": 2, "streamer": object()}, "streamer: beams"),
        ([5, 6], {"logits_processors": [lambda _, logits: logits[:, :3]]}, "processor .*\\(1, 61\\), found \\(1, 3\\)"),
        ([5, 6], {"logits_processors": [lambda _, logits: logits * np.nan]}, "logits of row 0 at new token 0.*nan"),
    ],
)  # fmt: skip
def test_errors(model: ErnieForCausalLM, prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ErnieError, match=message):
        model.generate(prompt, **options)


def test_cache_errors(model: ErnieForCausalLM) -> None:
    with pytest.raises(ErnieError, match="cache: expected a PromptCache.*found a KVCache"):
        model.generate([5], cache=KVCache(model.config))
    cache = model.generate([[5], [6]], max_new_tokens=1).cache
    with pytest.raises(ErnieError, match="cache: holds 2 rows, but there are 1 prompts"):
        model.generate([5], cache=cache)
