"""Adapters on whole models, dense, with experts, with pictures and on packed weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie45 import lora, ops
from ernie45.errors import ErnieError
from ernie45.models.pretrained import PretrainedModel
from ernie45.models.vision_language import ErnieForConditionalGeneration
from ernie45.ops import custom
from tests.helpers.fused import both_instruction_sets, fused
from tests.helpers.packed import load, save_source
from tests.helpers.tiny import DENSE, MOE, difference, randomise, tiny_config, tiny_model, token_ids
from tests.helpers.vision import VISION, vision_config

KINDS = ("dense", "moe", "vl", "bfloat16", "packed bfloat16", "wint8", "wint4")
PACKED = KINDS[4:]
PLAIN = KINDS[:4]
ROUNDED = {"rtol": 0.02, "atol": 0.01}  # three roundings to bfloat16, of sums of some dozen terms
every_kind = pytest.mark.parametrize("kind", KINDS)
Make = Callable[[str], PretrainedModel]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A new model of some kind."""
    folder = functools.cache(lambda: save_source(tmp_path_factory.mktemp("source"), MOE))

    def build(kind: str) -> PretrainedModel:
        if kind in PACKED:
            if custom.library() is None:
                pytest.skip("no native library here")
            return load(folder(), kind.removeprefix("packed "))
        if kind == "vl":
            return randomise(ErnieForConditionalGeneration(vision_config(), initialize=False), 0)
        return tiny_model(
            tiny_config(DENSE if kind == "dense" else MOE), dtype="bfloat16" if kind == "bfloat16" else "float32"
        )

    return build


def inputs_for(model: PretrainedModel, learn: bool = True) -> dict[str, Any]:
    if model.config.vision is None:
        ids = token_ids(2, 9)
        return {"input_ids": ids, **({"labels": paddle.roll(ids, -1, axis=1)} if learn else {})}
    start, end, place = (VISION[f"{key}_id"] for key in ("image_start_token", "image_end_token", "im_patch"))
    ids = [5, start, *[place] * 4, end, 9, 40, 1200, 77]
    labels = [token if token < place else -100 for token in ids[1:]] + [-100]
    pixels = np.random.default_rng(0).integers(0, 256, (16, 588)).astype("uint8")
    inputs = {"input_ids": paddle.to_tensor([ids]), "images": paddle.to_tensor(pixels), "grid_thw": [[1, 4, 4]]}
    return inputs | ({"labels": paddle.to_tensor([labels])} if learn else {})


@paddle.no_grad()
def logits(model: PretrainedModel) -> np.ndarray:
    return model(**inputs_for(model, learn=False)).numpy()


def disturb(model: PretrainedModel, size: float = 0.1) -> None:
    """Gives every B values, as training would."""
    generator = np.random.default_rng(5)
    for tensor in lora.parameters(model)[1::2]:
        tensor.set_value(size * generator.standard_normal(tensor.shape, dtype="float32"))


# What the adapters are.


@every_kind
def test_new_adapters_change_nothing(kind: str, make: Make) -> None:
    model = make(kind)
    model.ernie.fused = None  # which rounds in another way than the layers one by one
    before = logits(model)
    names = lora.apply(model, rank=2)
    np.testing.assert_array_equal(logits(model), before)
    assert any(name.endswith("self_attn.qkv_proj") for name in names)
    disturb(model)
    assert difference(logits(model), before) > 1e-3


