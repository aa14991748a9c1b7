"""Beam search against every possible reply, against greedy decoding, and against transformers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie45.generation.sampling import log_softmax
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.tokenizer import ErnieTokenizer
from tests.helpers.tiny import MOE, difference, tiny_config, tiny_model

VOCAB, EOS, NEW = 5, 2, 4
PROMPTS = [[3, 4, 1], [4], [1, 1, 3, 3, 0]]


@pytest.fixture(scope="module")
def model() -> ErnieForCausalLM:
    return tiny_model(tiny_config(vocab_size=VOCAB))


@paddle.no_grad()
def all_replies(model: ErnieForCausalLM, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """Every reply of at most NEW tokens that ends with eos or is that long, and its log-probability."""
    tails = np.array(list(itertools.product(range(VOCAB), repeat=NEW)))
    ids = np.concatenate([np.repeat([prompt], len(tails), axis=0), tails], axis=1)
    log_probs = log_softmax(model(paddle.to_tensor(ids)).numpy())[:, len(prompt) - 1 : -1]
    chosen = np.take_along_axis(log_probs, tails[..., None], axis=2)[..., 0]
    replies = {}
    for tail, values in zip(tails.tolist(), chosen, strict=True):
        length = tail.index(EOS) + 1 if EOS in tail else NEW
        replies[tuple(tail[:length])] = float(values[:length].sum())
    return replies


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_beams_as_wide_as_the_tree_find_the_best_replies(model: ErnieForCausalLM, prompt: list[int]) -> None:
    replies = all_replies(model, prompt)
    best = sorted(replies, key=lambda reply: -replies[reply])[:6]
    # Without length penalty a reply cannot gain by going on, so the search may not stop too early.
    result = model.generate(
        prompt, max_new_tokens=NEW, num_beams=VOCAB**NEW, num_return_sequences=6, length_penalty=0.0, pad_token_id=0
    )
    width = result.ids.shape[1]
    assert result.ids.numpy().tolist() == [[*reply, *[0] * (width - len(reply))] for reply in best]
    assert difference(result.scores, [replies[reply] for reply in best]) < 1e-4
    assert difference(result.log_probs.sum(axis=1), [replies[reply] for reply in best]) < 1e-4


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
def test_scores_are_divided_by_a_power_of_the_length(model: ErnieForCausalLM, length_penalty: float) -> None:
    replies = all_replies(model, PROMPTS[0])
    result = model.generate(
        PROMPTS[0], max_new_tokens=NEW, num_beams=3, num_return_sequences=3, length_penalty=length_penalty
    )
    scores = result.scores.numpy()
    assert (np.diff(scores) <= 0).all()
    for row, log_probs, score in zip(result.ids.numpy().tolist(), result.log_probs.numpy(), scores, strict=True):
        reply = tuple(row[: int((log_probs != 0).sum())])
        assert abs(replies[reply] / len(reply) ** length_penalty - score) < 1e-4


@pytest.mark.parametrize("beams", [2, 4])
def test_each_row_of_a_batch_equals_the_row_alone(beams: int) -> None:
    model = tiny_model(tiny_config(vocab_size=12))
    options = {"max_new_tokens": 10, "num_beams": beams, "num_return_sequences": 2, "pad_token_id": 0}
    prompts = [[5, 9, 11], [7], [8, 3, 4, 10]]
    batch = model.generate(prompts, **options)
    lengths = (batch.log_probs.numpy() != 0).sum(axis=1)
    for index, prompt in enumerate(prompts):
        alone = model.generate(prompt, **options)
        assert difference(alone.scores, batch.scores[2 * index : 2 * index + 2]) < 1e-4
        for row, reply in enumerate(alone.ids.numpy().tolist()):
            expected = batch.ids.numpy()[2 * index + row].tolist()
            assert reply[: lengths[2 * index + row]] == expected[: len(reply)][: lengths[2 * index + row]]


def test_stop_strings_end_hypotheses(speaker: ErnieForCausalLM, tokenizer: ErnieTokenizer) -> None:
    options = {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 3, "eos_token_id": [], "pad_token_id": 0}
    free = speaker.generate([5, 6], tokenizer=tokenizer, **options).ids.numpy()
    stop = next(c for c in tokenizer.decode(free[0, :6], skip_special_tokens=True) if c.isascii() and c.isprintable())
    result = speaker.generate([5, 6], tokenizer=tokenizer, stop_strings=stop, **options)
    lengths = (result.log_probs.numpy() != 0).sum(axis=1)
    texts = [tokenizer.decode(row[:n]) for row, n in zip(result.ids.numpy(), lengths, strict=True)]
    assert any(stop in text for text in texts)
    assert all(stop not in tokenizer.decode(row[: n - 1]) for row, n in zip(result.ids.numpy(), lengths, strict=True))
    assert all(stop in text or n == 12 for text, n in zip(texts, lengths, strict=True))


def test_fewer_possible_replies_than_asked_for(model: ErnieForCausalLM) -> None:
    def only_one(context: Any, logits: np.ndarray) -> np.ndarray:
        return np.where(np.arange(VOCAB) == 3, logits, -np.inf)

    result = model.generate(
        [1], max_new_tokens=2, num_beams=3, num_return_sequences=2, logits_processors=[only_one], pad_token_id=0
    )
    assert result.ids.numpy().tolist() == [[3, 3], [0, 0]]
    assert result.scores.numpy().tolist() == [0, -np.inf]


@pytest.mark.parity
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_transformers_finds_the_same(tmp_path: Path, seed: int, length_penalty: float) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = tiny_model(tiny_config(MOE, vocab_size=13, moe_num_experts=4, moe_intermediate_size=16), seed=seed)
    model.save_pretrained(tmp_path, layout="pt", progress=False)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 13
    options = {"max_new_tokens": 12, "num_beams": 4, "num_return_sequences": 3, "length_penalty": length_penalty}
    for prompt, eos in itertools.product([[5, 9, 11], [7], [8, 3, 4, 10]], ([2], [2, 6, 9])):
        ours = model.generate(prompt, eos_token_id=eos, pad_token_id=1, **options)
        theirs = peer.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            eos_token_id=eos,
            pad_token_id=1,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
        assert ours.ids.numpy().tolist() == theirs.sequences[:, len(prompt) :].tolist()
        assert difference(ours.scores, theirs.sequences_scores.numpy()) < 1e-4
