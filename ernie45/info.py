"""What `ernie45 info` prints: the architecture, its size by part, and whether this machine can hold it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ernie45.checkpoint.dtypes import DTYPES, dtype_from_framework_name
from ernie45.checkpoint.folder import INDEX_NAME, CheckpointFolder, read_index
from ernie45.checkpoint.hub import resolve_folder
from ernie45.checkpoint.names import (
    TensorSpec,
    bytes_left_out,
    checkpoint_tensors,
    settle_config,
    text_part_tensors,
    weight_bytes,
)
from ernie45.config import ErnieConfig
from ernie45.errors import ErnieError
from ernie45.memory import available_bytes, format_bytes
from ernie45.quantization.config import KINDS, QuantizationConfig

DTYPE_CHOICES = ("float32", "bfloat16", "float16")
# Most specific first: every published name contains one of these.
PUBLISHED_CONFIGS = {
    "VL-424B": "ernie-4.5-vl-424b-a47b",
    "VL-28B": "ernie-4.5-vl-28b-a3b",
    "300B": "ernie-4.5-300b-a47b",
    "21B": "ernie-4.5-21b-a3b",
    "0.3B": "ernie-4.5-0.3b",
}


def find_config(name: str) -> tuple[ErnieConfig, str]:
    """Finds the architecture without downloading weights.

    Args:
        name: a checkpoint folder, a config.json, a published name (read from the configurations that come with the
            package, without network), or another name on a hub (downloads config.json alone).

    Returns:
        the config, and where it was found.
    """
    path = Path(name)
    if not path.exists():
        packaged = _packaged_config(name)
        if packaged is not None:
            return ErnieConfig.from_pretrained(packaged), f"configs/{packaged.name}"
        path = resolve_folder(name, allow_patterns=["config.json", "*.safetensors.index.json"])
    config, stored = ErnieConfig.from_pretrained(path), _stored_names(path)
    return (settle_config(config, stored) if stored else config), str(path)


def describe(name: str) -> str:
    """The report on one model as text.

    Raises:
        ErnieError: there is no such model, or its config is broken.
    """
    config, where = find_config(name)
    specs = checkpoint_tensors(config)
    sections = [
        f"{name}  ({config.model_type}, {where})",
        _table(["architecture", ""], _architecture(config)),
        _table(["part", "parameters", "share", "used per token"], _parameters(config, specs)),
        _table(["dtype", "weights", "KV cache per token", "here"], _memory(config, specs)),
    ]
    if config.vision_config is not None:
        saved = format_bytes(bytes_left_out(config, config.dtype))
        sections.append(f"loaded with ErnieForCausalLM: the text part alone, {saved} less in {config.dtype}")
        rows = _memory(config, text_part_tensors(config))
        sections.append(_table(["text part", "weights", "KV cache per token", "here"], rows))
    return "\n\n".join(sections)


def active_parameters(config: ErnieConfig, spec: TensorSpec) -> float:
    """Parameters of this tensor that a text token uses: moe_k of E experts, nothing that only pictures need."""
    if spec.group in ("vision experts", "vision tower", "adapter", "multi-token prediction"):
        return 0
    if spec.group in ("experts", "text experts"):
        return spec.size * config.moe_k / config.banks[0].num_experts
    return spec.size


def cache_bytes_per_token(config: ErnieConfig, dtype: str) -> int:
    """Bytes of keys and values that one token adds to the cache of all layers."""
    item = DTYPES[dtype_from_framework_name(dtype)].item_size
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * item


def _architecture(config: ErnieConfig) -> list[list[str]]:
    moe_layers = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)]
    rows = [
        ["layers", f"{config.num_hidden_layers}" + (f", {len(moe_layers)} with experts" if moe_layers else "")],
        ["hidden size", f"{config.hidden_size}"],
        [
            "attention",
            f"{config.num_attention_heads} heads, {config.num_key_value_heads} kv heads of {config.head_dim}",
        ],
        ["feed-forward width", f"{config.intermediate_size}"],
        ["vocabulary", f"{config.vocab_size}, head {'tied' if config.tie_word_embeddings else 'untied'}"],
        ["context", f"{config.max_position_embeddings} tokens, RoPE base {config.rope_theta:g}"],
    ]
    for number, bank in enumerate(config.banks):
        kind = "experts" if len(config.banks) == 1 else ("text experts", "vision experts")[number]
        layers = f"layers {bank.first_layer} to {bank.last_layer}"
        rows.append([kind, f"{bank.num_experts} of width {bank.intermediate_size}, {config.moe_k} per token, {layers}"])
    if config.banks:
        bias = {True: "yes", False: "no", None: "decided by the files"}[config.moe_use_aux_free]
        rows.append(["shared experts", f"{config.moe_num_shared_experts}"])
        rows.append(["correction bias", bias])
    vision = config.vision
    if vision is not None:
        rows.append(["vision tower", f"{vision.depth} blocks of width {vision.width}, {vision.num_heads} heads"])
        block = f"{vision.merge_size} x {vision.merge_size} patches of {vision.patch_size} x {vision.patch_size} pixels"
        rows.append(["adapter", f"a token for {block}, or of {vision.frames_per_token} frames of a video"])
    rows.append(["multi-token prediction", f"{config.num_nextn_predict_layers or 0} blocks"])
    stored = config.quantization_config
    if stored is not None:
        experts = f", experts {stored.moe_quant_type}" if config.banks else ""
        kinds = f"linear {stored.dense_quant_type}{experts}, embedding and head {stored.embedding_quant_type}"
        rows.append(["stored quantised", kinds])
    return rows


def _parameters(config: ErnieConfig, specs: Iterable[TensorSpec]) -> list[list[str]]:
    sizes: dict[str, int] = {}
    active: dict[str, float] = {}
    for spec in specs:
        sizes[spec.group] = sizes.get(spec.group, 0) + spec.size
        active[spec.group] = active.get(spec.group, 0) + active_parameters(config, spec)
    total = sum(sizes.values())
    rows = [[group, f"{n:,}", f"{n / total:.1%}", f"{round(active[group]):,}"] for group, n in sizes.items()]
    return [*rows, ["total", f"{total:,}", "100.0%", f"{round(sum(active.values())):,}"]]


def _memory(config: ErnieConfig, specs: list[TensorSpec]) -> list[list[str]]:
    rows = [_memory_row(config, dtype, weight_bytes(specs, dtype), dtype) for dtype in DTYPE_CHOICES]
    for kind in KINDS:
        weights = weight_bytes(specs, "bfloat16", QuantizationConfig.uniform(kind))
        rows.append(_memory_row(config, kind, weights, "bfloat16"))
    return rows


def _memory_row(config: ErnieConfig, label: str, weights: int, cache_dtype: str) -> list[str]:
    free = available_bytes()
    fits = "unknown" if free is None else ("fits" if weights < free else "does not fit")
    note = "" if free is None else f" in {format_bytes(free)} of free memory"
    cache = format_bytes(cache_bytes_per_token(config, cache_dtype))
    return [label, format_bytes(weights), cache, fits + note]


def _table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    numeric = [all(re.fullmatch(r"[\d,.%]+", row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, numeric, strict=True)
        )
        for row in [head, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


def _packaged_config(name: str) -> Path | None:
    here = Path(__file__).parent
    folder = here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
    stem = name.lower().removesuffix(".json")
    if (folder / f"{stem}.json").is_file():
        return folder / f"{stem}.json"
    if "ernie-4.5" not in stem:
        return None
    for mark, config in PUBLISHED_CONFIGS.items():
        if re.search(rf"ernie-4\.5-{re.escape(mark.lower())}(-|$)", stem):
            return folder / f"{config}.json"
    return None


def _stored_names(path: Path) -> list[str]:
    """Names of the tensors in a checkpoint folder, from headers or, without weights, from the index; or none."""
    if not path.is_dir():
        return []
    if any(path.glob("*.safetensors")):
        try:
            with CheckpointFolder(path) as folder:
                return list(folder.tensors)
        except ErnieError:
            return []
    if not (path / INDEX_NAME).is_file():
        return []
    return [name for names in read_index(path / INDEX_NAME, []).values() for name in names]
