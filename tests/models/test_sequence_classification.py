"""Sorting texts into classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie45 import lora
from ernie45.errors import CheckpointError, ConfigError, ErnieError
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.models.sequence_classification import ErnieForSequenceClassification
from ernie45.ops import custom
from tests.helpers.packed import save_source
from tests.helpers.tiny import (
    DENSE,
    MOE,
    difference,
    randomise,
    read_folder,
    same_bits,
    tiny_config,
    tiny_model,
    token_ids,
)
from tests.helpers.vision import write_vision_folder

NAMES = ["bad", "neutral", "good"]
UNTIED = {**DENSE, "tie_word_embeddings": False}


def classifier(keys: dict[str, Any] = MOE, **options: Any) -> ErnieForSequenceClassification:
    options = {"labels": NAMES, "initialize": False, **options}
    return randomise(ErnieForSequenceClassification(tiny_config(keys), **options), 0)


@paddle.no_grad()
def logits(model: ErnieForSequenceClassification, ids: Any, mask: Any = None) -> np.ndarray:
    return model(paddle.to_tensor(ids), None if mask is None else paddle.to_tensor(mask)).numpy()


# What it computes.


@pytest.mark.parametrize("keys", [DENSE, MOE, UNTIED], ids=["dense", "moe", "untied"])
def test_logits_are_the_score_of_the_last_hidden_state(keys: dict[str, Any]) -> None:
    model, ids = classifier(keys), token_ids(3, 7)
    with paddle.no_grad():
        expected = model.ernie(ids)[:, -1].numpy() @ model.score.weight.numpy()
    assert difference(logits(model, ids), expected) < 1e-5
    assert logits(model, ids).shape == (3, 3)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_the_last_real_token_counts_wherever_padding_is(side: str) -> None:
    model, ids = classifier(), token_ids(3, 6).numpy()
    lengths, width = (6, 4, 1), 8
    rows, mask = np.zeros((3, width), "int64"), np.zeros((3, width), "int64")
    for row, length in enumerate(lengths):
        first = {"left": width - length, "right": 0, "both": (width - length) // 2}[side]
        rows[row, first : first + length] = ids[row, :length]
        mask[row, first : first + length] = 1
    alone = [logits(model, ids[row : row + 1, :length])[0] for row, length in enumerate(lengths)]
    assert difference(logits(model, rows, mask), np.stack(alone)) < 1e-5


def test_the_loss_is_the_mean_cross_entropy() -> None:
    model, ids = classifier(), token_ids(4, 5)
    labels = np.array([2, 0, 1, 1])
    loss, found = model(ids, labels=paddle.to_tensor(labels))
    rows = found.numpy().astype("float64")
    expected = np.mean(np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(4), labels])
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [0, 1, 2]}, r"labels: expected \[2\], one for each text, found \[3\]"),
        ({"labels": [0, 3]}, "labels: found 0 to 3, expected 0 to 2"),
        ({"labels": [-100, 1]}, "labels: found -100 to 1"),
        ({"attention_mask": [[1, 1, 0, 0], [0, 0, 0, 0]]}, "a row has no token that is not padding"),
        ({"attention_mask": [[1, 1], [1, 1]]}, r"attention_mask: expected \[2, 4\]"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ErnieError, match=message):
        classifier()(token_ids(2, 4), **{name: paddle.to_tensor(value) for name, value in arguments.items()})


def test_it_generates_nothing() -> None:
    model = classifier()
    for use in (model.generate, model.stream, model.lm_head):
        with pytest.raises(ErnieError, match="load it with ErnieForCausalLM"):
            use(token_ids(1, 3))


# Training.


def learned(model: ErnieForSequenceClassification) -> set[str]:
    model(token_ids(4, 9), labels=paddle.to_tensor([0, 1, 2, 1]))[0].backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_only_the_last_layers_without_experts_are_trained() -> None:
    model = classifier()
    count = model.train_last(1)
    found = learned(model)
    assert len(found) == count
    assert found == {
        "score.weight",
        "ernie.norm.weight",
        *(f"ernie.layers.2.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")),
        *(f"ernie.layers.2.self_attn.{name}.weight" for name in ("qkv_proj", "o_proj")),
        *(f"ernie.layers.2.mlp.shared_experts.{name}.weight" for name in ("up_gate_proj", "down_proj")),
    }


def test_experts_of_the_last_layers_are_trained_if_asked_for() -> None:
    model = classifier()
    without = model.train_last(2)
    assert model.train_last(2, experts=True) == without + 2 * 3
    assert {"ernie.layers.1.mlp.gate.weight", "ernie.layers.1.mlp.experts.0.down_proj"} < learned(model)


def test_train_last_of_no_layer_and_of_too_many() -> None:
    model = classifier()
    model.train_last(0)
    assert learned(model) == {"score.weight", "ernie.norm.weight"}
    with pytest.raises(ErnieError, match="4 layers, but the model has 3"):
        model.train_last()


def toy_task(seed: int, rows: int = 32, length: int = 6) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Whether token 7 occurs in a text."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(10, 60, (rows, length))
    labels = generator.integers(0, 2, rows)
    ids[labels == 1, generator.integers(0, length, (labels == 1).sum())] = 7
    return paddle.to_tensor(ids), paddle.to_tensor(labels)


def test_it_learns_a_toy_task_in_thirty_steps() -> None:
    model = ErnieForSequenceClassification(tiny_config(DENSE), labels=2)
    model.train()
    optimizer = paddle.optimizer.AdamW(1e-2, parameters=model.parameters())
    for step in range(30):
        ids, labels = toy_task(step)
        loss, _ = model(ids, labels=labels)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
    ids, labels = toy_task(1000, rows=200)
    assert (logits(model.eval(), ids).argmax(axis=1) == labels.numpy()).mean() > 0.9


def test_adapters_beside_it_train_with_the_head() -> None:
    model = classifier()
    lora.apply(model, rank=2)
    model.score.weight.stop_gradient = False
    assert {"score.weight", "ernie.layers.0.self_attn.qkv_proj.lora_B"} < learned(model)
    assert not any(name.startswith("score") for name in lora.adapters.of(model).adapters[0].place.modules)


# Checkpoints.


@pytest.mark.parametrize("layout", ["paddle", "pt"])
@pytest.mark.parametrize("keys", [DENSE, MOE, UNTIED], ids=["dense", "moe", "untied"])
def test_there_and_back(keys: dict[str, Any], layout: str, tmp_path: Path) -> None:
    model, ids = classifier(keys), token_ids(2, 5)
    model.save_pretrained(tmp_path, layout=layout, progress=False)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_labels"] == 3 and config["id2label"] == {"0": "bad", "1": "neutral", "2": "good"}
    stored = read_folder(tmp_path)
    assert stored["score.weight"][1].shape == ((24, 3) if layout == "paddle" else (3, 24))
    assert not any(name.startswith("lm_head") for name in stored)
    again = ErnieForSequenceClassification.from_pretrained(tmp_path, progress=False)
    assert again.labels == NAMES
    np.testing.assert_array_equal(logits(again, ids), logits(model, ids))


def test_the_names_of_the_base_are_kept(tmp_path: Path) -> None:
    base = tiny_model(tiny_config(MOE))
    base.save_pretrained(tmp_path / "base", progress=False)
    model = ErnieForSequenceClassification.from_pretrained(tmp_path / "base", labels=2, progress=False)
    model.save_pretrained(tmp_path / "classes", progress=False)
    stored, expected = (read_folder(tmp_path / name) for name in ("classes", "base"))
    assert stored.pop("score.weight")[0] == "F32"
    expected.pop("lm_head.weight")
    assert same_bits(stored, expected)


def test_a_base_gets_a_new_random_head(tmp_path: Path) -> None:
    tiny_model(tiny_config(DENSE)).save_pretrained(tmp_path, progress=False)
    first, second = (
        ErnieForSequenceClassification.from_pretrained(tmp_path, labels=NAMES, progress=False) for _ in range(2)
    )
    assert first.labels == NAMES and first.score.weight.shape == [24, 3]
    assert difference(first.score.weight, second.score.weight) > 0.01
    assert not first.score.weight.stop_gradient
    with pytest.raises(ErnieError, match="has no classes; give their number or names"):
        ErnieForSequenceClassification.from_pretrained(tmp_path, progress=False)


def test_the_text_part_of_a_vision_language_checkpoint(tmp_path: Path) -> None:
    folder = write_vision_folder(tmp_path)
    model = ErnieForSequenceClassification.from_pretrained(folder, labels=2, dtype="float32", progress=False)
    text = ErnieForCausalLM.from_pretrained(folder, dtype="float32", progress=False)
    with paddle.no_grad():
        expected = text.ernie(token_ids(2, 5))[:, -1].numpy() @ model.score.weight.numpy()
    assert difference(logits(model, token_ids(2, 5)), expected) < 1e-5


@pytest.mark.skipif(custom.library() is None, reason="no native library here")
def test_of_packed_weights_the_head_is_trained(tmp_path: Path) -> None:
    model = ErnieForSequenceClassification.from_pretrained(
        save_source(tmp_path / "base", MOE), labels=3, quantization="wint4", progress=False
    )
    assert model.ernie.fused is not None
    model.train()
    assert learned(model) == {"score.weight"}
    model.save_pretrained(tmp_path / "classes", progress=False)
    again = ErnieForSequenceClassification.from_pretrained(tmp_path / "classes", progress=False)
    np.testing.assert_array_equal(logits(again, token_ids(2, 5)), logits(model, token_ids(2, 5)))


def test_other_labels_than_those_of_the_checkpoint(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path, progress=False)
    for labels in (3, NAMES):
        assert ErnieForSequenceClassification.from_pretrained(tmp_path, labels=labels, progress=False).labels == NAMES
    with pytest.raises(ErnieError, match="has the classes .*'bad'.*; for others call set_labels"):
        ErnieForSequenceClassification.from_pretrained(tmp_path, labels=["yes", "no"], progress=False)
    model = ErnieForSequenceClassification.from_pretrained(tmp_path, progress=False)
    model.set_labels(["yes", "no"])
    assert logits(model, token_ids(1, 3)).shape == (1, 2)
    with pytest.raises(ErnieError, match="expected a number of classes from 2 on"):
        model.set_labels(["yes", "yes"])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_labels": 1}, "num_labels is 1, expected a number from 2"),
        ({"num_labels": "3"}, "num_labels is '3'"),
        ({"id2label": {"0": "a", "1": "b"}}, "id2label does not name the classes 0 to 2"),
        ({"id2label": ["a", "b", "c"]}, "id2label does not name the classes 0 to 2"),
    ],
    ids=str,
)
def test_broken_entries_of_the_config(entries: dict[str, Any], message: str, tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path, progress=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | entries))
    with pytest.raises(ConfigError, match=message):
        ErnieForSequenceClassification.from_pretrained(tmp_path, progress=False)


def test_a_checkpoint_without_the_head_that_its_config_announces(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path, progress=False)
    config = json.loads((tmp_path / "config.json").read_text())
    tiny_model(tiny_config(MOE)).save_pretrained(tmp_path, progress=False)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"score.weight: missing, expected shape \[24, 3\]"):
        ErnieForSequenceClassification.from_pretrained(tmp_path, progress=False)


def test_without_labels_there_is_no_head() -> None:
    model = ErnieForSequenceClassification(tiny_config(DENSE))
    with pytest.raises(ErnieError, match="this model has no classes yet"):
        model(token_ids(1, 3))
    model.set_labels(5)
    assert model.labels[4] == "LABEL_4" and logits(model, token_ids(1, 3)).shape == (1, 5)
