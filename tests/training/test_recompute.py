"""Recomputation changes memory, not numbers."""

import numpy as np
import paddle
import pytest

from ernie45 import lora
from ernie45.errors import ErnieError
from ernie45.losses import router_losses
from ernie45.models.decoder import DecoderLayer
from ernie45.models.parts import router_weights
from ernie45.models.vision_language import ErnieForConditionalGeneration
from ernie45.training.recompute import LAYERS, keep_activations, recompute
from tests.helpers.tiny import MOE, randomise, tiny_config, tiny_model, token_ids
from tests.helpers.vision import vision_config


def gradients(model, ids):
    """Of the loss and the router losses, by name; and how often a decoder layer ran."""
    calls, forward = [], DecoderLayer.forward
    routing = []
    paddle.seed(3)
    DecoderLayer.forward = lambda self, *args: (calls.append(1), forward(self, *args))[1]
    try:
        loss, _ = model(ids, labels=ids, routing=routing)
        terms = router_losses(routing, router_weights(model), model.config.moe_k, balance=0.1, z=0.1)
        (loss + terms.total).backward()
    finally:
        DecoderLayer.forward = forward
    found = {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return found, len(calls)


@pytest.mark.parametrize("granularity", sorted(LAYERS))
def test_gradients_are_the_same_to_the_bit(granularity):
    model, ids = tiny_model(tiny_config(MOE)), token_ids(2, 9)
    model.train()
    expected, calls = gradients(model, ids)
    layers = recompute(model, granularity)
    found, again = gradients(model, ids)
    assert layers == model.config.num_hidden_layers
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    keep_activations(model)
    assert gradients(model, ids)[1] == calls == 3


def test_layers_do_run_again(monkeypatch):
    model, ids = tiny_model(tiny_config(MOE)), token_ids(1, 5)
    model.train()
    calls, forward = [], DecoderLayer.forward
    monkeypatch.setattr(DecoderLayer, "forward", lambda self, *args: (calls.append(1), forward(self, *args))[1])
    recompute(model, "full")
    model(ids, labels=ids)[0].backward()
    assert len(calls) == 2 * model.config.num_hidden_layers
    calls.clear()
    model.eval()
    model(ids)
    assert len(calls) == model.config.num_hidden_layers


def test_dropout_draws_the_same_numbers_again():
    model, ids = tiny_model(tiny_config(MOE)), token_ids(2, 9)
    lora.apply(model, 4, dropout=0.5)
    for parameter in lora.parameters(model):
        parameter.set_value(paddle.randn(parameter.shape) * 0.1)
    model.train()
    expected, _ = gradients(model, ids)
    recompute(model, "full")
    found, _ = gradients(model, ids)
    assert expected
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_the_vision_tower_too():
    model = randomise(ErnieForConditionalGeneration(vision_config(), initialize=False), 0)
    model.train()
    pixels = np.random.default_rng(0).integers(0, 256, [16, model.vision.patch_bytes]).astype("uint8")

    def tower():
        model.encode_images(paddle.to_tensor(pixels), [[1, 4, 4]]).square().sum().backward()
        return {n: p.grad.numpy().copy() for n, p in model.vision_model.named_parameters()}

    expected = tower()
    for parameter in model.parameters():
        parameter.grad = None
    assert recompute(model, "full") == model.config.num_hidden_layers + model.vision.depth
    found = tower()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_unknown_granularity():
    with pytest.raises(ErnieError, match="recompute_granularity: expected full, full_attn, mlp, found 'core_attn'"):
        recompute(tiny_model(), "core_attn")
