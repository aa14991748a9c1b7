"""The reference checkpoints: outputs computed by an independent implementation, and what a wrong model would give.

Each mutation test builds in one plausible mistake and shows that the comparison with the reference notices it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import Tensor

from ernie45 import ops
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.models.layers import Attention
from ernie45.models.moe import Routing
from tests.helpers.tiny import as_float32, difference, greedy, read_folder

TOLERANCE = 1e-4
NOTICEABLE = 100 * TOLERANCE  # a mistake has to change the logits by at least this much

kinds = pytest.mark.parametrize("kind", ["dense", "moe"])
layouts = pytest.mark.parametrize("layout", ["paddle", "pt"])


def expected(reference: Path, kind: str) -> dict[str, np.ndarray]:
    with np.load(reference / kind / "reference.npz") as file:
        return dict(file)


def load(reference: Path, kind: str, layout: str = "paddle") -> ErnieForCausalLM:
    return ErnieForCausalLM.from_pretrained(reference / kind / layout, dtype="float32", progress=False)


def error(model: ErnieForCausalLM, data: dict[str, np.ndarray]) -> float:
    """Largest difference of any logit from the reference."""
    with paddle.no_grad():
        return difference(model(paddle.to_tensor(data["input_ids"])), data["logits"])


def routing_of(model: ErnieForCausalLM, data: dict[str, np.ndarray]) -> list[Routing]:
    routing: list[Routing] = []
    with paddle.no_grad():
        model(paddle.to_tensor(data["input_ids"]), routing=routing)
    return routing


def correction_biases(model: ErnieForCausalLM) -> list[Tensor]:
    return [tensor for name, tensor in model.state_dict().items() if name.endswith("e_score_correction_bias")]


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@kinds
@layouts
def test_logits_and_loss(reference: Path, kind: str, layout: str) -> None:
    data = expected(reference, kind)
    loss, logits = load(reference, kind, layout)(
        paddle.to_tensor(data["input_ids"]), labels=paddle.to_tensor(data["shifted_labels"])
    )
    assert logits.dtype == paddle.float32
    assert difference(logits, data["logits"]) < TOLERANCE
    assert abs(float(loss) - float(data["loss"])) < 1e-5


@kinds
@layouts
def test_greedy_continuation(reference: Path, kind: str, layout: str) -> None:
    data = expected(reference, kind)
    found = greedy(load(reference, kind, layout), data["greedy_prompt"], data["greedy_ids"].shape[1])
    assert found.tolist() == data["greedy_ids"].tolist()


@kinds
@layouts
def test_left_padded_batch_continues_as_the_reference_row_by_row(reference: Path, kind: str, layout: str) -> None:
    data = expected(reference, kind)
    steps = data["batch_greedy"].shape[1]
    model = load(reference, kind, layout)
    assert not data["batch_mask"].all(), "the reference batch has padding"
    together = greedy(model, data["batch_ids"], steps, data["batch_mask"])
    assert together.tolist() == data["batch_greedy"].tolist()
    for ids, mask, continuation in zip(data["batch_ids"], data["batch_mask"], data["batch_greedy"], strict=True):
        alone = greedy(model, ids[None, mask.astype(bool)], steps)
        assert alone[0].tolist() == continuation.tolist()


@layouts
def test_router_logits_and_choice(reference: Path, layout: str) -> None:
    data = expected(reference, "moe")
    model = load(reference, "moe", layout)
    routing = routing_of(model, data)
    biases = [bias.numpy()[0] for bias in correction_biases(model)]
    assert len(routing) == len(biases) == len(data["router_logits"])
    for found, logits, bias in zip(routing, data["router_logits"], biases, strict=True):
        assert difference(found.logits, logits) < TOLERANCE
        probabilities = softmax(logits)
        chosen = np.argsort(-(probabilities + bias), axis=-1)[:, : model.config.moe_k]
        assert np.sort(found.indices.numpy(), axis=-1).tolist() == np.sort(chosen, axis=-1).tolist()
        weights = np.take_along_axis(probabilities, found.indices.numpy(), axis=-1)
        assert difference(found.weights, weights / weights.sum(axis=-1, keepdims=True)) < 1e-5


def test_bfloat16_weights_stay_close_and_keep_the_router_exact(reference: Path) -> None:
    data = expected(reference, "moe")
    model = ErnieForCausalLM.from_pretrained(reference / "moe" / "paddle", dtype="bfloat16", progress=False)
    scale = np.abs(data["logits"]).max()
    assert TOLERANCE < error(model, data) < 0.1 * scale
    stored = read_folder(reference / "moe" / "paddle")
    for name, tensor in model.state_dict().items():
        is_router = ".mlp.gate." in name or name.endswith("correction_bias")
        assert tensor.dtype == (paddle.float32 if is_router else paddle.bfloat16), name
        if is_router:
            assert tensor.numpy().tobytes() == stored[name][1].tobytes()


# Mistakes that the comparison must notice.


def test_notices_a_dropped_correction_bias(reference: Path) -> None:
    model = load(reference, "moe")
    for bias in correction_biases(model):
        bias.zero_()
    assert error(model, expected(reference, "moe")) > NOTICEABLE


def test_notices_a_correction_bias_in_the_weights(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    correct = ops.moe_gate

    def biased(logits: Tensor, bias: Tensor, *options: object) -> tuple[Tensor, Tensor, Tensor]:
        probabilities, indices, _ = correct(logits, bias, *options)
        weights = paddle.take_along_axis(probabilities + bias, indices, axis=-1)
        return probabilities, indices, weights / weights.sum(axis=-1, keepdim=True)

    monkeypatch.setattr(ops, "moe_gate", biased)
    assert error(load(reference, "moe"), expected(reference, "moe")) > NOTICEABLE


def test_notices_a_correction_bias_rounded_to_bfloat16(reference: Path) -> None:
    """The 42 tokens of the reference do not tell; among 2048 others the choice is closer than the rounding."""
    data = {"input_ids": np.random.default_rng(0).integers(3, 640, (8, 256))}
    stored = read_folder(reference / "moe" / "paddle")
    names = [name for name in stored if name.endswith("e_score_correction_bias")]

    def disagreements(model: ErnieForCausalLM) -> int:
        """Tokens whose experts are not the top k of softmax(logits) + the bias in the file, in float64."""
        count = 0
        for name, found in zip(names, routing_of(model, data), strict=True):
            scores = softmax(found.logits.numpy().astype(np.float64)) + as_float32(stored[name])
            chosen = np.argsort(-scores, axis=-1)[:, : model.config.moe_k]
            count += (np.sort(found.indices.numpy(), axis=-1) != np.sort(chosen, axis=-1)).any(axis=-1).sum()
        return count

    model = load(reference, "moe")
    assert disagreements(model) == 0
    for bias in correction_biases(model):
        bias.set_value(bias.astype("bfloat16").astype("float32"))
    assert disagreements(model) > 0


def test_notices_unnormalised_expert_weights(reference: Path) -> None:
    model = load(reference, "moe")
    for layer in model.ernie.layers[1:]:
        layer.mlp.config = model.config.replace(moe_norm_gate_logits=False)
    assert error(model, expected(reference, "moe")) > NOTICEABLE


def test_notices_a_router_in_bfloat16(reference: Path) -> None:
    model = load(reference, "moe")
    for name, tensor in model.state_dict().items():
        if name.endswith("mlp.gate.weight"):
            tensor.set_value(tensor.astype("bfloat16").astype("float32"))
    assert error(model, expected(reference, "moe")) > TOLERANCE


@kinds
def test_notices_rope_that_rotates_halves(reference: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = paddle.chunk(x, 2, axis=-1)
        return paddle.concat([first * cos - second * sin, second * cos + first * sin], axis=-1)

    monkeypatch.setattr(ops, "rope", half_split)
    assert error(load(reference, kind), expected(reference, kind)) > NOTICEABLE


@kinds
def test_notices_gate_and_up_swapped(reference: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    correct = ops.swiglu
    monkeypatch.setattr(ops, "swiglu", lambda x: correct(paddle.concat(paddle.chunk(x, 2, axis=-1)[::-1], axis=-1)))
    assert error(load(reference, kind), expected(reference, kind)) > NOTICEABLE


@kinds
def test_notices_qkv_grouped_by_kv_head(reference: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def grouped(self: Attention, fused: Tensor) -> list[Tensor]:
        """PaddleFormers' layout in memory: for each kv head its query heads, one K and one V."""
        batch, sequence = fused.shape[:2]
        queries = self.num_heads // self.num_kv_heads
        groups = fused.reshape([batch, sequence, self.num_kv_heads, queries + 2, self.head_dim])
        parts = paddle.split(groups, [queries, 1, 1], axis=3)
        return [part.flatten(2, 3) for part in parts]

    monkeypatch.setattr(Attention, "split", grouped)
    assert error(load(reference, kind), expected(reference, kind)) > NOTICEABLE
