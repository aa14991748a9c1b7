"""Pairs of a right and a wrong reply, and learning from them by direct preference optimisation (arXiv 2305.18290)."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import paddle
from paddle import Tensor
from tiny_data import Batch, Sample, draw_lessons, encode_lesson, lay_out

from ernie45 import ErnieProcessor
from ernie45.losses import Answers, Pairs, PreferenceOptions, preference_loss, sequence_log_probs

# The share of ordinary learning keeps the right replies from becoming less likely together with the wrong ones.
OPTIONS = PreferenceOptions(loss="sigmoid", beta=0.2, sft_weight=0.5)

Pair = tuple[Sample, Sample]  # right, wrong


def spoil(rng: random.Random, reply: str) -> str:
    """The reply with one mistake: another digit in one place, or else two neighbouring words or characters swapped.

    A reply in which nothing can be swapped, because all of it is the same, loses its last character.
    """
    digits = [match.start() for match in re.finditer(r"\d", reply)]
    if digits:
        place = rng.choice(digits)
        other = rng.choice([digit for digit in "0123456789" if digit != reply[place]])
        return reply[:place] + other + reply[place + 1 :]
    parts = re.split(r"([ 、])", reply) if re.search(r"[ 、]", reply) else [part for c in reply for part in (c, "")]
    swaps = [first for first in range(0, len(parts) - 2, 2) if parts[first] != parts[first + 2]]
    if not swaps:
        return reply[:-1]
    first = rng.choice(swaps)
    parts[first], parts[first + 2] = parts[first + 2], parts[first]
    return "".join(parts)


def draw_pairs(
    rng: random.Random, shares: Mapping[str, float], processor: ErnieProcessor, template: str, end: int
) -> Iterator[Pair]:
    """Pairs without end, of kinds of lessons drawn by their shares."""
    for kind, lesson in draw_lessons(rng, shares):
        wrong = replace(lesson, reply=spoil(rng, lesson.reply))
        right, rejected = (
            replace(encode_lesson(choice, processor, template, end), kind=kind) for choice in (lesson, wrong)
        )
        yield right, rejected


def side_by_side(pairs: Iterator[Pair], rows: int, length: int) -> Batch:
    """The next rows / 2 pairs that are not too long: a row each for the right replies, then for the wrong ones."""
    chosen: list[Pair] = []
    while len(chosen) < rows // 2:
        pair = next(pairs)
        if max(len(document.ids) for document in pair) <= length:
            chosen.append(pair)
    documents = [right for right, _ in chosen] + [wrong for _, wrong in chosen]
    longest = max(len(document.ids) for document in documents)
    return lay_out([(row, 0, document) for row, document in enumerate(documents)], len(documents), longest)


def answers_of(log_probs: Tensor, places: Tensor, batch: Batch) -> Answers:
    """Log-probabilities [learned tokens] at `places` of the flattened batch, summed by row."""
    flat = paddle.zeros([batch.labels.size], dtype="float32")
    by_row = paddle.scatter_nd_add(flat, places.unsqueeze(-1), log_probs).reshape(batch.labels.shape)
    return sequence_log_probs(by_row, paddle.to_tensor(batch.labels))


def pair_loss(policy: Answers, reference: Answers) -> tuple[Tensor, Tensor]:
    """The loss, and which pairs [pairs] the policy orders better than the reference does."""
    found = preference_loss(Pairs.of(policy, reference), OPTIONS)
    return found.total, found.chosen_rewards > found.rejected_rewards
