"""Tiny models with random weights, and small tools around them, for tests of several modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ernie45.checkpoint.dtypes import DTYPES, convert
from ernie45.checkpoint.safetensors_file import SafetensorsFile
from ernie45.checkpoint.writer import TensorPlan, write_checkpoint
from ernie45.config import ErnieConfig
from ernie45.models.cache import KVCache
from ernie45.models.causal_lm import ErnieForCausalLM

DENSE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}
MOE: dict[str, Any] = {
    **DENSE,
    "num_hidden_layers": 3,
    "tie_word_embeddings": False,
    "moe_num_experts": 6,
    "moe_k": 2,
    "moe_intermediate_size": 10,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_interval": 1,
    "moe_use_aux_free": True,
}


def tiny_config(base: dict[str, Any] = MOE, **changes: Any) -> ErnieConfig:
    return ErnieConfig(**{**base, **changes})


def tiny_model(
    config: ErnieConfig | None = None, seed: int = 0, dtype: str = "float32", mtp: bool = False
) -> ErnieForCausalLM:
    """A model whose every parameter is random, norms and correction bias included, so that each one matters."""
    return randomise(ErnieForCausalLM(config or tiny_config(), dtype=dtype, mtp=mtp, initialize=False), seed)


def randomise(model: paddle.nn.Layer, seed: int) -> Any:
    """The same model with random values in every parameter."""
    generator = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        values = generator.standard_normal(parameter.shape, dtype=np.float32)
        if parameter.ndim == 1:
            values = 0.2 * values + (0 if name.endswith(".bias") else 1)
        elif parameter.stop_gradient:
            values = 0.05 * values
        else:
            values = values / np.sqrt(parameter.shape[-2])
        parameter.set_value(paddle.to_tensor(values).astype(parameter.dtype))
    return model.eval()


def token_ids(batch: int, length: int, vocab_size: int = DENSE["vocab_size"], seed: int = 1) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(seed).integers(3, vocab_size, (batch, length)))


@paddle.no_grad()
def greedy(
    model: ErnieForCausalLM, ids: np.ndarray, steps: int, attention_mask: np.ndarray | None = None
) -> np.ndarray:
    """[batch, steps] most likely continuations, one token at a time with a cache: no code of `generation` is used."""
    cache = KVCache(model.config, capacity=4)
    mask = None if attention_mask is None else paddle.to_tensor(attention_mask)
    logits = model(paddle.to_tensor(ids), attention_mask=mask, cache=cache)
    chosen = []
    for _ in range(steps):
        chosen.append(logits[:, -1].argmax(axis=-1))
        logits = model(chosen[-1].unsqueeze(1), cache=cache)
    return paddle.stack(chosen, axis=1).numpy()


def difference(left: Any, right: Any) -> float:
    """Largest absolute difference of two tensors or arrays."""
    return float(np.abs(_array(left) - _array(right)).max())


def _array(value: Any) -> np.ndarray:
    return value.astype("float32").numpy() if isinstance(value, paddle.Tensor) else np.asarray(value)


Stored = dict[str, tuple[str, np.ndarray]]  # safetensors dtype and the array that holds the bits, by tensor name


def read_folder(folder: Path) -> Stored:
    """Every tensor of all safetensors files in a folder, copied."""
    stored: Stored = {}
    for path in sorted(folder.glob("*.safetensors")):
        with SafetensorsFile(path) as file:
            stored.update({name: (entry.dtype, file.read(name).copy()) for name, entry in file.tensors.items()})
    return stored


def write_folder(folder: Path, config: dict[str, Any], tensors: Stored, max_shard_bytes: int = 10**9) -> Path:
    """A checkpoint folder with exactly these tensors and this config.json."""
    plans = [TensorPlan(name, dtype, array.shape, _constant(array)) for name, (dtype, array) in tensors.items()]
    write_checkpoint(folder, plans, metadata={"format": "np"}, max_shard_bytes=max_shard_bytes, progress=False)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _constant(array: np.ndarray) -> Any:
    return lambda: array


def as_float32(stored: tuple[str, np.ndarray]) -> np.ndarray:
    return convert(stored[1], stored[0], "F32")


def cast(stored: tuple[str, np.ndarray], dtype: str) -> tuple[str, np.ndarray]:
    """The same values in another safetensors dtype."""
    return dtype, convert(stored[1], stored[0], dtype)


def same_bits(left: Stored, right: Stored) -> bool:
    """Whether two folders hold the same names, dtypes, shapes and bits."""
    return left.keys() == right.keys() and all(
        left[name][0] == right[name][0]
        and left[name][1].shape == right[name][1].shape
        and left[name][1].tobytes() == right[name][1].tobytes()
        for name in left
    )


def empty_like(dtype: str, *shape: int) -> tuple[str, np.ndarray]:
    return dtype, np.zeros(shape, DTYPES[dtype].storage)
