"""Latency and speed of generation, as a caller of `generate` sees them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ernie45.errors import ErnieError

if TYPE_CHECKING:
    from ernie45.config import ErnieConfig
    from ernie45.models.causal_lm import ErnieForCausalLM

# Whatever generation_config.json says: the most likely token, without penalties.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_new_tokens": 0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@dataclass(frozen=True)
class Speed:
    """Medians over the runs of one prompt length and one output length, batch of one.

    Attributes:
        prompt, output: tokens of the prompt, and new ones.
        first_token: seconds from the call to the first new token.
        others: seconds from the first new token to the last.
    """

    prompt: int
    output: int
    first_token: float
    others: float

    @property
    def per_token(self) -> float | None:
        """Seconds per output token after the first; None if there was only one."""
        return self.others / (self.output - 1) if self.output > 1 else None

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the time of the whole call."""
        return self.output / (self.first_token + self.others)


def check_lengths(config: ErnieConfig, prompts: Sequence[int], outputs: Sequence[int], runs: int) -> None:
    """Raises ErnieError for lengths that `measure_speed` cannot run on this model, or a negative number of runs."""
    if runs < 0 or any(length < 1 for length in (*prompts, *outputs)):
        raise ErnieError(
            f"speed: expected lengths of at least 1 and no negative runs, found prompts {list(prompts)}, "
            f"outputs {list(outputs)}, {runs} runs"
        )
    if not (runs and prompts and outputs):
        return
    longest, limit = max(prompts) + max(outputs), config.max_position_embeddings
    if longest > limit:
        raise ErnieError(
            f"speed: {max(prompts)} tokens of prompt and {max(outputs)} new ones exceed the {limit} positions of "
            "this model; choose shorter prompt or output lengths"
        )


def measure_speed(
    model: ErnieForCausalLM, prompts: Sequence[int], outputs: Sequence[int], runs: int, progress: bool
) -> list[Speed]:
    """Times greedy generation after random prompts for every pair of a prompt length and an output length.

    One run of each pair comes after the other, so that a drift of the machine meets all of them.
    """
    cases = [(prompt, output) for prompt in prompts for output in outputs] if runs else []
    times: dict[tuple[int, int], list[tuple[float, float]]] = {case: [] for case in cases}
    total = runs * sum(prompt + output for prompt, output in cases)
    with tqdm(total=total, unit="token", desc="Measuring speed", delay=1, disable=not progress) as bar:
        for _ in range(runs):
            for prompt, output in cases:
                times[prompt, output].append(_time_generation(model, prompt, output))
                bar.update(prompt + output)
    return [
        Speed(*case, first_token=median(first for first, _ in taken), others=median(others for _, others in taken))
        for case, taken in times.items()
    ]


def _time_generation(model: ErnieForCausalLM, prompt: int, output: int) -> tuple[float, float]:
    """Seconds to the first new token, and from there to the last."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, [1, prompt])
    clock = _Clock()
    start = time.perf_counter()
    # Without end-of-sequence ids every run has the same length.
    model.generate(ids, max_new_tokens=output, eos_token_id=(), streamer=clock, **GREEDY)
    return clock.ticks[0] - start, clock.ticks[-1] - clock.ticks[0]


class _Clock:
    """A streamer that notes when the tokens come."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def put(self, ids: np.ndarray) -> None:
        self.ticks.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to finish."""
