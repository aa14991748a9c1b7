"""Twelve drawn vision-language architectures against transformers, in both directions and both layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie45.checkpoint.convert import convert_checkpoint
from ernie45.config import ErnieConfig
from ernie45.models.vision_language import ErnieForConditionalGeneration
from tests.helpers import peers
from tests.helpers.peers import EXPERTS, relative_error
from tests.helpers.peers_vision import (
    PROMPTS,
    TEXT_IDS,
    VIDEO_END,
    VOCABULARY,
    Batch,
    batch_of,
    draw,
    is_moe_layer,
    normalised,
    their_config,
)
from tests.helpers.tiny import randomise, read_folder, same_bits

pytestmark = peers.parity

STEPS = 12
TOLERANCE = 1e-4  # relative to the largest value
DECODED = ("text", "pictures", "video", "mixed", "padded")

seeds = pytest.mark.parametrize("seed", range(12))


def test_the_draw_covers_what_it_should() -> None:
    drawn = [draw(seed) for seed in range(12)]
    towers = [keys["vision_config"] for keys in drawn]
    assert {keys["tie_word_embeddings"] for keys in drawn} == {True, False}
    assert {keys["moe_num_shared_experts"] for keys in drawn} == {0, 1, 2}
    assert {keys["moe_layer_start_index"][0] for keys in drawn} == {0, 1}
    assert {keys["moe_layer_interval"] for keys in drawn} == {1, 2}
    assert {keys["moe_k"] for keys in drawn} == {1, 2, 3}
    assert all(any(is_moe_layer(keys, layer) for layer in range(keys["num_hidden_layers"])) for keys in drawn)
    assert len({(keys["head_dim"], keys["freq_allocation"]) for keys in drawn}) >= 4
    assert len({(tower["num_heads"], tower["embed_dim"]) for tower in towers}) >= 3
    assert {tower["depth"] for tower in towers} == {1, 2, 3}
    assert {tower["mlp_ratio"] for tower in towers} == {2, 3, 4}


def their_logits(model: Any, batch: Batch) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(**batch.theirs()).logits.numpy()


def logits_error(ours: ErnieForConditionalGeneration, theirs: Any, batch: Batch) -> float:
    real = batch.mask == 1
    with paddle.no_grad():
        return relative_error(ours(**batch.ours()).numpy()[real], their_logits(theirs, batch)[real])


def encoder_errors(ours: ErnieForConditionalGeneration, theirs: Any, batch: Batch) -> tuple[float, float]:
    """Of the vision tower, and of the adapter given the same vectors."""
    import torch

    patches, grid = batch.patches, batch.grid
    with torch.no_grad(), paddle.no_grad():
        expected = theirs.model.vision_tower(torch.from_numpy(normalised(patches)), torch.from_numpy(grid))[0]
        found = ours.vision_model(paddle.to_tensor(patches), grid)
        features = theirs.model.resampler_model(expected, torch.from_numpy(grid)).numpy()
        adapted = ours.adapter(paddle.to_tensor(expected.numpy()), grid)
    return relative_error(found, expected.numpy()), relative_error(adapted, features)


@seeds
def test_reads_what_transformers_writes(seed: int, tmp_path: Path) -> None:
    keys = draw(seed)
    theirs = peers.build("Ernie4_5_VLMoeForConditionalGeneration", their_config(keys), seed)
    theirs.save_pretrained(tmp_path / "pt")
    (tmp_path / "pt" / "config.json").write_text(json.dumps(keys), encoding="utf-8")
    convert_checkpoint(tmp_path / "pt", tmp_path / "paddle", layout="paddle", progress=False)
    for layout in ("pt", "paddle"):
        ours = ErnieForConditionalGeneration.from_pretrained(tmp_path / layout, dtype="float32", progress=False)
        for name in PROMPTS:
            batch = batch_of(name, ours.config, seed)
            assert logits_error(ours, theirs, batch) < TOLERANCE, (layout, name)
            if len(batch.grid):
                assert max(encoder_errors(ours, theirs, batch)) < TOLERANCE, (layout, name)


@seeds
def test_transformers_reads_what_we_write(seed: int, tmp_path: Path) -> None:
    import torch
    import transformers

    keys = draw(seed)
    ours = randomise(ErnieForConditionalGeneration(ErnieConfig.from_dict(keys), initialize=False), seed).eval()
    ours.save_pretrained(tmp_path / "direct", layout="pt", progress=False)
    ours.save_pretrained(tmp_path / "paddle", layout="paddle", progress=False)
    convert_checkpoint(tmp_path / "paddle", tmp_path / "converted", layout="pt", progress=False)
    assert same_bits(read_folder(tmp_path / "direct"), read_folder(tmp_path / "converted"))
    theirs, report = transformers.Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
        tmp_path / "direct",
        config=their_config(keys),
        dtype=torch.float32,
        experts_implementation=EXPERTS,
        output_loading_info=True,
    )
    assert not any(report.values()), report
    for name in PROMPTS:
        assert logits_error(ours, theirs, batch_of(name, ours.config, seed)) < TOLERANCE, name


@seeds
def test_greedy_tokens(seed: int, tmp_path: Path) -> None:
    keys = draw(seed)
    theirs = peers.build("Ernie4_5_VLMoeForConditionalGeneration", their_config(keys), seed)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(keys), encoding="utf-8")
    ours = ErnieForConditionalGeneration.from_pretrained(tmp_path, dtype="float32", progress=False)
    compared = 0
    for name in DECODED:
        batch = batch_of(name, ours.config, seed)
        assert batch.positions_agree, "generate() of transformers takes no other positions than its own"
        suppressed = list(range(TEXT_IDS, VOCABULARY))
        expected, certain = peers.continuation_of(theirs, batch.theirs(), STEPS, suppress_tokens=suppressed)
        found = ours.generate(**batch.ours(), max_new_tokens=STEPS, vocab_size=TEXT_IDS, eos_token_id=[]).ids
        assert found[:, :certain].tolist() == expected[:, :certain].tolist(), name
        compared += certain
    assert compared >= len(DECODED) * STEPS // 2, "too few steps to compare; draw another seed"


def test_positions_differ_only_after_long_videos() -> None:
    import transformers

    keys = draw(0)
    theirs = transformers.Ernie4_5_VLMoeForConditionalGeneration(their_config(keys))
    config = ErnieConfig.from_dict(keys)
    for name in PROMPTS:
        batch = batch_of(name, config, 0)
        if not len(batch.grid):
            continue
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
        inputs = {key: value for key, value in batch.theirs().items() if key in names}
        own = theirs.model.get_rope_index(**inputs)[0].numpy().transpose(1, 2, 0)
        behind = np.zeros(own.shape, "int64")
        if name == "long_video":  # four pairs of frames, but text goes on after the two columns
            end = batch.rows[0].ids.index(VIDEO_END)
            behind[:, end:] = 4 - 2
        assert (batch.positions() - own == behind).all(), name
