"""`ernie45 train`: from a recipe to a checkpoint."""

import argparse
import csv
import json

import numpy as np
import paddle
import pytest
from PIL import Image

from ernie45 import ErnieForCausalLM, ErnieForConditionalGeneration, ErnieTokenizer, lora
from ernie45.errors import ErnieError
from ernie45.training.checkpoints import pointed
from ernie45.training.command import add_options, build_trainer, run
from ernie45.training.data import DataStream, Encoder
from ernie45.training.recipe import Recipe
from tests.helpers.vision import write_vision_folder

QUESTIONS = [{"src": f"{a}+{b}=?", "tgt": f"{a + b}"} for a in range(3) for b in range(4)]
PAIRS = [
    {"src": [line["src"]], "tgt": [], "response": [[line["tgt"]], ["no idea"]], "sort": [1, 0]} for line in QUESTIONS
]


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def write_recipe(folder, **changes):
    keys = {
        "model_name_or_path": "ernie45-tiny",
        "train_dataset_path": [write_lines(folder / "train.jsonl", QUESTIONS)],
        "output_dir": str(folder / "run"),
        "max_steps": 3,
        "max_seq_len": 64,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
        "save_steps": 2,
    }
    (folder / "recipe.yaml").write_text(json.dumps({**keys, **changes}), encoding="utf-8")  # JSON is YAML
    return str(folder / "recipe.yaml")


def train(*arguments):
    parser = argparse.ArgumentParser()
    add_options(parser)
    run(parser.parse_args(arguments))


def rows(folder):
    with (folder / "training.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_result_is_a_checkpoint_with_its_tokenizer(tmp_path, capsys):
    train(write_recipe(tmp_path), "--set", "max_steps=4", "--set", "learning_rate=5e-4")
    assert "checkpoint-4" in capsys.readouterr().out
    checkpoint = pointed(tmp_path / "run")
    model = ErnieForCausalLM.from_pretrained(checkpoint, dtype="float32", progress=False)
    prompt = ErnieTokenizer.from_pretrained(checkpoint).apply_chat_template([{"role": "user", "content": "1+1=?"}])
    assert model.generate(prompt, max_new_tokens=2)[0].shape == [1, 2]
    assert [row["step"] for row in rows(tmp_path / "run")] == ["1", "2", "3", "4"]


def test_the_same_losses_as_a_plain_loop(tmp_path):
    epsilon = 1e-3  # with a tiny one, Adam's first step is the sign of gradients that are only rounding
    fixed = {"weight_decay": 0, "max_grad_norm": 0, "lr_scheduler_type": "constant", "adam_epsilon": epsilon}
    path = write_recipe(tmp_path, learning_rate=1e-3, seed=7, **fixed)
    train(path)
    recipe = Recipe.from_yaml(path)
    model = ErnieForCausalLM.from_pretrained("ernie45-tiny", dtype="float32")
    model.train()
    encoder = Encoder(ErnieTokenizer.from_pretrained("ernie45-tiny"), max_length=recipe.max_seq_len)
    optimizer = paddle.optimizer.AdamW(
        recipe.learning_rate, 0.9, 0.95, epsilon, parameters=model.parameters(), weight_decay=0.0
    )
    plain = []
    for _, batch in zip(range(3), DataStream(recipe.train_dataset_path, encoder, seed=7), strict=False):
        loss, _ = model(**batch.inputs())
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        plain.append(float(loss))
    assert [float(row["loss"]) for row in rows(tmp_path / "run")] == pytest.approx(plain, rel=1e-5)


def test_resumes(tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for folder in (whole, torn):
        folder.mkdir()
    train(write_recipe(whole, lr_scheduler_type="constant"))
    path = write_recipe(torn, lr_scheduler_type="constant")
    train(path, "--set", "max_steps=2")
    train(path, "--resume")
    assert [row["loss"] for row in rows(torn / "run")] == [row["loss"] for row in rows(whole / "run")]


def test_bfloat16_with_masters(tmp_path):
    train(write_recipe(tmp_path, compute_type="bf16", gradient_accumulation_steps=2))
    assert json.loads((pointed(tmp_path / "run") / "config.json").read_text())["dtype"] == "bfloat16"
    losses = [float(row["loss"]) for row in rows(tmp_path / "run")]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("compute_type", ["float32", "bf16", "wint4"])
def test_adapters(tmp_path, compute_type):
    changes = {"fine_tuning": "LoRA", "compute_type": compute_type, "max_steps": 12, "learning_rate": 0.01}
    train(write_recipe(tmp_path, **changes, save_steps=100))
    losses = [float(row["loss"]) for row in rows(tmp_path / "run")]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    model = ErnieForCausalLM.from_pretrained("ernie45-tiny", dtype="float32")
    assert lora.load(model, pointed(tmp_path / "run"))


@pytest.mark.parametrize("fine_tuning", ["Full", "LoRA"])
def test_preferences(tmp_path, fine_tuning):
    pairs = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    path = write_recipe(
        tmp_path, stage="DPO", train_dataset_path=pairs, fine_tuning=fine_tuning, max_steps=6, max_seq_len=128
    )
    train(path)
    found = rows(tmp_path / "run")
    assert float(found[0]["loss"]) == pytest.approx(np.log(2), rel=1e-5)  # policy and reference are still the same
    assert float(found[-1]["loss"]) < float(found[0]["loss"])
    assert float(found[-1]["margin"]) > 0


@pytest.mark.parametrize("fine_tuning", ["Full", "LoRA"])
def test_pictures_with_the_tower_frozen(tmp_path, fine_tuning):
    model = write_vision_folder(tmp_path / "model")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, [56, 56, 3]).astype("uint8")).save(tmp_path / "p.png")
    lines = [
        {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "9"}],
         "images": ["p.png"]},
        {"messages": [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}]},
    ]  # fmt: skip
    data = write_lines(tmp_path / "vl.jsonl", lines)
    path = write_recipe(
        tmp_path,
        stage="VL-SFT",
        model_name_or_path=str(model),
        train_dataset_path=data,
        fine_tuning=fine_tuning,
        freeze=["vision"],
        max_seq_len=512,
        recompute=True,
    )
    train(path)
    checkpoint = pointed(tmp_path / "run")
    before = ErnieForConditionalGeneration.from_pretrained(model)
    if fine_tuning == "LoRA":
        assert lora.load(before, checkpoint)
        return
    after = ErnieForConditionalGeneration.from_pretrained(checkpoint)
    name = "vision_model.patch_embed.proj.weight"
    np.testing.assert_array_equal(before.state_dict()[name].numpy(), after.state_dict()[name].numpy())
    name = "ernie.resampler_model.mlp.weight"
    assert np.abs(before.state_dict()[name].numpy() - after.state_dict()[name].numpy()).max() > 0


def test_missing_data_is_said_before_anything_is_loaded(tmp_path):
    with pytest.raises(ErnieError, match="train_dataset_path: nowhere.jsonl: no such file"):
        train(write_recipe(tmp_path, train_dataset_path="nowhere.jsonl", model_name_or_path="nowhere"))


def test_evaluation_reads_every_line_in_order(tmp_path):
    path = write_recipe(tmp_path, eval_dataset_path=[write_lines(tmp_path / "eval.jsonl", QUESTIONS[:5])])
    trainer = build_trainer(Recipe.from_yaml(path))
    learned = [sum(batch.learned for batch in trainer.evaluation()) for _ in range(2)]
    assert learned[0] == learned[1] > 0
    assert trainer.evaluate() == trainer.evaluate()
