"""What the small model is trained on as rows of tokens: lessons and conversations, encoded and packed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from tiny_skills import LESSONS, Lesson, draw_lesson
from tiny_tasks import sample

from ernie45 import ErnieProcessor
from ernie45.losses import IGNORED_LABEL

PADDING = -1
SYSTEM_MESSAGES = ("You are a helpful assistant.", "Answer briefly.", "你是一个乐于助人的助手。", "请简短回答。")
TURN_SHARES = (70, 15, 10, 5)  # how many conversations in 100 have one, two, three, four questions


@dataclass(frozen=True)
class Sample:
    """One document of `s` tokens, and the pictures in it.

    Attributes:
        ids, labels: token ids, and for each the next token of an answer or `IGNORED_LABEL`.
        positions: [s, 3] int64 time, row, column; or None for 0, 1, 2, ... on all three.
        types: [s] int64, 0 for text; or None for text alone.
        images: [patches, patch_bytes] uint8; or None.
        grid: [items, 3] int64; or None.
        kind: place of the kind of lesson in `tiny_skills.LESSONS`.
    """

    ids: list[int]
    labels: list[int]
    positions: np.ndarray | None = None
    types: np.ndarray | None = None
    images: np.ndarray | None = None
    grid: np.ndarray | None = None
    kind: int = 0


def draw_conversation(rng: random.Random, encode: Callable[[str], list[int]], end: int) -> Sample:
    """A conversation of text alone, without the formats of thinking and tools: all of its answers are learned.

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
    return Sample(ids, labels)


def encode_lesson(lesson: Lesson, processor: ErnieProcessor, template: str | None, end: int) -> Sample:
    """A lesson as the processor makes its prompt, then the reply; only the reply is learned."""
    inputs = processor(
        lesson.messages, enable_thinking=lesson.thinking, tools=lesson.tools, chat_template=template
    )  # fmt: skip
    prompt = inputs["input_ids"][0].numpy()
    reply = processor.tokenizer.encode(lesson.reply)
    before = inputs["position_ids"][0].numpy()
    after = before[-1].max() + 1 + np.arange(len(reply))
    return Sample(
        ids=[*prompt.tolist(), *reply],
        labels=[IGNORED_LABEL] * (len(prompt) - 1) + [*reply, end],
        positions=np.concatenate([before, np.repeat(after[:, None], 3, axis=1)]),
        types=np.concatenate([inputs["token_type_ids"][0].numpy(), np.zeros(len(reply), np.int64)]),
        images=inputs["images"].numpy(),
        grid=inputs["grid_thw"].numpy(),
    )


def draw_lessons(rng: random.Random, shares: Mapping[str, float]) -> Iterator[tuple[int, Lesson]]:
    """Training lessons without end, each with the place of its kind in `LESSONS`."""
    places = {kind: place for place, kind in enumerate(LESSONS)}
    while True:
        kind = rng.choices(list(shares), list(shares.values()))[0]
        yield places[kind], draw_lesson(rng, kind)


def draw_samples(
    rng: random.Random, shares: Mapping[str, float], processor: ErnieProcessor, template: str | None, end: int
) -> Iterator[Sample]:
    """Lessons without end, of kinds drawn by their shares of all lessons."""
    for kind, lesson in draw_lessons(rng, shares):
        yield replace(encode_lesson(lesson, processor, template, end), kind=kind)


def draw_conversations(rng: random.Random, encode: Callable[[str], list[int]], end: int) -> Iterator[Sample]:
    """Conversations without end."""
    while True:
        yield draw_conversation(rng, encode, end)


@dataclass(frozen=True)
class Batch:
    """Packed documents.

    Attributes:
        input_ids, labels, kinds: int64 [rows, length].
        types: int64 [rows, length], 0 for text, more for pictures, `PADDING` behind the last document.
        position_ids: int64 [rows, length, 3].
        end_rows: int32 [rows, 1, length, 1], where the document of each token ends.
        images: [patches, patch_bytes] uint8 of all pictures in the order of their tokens, or None.
        grid: [items, 3] int64, or None.
        tokens: how many there are without the padding.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    types: np.ndarray
    kinds: np.ndarray
    position_ids: np.ndarray
    end_rows: np.ndarray
    images: np.ndarray | None
    grid: np.ndarray | None
    tokens: int


def pack(samples: Iterator[Sample], rows: int, length: int) -> Batch:
    """Fills rows with whole documents, first-fit, until a few in a row fit nowhere."""
    used = [0] * rows
    placed: list[tuple[int, int, Sample]] = []
    rejected = 0
    for document in samples:
        row = next((row for row in range(rows) if used[row] + len(document.ids) <= length), None)
        if row is None:
            rejected += 1
            if rejected == 4:
                break
            continue
        placed.append((row, used[row], document))
        used[row] += len(document.ids)
    return lay_out(placed, rows, length)


def lay_out(placed: Iterable[tuple[int, int, Sample]], rows: int, length: int) -> Batch:
    """The batch of documents whose row and first column are given; padding behind them is one more document."""
    input_ids, types, kinds = np.zeros((3, rows, length), np.int64)
    labels = np.full((rows, length), IGNORED_LABEL, np.int64)
    position_ids = np.zeros((rows, length, 3), np.int64)
    end_rows = np.full((rows, length), length, np.int32)
    used = np.zeros(rows, np.int64)
    images: list[np.ndarray] = []
    grids: list[np.ndarray] = []
    for row, start, document in sorted(placed, key=lambda place: place[:2]):  # the order in which tokens are read
        stop = start + len(document.ids)
        input_ids[row, start:stop], labels[row, start:stop] = document.ids, document.labels
        places = np.arange(stop - start)[:, None] if document.positions is None else document.positions
        position_ids[row, start:stop], end_rows[row, start:stop] = places, stop
        kinds[row, start:stop] = document.kind
        if document.types is not None:
            types[row, start:stop] = document.types
        if document.images is not None and document.grid is not None and len(document.images):
            images.append(document.images)
            grids.append(document.grid)
        used[row] = stop
    for row, start in enumerate(used):
        types[row, start:] = PADDING
        position_ids[row, start:] = np.arange(length - start)[:, None]
    return Batch(
        input_ids,
        labels,
        types,
        kinds,
        position_ids,
        end_rows.reshape(rows, 1, length, 1),
        np.concatenate(images) if images else None,
        np.concatenate(grids) if grids else None,
        int(used.sum()),
    )
