"""Bytes and operations per token, counted by hand for small architectures."""

from __future__ import annotations

from pathlib import Path

import pytest

from ernie45.bench.limits import (
    STORAGES,
    bytes_per_token,
    operations_per_token,
    operations_per_vision_token,
    picture_operations,
    picture_tokens,
)
from ernie45.config import ErnieConfig
from tests.helpers.tiny import DENSE, MOE
from tests.helpers.vision import vision_config

CONFIGS = Path(__file__).parents[2] / "configs"

# Per layer of DENSE: Q, K, V and O of 4 heads and 2 groups of 8, and an MLP of 40; inputs first.
ATTENTION = ((24, 64), (32, 24))
DENSE_LAYER = (*ATTENTION, (24, 80), (40, 24))
NORMS = 2 * 24


def weights(shapes: tuple[tuple[int, int], ...]) -> int:
    return sum(inputs * outputs for inputs, outputs in shapes)


def outputs(shapes: tuple[tuple[int, int], ...]) -> int:
    return sum(width for _, width in shapes)


@pytest.mark.parametrize(
    ("storage", "linear", "vocabulary"),
    [
        ("float32", 4 * weights(DENSE_LAYER), 4 * 61 * 24),
        ("bfloat16", 2 * weights(DENSE_LAYER), 2 * 61 * 24),
        ("wint8", weights(DENSE_LAYER) + 4 * outputs(DENSE_LAYER), 61 * 24 + 4 * 61),
        ("wint4", 0.53125 * weights(DENSE_LAYER), 61 * 24 + 4 * 61),
        ("Q8_0", 1.0625 * weights(DENSE_LAYER), 1.0625 * 61 * 24),
        ("Q4_0", 0.5625 * weights(DENSE_LAYER), 0.8203125 * 61 * 24),
    ],
)
def test_every_weight_is_read_once_and_a_tied_embedding_as_the_head(
    storage: str, linear: float, vocabulary: float
) -> None:
    expected = 2 * (linear + 4 * NORMS) + 4 * 24 + vocabulary
    assert bytes_per_token(ErnieConfig.from_dict(DENSE), STORAGES[storage]) == pytest.approx(expected)


def test_only_chosen_experts_and_one_row_of_an_untied_embedding_are_read() -> None:
    shared, chosen = weights(((24, 40), (20, 24))), 2 * weights(((24, 20), (10, 24)))
    moe_layer = 2 * (weights(ATTENTION) + shared + chosen) + 4 * (NORMS + 24 * 6 + 6)
    expected = 2 * weights(DENSE_LAYER) + 4 * NORMS + 2 * moe_layer + 4 * 24 + 2 * 24 + 2 * 24 * 61
    assert bytes_per_token(ErnieConfig.from_dict(MOE), STORAGES["bfloat16"]) == pytest.approx(expected)


def test_operations_leave_out_the_head_and_experts_that_are_not_chosen() -> None:
    assert operations_per_token(ErnieConfig.from_dict(DENSE)) == 2 * 2 * weights(DENSE_LAYER)
    shared, chosen, router = weights(((24, 40), (20, 24))), 2 * weights(((24, 20), (10, 24))), 24 * 6
    moe_layer = weights(ATTENTION) + shared + chosen + router
    assert operations_per_token(ErnieConfig.from_dict(MOE)) == pytest.approx(
        2 * (weights(DENSE_LAYER) + 2 * moe_layer), abs=2 * 2 * 6
    )


def test_the_published_sizes() -> None:
    small = ErnieConfig.from_pretrained(CONFIGS / "ernie-4.5-0.3b.json")
    assert bytes_per_token(small, STORAGES["bfloat16"]) == pytest.approx(2 * 361e6, rel=0.01)
    large = ErnieConfig.from_pretrained(CONFIGS / "ernie-4.5-21b-a3b.json")
    assert operations_per_token(large) == pytest.approx(2 * 3e9, rel=0.15)


def test_a_picture_by_hand() -> None:
    # 112 x 56 pixels are 8 x 4 patches and 8 tokens. Two blocks of width 32 with an MLP of 64; adapter of width 128.
    config = vision_config()
    tower = 32 * (2 * 588 * 32 + 2 * (2 * 32 * (3 * 32 + 32 + 64 + 64) + 2 * 2 * 32 * 32))
    adapter = 2 * 8 * (128 * 128 + 128 * 128 + 256 * 128 + 128 * 128 + 128 * 32)
    assert picture_operations(config, 1, 56, 112) == tower + adapter
    assert config.vision is not None
    assert picture_tokens(config.vision, 1, 56, 112) == 8


def test_frames_of_a_video_see_only_themselves_and_pairs_share_tokens() -> None:
    config = vision_config()
    frame = 32 * (2 * 588 * 32 + 2 * (2 * 32 * (3 * 32 + 32 + 64 + 64) + 2 * 2 * 32 * 32))
    spatial, rest = 128 * 128 + 128 * 128, 256 * 128 + 128 * 128 + 128 * 32
    assert picture_operations(config, 6, 56, 112) == 6 * frame + 2 * (6 * 8 * spatial + 3 * 8 * rest)
    assert config.vision is not None
    assert picture_tokens(config.vision, 6, 56, 112) == 3 * 8


def test_the_published_tower() -> None:
    config = ErnieConfig.from_pretrained(CONFIGS / "ernie-4.5-vl-28b-a3b.json")
    blocks = 32 * (2 * (4 * 1280**2 + 2 * 1280 * 5120) + 4 * 1280 * 12288)
    assert picture_operations(config, 1, 1344, 1792) == pytest.approx(12288 * blocks, rel=0.03)


def test_text_of_a_vision_language_model_costs_what_its_text_part_costs() -> None:
    config = vision_config()
    for storage in STORAGES.values():
        # the correction bias of the other bank is in the same tensor
        other_bias = 4 * 4 * 2
        expected = bytes_per_token(config.text_part(), storage) + other_bias
        assert bytes_per_token(config, storage) == pytest.approx(expected)


def test_tokens_of_pictures_go_to_the_other_experts() -> None:
    # In both layers with experts, 2 of width 8 instead of 2 of width 24 are chosen.
    config = vision_config()
    saved = 2 * 2 * weights(((32, 2 * (24 - 8)), (24 - 8, 32)))
    assert operations_per_vision_token(config) == pytest.approx(operations_per_token(config) - 2 * saved)
