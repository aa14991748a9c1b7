"""Parts of a model: every parameter is in one of them, gradients reach each, and a frozen one stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import paddle
import pytest

from ernie45.errors import ErnieError
from ernie45.losses import router_losses
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.models.moe import Routing
from ernie45.models.parts import PARTS, freeze, parts, router_weights, unfreeze
from ernie45.models.vision_language import ErnieForConditionalGeneration
from tests.helpers.tiny import DENSE, tiny_config, tiny_model
from tests.helpers.vision import VISION, vision_config, write_vision_folder

PLACE = VISION["im_patch_id"]
IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END = (
    VISION[f"{kind}_{end}_token_id"] for kind in ("image", "video") for end in ("start", "end")
)
GRID = [[1, 4, 4], [4, 2, 4]]  # a picture of 4 tokens, a video of 4
PICTURES = [IMAGE_START, *[PLACE] * 4, IMAGE_END, 12, VIDEO_START, *[PLACE] * 4, VIDEO_END]
BIAS = "e_score_correction_bias"
STEP = 3e-3  # with larger ones some token changes its experts


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> ErnieForConditionalGeneration:
    folder = write_vision_folder(tmp_path_factory.mktemp("vision"))
    return ErnieForConditionalGeneration.from_pretrained(folder, dtype="float32", progress=False)


@pytest.fixture
def model(loaded: ErnieForConditionalGeneration) -> Iterator[ErnieForConditionalGeneration]:
    """The model with all parts in training and without gradients, whatever a test before has done."""
    loaded.train()
    yield loaded
    unfreeze(loaded, PARTS)
    forget_gradients(loaded)


def batch(pictures: bool = True) -> dict[str, paddle.Tensor]:
    ids = [5, 700, *(PICTURES if pictures else [31]), 9, 40, 1200, 77]
    labels = [token if token < PLACE else -100 for token in ids[1:]] + [-100]
    inputs = {"input_ids": paddle.to_tensor([ids]), "labels": paddle.to_tensor([labels])}
    if pictures:
        pixels = np.random.default_rng(0).integers(0, 256, (int(np.prod(GRID, axis=1).sum()), 588))
        inputs |= {"images": paddle.to_tensor(pixels.astype("uint8")), "grid_thw": paddle.to_tensor(GRID)}
    return inputs


def forget_gradients(model: paddle.nn.Layer) -> None:
    for parameter in model.parameters():
        parameter.clear_gradient(False)  # None, not zeros


def names_by_part(model: paddle.nn.Layer) -> dict[str, list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {part: [names[id(parameter)] for parameter in found] for part, found in parts(model).items()}


def gradients(model: paddle.nn.Layer) -> dict[str, np.ndarray]:
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}


def learned(model: paddle.nn.Layer) -> set[str]:
    """Names of the parameters that have a gradient other than zero."""
    return {name for name, gradient in gradients(model).items() if gradient.any()}


def trained(model: paddle.nn.Layer, *names: str) -> set[str]:
    """Names of the parameters of parts without the correction bias."""
    return {name for part in names for name in names_by_part(model)[part] if BIAS not in name}


def test_every_parameter_is_in_one_part(model: ErnieForConditionalGeneration) -> None:
    found = names_by_part(model)
    assert list(found) == list(PARTS)
    listed = [name for names in found.values() for name in names]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())
    assert {name.split(".")[0] for name in found["vision"]} == {"vision_model"}
    assert {name.split(".")[0] for name in found["adapter"]} == {"adapter"}
    assert found["vision_experts"] == [
        f"ernie.layers.{layer}.mlp.{name}"
        for layer in (1, 2)
        for name in ("gate.weight_1", "experts.1.up_gate_proj", "experts.1.down_proj")
    ]
    assert {"ernie.layers.1.mlp.gate.weight", "ernie.layers.1.mlp.experts.0.down_proj"} < set(found["text"])


def test_a_text_model_is_all_text() -> None:
    model = tiny_model()
    found = parts(model)
    assert len(found["text"]) == len(model.parameters())
    assert not any(found[part] for part in PARTS if part != "text")


def test_gradients_reach_every_parameter(model: ErnieForConditionalGeneration) -> None:
    loss, _ = model(**batch())
    loss.backward()
    assert learned(model) == trained(model, *PARTS)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_frozen_parts_get_no_gradient_and_the_others_the_same(model: ErnieForConditionalGeneration, count: int) -> None:
    model(**batch())[0].backward()
    whole = gradients(model)
    for frozen in combinations(PARTS, count):
        forget_gradients(model)
        assert freeze(model, frozen) == len(trained(model, *frozen))
        model(**batch())[0].backward()
        rest = trained(model, *(part for part in PARTS if part not in frozen))
        assert learned(model) == gradients(model).keys() == rest
        for name, gradient in gradients(model).items():
            np.testing.assert_allclose(gradient, whole[name], rtol=1e-4, atol=1e-6, err_msg=f"{name}, {frozen} frozen")
        assert unfreeze(model, frozen) == len(trained(model, *frozen))


def loss_in_float64(model: ErnieForConditionalGeneration, inputs: dict[str, paddle.Tensor]) -> float:
    """The loss without the rounding of its sum, for differences between two of them."""
    with paddle.no_grad():
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"})[0].numpy()
    labels = inputs["labels"][0].numpy()
    rows = logits.astype(np.float64)[labels != -100]
    wanted = rows[np.arange(len(rows)), labels[labels != -100]]
    return float(np.mean(np.log(np.exp(rows).sum(axis=1)) - wanted))


@pytest.mark.parametrize("part", PARTS)
def test_gradients_are_those_of_central_differences_through_the_whole_model(
    model: ErnieForConditionalGeneration, part: str
) -> None:
    inputs = batch()
    model(**inputs)[0].backward()
    parameters = dict(model.named_parameters())
    for name in trained(model, part):
        parameter = parameters[name]
        gradient, start = parameter.grad.numpy(), parameter.numpy()
        place = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        losses = []
        for step in (STEP, -STEP):
            moved = start.copy()
            moved[place] += step
            parameter.set_value(moved)
            losses.append(loss_in_float64(model, inputs))
        parameter.set_value(start)
        slope = (losses[0] - losses[1]) / (2 * STEP)
        assert slope == pytest.approx(gradient[place], rel=0.01, abs=1e-4), name


@pytest.mark.parametrize("frozen", [(), ("vision", "adapter"), ("text",)], ids=str)
def test_a_batch_of_text_alone_trains_the_text_alone(model: ErnieForConditionalGeneration, frozen: tuple) -> None:
    freeze(model, frozen)
    loss, _ = model(**batch(pictures=False))
    if "text" in frozen:
        assert loss.stop_gradient  # there is nothing to train
        return
    loss.backward()
    assert learned(model) == trained(model, "text")


def test_router_losses_train_the_router_of_each_bank(model: ErnieForConditionalGeneration) -> None:
    routing: list[Routing] = []
    model(**batch(), routing=routing)
    found = router_losses(routing, router_weights(model), VISION["moe_k"], balance=1e-2, orthogonality=1e-2, z=1e-3)
    found.total.backward()
    gates = {f"ernie.layers.{layer}.mlp.gate.{name}" for layer in (1, 2) for name in ("weight", "weight_1")}
    assert gates < learned(model)
    assert len(found.banks) == 2 and np.isfinite(float(found.total))


def test_router_losses_of_text_alone_leave_the_vision_bank_alone(model: ErnieForConditionalGeneration) -> None:
    routing: list[Routing] = []
    loss, _ = model(**batch(pictures=False), routing=routing)
    found = router_losses(routing, router_weights(model), VISION["moe_k"], balance=1e-2, orthogonality=1e-2, z=1e-3)
    (loss + found.total).backward()
    assert float(found.banks[1].orthogonality) == 0
    assert learned(model) == trained(model, "text")


def test_router_weights_are_the_parameters_of_each_bank(model: ErnieForConditionalGeneration) -> None:
    parameters, found = dict(model.named_parameters()), router_weights(model)
    assert list(found) == [1, 2]
    for layer, (text, vision) in found.items():
        assert text is parameters[f"ernie.layers.{layer}.mlp.gate.weight"]
        assert vision is parameters[f"ernie.layers.{layer}.mlp.gate.weight_1"]


def test_router_weights_of_models_without_vision_or_experts() -> None:
    assert {layer: len(found) for layer, found in router_weights(tiny_model()).items()} == {1: 1, 2: 1}
    assert router_weights(tiny_model(tiny_config(DENSE))) == {}


def test_the_correction_bias_is_never_in_training(model: ErnieForConditionalGeneration) -> None:
    freeze(model, ["text", "vision_experts"])
    unfreeze(model, ["text", "vision_experts"])
    biases = [p for name, p in model.named_parameters() if BIAS in name]
    assert len(biases) == 2 and all(bias.stop_gradient for bias in biases)


def test_freezing_twice_or_naming_a_part_twice_counts_once(model: ErnieForConditionalGeneration) -> None:
    count = freeze(model, "adapter")
    assert count == freeze(model, ["adapter", "adapter"]) == len(parts(model)["adapter"])


@pytest.mark.parametrize("change", [freeze, unfreeze])
def test_unknown_parts_change_nothing(model: ErnieForConditionalGeneration, change) -> None:
    known = r"parts: there is no part 'aligner'; the parts of a model are vision, adapter, vision_experts, text"
    with pytest.raises(ErnieError, match=known):
        change(model, ["text", "aligner"])
    assert not any(parameter.stop_gradient for parameter in parts(model)["adapter"])
    assert not model.ernie.embed_tokens.weight.stop_gradient


@pytest.mark.parametrize("name", ["vision", "adapter", "vision_experts"])
def test_parts_that_a_text_model_does_not_have(name: str) -> None:
    with pytest.raises(ErnieError, match=f"this ErnieForCausalLM has no part '{name}'; it has text"):
        freeze(tiny_model(), name)


def test_the_text_of_a_vision_language_checkpoint_can_be_frozen(tmp_path: Path) -> None:
    folder = write_vision_folder(tmp_path, vision_config())
    model = ErnieForCausalLM.from_pretrained(folder, dtype="float32", progress=False)
    assert freeze(model, "text") == len(model.parameters()) - 2
    assert all(parameter.stop_gradient for parameter in model.parameters())


def test_packed_weights_cannot_be_frozen(model: ErnieForConditionalGeneration, monkeypatch) -> None:
    monkeypatch.setattr(ErnieForConditionalGeneration, "is_packed", True)
    with pytest.raises(ErnieError, match='packed for inference; load the model with dtype="float32"'):
        freeze(model, "text")


def test_frozen_while_loading(reference: Path) -> None:
    folder = reference / "vl" / "paddle"
    model = ErnieForConditionalGeneration.from_pretrained(
        folder, dtype="float32", freeze=("vision", "text"), progress=False
    )
    frozen = {name: all(p.stop_gradient for p in group) for name, group in parts(model).items()}
    assert frozen == {"vision": True, "adapter": False, "vision_experts": False, "text": True}
    with pytest.raises(ErnieError, match="no part 'tower'"):
        ErnieForConditionalGeneration.from_pretrained(folder, dtype="float32", freeze=("tower",), progress=False)
