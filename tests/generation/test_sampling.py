"""Penalties, filters and the draw, against slow definitions."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie45.generation.config import GenerationConfig
from ernie45.generation.sampling import Context, candidates, choose, process, processors_of
from tests.helpers.numeric import softmax

PROBABILITIES = np.array([0.05, 0.4, 0.02, 0.25, 0.15, 0.001, 0.129, 0.0])


def config(**options: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=True, **options)


def logits_of(probabilities: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(probabilities).astype("float32") + 3


@pytest.mark.parametrize(
    ("options", "support"),
    [
        ({}, {0, 1, 2, 3, 4, 5, 6}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 100}, {0, 1, 2, 3, 4, 5, 6}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.79}, {1, 3, 4}),
        ({"top_p": 0.81}, {1, 3, 4, 6}),
        ({"top_p": 1e-6}, {1}),
        ({"min_p": 0.3}, {1, 3, 4, 6}),
        ({"min_p": 0.37}, {1, 3, 4}),
        ({"min_p": 0.999}, {1}),
        ({"top_k": 3, "top_p": 0.79}, {1, 3}),  # top-p of 0.8, what top-k left
        ({"top_k": 3, "top_p": 0.82}, {1, 3, 4}),
        ({"temperature": 0.5, "top_p": 0.6}, {1}),  # squares: 0.16, 0.0625, 0.0225, 0.0166, ...
        ({"temperature": 2.0, "min_p": 0.3}, {0, 1, 3, 4, 6}),  # roots
        ({"temperature": 1e-6}, {1}),
    ],
)
def test_support(options: dict[str, Any], support: set[int]) -> None:
    ids, weights = candidates(logits_of(PROBABILITIES), config(**options))
    assert set(ids.tolist()) == support and len(ids) == len(support)
    tempered = (PROBABILITIES[ids] / PROBABILITIES.max()) ** (1 / options.get("temperature", 1))
    assert np.abs(weights / weights.sum() - tempered / tempered.sum()).max() < 1e-5


def test_equal_tokens_are_cut_to_the_smallest_set() -> None:
    ids, _ = candidates(np.zeros(10, "float32"), config(top_p=0.35))
    assert len(set(ids.tolist())) == 4


def slow_support(logits: np.ndarray, options: GenerationConfig) -> set[int]:
    """The definition: sort, cut, add up."""
    tempered = logits.astype("float64") / options.temperature
    order = np.argsort(-tempered, kind="stable")[: options.top_k or None]
    probabilities = softmax(tempered[order])
    kept, total = set(), 0.0
    for token, probability in zip(order, probabilities, strict=True):
        if total < options.top_p and probability >= options.min_p * probabilities[0]:
            kept.add(int(token))
        total += probability
    return kept


@given(
    st.integers(0, 10**6),
    st.sampled_from([0, 1, 5, 40, 400]),
    st.sampled_from([1.0, 0.9, 0.5, 0.05, 0.999]),
    st.sampled_from([0.0, 0.02, 0.5]),
    st.sampled_from([1.0, 0.3, 3.0]),
)
def test_support_by_definition(seed: int, top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    logits = (np.random.default_rng(seed).standard_normal(300) * 3).astype("float32")
    options = config(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    assert set(candidates(logits, options)[0].tolist()) == slow_support(logits, options)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.79}, {"top_k": 4}, {"temperature": 2.0}, {"min_p": 0.2}])
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    logits, generator, draws = logits_of(PROBABILITIES), np.random.default_rng(0), 4000
    ids, weights = candidates(logits, config(**options))
    expected = dict(zip(ids.tolist(), draws * weights / weights.sum(), strict=True))
    found = Counter(choose(logits, config(**options), generator) for _ in range(draws))
    assert found.keys() <= expected.keys()
    chi_square = sum((found[token] - mean) ** 2 / mean for token, mean in expected.items())
    assert chi_square < 25  # the 0.9995 quantile for 7 tokens


def test_a_draw_of_almost_one_takes_no_impossible_token() -> None:
    class Highest(np.random.Generator):
        def random(self, *args: Any, **kwargs: Any) -> float:
            return math.nextafter(1, 0)

    assert choose(logits_of(PROBABILITIES), config(), Highest(np.random.PCG64())) == 6


def test_greedy_takes_the_most_likely() -> None:
    options = GenerationConfig(do_sample=False, temperature=5.0, top_k=3)
    assert choose(logits_of(PROBABILITIES), options, np.random.default_rng(0)) == 1


def slow_penalties(context: Context, logits: np.ndarray, options: GenerationConfig) -> np.ndarray:
    expected = logits.astype("float64").copy()
    for row in range(len(logits)):
        prompt, reply = context.prompts[row].tolist(), context.replies[row].tolist()
        for token in range(logits.shape[1]):
            value = expected[row, token]
            if token in prompt or token in reply:
                value = value * options.repetition_penalty if value < 0 else value / options.repetition_penalty
            if token in reply:
                value -= options.presence_penalty + options.frequency_penalty * reply.count(token)
            expected[row, token] = value
    return expected


@given(
    st.integers(0, 10**6),
    st.integers(0, 6),
    st.sampled_from([1.0, 1.4, 0.7]),
    st.sampled_from([0.0, 0.5, -1.0]),
    st.sampled_from([0.0, 0.3]),
)
def test_penalties_by_definition(seed: int, new: int, repetition: float, presence: float, frequency: float) -> None:
    generator = np.random.default_rng(seed)
    options = config(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    prompts = [generator.integers(0, 9, length) for length in (1, 5)]
    context = Context(prompts, generator.integers(0, 9, (2, new)))
    logits = generator.standard_normal((2, 9)).astype("float32")
    before = logits.copy()
    processed = process(processors_of(options, 9, 9), context, logits)
    assert np.abs(processed - slow_penalties(context, logits, options)).max() < 1e-5
    assert (logits == before).all()


def test_neutral_options_need_no_processor() -> None:
    assert processors_of(GenerationConfig(), 9, 9) == []


def test_forbidden_ids() -> None:
    options = config(eos_token_id=(2, 4, 99), min_new_tokens=2)
    logits = np.zeros((1, 9), "float32")

    def forbidden(new: int) -> list[int]:
        context = Context([np.array([1])], np.ones((1, new), "int64"))
        return np.flatnonzero(np.isneginf(process(processors_of(options, 9, 7), context, logits)[0])).tolist()

    assert forbidden(0) == forbidden(1) == [2, 4, 7, 8]
    assert forbidden(2) == [7, 8]
