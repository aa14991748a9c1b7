"""Measures the small model on held-out questions, pictures and clips: one row per task, in Markdown.

    python tools/tiny_accuracy.py build/tiny
    python tools/tiny_accuracy.py ernie45-tiny --questions 1000 --json accuracy.json
    python tools/tiny_accuracy.py ernie45-tiny --variant float32 --variant wint8 --variant wint4    # side by side
    python tools/tiny_accuracy.py build/tiny --task "one digit" --task "clip, when"
    python tools/tiny_accuracy.py build/tiny/stages/*                                               # likewise

The prompt is what `ErnieProcessor` makes, and greedy decoding answers it. A reply counts if the answer is all that it
says after its thoughts and steps; a tool call, if it is well-formed and asks for the right product. The questions are
the same for every model. The digits in the pictures come with scikit-learn: `pip install ".[tiny]"`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import paddle
from paddle import Tensor
from tqdm import tqdm

from ernie45 import ErnieForConditionalGeneration, ErnieProcessor
from ernie45.bench.contenders import VARIANTS
from ernie45.checkpoint.writer import write_json_atomic

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from tiny_skills import LESSONS, THREE_DIGIT_SUM, Lesson, draw_lesson, is_right, is_well_formed_call, text_lesson
from tiny_tasks import TASK_NAMES, sample

QUESTION_SEED = 20250630
LONGEST_REPLY = 80  # tokens
CALLS, WELL_FORMED = "tool calls", ", well-formed"
TASKS = (
    *(task for task in TASK_NAMES if task != THREE_DIGIT_SUM),
    *(kind for kind in LESSONS if kind not in ("text", "three-digit sums, in steps")),
)


def draw_lessons(task: str, count: int, split: str = "heldout") -> list[Lesson]:
    """The first `count` lessons of a task; different ones, where they are of text alone."""
    rng = random.Random(f"{QUESTION_SEED} {task}")
    lessons: dict[Any, Lesson] = {}
    for number in range(50 * count):  # a task with few operands has fewer questions than asked for
        if task in LESSONS:
            lessons[number] = draw_lesson(rng, task, split)
        else:
            question = sample(rng, task, split)
            lessons.setdefault(question.prompt, text_lesson(question))
        if len(lessons) == count:
            break
    return list(lessons.values())


def batches_of_equal_length(prompts: Sequence[dict[str, Tensor]], most: int) -> Iterator[list[int]]:
    """Indices of prompts, grouped so that a batch needs no padding."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[prompt["input_ids"].shape[1]].append(index)
    for indices in by_length.values():
        for first in range(0, len(indices), most):
            yield indices[first : first + most]


def ask(
    model: ErnieForConditionalGeneration, processor: ErnieProcessor, lessons: Sequence[Lesson], batch_size: int = 64
) -> list[str]:
    """The model's greedy replies with their special tokens, in the order of the lessons."""
    prompts = [processor(le.messages, enable_thinking=le.thinking, tools=le.tools) for le in lessons]
    replies = [""] * len(lessons)
    for indices in batches_of_equal_length(prompts, batch_size):
        inputs = {key: paddle.concat([prompts[index][key] for index in indices]) for key in prompts[indices[0]]}
        ids, _ = model.generate(**inputs, max_new_tokens=LONGEST_REPLY, do_sample=False)
        for index, row in zip(indices, ids.tolist(), strict=True):
            replies[index] = processor.decode(_until_end(row, model.config.eos_token_id))
    return replies


def _until_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def measure_accuracy(
    model: ErnieForConditionalGeneration, processor: ErnieProcessor, count: int, tasks: Iterable[str] = TASKS
) -> dict[str, tuple[int, int]]:
    """For each task the number of right replies and of questions; at most `count` questions a task.

    Tool calls have a second row: how many are well-formed, whatever they compute.
    """
    result = {}
    for task in tqdm(tasks, unit="task"):
        lessons = draw_lessons(task, count)
        replies = ask(model, processor, lessons)
        result[task] = (sum(map(is_right, lessons, replies)), len(lessons))
        if task == CALLS:
            result[CALLS + WELL_FORMED] = (sum(map(is_well_formed_call, lessons, replies)), len(lessons))
    return result


def example_of(task: str) -> str:
    """The first question of a task and its reply, in a line."""
    lesson = draw_lessons(task.removesuffix(WELL_FORMED), 1)[0]
    shown = []
    for message in lesson.messages:
        content = message["content"] or lesson.call or ""
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        shown += [
            part["text"] if part["type"] == "text" else f"[{part['type'].removesuffix('_url')}]" for part in parts
        ]
    prompt = " ".join(filter(None, shown))
    return f"`{prompt}` → `{lesson.reply.strip()}`".replace("\n", "⏎").replace("|", "\\|")


def markdown(accuracy: dict[str, tuple[int, int]]) -> str:
    """The table: task, share of right answers, number of questions, and an example."""
    lines = ["| task | right | held-out questions | for example |", "| --- | --- | --- | --- |"]
    for task, (right, count) in accuracy.items():
        lines.append(f"| {task} | {right / count:.3f} | {count} | {example_of(task)} |")
    return "\n".join(lines)


def side_by_side(accuracies: dict[str, dict[str, tuple[int, int]]]) -> str:
    """The table of several variants: one column each."""
    lines = [f"| task | questions | {' | '.join(accuracies)} |", "| --- " * (2 + len(accuracies)) + "|"]
    first = next(iter(accuracies.values()))
    for task, (_, count) in first.items():
        shares = " | ".join(f"{accuracy[task][0] / count:.3f}" for accuracy in accuracies.values())
        lines.append(f"| {task} | {count} | {shares} |")
    return "\n".join(lines)


def write_json(path: Path, accuracy: dict[str, tuple[int, int]]) -> None:
    """Writes the numbers; a JSON object that is there already (such as a training.json) gets them as "accuracy"."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content["accuracy"] = {
        task: {"right": right, "questions": count, "accuracy": round(right / count, 4)}
        for task, (right, count) in accuracy.items()
    }
    write_json_atomic(path, content)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Accuracy of the small model per task, on held-out questions.")
    parser.add_argument(
        "models", nargs="*", default=["ernie45-tiny"], help="checkpoint folders or names (ernie45-tiny)"
    )
    parser.add_argument("--questions", type=int, default=500, help="at most this many per task (500)")
    parser.add_argument("--task", action="append", choices=TASKS, help="only this task (repeatable; all)")
    parser.add_argument(
        "--variant", action="append", choices=VARIANTS, help="how the weights are held (repeatable; float32)"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers here, or add them to this training.json")
    options = parser.parse_args()
    tables = {}
    for name, variant in itertools.product(options.models, options.variant or ["float32"]):
        model = ErnieForConditionalGeneration.from_pretrained(name, **VARIANTS[variant])
        processor = ErnieProcessor.from_pretrained(name)
        label = (
            variant if len(options.models) == 1 else f"{Path(name).name} {variant if options.variant else ''}".strip()
        )
        tables[label] = measure_accuracy(model, processor, options.questions, options.task or TASKS)
    print(markdown(*tables.values()) if len(tables) == 1 else side_by_side(tables))
    if options.json:
        write_json(options.json, next(iter(tables.values())))


if __name__ == "__main__":
    main()