@every_kind
def test_adapters_add_a_narrow_product_to_every_weight(kind: str, make: Make) -> None:
    model = make(kind)
    lora.apply(model, rank=3, alpha=7.5)
    disturb(model)
    for adapter in lora.adapters.of(model).adapters:
        weight = adapter.weight
        parts = weight.matrices() if len(weight.shape) == 3 else [weight]
        for part in parts:
            x = paddle.to_tensor(np.random.default_rng(0).standard_normal((4, part.shape[0]), dtype="float32"))
            expected = x.numpy() @ part.a.numpy() @ part.b.numpy() * 2.5
            added = (part.product(x) - ops.linear(x, part.base)).numpy()
            exact = isinstance(part.base, paddle.Tensor) and part.base.dtype == paddle.float32
            np.testing.assert_allclose(added, expected, **({"rtol": 1e-4, "atol": 1e-5} if exact else ROUNDED))
    assert weight.a.shape[-1] == weight.b.shape[-2] == 3


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 2.0),
        ({"alpha": 5}, 1.25),
        ({"rslora": True}, 2.0),
        ({"rslora": True, "alpha": 6}, 3.0),
    ],
    ids=str,
)
def test_the_scale_is_that_of_the_alpha_that_was_given(options: dict[str, Any], scale: float) -> None:
    model = tiny_model()
    lora.apply(model, rank=4, **options)
    assert {adapter.weight.scale for adapter in lora.adapters.of(model).adapters} == {scale}


def test_a_starts_uniform_and_every_expert_with_its_own() -> None:
    model = tiny_model()
    lora.apply(model, rank=4)
    a = model.ernie.layers[1].mlp.experts["0"].up_gate_proj_lora_A.numpy()
    bound = 1 / np.sqrt(MOE["hidden_size"])
    assert a.shape == (MOE["moe_num_experts"], MOE["hidden_size"], 4)
    assert np.abs(a).max() <= bound and a.std() == pytest.approx(bound / np.sqrt(3), rel=0.1)
    assert len({matrix.tobytes() for matrix in a}) == MOE["moe_num_experts"]


def test_dropout_is_for_training_and_the_way_through_the_adapter_alone() -> None:
    model = tiny_model()
    lora.apply(model, rank=2, dropout=0.5)
    model.train()
    np.testing.assert_array_equal(logits(model), logits(model))  # B is zero
    disturb(model)
    assert difference(logits(model), logits(model)) > 1e-4
    model.eval()
    np.testing.assert_array_equal(logits(model), logits(model))


# Which weights get one.


def test_default_targets_of_a_text_model() -> None:
    model = tiny_model()
    names = lora.apply(model)
    experts = [f"ernie.layers.1.mlp.experts.{e}.{p}" for p in ("up_gate_proj", "down_proj") for e in range(6)]
    assert [name for name in names if "layers.1.mlp.experts" in name] == experts
    assert {name.rsplit(".", 1)[1] for name in names} == {"qkv_proj", "o_proj", "up_gate_proj", "down_proj"}
    assert len(names) == 3 * 2 + 2 + 2 * (12 + 2)
    assert sorted(names) == sorted(set(names))


def test_default_targets_of_a_vision_language_model(make: Make) -> None:
    names = lora.apply(make("vl"))
    assert {"vision_model.blocks.1.attn.qkv", "vision_model.blocks.0.mlp.fc2"} < set(names)
    assert {f"ernie.resampler_model.{part}" for part in ("spatial_linear.0", "temporal_linear.2", "mlp")} < set(names)
    assert {"ernie.layers.2.mlp.experts.0.down_proj", "ernie.layers.2.mlp.experts.7.down_proj"} < set(names)
    assert not any("patch_embed" in name or ".gate" in name or "embed_tokens" in name for name in names)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("o_proj", {f"ernie.layers.{i}.self_attn.o_proj" for i in range(3)}),
        (["qkv_proj", r"layers\.0\..*down_proj"], {*(f"ernie.layers.{i}.self_attn.qkv_proj" for i in range(3)),
                                                   "ernie.layers.0.mlp.down_proj"}),
        ([".*shared_experts.*"], {f"ernie.layers.{i}.mlp.shared_experts.{p}_proj" for i in (1, 2)
                                   for p in ("up_gate", "down")}),
        (r"layers\.2\.mlp\.experts\.\d+\.down_proj", {f"ernie.layers.2.mlp.experts.{i}.down_proj" for i in range(6)}),
        ("gate_proj|o_proj", {f"ernie.layers.{i}.self_attn.o_proj" for i in range(3)}),
    ],
    ids=str,
)  # fmt: skip
def test_targets_are_patterns_for_whole_names_or_what_follows_a_dot(targets: Any, expected: set[str]) -> None:
    assert set(lora.apply(tiny_model(), targets=targets)) == expected


