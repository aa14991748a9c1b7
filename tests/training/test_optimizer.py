"""AdamW with masters: against Paddle's own and against the formula in float64."""

import numpy as np
import paddle
import pytest

from ernie45.errors import ErnieError
from ernie45.models.vision_language import ErnieForConditionalGeneration
from ernie45.training.optimizer import AdamW, Group, Rates, clip_scale, decays, global_norm, parameter_groups
from tests.helpers.tiny import MOE, tiny_config, tiny_model
from tests.helpers.vision import vision_config


def parameter(values, dtype="float32"):
    values = np.asarray(values, "float32")
    created = paddle.create_parameter(list(values.shape), "float32")
    if dtype != "float32":
        created = paddle.base.framework.EagerParamBase.from_tensor(paddle.to_tensor(values).astype(dtype))
    created.set_value(paddle.to_tensor(values).astype(dtype))
    created.stop_gradient = False
    return created


def set_gradient(target, values):
    (target.astype("float32") * paddle.to_tensor(np.asarray(values, "float32"))).sum().backward()


def draws(count, shape=(4, 5), seed=0):
    return list(np.random.default_rng(seed).standard_normal([count, *shape]).astype("float32"))


def test_float32_agrees_with_paddle():
    start, *gradients = draws(6)
    ours, theirs = parameter(start), parameter(start)
    optimizer = AdamW([Group({"w": ours}, rate=0.5, weight_decay=0.1)])
    reference = paddle.optimizer.AdamW(
        5e-3, 0.9, 0.95, 1e-8, parameters=[{"params": [theirs], "weight_decay": 0.1}], weight_decay=0.1
    )
    for gradient in gradients:
        set_gradient(ours, gradient)
        optimizer.step(1e-2, optimizer.gradients())
        set_gradient(theirs, gradient)
        reference.step()
        reference.clear_grad()
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-6, atol=1e-7)
    assert np.abs(ours.numpy() - start).max() > 1e-3


def test_bfloat16_follows_a_float32_master():
    """Steps far below the precision of bfloat16 add up."""
    start, *gradients = draws(21)
    narrow, wide = parameter(start, "bfloat16"), parameter(start)
    wide.set_value(narrow.astype("float32"))
    optimizers = [AdamW([Group({"w": target}, weight_decay=0.01)]) for target in (narrow, wide)]
    for gradient in gradients:
        rounded = paddle.to_tensor(gradient).astype("bfloat16").astype("float32").numpy()
        for target, optimizer in zip((narrow, wide), optimizers, strict=True):
            set_gradient(target, rounded)
            optimizer.step(1e-4, optimizer.gradients())
    master = optimizers[0].state_dict()["master.w"]
    np.testing.assert_array_equal(master.numpy(), wide.numpy())
    np.testing.assert_array_equal(narrow.numpy(), master.astype("bfloat16").numpy())
    assert np.abs(wide.numpy() - start).max() > 0


def test_formula():
    start, *gradients = draws(4)
    target = parameter(start)
    optimizer = AdamW([Group({"w": target}, rate=2.0, weight_decay=0.3)], beta1=0.8, beta2=0.9, epsilon=1e-3)
    x, m, v = start.astype("float64"), 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        set_gradient(target, gradient)
        optimizer.step(0.01, optimizer.gradients(), scale=0.5)
        g = 0.5 * gradient.astype("float64")
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        x = x - 0.02 * 0.3 * x
        x = x - 0.02 * (m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.9**step)) + 1e-3)
    np.testing.assert_allclose(target.numpy(), x, rtol=2e-5, atol=1e-6)


def test_gradients_are_used_up_and_a_parameter_without_one_stays():
    used, unused = parameter(np.ones(3)), parameter(np.ones(3))
    optimizer = AdamW([Group({"used": used, "unused": unused}, weight_decay=0.1)])
    set_gradient(used, np.ones(3))
    optimizer.step(0.1, optimizer.gradients())
    assert optimizer.gradients() == {}
    assert unused.tolist() == [1.0] * 3
    set_gradient(used, np.ones(3))
    optimizer.clear_gradients()
    assert optimizer.gradients() == {}


def test_gradients_of_micro_batches_are_summed_in_float32():
    """1 + 2 ** -9 eight times: bfloat16 would forget every one but the first."""
    target = parameter(np.zeros([2, 2]), "bfloat16")
    optimizer = AdamW([Group({"w": target})])
    parts = [1.0] + [2.0**-9] * 8
    for part in parts[:-1]:
        set_gradient(target, np.full([2, 2], part))
        optimizer.accumulate()
    set_gradient(target, np.full([2, 2], parts[-1]))
    gradients = optimizer.gradients()
    np.testing.assert_array_equal(gradients["w"].numpy(), np.full([2, 2], sum(parts), "float32"))
    optimizer.step(0.1, gradients)
    assert optimizer.gradients() == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_goes_on_to_the_bit(dtype):
    start, *gradients = draws(7)

    def run(optimizer, target, parts):
        for gradient in parts:
            set_gradient(target, gradient)
            optimizer.step(1e-3, optimizer.gradients())

    whole = parameter(start, dtype)
    first = AdamW([Group({"w": whole})])
    run(first, whole, gradients[:3])
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    resumed = parameter(whole.astype("float32").numpy(), dtype)
    second = AdamW([Group({"w": resumed})])
    second.set_state_dict(state)
    run(first, whole, gradients[3:])
    run(second, resumed, gradients[3:])
    np.testing.assert_array_equal(whole.numpy(), resumed.numpy())
    for name, tensor in first.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), second.state_dict()[name].numpy())


