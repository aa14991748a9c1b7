"""Mistakes that the comparison with the vision-language reference must notice.

Each test builds in one plausible mistake and measures what it does to the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import Tensor

from ernie45 import ops
from ernie45.models import vision
from ernie45.models.adapter import GELU, Adapter
from ernie45.models.layers import LayerNorm
from ernie45.models.vision import VisionTransformer
from ernie45.models.vision_language import ErnieForConditionalGeneration
from ernie45.ops.reference import rope
from ernie45.processing.positions import VIDEO, token_types
from tests.helpers.tiny import difference

TOLERANCE = 1e-4
NOTICEABLE = 100 * TOLERANCE  # a mistake has to change the logits by at least this much
CASES = ("image", "two_images", "video", "long_video", "mixed")

cases = pytest.mark.parametrize("case", CASES)
videos = pytest.mark.parametrize("case", ["video", "long_video", "mixed"])


@pytest.fixture(scope="module")
def data(reference: Path) -> dict[str, np.ndarray]:
    with np.load(reference / "vl" / "reference.npz") as file:
        return dict(file)


def load(reference: Path) -> ErnieForConditionalGeneration:
    return ErnieForConditionalGeneration.from_pretrained(reference / "vl" / "paddle", dtype="float32", progress=False)


@pytest.fixture(scope="module")
def model(reference: Path) -> ErnieForConditionalGeneration:
    return load(reference)


@pytest.fixture
def own_model(reference: Path) -> ErnieForConditionalGeneration:
    """For tests that change its parts."""
    return load(reference)


def inputs(data: dict[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    names = ("input_ids", "images", "grid_thw", "token_type_ids", "position_ids")
    return {name: data[f"{case}.{name}"] for name in names}


@paddle.no_grad()
def error(model: ErnieForConditionalGeneration, data: dict[str, np.ndarray], case: str, **changed: Any) -> float:
    """Largest difference of any logit from the reference, with some arguments in the place of the right ones."""
    arguments = {**inputs(data, case), **changed}
    logits = model(**{name: paddle.to_tensor(value) for name, value in arguments.items()})
    return difference(logits, data[f"{case}.logits"])


@cases
def test_without_mistakes_there_is_nothing_to_notice(model, data, case: str) -> None:
    assert error(model, data, case) < TOLERANCE


# The vision tower.


@cases
def test_notices_pixels_that_are_not_normalised(model, data, case: str) -> None:
    raw = data[f"{case}.images"].astype("float32") / 255
    assert error(model, data, case, images=raw) > NOTICEABLE


@cases
def test_notices_channels_in_the_order_of_bgr(model, data, case: str) -> None:
    patches = data[f"{case}.images"]
    swapped = np.ascontiguousarray(patches.reshape(len(patches), 3, -1)[:, ::-1]).reshape(patches.shape)
    assert error(model, data, case, images=swapped) > NOTICEABLE


@cases
def test_notices_patches_row_by_row_instead_of_block_by_block(model, data, case: str) -> None:
    patches, raster, first = data[f"{case}.images"], [], 0
    for frames, rows, columns in data[f"{case}.grid_thw"]:
        places = vision.patch_places(np.array([[1, rows, columns]]), merge_size=2)
        order = np.lexsort((places[:, 1], places[:, 0]))
        for _ in range(frames):
            raster.append(patches[first : first + rows * columns][order])
            first += rows * columns
    assert error(model, data, case, images=np.concatenate(raster)) > NOTICEABLE


@cases
def test_notices_interleaved_rope_in_the_tower(model, data, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "rope_halves", rope)
    assert error(model, data, case) > NOTICEABLE


@cases
@pytest.mark.parametrize("mistake", ["swapped", "dropped", "raster"])
def test_notices_wrong_places_of_patches(model, data, case: str, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    correct = vision.patch_places

    def wrong(grid_thw: np.ndarray, merge_size: int) -> np.ndarray:
        if mistake == "swapped":
            return correct(grid_thw, merge_size)[:, ::-1]
        return 0 * correct(grid_thw, merge_size) if mistake == "dropped" else correct(grid_thw, 1)

    monkeypatch.setattr(vision, "patch_places", wrong)
    assert error(model, data, case) > NOTICEABLE


@pytest.mark.parametrize("case", ["two_images", "video", "long_video", "mixed"])
def test_notices_attention_across_frames(model, data, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "frame_lengths", lambda grid: [int(grid.prod(axis=1).sum())])
    assert error(model, data, case) > NOTICEABLE


@cases
def test_notices_queries_and_keys_grouped_by_head(own_model, data, case: str) -> None:
    """q, k and v of one head side by side, as text models without grouped queries store them."""
    config = own_model.vision
    for block in own_model.vision_model.blocks:
        for parameter in (block.attn.qkv.weight, block.attn.qkv.bias):
            leading = parameter.shape[:-1]
            by_head = parameter.reshape([*leading, config.num_heads, 3, config.head_dim])
            parameter.set_value(by_head.transpose([*range(len(leading)), -2, -3, -1]).reshape(parameter.shape))
    assert error(own_model, data, case) > NOTICEABLE


@cases
def test_notices_gelu_in_the_tower(model, data, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "quick_gelu", F.gelu)
    assert error(model, data, case) > NOTICEABLE


@cases
@pytest.mark.parametrize("part", ["norm1", "norm2", "ln"])
def test_notices_a_missing_shift_of_a_norm(own_model, data, case: str, part: str) -> None:
    tower = own_model.vision_model
    norms = [tower.ln] if part == "ln" else [getattr(block, part) for block in tower.blocks]
    for norm in norms:
        norm.bias.set_value(paddle.zeros_like(norm.bias))
    assert error(own_model, data, case) > NOTICEABLE


# The adapter.


@cases
def test_notices_approximate_gelu_in_the_adapter(model, data, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two functions differ by 5e-4 at most, so that this mistake is the smallest of all: it gives 7e-4 to 1e-3."""
    monkeypatch.setattr(GELU, "forward", lambda self, x: F.gelu(x, approximate=True))
    assert error(model, data, case) > 5 * TOLERANCE


