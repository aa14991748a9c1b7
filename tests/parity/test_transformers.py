"""Twenty drawn architectures against transformers, in both directions and both layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie45.checkpoint.convert import convert_checkpoint
from ernie45.models.causal_lm import ErnieForCausalLM
from tests.helpers import peers
from tests.helpers.peers import EXPERTS, relative_error
from tests.helpers.peers_text import build, draw
from tests.helpers.tiny import greedy, read_folder, same_bits, tiny_config, tiny_model

pytestmark = peers.parity

STEPS = 24
TOLERANCE = 1e-4  # relative to the largest logit

seeds = pytest.mark.parametrize("seed", range(20))


def test_the_draw_covers_what_it_should() -> None:
    drawn = [draw(seed) for seed in range(20)]
    mixtures = [keys for keys in drawn if "moe_num_experts" in keys]
    assert any(keys["num_attention_heads"] == keys["num_key_value_heads"] for keys in drawn)
    assert any(keys["num_attention_heads"] != keys["num_key_value_heads"] for keys in drawn)
    assert any(keys["head_dim"] != keys["hidden_size"] // keys["num_attention_heads"] for keys in drawn)
    assert {keys["tie_word_embeddings"] for keys in mixtures} == {True, False}
    assert {keys["moe_num_shared_experts"] for keys in mixtures} == {0, 1, 2}
    assert {keys["moe_layer_start_index"] for keys in mixtures} == {0, 1}
    assert {keys["moe_layer_interval"] for keys in mixtures} == {1, 2}
    assert any(0 <= keys["moe_layer_end_index"] < keys["num_hidden_layers"] - 1 for keys in mixtures)


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def continuation_of(model: Any, ids: np.ndarray) -> tuple[np.ndarray, int]:
    import torch

    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.ones(ids.shape, dtype=torch.int64)}
    return peers.continuation_of(model, inputs, STEPS)


@seeds
def test_reads_what_transformers_writes(seed: int, tmp_path: Path) -> None:
    keys = draw(seed)
    theirs = build(keys, seed)
    theirs.save_pretrained(tmp_path / "pt")
    convert_checkpoint(tmp_path / "pt", tmp_path / "paddle", layout="paddle", progress=False)
    ids = np.random.default_rng(seed).integers(3, keys["vocab_size"], (2, 17))
    expected, (continuation, certain) = logits_of(theirs, ids), continuation_of(theirs, ids[:1])
    assert certain >= STEPS // 2, "too few steps to compare; draw another seed"
    for layout in ("pt", "paddle"):
        ours = ErnieForCausalLM.from_pretrained(tmp_path / layout, dtype="float32", progress=False)
        with paddle.no_grad():
            assert relative_error(ours(paddle.to_tensor(ids)), expected) < TOLERANCE
        found = greedy(ours, ids[:1], STEPS)
        assert found[:, :certain].tolist() == continuation[:, :certain].tolist()


@seeds
def test_transformers_reads_what_we_write(seed: int, tmp_path: Path) -> None:
    import torch
    import transformers

    keys = draw(seed)
    ours = tiny_model(tiny_config(keys, moe_use_aux_free="moe_num_experts" in keys), seed)
    ours.save_pretrained(tmp_path / "direct", layout="pt", progress=False)
    ours.save_pretrained(tmp_path / "paddle", layout="paddle", progress=False)
    convert_checkpoint(tmp_path / "paddle", tmp_path / "converted", layout="pt", progress=False)
    assert same_bits(read_folder(tmp_path / "direct"), read_folder(tmp_path / "converted"))
    ids = np.random.default_rng(seed).integers(3, keys["vocab_size"], (2, 17))
    for folder in ("direct", "converted"):
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, dtype=torch.float32, experts_implementation=EXPERTS, output_loading_info=True
        )
        assert not any(report.values()), report
        with paddle.no_grad():
            assert relative_error(ours(paddle.to_tensor(ids)), logits_of(theirs, ids)) < TOLERANCE