def test_state_of_other_parameters_is_refused():
    optimizer = AdamW([Group({"w": parameter(np.zeros(3))})])
    state = optimizer.state_dict()
    for wrong, message in (
        ({**state, "moment1.x": paddle.zeros([1])}, "moment1.x: belongs to no trained"),
        ({name: state[name] for name in state if name != "moment2.w"}, "moment2.w: missing"),
        ({**state, "moment1.w": paddle.ones([4])}, r"moment1.w: .*\[4\], expected .*\[3\]"),
    ):
        with pytest.raises(ErnieError, match=message):
            optimizer.set_state_dict(wrong)
    assert float(optimizer.state_dict()["moment1.w"].sum()) == 0


def test_groups_of_a_mixture_of_experts():
    model = tiny_model(tiny_config(MOE))
    groups = parameter_groups(model.named_parameters(), 0.1, Rates(router=0.01))
    found = {name: (group.rate, group.weight_decay) for group in groups for name in group.parameters}
    assert found["ernie.layers.1.mlp.gate.weight"] == (0.01, 0.1)
    assert found["ernie.layers.1.mlp.experts.0.up_gate_proj"] == (1.0, 0.1)
    assert found["ernie.layers.1.input_layernorm.weight"] == (1.0, 0.0)
    assert found["ernie.norm.weight"] == (1.0, 0.0)
    assert not any("e_score_correction_bias" in name for name in found)
    assert len(found) == sum(not parameter.stop_gradient for parameter in model.parameters())


def test_layer_decay_of_the_vision_tower():
    config = vision_config()
    model, depth = ErnieForConditionalGeneration(config, initialize=False), config.vision.depth
    assert depth > 1
    rates = Rates(router=0.5, vision=0.9)
    found = {name: rates.of(name, depth) for name, _ in model.named_parameters()}
    assert found["vision_model.patch_embed.proj.weight"] == pytest.approx(0.9 ** (depth - 1))
    for block in range(depth):
        assert found[f"vision_model.blocks.{block}.attn.qkv.bias"] == pytest.approx(0.9 ** (depth - 1 - block))
    assert found["vision_model.ln.weight"] == 1.0
    routers = {name: rate for name, rate in found.items() if ".gate.weight" in name}
    assert set(routers.values()) == {0.5}
    assert any(name.endswith("gate.weight_1") for name in routers)
    named = dict(model.named_parameters())
    assert not any(decays(name, parameter) for name, parameter in named.items() if parameter.ndim == 1)


def test_lora_plus():
    rates = Rates(lora_plus=16.0)
    assert rates.of("ernie.layers.0.self_attn.qkv_proj.lora_B", 0) == 16.0
    assert rates.of("ernie.layers.1.mlp.experts.0.down_proj_lora_B", 0) == 16.0
    assert rates.of("ernie.layers.0.self_attn.qkv_proj.lora_A", 0) == 1.0


def test_nothing_to_train_and_twice_the_same():
    with pytest.raises(ErnieError, match="everything frozen"):
        AdamW([])
    target = parameter(np.zeros(2))
    with pytest.raises(ErnieError, match="two groups"):
        AdamW([Group({"w": target}), Group({"w": target})])


def test_norm_counts_every_expert_once():
    """Two ranks with one expert each see the norm of one rank with both."""
    shared, experts = paddle.full([3], 2.0), paddle.to_tensor([[3.0], [4.0]])
    name = "ernie.layers.1.mlp.experts.0.down_proj"
    whole = global_norm({"ernie.norm.weight": shared, name: experts})
    assert whole == pytest.approx(np.sqrt(12 + 25))
    for rank in (0, 1):
        own = {"ernie.norm.weight": shared, name: experts[rank : rank + 1]}
        other = (experts[1 - rank] ** 2).sum()
        assert global_norm(own, reduce_experts=lambda squares, other=other: squares + other) == pytest.approx(whole)


def test_norm_of_bfloat16_is_summed_in_float32():
    gradient = paddle.full([100, 100], 0.01).astype("bfloat16")
    expected = np.sqrt((gradient.astype("float32").numpy().astype("float64") ** 2).sum())
    assert global_norm({"w": gradient}) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("norm", "limit", "expected"), [(0.5, 1.0, 1.0), (4.0, 1.0, 0.25), (4.0, 0.0, 1.0)])
def test_clip_scale(norm, limit, expected):
    assert clip_scale(norm, limit) == expected
