"""The mixture-of-experts layer against one that treats every token by itself, in float64."""

from __future__ import annotations

import sys

import numpy as np
import paddle
import pytest

from ernie45 import ops
from ernie45.config import ErnieConfig
from ernie45.models.moe import ExpertBank, MoE, Routing, published_tensors
from ernie45.ops import custom
from tests.helpers.numeric import numeric_gradient, softmax, swiglu_mlp, top_k
from tests.helpers.tiny import MOE, difference, tiny_config

HIDDEN = MOE["hidden_size"]
TWO_BANKS = {
    "moe_num_experts": [6, 6],
    "moe_intermediate_size": [10, 4],
    "moe_layer_start_index": [1, 1],
    "vision_config": {},
}

variants = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_num_shared_experts": 0},
        {"moe_use_aux_free": False},
        {"moe_gate_act": "sigmoid"},
        {"moe_norm_gate_logits": False},
        {"moe_k": 1},
        {"moe_k": 6},
        {"moe_intermediate_size": 0},
    ],
    ids=str,
)


def layer(config: ErnieConfig, seed: int = 0, dtype: str = "float32") -> MoE:
    moe = MoE(config, 1, dtype)
    generator = np.random.default_rng(seed)
    for name, parameter in moe.named_parameters():
        scale = 0.2 if "correction" in name else parameter.shape[-2] ** -0.5
        values = scale * generator.standard_normal(parameter.shape)
        parameter.set_value(paddle.to_tensor(values.astype(np.float32)).astype(parameter.dtype))
    return moe


def inputs(batch: int = 2, sequence: int = 5, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, sequence, HIDDEN)).astype(np.float32)


def exact(parameter: paddle.Tensor) -> np.ndarray:
    return parameter.detach().astype("float32").numpy().astype(np.float64)


