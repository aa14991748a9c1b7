"""The examples that train run as their docstrings say, and learn; the three ways to train give the same losses."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import paddle
import pytest

from ernie45 import ErnieForCausalLM, ErnieTokenizer
from ernie45.cli import main
from ernie45.training.data import DataStream, Encoder
from tests.helpers.examples import run

STEPS, RATE, LENGTH, SEED = 12, 1e-3, 128, 3


def losses_of(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)", printed, re.MULTILINE)]


def test_preferences_are_learned_by_adapters_and_hold_for_other_questions(tmp_path: Path) -> None:
    printed = run("dpo.py", "--output", str(tmp_path / "adapters"))
    found = re.findall(r"accuracy ([\d.]+), margin (-?[\d.]+)", printed)
    (accuracy, margin), (later_accuracy, later_margin) = [tuple(map(float, pair)) for pair in found]
    assert (accuracy, margin) == (0, 0)  # the model and its adapter-free base are still the same
    assert later_accuracy == 1
    assert later_margin > 1
    losses = losses_of(printed)
    assert losses[-1] < 0.1 * losses[0]
    assert (tmp_path / "adapters" / "lora_config.json").exists()


@pytest.mark.parametrize("frozen", [(), ("vision_experts",)])
def test_a_model_that_reads_digits_learns_to_see_colours(frozen: tuple[str, ...], tmp_path: Path) -> None:
    output = tmp_path / "discs"
    printed = run("vl_sft.py", "--output", str(output), *(["--freeze", *frozen] if frozen else []))
    losses = losses_of(printed)
    assert losses[-1] < 0.1 * losses[0]
    answers = re.findall(r"^(\w+)  ->  (.*)$", printed, re.MULTILINE)
    assert len(answers) == 4
    assert sum(asked == answered for asked, answered in answers) >= 3  # sizes that it has not seen
    assert (output / "config.json").exists()


# The same run three ways: AdamW with a rate that falls to 0 on a line, decay of matrices only, and clipping.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    lines = [{"src": f"{a} and {b}?", "tgt": f"{a + b}, of course."} for a in range(6) for b in range(7)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plain_losses(data: Path) -> list[float]:
    """Of a loop that has nothing of this library but the model and the data."""
    tokenizer = ErnieTokenizer.from_pretrained("ernie45-tiny")
    model = ErnieForCausalLM.from_pretrained("ernie45-tiny", dtype="float32")
    model.train()
    matrices = {parameter.name for parameter in model.parameters() if parameter.ndim > 1}
    rate = paddle.optimizer.lr.LambdaDecay(RATE, lambda step: 1 - step / STEPS)
    optimizer = paddle.optimizer.AdamW(
        rate,
        beta2=0.95,
        parameters=model.parameters(),
        weight_decay=0.01,
        apply_decay_param_fun=matrices.__contains__,
        grad_clip=paddle.nn.ClipGradByGlobalNorm(1.0),
    )
    losses = []
    batches = DataStream([data], Encoder(tokenizer, max_length=LENGTH), seed=SEED)
    for _, batch in zip(range(STEPS), batches, strict=False):
        loss, _ = model(**batch.inputs())
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        rate.step()
        losses.append(float(loss))
    return losses


def test_the_command_gives_the_losses_of_the_plain_loop(data: Path, plain_losses: list[float], tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "model_name_or_path": "ernie45-tiny",
        "train_dataset_path": [str(data)],
        "output_dir": str(tmp_path / "run"),
        "max_steps": STEPS,
        "max_seq_len": LENGTH,
        "learning_rate": RATE,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "seed": SEED,
        "disable_tqdm": True,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    with open(tmp_path / "run" / "training.csv", encoding="utf-8", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses == pytest.approx(plain_losses, rel=1e-4)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.skipif(importlib.util.find_spec("paddlenlp") is None, reason="needs the extra paddlenlp")
def test_the_trainer_of_paddlenlp_gives_the_losses_of_the_plain_loop(
    data: Path, plain_losses: list[float], tmp_path: Path
) -> None:
    options = {"--data": data, "--steps": STEPS, "--rate": RATE, "--seed": SEED, "--output": tmp_path / "model"}
    losses = losses_of(run("finetune_trainer.py", *(str(word) for pair in options.items() for word in pair)))
    assert losses == pytest.approx(plain_losses, rel=1e-4)
    ErnieForCausalLM.from_pretrained(tmp_path / "model")
