"""Random weights and models in their published form, packed, and what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ernie45.checkpoint.dtypes import convert
from ernie45.checkpoint.names import checkpoint_tensors, quantised_kind, settle_config
from ernie45.config import ErnieConfig
from ernie45.models.causal_lm import ErnieForCausalLM
from ernie45.ops.packed import PackedWeight
from ernie45.quantization.config import QuantizationConfig
from ernie45.quantization.weights import Quantised, dequantize, pack_pairs, quantize, stored_shapes
from tests.helpers.tiny import DENSE, MOE, as_float32, read_folder, tiny_config, tiny_model, token_ids

KINDS = ("bfloat16", "wint8", "wint4")
CLEAR = 0.005  # difference of two experts' scores that bfloat16 activations do not overcome


@dataclass(frozen=True)
class Published:
    """One matrix as a checkpoint holds it.

    Attributes:
        codes, scales: what `PackedWeight.write` and `write_scales` take; scales is None for bfloat16.
        shape: of the published tensor.
        meaning: float32 [in, out].
    """

    kind: str
    codes: np.ndarray
    scales: np.ndarray | None
    shape: list[int]
    outputs_first: bool
    meaning: np.ndarray


def published(kind: str, inputs: int, outputs: int, outputs_first: bool = False, seed: int = 0) -> Published:
    """A random weight whose every code and scale differs from its neighbours'."""
    generator = np.random.default_rng(seed)
    shape = (outputs, inputs) if outputs_first else (inputs, outputs)
    if kind == "bfloat16":
        codes = convert(generator.standard_normal(shape, dtype=np.float32), "F32", "BF16")
        values = convert(codes, "BF16", "F32")
        return Published(kind, codes, None, list(shape), outputs_first, values.T if outputs_first else values)
    scales_shape = stored_shapes(kind, shape, outputs_first)[1]
    scales = generator.uniform(0.01, 0.1, scales_shape).astype(np.float32)
    if kind == "wint8":
        codes = generator.integers(-127, 128, shape).astype(np.int8)
    else:
        scales = convert(scales * generator.choice([-1, 1], scales_shape).astype(np.float32), "F32", "BF16")
        codes = pack_pairs(generator.integers(-8, 8, (inputs, outputs)).astype(np.int8))
        codes = codes.T.copy() if outputs_first else codes
    values = dequantize(Quantised(kind, shape, codes, scales, outputs_first))
    return Published(kind, codes, scales, list(shape), outputs_first, values.T if outputs_first else values)


def fill(weight: PackedWeight, source: Published, cuts: list[int] | None = None) -> PackedWeight:
    """Writes the rows of a matrix piece by piece, cut at these rows, last piece first; then the scales."""
    edges = [0, *sorted(cuts or []), len(source.codes)]
    for first, last in reversed(list(zip(edges, edges[1:], strict=False))):
        weight.write(source.codes[first:last], first)
    if source.scales is not None:
        weight.write_scales(source.scales)
    return weight


def packed(source: Published) -> PackedWeight:
    return fill(PackedWeight.zeros(source.kind, source.shape, outputs_first=source.outputs_first), source)


VARIANTS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "dense, ungrouped, untied": {**DENSE, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "moe": MOE,
    "moe, nothing shared, no bias, sigmoid": {
        **MOE,
        "moe_num_shared_experts": 0,
        "moe_use_aux_free": False,
        "moe_gate_act": "sigmoid",
    },
    "moe, one expert, ungrouped, tied": {**MOE, "moe_k": 1, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "moe, wider than a panel": {
        **MOE,
        "vocab_size": 131,
        "hidden_size": 80,
        "intermediate_size": 70,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 18,
        "moe_intermediate_size": 67,
        "moe_norm_gate_logits": False,
    },
}


def save_source(folder: Path, keys: dict[str, Any], layout: str = "paddle", dtype: str = "bfloat16") -> Path:
    """A tiny model, saved in the dtype of published ones."""
    model = tiny_model(tiny_config(keys), mtp=bool(keys.get("num_nextn_predict_layers")))
    model.save_pretrained(folder, layout=layout, dtype=dtype, progress=False)
    return folder


def load(folder: Path, kind: str, **options: Any) -> ErnieForCausalLM:
    quantization = None if kind == "bfloat16" else kind
    return ErnieForCausalLM.from_pretrained(folder, quantization=quantization, progress=False, **options)


def meanings(folder: Path, kind: str) -> dict[str, np.ndarray]:
    """What every weight of a bfloat16 folder stands for once it is quantised, float32."""
    stored = read_folder(folder)
    values = {name: as_float32(tensor) for name, tensor in stored.items()}
    if kind != "bfloat16":
        config = settle_config(ErnieConfig.from_pretrained(folder), stored)
        for spec in checkpoint_tensors(config):
            chosen = quantised_kind(spec, QuantizationConfig.uniform(kind))
            if chosen is not None:
                dtype, array = stored[spec.name]
                values[spec.name] = dequantize(quantize(array, dtype, chosen, outputs_first=spec.outputs_first))
    return values


def plain_model(folder: Path, kind: str) -> ErnieForCausalLM:
    """A float32 model with parameters that hold these meanings."""
    values = meanings(folder, kind)
    config = settle_config(ErnieConfig.from_pretrained(folder), values).replace(dtype="float32")
    model = ErnieForCausalLM(config, mtp=bool(config.num_nextn_predict_layers), initialize=False)
    assert model.set_state_dict(values) == ([], [])
    return model.eval()


@paddle.no_grad()
def clear_ids(model: ErnieForCausalLM, rows: int, length: int) -> paddle.Tensor:
    """Token ids [rows, length] for which no router is near a tie: there, rounding may choose other experts."""
    candidates = 256
    ids, routing = token_ids(candidates, length, model.config.vocab_size), []
    model(ids, routing=routing)
    margins = np.full(candidates, np.inf)
    for decision in routing:
        scores, k = decision.probabilities.numpy(), decision.indices.shape[1]
        statics = model.ernie.layers[decision.layer].mlp.moe_statics
        if statics is not None:
            scores = scores + statics.e_score_correction_bias[0].numpy()
        ordered = -np.sort(-scores, axis=-1)
        gaps = (ordered[:, k - 1] - ordered[:, k]).reshape([candidates, length])
        margins = np.minimum(margins, gaps.min(axis=1))
    best = np.argsort(-margins, kind="stable")[:rows]
    assert margins[best].min() > CLEAR, "choose other weights or shorter rows"
    return ids[paddle.to_tensor(best)]