def slow_token(moe: MoE, x: np.ndarray, bank: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Output [hidden] and chosen experts [k] of one token [hidden], written out from the definition."""
    config = moe.config
    logits = x @ exact(getattr(moe.gate, "weight_1" if bank else "weight"))
    probabilities = softmax(logits) if config.moe_gate_act == "softmax" else 1 / (1 + np.exp(-logits))
    bias = exact(moe.moe_statics.e_score_correction_bias)[bank] if config.moe_use_aux_free else 0
    chosen = top_k(probabilities + bias, config.moe_k)
    weights = probabilities[chosen]
    if config.moe_norm_gate_logits:
        weights = weights / max(weights.sum(), 1e-12)
    experts = moe.experts[str(bank)]
    output = np.zeros(HIDDEN)
    for weight, expert in zip(weights, chosen, strict=True):
        output += weight * swiglu_mlp(x, exact(experts.up_gate_proj)[expert], exact(experts.down_proj)[expert])
    if config.moe_num_shared_experts:
        shared = moe.shared_experts
        output += swiglu_mlp(x, exact(shared.up_gate_proj.weight), exact(shared.down_proj.weight))
    return output, chosen


@variants
def test_equals_the_definition_per_token(changes: dict) -> None:
    moe, x = layer(tiny_config(**changes)), inputs()
    routing: list[Routing] = []
    with paddle.no_grad():
        found = moe(paddle.to_tensor(x), routing=routing)
    expected = [slow_token(moe, token.astype(np.float64)) for token in x.reshape(-1, HIDDEN)]
    assert difference(found.reshape([-1, HIDDEN]), np.stack([output for output, _ in expected])) < 1e-5
    assert routing[0].indices.tolist() == [chosen.tolist() for _, chosen in expected]
    counts = np.bincount(routing[0].indices.numpy().ravel(), minlength=6)
    assert routing[0].counts.tolist() == counts.tolist()
    assert (routing[0].layer, routing[0].bank) == (1, 0)


@variants
def test_gradients(changes: dict) -> None:
    """Of the input, the router and every expert, against central differences of the definition."""
    moe, x, mix = layer(tiny_config(**changes)), inputs(1, 2), inputs(1, 2, seed=2).reshape(-1, HIDDEN)
    at = paddle.to_tensor(x, stop_gradient=False)
    (moe(at).reshape([-1, HIDDEN]) * paddle.to_tensor(mix)).sum().backward()

    def loss(tokens: np.ndarray) -> float:
        return sum(float(slow_token(moe, t)[0] @ m) for t, m in zip(tokens.reshape(-1, HIDDEN), mix, strict=True))

    np.testing.assert_allclose(at.grad.numpy(), numeric_gradient(loss, x), rtol=1e-3, atol=1e-4)
    assert moe.experts["0"].up_gate_proj.grad is not None
    if changes.get("moe_use_aux_free", True):
        assert moe.moe_statics.e_score_correction_bias.grad is None
    # A few entries of each parameter: the numeric gradient of all would take long. float32 allows a larger step.
    for name, parameter in moe.named_parameters():
        if "correction" in name:
            continue
        gradient, values, step = parameter.grad.numpy(), parameter.numpy(), 1e-3
        for index in {tuple(np.unravel_index(np.abs(gradient).argmax(), gradient.shape)), (0,) * gradient.ndim}:
            slopes = []
            for sign in (1, -1):
                changed = values.copy()
                changed[index] += sign * step
                parameter.set_value(changed)
                slopes.append(sign * loss(x.astype(np.float64)))
            parameter.set_value(values)
            assert gradient[index] == pytest.approx(sum(slopes) / (2 * step), rel=5e-3, abs=1e-3), name


def test_a_batch_equals_its_tokens_one_by_one() -> None:
    moe, x = layer(tiny_config()), paddle.to_tensor(inputs())
    with paddle.no_grad():
        together = moe(x)
        for row in range(2):
            for column in range(5):
                assert difference(moe(x[row : row + 1, column : column + 1]), together[row, column]) < 1e-6


def test_experts_that_nobody_chose_do_not_matter() -> None:
    moe, x = layer(tiny_config()), paddle.to_tensor(inputs(1, 1))
    routing: list[Routing] = []
    with paddle.no_grad():
        before = moe(x, routing=routing)
        idle = [expert for expert in range(6) if expert not in routing[0].indices.flatten().tolist()]
        assert len(idle) == 4
        for parameter in (moe.experts["0"].up_gate_proj, moe.experts["0"].down_proj):
            values = parameter.numpy()
            values[idle] = np.nan
            parameter.set_value(values)
        assert difference(moe(x), before) == 0


def test_only_chosen_experts_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    correct = ops.linear

    def counting(x: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
        rows.append(x.shape[0])
        return correct(x, weight)

    bank = ExpertBank(tiny_config(), tiny_config().banks[0], "float32")
    monkeypatch.setattr(sys.modules["ernie45.ops.linear"], "linear", counting)  # the module, not the function
    indices = paddle.to_tensor([[3, 1], [3, 5], [1, 3]])
    bank(paddle.ones([3, HIDDEN]), indices, paddle.ones([3, 2]))
    assert rows == [2, 3, 1, 2, 3, 1]  # two products each for experts 1, 3 and 5


def test_gradient_of_an_idle_expert_is_zero() -> None:
    moe = layer(tiny_config())
    routing: list[Routing] = []
    moe(paddle.to_tensor(inputs(1, 1)), routing=routing).sum().backward()
    used = set(routing[0].indices.flatten().tolist())
    per_expert = np.abs(moe.experts["0"].down_proj.grad.numpy()).sum(axis=(1, 2))
    assert {expert for expert in range(6) if per_expert[expert] > 0} == used


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_experts_with_a_float32_router(dtype: str) -> None:
    moe, x = layer(tiny_config(), dtype=dtype), inputs()
    assert moe.gate.weight.dtype == moe.moe_statics.e_score_correction_bias.dtype == paddle.float32
    assert moe.experts["0"].up_gate_proj.dtype == getattr(paddle, dtype)
    with paddle.no_grad(), custom.reference_only():  # the fused products round activations
        found = moe(paddle.to_tensor(x))
    expected = np.stack([slow_token(moe, token.astype(np.float64))[0] for token in x.reshape(-1, HIDDEN)])
    assert difference(found.reshape([-1, HIDDEN]), expected) < 1e-5


# Banks.


def test_every_token_is_routed_in_its_own_bank() -> None:
    moe, x = layer(tiny_config(**TWO_BANKS)), inputs()
    banks = np.array([[0, 1, 1, 0, 1], [1, 0, 0, 0, 1]])
    routing: list[Routing] = []
    with paddle.no_grad():
        found = moe(paddle.to_tensor(x), paddle.to_tensor(banks), routing)
    tokens = x.reshape(-1, HIDDEN).astype(np.float64)
    expected = [slow_token(moe, token, bank) for token, bank in zip(tokens, banks.ravel(), strict=True)]
    assert difference(found.reshape([-1, HIDDEN]), np.stack([output for output, _ in expected])) < 1e-5
    assert [r.bank for r in routing] == [0, 1]
    for r in routing:
        chosen = [c.tolist() for (_, c), bank in zip(expected, banks.ravel(), strict=True) if bank == r.bank]
        assert r.indices.tolist() == chosen


@pytest.mark.parametrize("bank", [0, 1])
def test_the_other_bank_does_not_matter(bank: int) -> None:
    moe, x = layer(tiny_config(**TWO_BANKS)), paddle.to_tensor(inputs())
    banks = paddle.full([2, 5], bank, "int64")
    with paddle.no_grad():
        before = moe(x, banks)
        if bank == 0:
            assert difference(moe(x), before) == 0
        for parameter in moe.experts[str(1 - bank)].parameters():
            parameter.set_value(paddle.full_like(parameter, float("nan")))
        assert difference(moe(x, banks), before) == 0


def test_gradients_through_two_banks() -> None:
    moe, x = layer(tiny_config(**TWO_BANKS)), inputs(1, 3)
    banks = np.array([1, 0, 1])
    at = paddle.to_tensor(x, stop_gradient=False)
    moe(at, paddle.to_tensor(banks[None])).sum().backward()

    def loss(tokens: np.ndarray) -> float:
        pairs = zip(tokens.reshape(-1, HIDDEN), banks, strict=True)
        return sum(float(slow_token(moe, token, int(bank))[0].sum()) for token, bank in pairs)

    np.testing.assert_allclose(at.grad.numpy(), numeric_gradient(loss, x), rtol=1e-3, atol=1e-4)
    assert np.abs(moe.gate.weight.grad.numpy()).max() > 0 and np.abs(moe.gate.weight_1.grad.numpy()).max() > 0


def test_experts_of_the_second_bank_are_numbered_after_those_of_the_first() -> None:
    config = tiny_config(**TWO_BANKS)
    experts = layer(config).experts["1"].down_proj
    published = dict(published_tensors("ernie.layers.1.mlp.experts.1.down_proj", experts, config.banks))
    assert list(published) == [f"ernie.layers.1.mlp.experts.{i}.down_proj.weight" for i in range(6, 12)]
    assert difference(published["ernie.layers.1.mlp.experts.8.down_proj.weight"], experts[2]) == 0


@pytest.mark.parametrize("normalised", [True, False])
def test_a_bank_that_the_layer_does_not_have_passes_tokens_on(normalised: bool) -> None:
    """Upstream has identities in the place of its experts: the weights' sum times the token, plus shared experts."""
    config = tiny_config(**TWO_BANKS, moe_layer_end_index=[2, 0], moe_norm_gate_logits=normalised)
    moe, x = layer(config), paddle.to_tensor(inputs(1))
    assert list(moe.experts) == ["0"] and hasattr(moe.gate, "weight_1")
    routing: list[Routing] = []
    with paddle.no_grad():
        found = moe(x, paddle.to_tensor([[0, 1, 1, 0, 1]]), routing)
        weights = routing[1].weights.sum(axis=-1, keepdim=True)
        assert difference(found[0, 1:3], x[0, 1:3] * weights[:2] + moe.shared_experts(x[0, 1:3])) < 1e-5
    assert (difference(weights, np.ones([3, 1])) < 1e-6) == normalised
