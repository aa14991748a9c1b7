"""Models with weights of 8 and 4 bits on a GPU, with tensors that pretend to be on one.

The product is Paddle's there. Here it is computed from the codes that the layout gives back, in float32, and rounded
once; `tests/ops/test_weight_only.py` compares the layout with Paddle's source.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie45 import lora
from ernie45.errors import CheckpointError, ErnieError
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.ops import PackedWeight, weight_only
from ernie45.ops.weight_only import WeightOnly, WeightOnlyStack
from ernie45.quantization.convert import quantize_checkpoint
from ernie45.quantization.weights import unpack_pairs
from tests.helpers.packed import clear_ids, plain_model, save_source
from tests.helpers.tiny import DENSE, MOE, as_float32, read_folder

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {**DENSE, **WIDE},
    "moe": {**MOE, **WIDE, "moe_intermediate_size": 64},
    "moe, experts too narrow": {**MOE, **WIDE, "moe_intermediate_size": 24},
}


def weight_only_linear(
    x: paddle.Tensor, data: paddle.Tensor, *, weight_scale: paddle.Tensor, weight_dtype: str, **_: Any
) -> paddle.Tensor:
    """What Paddle's operator means."""
    kind = {"int8": "wint8", "int4": "wint4"}[weight_dtype]
    codes, scales = weight_only.published(kind, data.numpy()), weight_scale.astype("float32")
    if kind == "wint4":
        codes, scales = unpack_pairs(codes, x.shape[-1]), scales.repeat_interleave(64, axis=0)
    return paddle.matmul(x.astype("float32"), paddle.to_tensor(codes).astype("float32") * scales).astype(x.dtype)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paddle.device, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(paddle.device, "cuda", types.SimpleNamespace(get_device_capability=lambda: (9, 0)))
    monkeypatch.setattr(weight_only.quant, "weight_only_linear", weight_only_linear)


def load(folder: Path, **options: Any) -> ErnieForCausalLM:
    return ErnieForCausalLM.from_pretrained(folder, progress=False, **options)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("kind", ["wint8", "wint4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_what_the_weights_stand_for(variant: str, kind: str, tmp_path: Path) -> None:
    """From a folder that is quantised already, and quantised on the way: the same weights, the same numbers."""
    source, quantised = save_source(tmp_path / "bfloat16", VARIANTS[variant]), tmp_path / kind
    quantize_checkpoint(source, quantised, kind, embedding="bfloat16", progress=False)
    plain = plain_model(source, kind)
    ids = clear_ids(plain, 2, 9)
    with paddle.no_grad():
        first, second = load(quantised)(ids), load(source, quantization=kind)(ids)
        expected = plain(ids)
    np.testing.assert_array_equal(first.astype("float32").numpy(), second.astype("float32").numpy())
    error = (first.astype("float32") - expected).abs()
    assert float(error.mean()) < 0.02 * float(expected.std()) and float(error.max()) < 0.2 * float(expected.std())


@pytest.mark.usefixtures("gpu")
def test_what_is_held_in_few_bits(tmp_path: Path) -> None:
    """Linear weights and experts of sizes that the kernels take; the rest are parameters without a gradient."""
    held = {}
    for variant, keys in VARIANTS.items():
        model = load(save_source(tmp_path / variant, keys), quantization="wint4")
        held[variant] = {name.rsplit(".", 2)[-2] for name, w in model.weights().items() if isinstance(w, WeightOnly)}
        assert not any(isinstance(weight, PackedWeight) for weight in model.weights().values())
        assert all(parameter.stop_gradient for parameter in model.parameters()) and model.is_packed
        assert model.ernie.embed_tokens.weight.dtype == paddle.bfloat16 and model.ernie.fused is None
    matrices = {"qkv_proj", "o_proj", "up_gate_proj", "down_proj"}
    assert held == dict.fromkeys(VARIANTS, matrices)
    assert isinstance(model.ernie.layers[1].mlp.experts["0"].up_gate_proj, WeightOnlyStack)
    assert isinstance(model.ernie.layers[1].mlp.experts["0"].down_proj, paddle.Tensor)
    with pytest.raises(ErnieError, match="train: the weights are packed for inference"):
        model.train()
    with pytest.raises(ErnieError, match="on a GPU, weights of 8 and 4 bits are for inference; .* pack=False"):
        lora.apply(model)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("options", [{"pack": False}, {"dtype": "float32"}])
def test_weights_can_be_parameters_instead(options: dict[str, Any], tmp_path: Path) -> None:
    source = save_source(tmp_path / "bfloat16", VARIANTS["moe"])
    quantize_checkpoint(source, tmp_path / "wint8", "wint8", progress=False)
    model = load(tmp_path / "wint8", **options)
    assert not model.is_packed and all(isinstance(weight, paddle.Tensor) for weight in model.weights().values())
    model.train()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("kind", ["wint8", "wint4"])
def test_what_was_read_can_be_written(kind: str, tmp_path: Path) -> None:
    """The same codes, and in another dtype what they stand for."""
    source = save_source(tmp_path / "bfloat16", VARIANTS["moe"])
    quantize_checkpoint(source, tmp_path / "once", kind, embedding="bfloat16", progress=False)
    model = load(tmp_path / "once")
    model.save_pretrained(tmp_path / "twice", progress=False)
    first, second = read_folder(tmp_path / "once"), read_folder(tmp_path / "twice")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if kind == "wint8" and name.endswith("weight_scale"):
            np.testing.assert_allclose(as_float32(second[name]), as_float32(tensor), rtol=2**-8, err_msg=name)
        else:
            np.testing.assert_array_equal(second[name][1], tensor[1], err_msg=name)
    assert {name for name in model.state_dict() if name.endswith("quant_weight")} == {
        name for name in first if name.endswith("quant_weight")
    }
    model.save_pretrained(tmp_path / "wide", dtype="float32", progress=False)
    assert not any("quant" in name for name in read_folder(tmp_path / "wide"))
    # An embedding that was read from 8 bits is written in full; experts that were not held in few bits cannot be.
    quantize_checkpoint(source, tmp_path / "embedding", kind, progress=False)
    load(tmp_path / "embedding").save_pretrained(tmp_path / "back", progress=False)
    assert read_folder(tmp_path / "back").keys() == first.keys()
    narrow = save_source(tmp_path / "narrow", VARIANTS["moe, experts too narrow"])
    with pytest.raises(CheckpointError, match=r"save_pretrained: .*down_proj.* give a dtype= .* `ernie45 quantize`"):
        load(narrow, quantization=kind).save_pretrained(tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()