def test_the_experts_of_one_bank_alone(make: Make) -> None:
    model = make("vl")
    names = lora.apply(model, targets=r"mlp\.experts\.[4-7]\..*")
    assert {name.split(".")[5] for name in names} == set("4567")
    banks = model.ernie.layers[1].mlp.experts
    assert hasattr(banks["1"], "down_proj_lora_A") and not hasattr(banks["0"], "down_proj_lora_A")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "q_proj"}, r"matches no module; their names end in down_proj, o_proj, qkv_proj, up_gate_proj"),
        ({"targets": ["o_proj", "lm_head"]}, "lm_head.*matches no module"),
        ({"targets": "gate"}, "matches no module"),
        ({"targets": "embed_tokens"}, "matches no module"),
        ({"targets": r"experts\.[0-3]\.down_proj"}, "match 4 of 6 experts, .*experts.0.down_proj.* together"),
        ({"targets": "(o_proj"}, "is no regular expression"),
        ({"targets": []}, "no module of the model matches"),
        ({"rank": 0}, "rank is 0, expected a positive integer"),
        ({"rank": 2.0}, "rank is 2.0, expected a positive integer"),
        ({"alpha": -1}, "alpha is -1, expected a positive number"),
        ({"dropout": 1.0}, "dropout is 1.0, expected 0 or more and less than 1"),
    ],
    ids=str,
)
def test_bad_arguments_are_named_and_change_nothing(options: dict[str, Any], message: str) -> None:
    model = tiny_model()
    with pytest.raises(ErnieError, match=message):
        lora.apply(model, **options)
    assert not model.ernie.embed_tokens.weight.stop_gradient
    with pytest.raises(ErnieError, match="has no adapters"):
        lora.parameters(model)


def test_adapters_go_on_once() -> None:
    model = tiny_model()
    lora.apply(model)
    with pytest.raises(ErnieError, match="has adapters already"):
        lora.apply(model)


# Training.


@every_kind
def test_gradients_reach_the_adapters_alone(kind: str, make: Make) -> None:
    model = make(kind)
    lora.apply(model, rank=2)
    disturb(model)
    model.train()
    model(**inputs_for(model))[0].backward()
    learned = {id(parameter) for parameter in model.parameters() if parameter.grad is not None}
    assert learned == {id(parameter) for parameter in lora.parameters(model)}
    assert all(bool((parameter.grad != 0).any()) for parameter in lora.parameters(model))


def loss_in_float64(model: PretrainedModel) -> float:
    """The loss without the rounding of its sum."""
    labels = inputs_for(model)["labels"].numpy()
    rows = logits(model).astype(np.float64)[labels != -100]
    wanted = rows[np.arange(len(rows)), labels[labels != -100]]
    largest = rows.max(axis=1)
    return float(np.mean(np.log(np.exp(rows - largest[:, None]).sum(axis=1)) + largest - wanted))


@pytest.mark.parametrize("kind", ["dense", "moe", "vl", "wint4"])
def test_gradients_are_those_of_central_differences(kind: str, make: Make) -> None:
    """On packed weights with their definition, because the operators round activations."""
    model = make(kind)
    lora.apply(model, rank=2)
    disturb(model)
    with custom.reference_only():
        model(**inputs_for(model))[0].backward()
        for parameter in lora.parameters(model):
            gradient, start = parameter.grad.numpy(), parameter.numpy()
            place = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
            losses = []
            for step in (2e-3, -2e-3):
                moved = start.copy()
                moved[place] += step
                parameter.set_value(moved)
                losses.append(loss_in_float64(model))
            parameter.set_value(start)
            slope = (losses[0] - losses[1]) / 4e-3
            assert slope == pytest.approx(gradient[place], rel=0.02, abs=2e-4), parameter.name


