"""Writes a checkpoint as a GGUF file, the format of llama.cpp, so that it can be measured on the same weights.

llama.cpp's architectures `ernie4_5` and `ernie4_5-moe` rotate neighbouring pairs, as ERNIE 4.5 does, and take Q, K, V,
gate and up as they are in the -PT layout: no row has to move. The file has no vocabulary, since it is fed with ids.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ernie45.checkpoint.dtypes import DTYPES
from ernie45.checkpoint.folder import CheckpointFolder
from ernie45.checkpoint.names import Part, checkpoint_tensors, settle_config
from ernie45.checkpoint.reader import Source, copy_part, find_sources, raise_problems
from ernie45.config import ErnieConfig
from ernie45.errors import ErnieError

# What stands in a -PT name, and what llama.cpp calls it.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.moe_statics.e_score_correction_bias": "exp_probs_b",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: -PT tensors stacked along a new first axis (experts), or a single one as it is."""

    name: str
    parts: tuple[tuple[Source, Part], ...]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.parts[0][1].shape
        if self.name.endswith("exp_probs_b.bias"):
            return shape[1:]  # [1, experts]: one bank
        return (len(self.parts), *shape) if self.stacked else shape

    @property
    def dtype(self) -> str:
        """Vectors and the router are float32, as llama.cpp wants them."""
        return "F32" if len(self.shape) == 1 or self.parts[0][0].spec.float32 else "BF16"

    @property
    def byte_count(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].item_size


def write_gguf(source: str | Path, destination: str | Path, *, progress: bool = True) -> None:
    """Writes the weights of a checkpoint folder, in either layout, in bfloat16.

    Raises:
        ErnieError: the package gguf is missing, or the model is one that llama.cpp has no architecture for.
        CheckpointError: the folder cannot be read.
    """
    try:
        import gguf
    except ImportError:
        raise ErnieError("writing a GGUF file needs the package gguf: pip install gguf") from None
    logging.getLogger("gguf").setLevel(logging.WARNING)
    with CheckpointFolder(source) as folder:
        config = settle_config(ErnieConfig.from_pretrained(source), folder.tensors)
        if config.vision_config is not None:
            raise ErnieError(f"{source}: llama.cpp has no architecture for vision-language ERNIE 4.5 models")
        sources, problems = find_sources(folder, checkpoint_tensors(config, mtp=False))
        raise_problems(source, problems, "Download the files again, or correct config.json.")
        tensors = _tensors(sources)
        partial = Path(f"{destination}.partial")
        writer = gguf.GGUFWriter(partial, "ernie4_5-moe" if config.banks else "ernie4_5")
        _describe(writer, config)
        types = {"F32": gguf.GGMLQuantizationType.F32, "BF16": gguf.GGMLQuantizationType.BF16}
        for tensor in tensors:
            storage = DTYPES[tensor.dtype].storage
            writer.add_tensor_info(tensor.name, tensor.shape, storage, tensor.byte_count, types[tensor.dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total, what = sum(tensor.byte_count for tensor in tensors), f"Writing {Path(destination).name}"
        with tqdm(total=total, unit="B", unit_scale=True, desc=what, delay=1, disable=not progress) as bar:
            for tensor in tensors:
                writer.write_tensor_data(_values(folder, tensor))
                bar.update(tensor.byte_count)
        writer.close()
    os.replace(partial, destination)


def _describe(writer: Any, config: ErnieConfig) -> None:
    """The hyperparameters."""
    writer.add_file_type(32)  # mostly bfloat16
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for bank in config.banks:
        writer.add_expert_count(bank.num_experts)
        writer.add_expert_used_count(config.moe_k)
        writer.add_expert_feed_forward_length(bank.intermediate_size)
        writer.add_leading_dense_block_count(bank.first_layer)
        writer.add_interleave_moe_layer_step(config.moe_layer_interval)
        writer.add_expert_shared_count(config.moe_num_shared_experts)
        writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)


def _tensors(sources: list[Source]) -> list[_Tensor]:
    """Every tensor of the file; the experts of a layer are one."""
    found: dict[str, list[tuple[Source, Part]]] = {}
    for source in sources:
        for part in source.spec.parts:
            found.setdefault(gguf_name(part.name), []).append((source, part))
    return [_Tensor(name, tuple(parts), "_exps." in name) for name, parts in found.items()]


def gguf_name(name: str) -> str:
    """What llama.cpp calls a -PT tensor; all experts of a layer have the same name."""
    stem, _, kind = name.rpartition(".")
    if name.endswith("e_score_correction_bias"):
        stem, kind = name, "bias"
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    layer, _, rest = stem.removeprefix("model.layers.").partition(".")
    if rest.startswith("mlp.experts."):
        projection = rest.rpartition(".")[2].removesuffix("_proj")
        return f"blk.{layer}.ffn_{projection}_exps.{kind}"
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def _values(folder: CheckpointFolder, tensor: _Tensor) -> np.ndarray:
    """The tensor's numbers, bfloat16 as bit patterns."""
    parts = [_read(folder, source, part, tensor.dtype) for source, part in tensor.parts]
    return (np.stack(parts) if tensor.stacked else np.ascontiguousarray(parts[0])).reshape(tensor.shape)


def _read(folder: CheckpointFolder, source: Source, part: Part, dtype: str) -> np.ndarray:
    """One -PT tensor, through the -Paddle tensor that it is a part of."""
    whole = np.empty(source.spec.shape, DTYPES[dtype].storage)
    for stored in source.parts:
        copy_part(folder, stored, whole, dtype)
    return part.take(whole)