@videos
def test_notices_frames_of_a_pair_swapped(model, data, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    correct = Adapter.frame_rows
    monkeypatch.setattr(Adapter, "frame_rows", lambda self, grid: correct(self, grid)[:, ::-1])
    assert error(model, data, case) > NOTICEABLE


@pytest.mark.parametrize("case", ["image", "two_images", "mixed"])
def test_notices_a_picture_beside_zeros_instead_of_itself(
    model, data, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Adapter, x: Tensor, grid_thw: np.ndarray) -> Tensor:
        x = self.spatial_linear(x.reshape([x.shape[0] // self.block, -1]))
        rows = self.frame_rows(grid_thw)
        pairs = paddle.gather(x, paddle.to_tensor(rows.reshape(-1))).reshape([len(rows), 2, -1])
        pairs[:, 1] = pairs[:, 1] * paddle.to_tensor(rows[:, :1] != rows[:, 1:]).astype(x.dtype)
        return self.after_norm(self.mlp(self.temporal_linear(pairs.flatten(1))))

    monkeypatch.setattr(Adapter, "forward", forward)
    assert error(model, data, case) > NOTICEABLE


@pytest.mark.parametrize("case", ["long_video"])
def test_notices_frames_paired_with_the_other_half_of_the_video(
    model, data, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halves(self: Adapter, grid: np.ndarray) -> np.ndarray:
        tokens = int(grid.prod(axis=1).sum()) // self.block
        return np.arange(tokens).reshape(2, -1).T

    monkeypatch.setattr(Adapter, "frame_rows", halves)
    assert error(model, data, case) > NOTICEABLE


# Positions of the decoder.


@cases
@pytest.mark.parametrize("order", [(0, 2, 1), (1, 0, 2), (2, 1, 0)], ids=["t w h", "h t w", "w h t"])
def test_notices_axes_of_positions_swapped(model, data, case: str, order: tuple[int, ...]) -> None:
    assert error(model, data, case, position_ids=data[f"{case}.position_ids"][:, :, order]) > NOTICEABLE


@cases
def test_notices_that_the_time_takes_the_first_pairs(model, data, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def time_first(positions: Tensor, head_dim: int, theta: float, time_pairs: int) -> tuple[Tensor, Tensor]:
        pairs = np.arange(head_dim // 2)
        axes = np.where(pairs < time_pairs, 0, 1 + pairs % 2)
        chosen = paddle.index_select(positions.astype("float32"), paddle.to_tensor(axes), axis=-1)
        angles = chosen * paddle.to_tensor((theta ** (-pairs * 2 / head_dim)).astype("float32"))
        return paddle.cos(angles).unsqueeze(2), paddle.sin(angles).unsqueeze(2)

    monkeypatch.setattr(ops, "rope_angles", time_first)
    assert error(model, data, case) > NOTICEABLE


@cases
def test_notices_rows_and_columns_in_blocks_of_pairs(model, data, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half of the pairs that are not for the time by rows, the second by columns; right is in turns."""

    def blocks(positions: Tensor, head_dim: int, theta: float, time_pairs: int) -> tuple[Tensor, Tensor]:
        pairs = np.arange(head_dim // 2)
        sides = len(pairs) - time_pairs
        axes = np.where(pairs >= sides, 0, 1 + (pairs >= sides // 2))
        chosen = paddle.index_select(positions.astype("float32"), paddle.to_tensor(axes), axis=-1)
        angles = chosen * paddle.to_tensor((theta ** (-pairs * 2 / head_dim)).astype("float32"))
        return paddle.cos(angles).unsqueeze(2), paddle.sin(angles).unsqueeze(2)

    monkeypatch.setattr(ops, "rope_angles", blocks)
    assert error(model, data, case) > NOTICEABLE


@cases
def test_notices_positions_that_count_tokens(model, data, case: str) -> None:
    counted = np.arange(data[f"{case}.input_ids"].shape[1])[None]
    assert error(model, data, case, position_ids=counted) > NOTICEABLE


def test_notices_text_that_goes_on_too_early_after_a_long_video(model, data) -> None:
    """The rule of transformers: after the rows and columns of the video, whatever its number of frames."""
    positions = data["long_video.position_ids"].copy()
    end = int(np.flatnonzero(data["long_video.input_ids"][0] == model.vision.video_end_id)[0])
    positions[:, end:] -= 6 - 2  # six pairs of frames, two columns of tokens
    assert error(model, data, "long_video", position_ids=positions) > NOTICEABLE


# The experts.


@cases
@pytest.mark.parametrize("mistake", ["all text", "delimiters text", "all vision"])
def test_notices_tokens_sent_to_the_other_bank(model, data, case: str, mistake: str) -> None:
    types = data[f"{case}.token_type_ids"]
    wrong = {
        "all text": np.zeros_like(types),
        "delimiters text": types * (data[f"{case}.input_ids"] == model.vision.placeholder_id),
        "all vision": np.ones_like(types),
    }
    assert error(model, data, case, token_type_ids=wrong[mistake]) > NOTICEABLE


@videos
def test_notices_videos_sent_to_the_text_bank(model, data, case: str) -> None:
    ids, types = data[f"{case}.input_ids"], data[f"{case}.token_type_ids"]
    kinds = token_types(ids[0], data[f"{case}.grid_thw"], model.vision)
    assert error(model, data, case, token_type_ids=types * (kinds != VIDEO)) > NOTICEABLE


@cases
@pytest.mark.parametrize("change", [lambda bias: bias[::-1], lambda bias: 0 * bias], ids=["swapped", "dropped"])
def test_notices_a_wrong_correction_bias(
    own_model, data, case: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    for name, tensor in own_model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.set_value(change(tensor.numpy()).copy())
    assert error(own_model, data, case) > NOTICEABLE


@cases
def test_notices_routers_of_the_banks_swapped(own_model, data, case: str) -> None:
    weights = dict(own_model.state_dict())
    for name, tensor in weights.items():
        if name.endswith("mlp.gate.weight"):
            text, picture = tensor.clone(), weights[f"{name}_1"].clone()
            tensor.set_value(picture)
            weights[f"{name}_1"].set_value(text)
    assert error(own_model, data, case) > NOTICEABLE


@cases
def test_notices_vision_tokens_without_shared_experts(own_model, data, case: str) -> None:
    banks = paddle.to_tensor(data[f"{case}.token_type_ids"] == 0).astype("float32").unsqueeze(-1)
    for layer in own_model.ernie.layers[1:]:
        correct = layer.mlp.shared_experts.forward
        layer.mlp.shared_experts.forward = lambda x, correct=correct: correct(x) * banks
    assert error(own_model, data, case) > NOTICEABLE


def test_does_not_notice_another_epsilon_of_layer_norms(own_model, data) -> None:
    """1e-5, as some runtimes have it, instead of 1e-6: it gives 7e-6, for the variances here are far larger.

    Vectors of almost no variance tell: see the tests of the tower and of the adapter against their definitions.
    """
    for layer in own_model.sublayers():
        if isinstance(layer, LayerNorm):
            assert layer.epsilon == 1e-6
            layer.epsilon = 1e-5
    assert all(error(own_model, data, case) < TOLERANCE for case in CASES)


def test_the_tower_is_what_the_model_runs(model, data) -> None:
    """The mistakes above are built into functions; a faster path of the model must not bypass them."""
    assert isinstance(model.vision_model, VisionTransformer) and model.vision_model.fused is None
    assert model.ernie.fused is None