@both_instruction_sets
@pytest.mark.parametrize("kind", ["bfloat16", *PACKED])
def test_gradients_through_operators_are_near_those_of_the_definitions(isa: str, kind: str, make: Make) -> None:
    model = make(kind)
    lora.apply(model, rank=2)
    disturb(model)

    def gradients() -> np.ndarray:
        model(**inputs_for(model))[0].backward()
        found = np.concatenate([parameter.grad.numpy().ravel() for parameter in lora.parameters(model)])
        for parameter in lora.parameters(model):
            parameter.clear_gradient(False)
        return found

    with fused(isa, "low_rank_linear_backward", "causal_attention_backward"):
        operators = gradients()
    with custom.reference_only():
        definitions = gradients()
    cosine = operators @ definitions / np.linalg.norm(operators) / np.linalg.norm(definitions)
    assert cosine > 0.999


@every_kind
def test_a_few_steps_lower_the_loss_and_leave_the_base_alone(kind: str, make: Make) -> None:
    model = make(kind)
    base = {name: value.astype("float32").numpy().copy() for name, value in model.state_dict().items()}
    lora.apply(model, rank=4)
    model.train()
    optimizer = paddle.optimizer.AdamW(1e-2, parameters=lora.parameters(model), weight_decay=0.0)
    losses = []
    for _ in range(20):
        loss, _ = model(**inputs_for(model))
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0]
    after = model.state_dict()
    assert all(np.array_equal(after[name].astype("float32").numpy(), value) for name, value in base.items())


def test_groups_let_b_learn_faster() -> None:
    model = tiny_model()
    lora.apply(model, rank=2)
    disturb(model, 0.01)
    before = [parameter.numpy() for parameter in lora.parameters(model)]
    groups = lora.parameter_groups(model, plus_ratio=4.0)
    optimizer = paddle.optimizer.Adam(1e-3, parameters=groups, epsilon=1e-15)
    model(**inputs_for(model))[0].backward()
    optimizer.step()  # the first step of Adam moves everything by the rate
    moved = [np.abs(p.numpy() - old).max() for p, old in zip(lora.parameters(model), before, strict=True)]
    np.testing.assert_allclose(moved[0::2], 1e-3, rtol=1e-2)
    np.testing.assert_allclose(moved[1::2], 4e-3, rtol=1e-2)


def test_a_packed_model_can_be_trained_with_adapters_only(make: Make) -> None:
    model = make("wint8")
    with pytest.raises(ErnieError, match="packed for inference"):
        model.train()
    lora.apply(model)
    model.train()
    assert model.training


# Out of the way, merged, removed.


@every_kind
def test_disabled_is_the_base(kind: str, make: Make) -> None:
    model = make(kind)
    model.ernie.fused = None
    before = logits(model)
    lora.apply(model, rank=2)
    disturb(model)
    changed = logits(model)
    with lora.disabled(model), lora.disabled(model):
        np.testing.assert_array_equal(logits(model), before)
    np.testing.assert_array_equal(logits(model), changed)
    with pytest.raises(KeyError), lora.disabled(model):
        raise KeyError
    np.testing.assert_array_equal(logits(model), changed)


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("keep_base", [True, False])
def test_merged_weights_compute_what_adapters_do(kind: str, keep_base: bool, make: Make) -> None:
    model = make(kind)
    before = {name: value.astype("float32").numpy().copy() for name, value in model.state_dict().items()}
    lora.apply(model, rank=2)
    disturb(model)
    expected = logits(model)
    lora.merge(model, keep_base=keep_base)
    close = 1e-5 if kind != "bfloat16" else 0.05  # the sums are rounded to bfloat16
    assert difference(logits(model), expected) < close * max(1.0, np.abs(expected).max())
    if not keep_base:
        assert model.state_dict().keys() == before.keys()
        assert not model.ernie.embed_tokens.weight.stop_gradient
        with pytest.raises(ErnieError, match="has no adapters"):
            lora.unmerge(model)
        return
    lora.unmerge(model)
    np.testing.assert_array_equal(logits(model), expected)
    after = model.state_dict()
    assert all(np.array_equal(after[name].astype("float32").numpy(), value) for name, value in before.items())


