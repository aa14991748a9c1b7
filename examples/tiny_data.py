"""Packs the questions of `tiny_tasks.py`, as conversations in the chat format, into rows of tokens to train on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from tiny_tasks import sample

from ernie45.losses import IGNORED_LABEL

SYSTEM_MESSAGES = ("You are a helpful assistant.", "Answer briefly.", "你是一个乐于助人的助手。", "请简短回答。")
TURN_SHARES = (70, 15, 10, 5)  # how many conversations in 100 have one, two, three, four questions

Conversation = tuple[list[int], list[int]]  # token ids, labels


def draw_conversation(rng: random.Random, encode: Callable[[str], list[int]], end: int) -> Conversation:
    """Token ids of one conversation, and for each the label: the next token of an answer, or `IGNORED_LABEL`.

    The prompt and the answer are encoded apart, as at inference, where the model continues the prompt's ids.
    The label after an answer is always `end`; the token that follows it in the conversation is the separator.
    """
    prompt = "<|begin_of_sentence|>"
    if rng.random() < 0.05:
        prompt += rng.choice(SYSTEM_MESSAGES) + "\n"
    ids: list[int] = []
    labels: list[int] = []
    for _ in range(rng.choices((1, 2, 3, 4), TURN_SHARES)[0]):
        question = sample(rng)
        asked = encode(f"{prompt}User: {question.prompt}\nAssistant: ")
        answer = encode(question.reply)
        ids += asked + answer
        labels += [IGNORED_LABEL] * (len(asked) - 1) + answer + [end]
        prompt = "<|end_of_sentence|>"
    return ids, labels


def draw_conversations(rng: random.Random, encode: Callable[[str], list[int]], end: int) -> Iterator[Conversation]:
    """Conversations without end."""
    while True:
        yield draw_conversation(rng, encode, end)


@dataclass(frozen=True)
class Batch:
    """Packed conversations: int64 [rows, length], but end_rows int32 [rows, 1, length, 1]; and their token count."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    end_rows: np.ndarray
    tokens: int


def pack(conversations: Iterator[Conversation], rows: int, length: int) -> Batch:
    """Fills rows with whole conversations until a few in a row fit nowhere; the padding is one more document."""
    input_ids = np.zeros((rows, length), np.int64)
    labels = np.full((rows, length), IGNORED_LABEL, np.int64)
    position_ids = np.zeros((rows, length), np.int64)
    end_rows = np.full((rows, length), length, np.int32)
    used = np.zeros(rows, np.int64)
    rejected = 0
    for ids, targets in conversations:
        fits = np.flatnonzero(used + len(ids) <= length)
        if fits.size == 0:
            rejected += 1
            if rejected == 4:
                break
            continue
        row, start = fits[0], used[fits[0]]
        stop = start + len(ids)
        input_ids[row, start:stop], labels[row, start:stop] = ids, targets
        position_ids[row, start:stop], end_rows[row, start:stop] = np.arange(len(ids)), stop
        used[row] = stop
    for row, start in enumerate(used):
        position_ids[row, start:] = np.arange(length - start)
    return Batch(input_ids, labels, position_ids, end_rows.reshape(rows, 1, length, 1), int(used.sum()))
