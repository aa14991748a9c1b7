"""Measures the small model on held-out questions: one row per task, in Markdown.

    python tools/tiny_accuracy.py build/tiny
    python tools/tiny_accuracy.py ernie45-tiny --questions 1000 --json accuracy.json
    python tools/tiny_accuracy.py ernie45-tiny --variant float32 --variant wint8 --variant wint4    # side by side

Every question is the only user message of a conversation in the model's chat template, and greedy decoding answers
it. A reply counts if the answer is all that it says after its steps. The questions are the same for every model.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import paddle
from tqdm import tqdm

from ernie45 import ErnieForCausalLM, ErnieTokenizer
from ernie45.bench.contenders import VARIANTS
from ernie45.checkpoint.writer import write_json_atomic

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from tiny_tasks import TASK_NAMES, Question, check, sample

QUESTION_SEED = 20250630
LONGEST_REPLY = 64  # tokens


def draw_questions(task: str, count: int, split: str = "heldout") -> list[Question]:
    """The first `count` different questions of a task."""
    rng = random.Random(f"{QUESTION_SEED} {task}")
    questions: dict[str, Question] = {}
    for _ in range(50 * count):  # a task with few operands has fewer questions than asked for
        question = sample(rng, task, split)
        questions.setdefault(question.prompt, question)
        if len(questions) == count:
            break
    return list(questions.values())


def batches_of_equal_length(prompts: Sequence[list[int]], most: int) -> Iterator[list[int]]:
    """Indices of prompts, grouped so that a batch needs no padding."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    for indices in by_length.values():
        for first in range(0, len(indices), most):
            yield indices[first : first + most]


def ask(
    model: ErnieForCausalLM, tokenizer: ErnieTokenizer, questions: Sequence[Question], batch_size: int = 128
) -> list[str]:
    """The model's greedy replies, in the order of the questions."""
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": q.prompt}]) for q in questions]
    replies = [""] * len(questions)
    for indices in batches_of_equal_length(prompts, batch_size):
        input_ids = paddle.to_tensor([prompts[index] for index in indices], dtype="int64")
        ids, _ = model.generate(input_ids, max_new_tokens=LONGEST_REPLY, do_sample=False)
        for index, row in zip(indices, ids.tolist(), strict=True):
            replies[index] = tokenizer.decode(row, skip_special_tokens=True)
    return replies


def measure_accuracy(
    model: ErnieForCausalLM, tokenizer: ErnieTokenizer, count: int, tasks: Iterable[str] = TASK_NAMES
) -> dict[str, tuple[int, int]]:
    """For each task the number of right replies and of questions; at most `count` questions a task."""
    result = {}
    for task in tqdm(tasks, unit="task"):
        questions = draw_questions(task, count)
        replies = ask(model, tokenizer, questions)
        result[task] = (sum(map(check, questions, replies)), len(questions))
    return result


def markdown(accuracy: dict[str, tuple[int, int]]) -> str:
    """The table: task, share of right answers, number of questions, and an example."""
    lines = ["| task | right | held-out questions | for example |", "| --- | --- | --- | --- |"]
    for task, (right, count) in accuracy.items():
        example = draw_questions(task, 1)[0]
        lines.append(f"| {task} | {right / count:.3f} | {count} | `{example.prompt}` → `{example.reply}` |")
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Accuracy of the small model per task, on held-out questions.")
    parser.add_argument("model", nargs="?", default="ernie45-tiny", help="checkpoint folder or name (ernie45-tiny)")
    parser.add_argument("--questions", type=int, default=500, help="at most this many per task (500)")
    parser.add_argument(
        "--variant", action="append", choices=VARIANTS, help="how the weights are held (repeatable; float32)"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers here, or add them to this training.json")
    arguments = parser.parse_args()
    tables = {
        variant: measure_accuracy(
            ErnieForCausalLM.from_pretrained(arguments.model, **VARIANTS[variant]),
            ErnieTokenizer.from_pretrained(arguments.model),
            arguments.questions,
        )
        for variant in arguments.variant or ["float32"]
    }
    print(markdown(*tables.values()) if len(tables) == 1 else side_by_side(tables))
    if arguments.json:
        write_json(arguments.json, next(iter(tables.values())))