def test_merged_adapters_refuse_what_makes_no_sense() -> None:
    model = tiny_model()
    lora.apply(model)
    with pytest.raises(ErnieError, match="are not merged"):
        lora.unmerge(model)
    lora.merge(model)
    with pytest.raises(ErnieError, match="are merged already"):
        lora.merge(model)
    with pytest.raises(ErnieError, match="are merged into the weights; call lora.unmerge"), lora.disabled(model):
        pass


@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_are_not_merged(kind: str, make: Make) -> None:
    model = make(kind)
    lora.apply(model)
    disturb(model)
    before = logits(model)
    with pytest.raises(ErnieError, match='cannot take up adapters; load the model with dtype="float32"'):
        lora.merge(model)
    np.testing.assert_array_equal(logits(model), before)


@every_kind
@pytest.mark.parametrize("merged", [False, True])
def test_removed_adapters_leave_the_model_as_it_was(kind: str, merged: bool, make: Make) -> None:
    model = make(kind)
    before, names = logits(model), list(model.state_dict())
    trainable = [parameter.stop_gradient for parameter in model.parameters()]
    lora.apply(model)
    disturb(model)
    if merged and kind not in PACKED:
        lora.merge(model)
    lora.remove(model)
    np.testing.assert_array_equal(logits(model), before)  # on packed weights the fused decoder is back, too
    assert list(model.state_dict()) == names
    assert [parameter.stop_gradient for parameter in model.parameters()] == trainable
    lora.apply(model, rank=1)


# The model around them.


@every_kind
def test_generation_with_adapters_is_that_of_the_model_with_them(kind: str, make: Make) -> None:
    model = make(kind)
    lora.apply(model, rank=2)
    disturb(model, 0.3)
    ids = token_ids(1, 5)
    reply = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False).ids
    everything = paddle.concat([ids, reply], axis=1)
    with paddle.no_grad():
        chosen = model(everything[:, :-1])[:, 4:].argmax(axis=-1)
    np.testing.assert_array_equal(chosen.numpy(), reply.numpy())
    if kind in PLAIN[:3]:
        lora.merge(model)
        np.testing.assert_array_equal(
            model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False).ids.numpy(), reply.numpy()
        )


@pytest.mark.parametrize("kind", ["moe", "vl", "wint4"])
def test_saving_the_model_writes_the_base_and_after_merging_the_sum(kind: str, make: Make, tmp_path: Path) -> None:
    model = make(kind)
    model.save_pretrained(tmp_path / "base", progress=False)
    lora.apply(model, rank=2)
    disturb(model)
    model.save_pretrained(tmp_path / "with", progress=False)
    base, beside = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("base", "with"))
    assert base == beside
    if kind != "wint4":
        expected = logits(model)
        lora.merge(model)
        model.save_pretrained(tmp_path / "merged", progress=False)
        again = type(model).from_pretrained(tmp_path / "merged", dtype="float32", progress=False)
        assert difference(logits(again), expected) < 1e-4


def test_adapters_are_found_in_the_state_under_published_names() -> None:
    model = tiny_model()
    lora.apply(model, rank=2)
    state = model.state_dict()
    name = "ernie.layers.1.mlp.experts.3.up_gate_proj.lora_A"
    assert state[name].shape == [MOE["hidden_size"], 2]
    copied = {key: value.numpy().copy() for key, value in state.items()}
    other = tiny_model(seed=7)
    lora.apply(other, rank=2)
    assert other.set_state_dict(copied) == ([], [])
    disturb(model), disturb(other)
    np.testing.assert_array_equal(logits(other), logits(model))
