"""Writing checkpoints: from a model, or from another checkpoint in the other layout or dtype.

Both stream: a tensor is produced when its turn to be written has come, and dropped afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ernie45.checkpoint.dtypes import DTYPES, convert, dtype_from_framework_name
from ernie45.checkpoint.folder import CheckpointFolder
from ernie45.checkpoint.names import (
    LAYOUTS,
    PADDLE,
    PT,
    Part,
    TensorSpec,
    checkpoint_tensors,
    detect_layout,
    quantised_kind,
    quantised_tensors,
    settle_config,
)
from ernie45.checkpoint.reader import (
    QuantisedSource,
    Source,
    copy_part,
    find_sources,
    quantised_sources,
    raise_problems,
    read_quantised,
    to_numpy,
)
from ernie45.checkpoint.writer import DEFAULT_SHARD_BYTES, TensorPlan, write_checkpoint, write_json_atomic
from ernie45.config import ALIASES, PADDLE_DEFAULTS, PT_DEFAULTS, ErnieConfig
from ernie45.errors import CheckpointError
from ernie45.ops.packed import BFLOAT16, PackedWeight
from ernie45.ops.weight_only import WeightOnly
from ernie45.quantization.weights import Quantised, dequantize

if TYPE_CHECKING:
    from paddle import Tensor

    from ernie45.models.pretrained import PretrainedModel

SMALL_FILE_BYTES = 100 * 2**20
# Keys for which the readers of the two layouts have different defaults, and what transformers tells a model by.
ALWAYS_WRITTEN = {
    *PADDLE_DEFAULTS,
    *PT_DEFAULTS,
    "tie_word_embeddings",
    "num_key_value_heads",
    "head_dim",
    "model_type",
    "architectures",
}
QUANTISATION_KEYS = ("quantization_config", "is_quantized")
METADATA = {PADDLE: {"format": "np"}, PT: {"format": "pt"}}


def save_model(
    model: PretrainedModel, folder: Path, layout: str, dtype: str | None, max_shard_bytes: int, progress: bool
) -> None:
    """Writes the weights of a model and its config.json and generation_config.json: see `save_pretrained`."""
    _check_choice(layout, dtype)
    quantization = model.config.quantization_config if dtype is None else None
    if quantization is not None and layout != PADDLE:
        raise CheckpointError('quantised weights have names in the "paddle" layout only; give a dtype= for "pt"')
    dtype = dtype or model.dtype
    weights = model.weights()
    plans = []
    for spec in model.tensors():
        weight = weights[spec.name]
        kind = None if quantization is None else quantised_kind(spec, quantization)
        if kind is None:
            target, values = _storage_dtype(spec, dtype), partial(_held_values, weight)
            plans += [plan_part(spec, part, target, values) for part in spec.stored(layout)]
        elif not isinstance(weight, PackedWeight | WeightOnly):
            raise CheckpointError(
                f"save_pretrained: {spec.name} is held in {model.dtype} on this device; give a dtype= to write what "
                "the weights stand for, or use `ernie45 quantize`"
            )
        else:
            codes, scales = quantised_tensors(spec, kind)
            plans.append(TensorPlan(codes.name, codes.dtype, codes.shape, weight.codes))
            plans.append(TensorPlan(scales.name, scales.dtype, scales.shape, weight.scale_values))
    write_checkpoint(folder, plans, metadata=METADATA[layout], max_shard_bytes=max_shard_bytes, progress=progress)
    config = model.config.replace(dtype=dtype, quantization_config=quantization)
    write_json_atomic(folder / "config.json", config.to_dict(layout))
    write_json_atomic(folder / "generation_config.json", model.generation_config.to_dict())


def _held_values(weight: Tensor | PackedWeight | WeightOnly) -> tuple[np.ndarray, str]:
    """The values of a weight in memory, and their dtype."""
    if not isinstance(weight, PackedWeight | WeightOnly):
        return to_numpy(weight)
    if weight.kind == BFLOAT16:
        return weight.codes(), "BF16"
    shape = (weight.shape[0], weight.shape[1])
    quantised = Quantised(weight.kind, shape, weight.codes(), weight.scale_values(), weight.outputs_first)
    return dequantize(quantised), "F32"


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    layout: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Rewrites a checkpoint folder in another layout or dtype.

    Tensors that the table of names does not know are carried along as they are, and so are tokenizer files and
    other small files. Without `dtype` every tensor keeps its own, and converting back gives the same bits.
    Quantised weights become what their codes stand for, in the dtype that must be given then.

    Args:
        source: a checkpoint folder, text or vision-language.
        destination: another folder; a checkpoint already there is replaced.
        layout: "paddle" or "pt"; None keeps the source's.
        dtype: "bfloat16", "float16" or "float32" for all but router and correction bias, which stay float32.
        max_shard_bytes: larger files are split.
        progress: show a progress bar.

    Raises:
        CheckpointError: lists everything wrong with the source, or says why the destination cannot be written.
        ConfigError: the source's config.json is missing or broken.
    """
    source, destination = Path(source), Path(destination)
    refuse_same_folder(source, destination)
    config = ErnieConfig.from_pretrained(source)
    with CheckpointFolder(source) as folder:
        config = settle_config(config, folder.tensors)
        layout = layout or detect_layout(folder.tensors, str(source))
        _check_choice(layout, dtype)
        sources = _find_float_sources(folder, config, dtype)
        plans = [
            plan_part(found.spec, part, _target_dtype(folder, found, dtype), partial(_values, folder, found))
            for found in sources
            for part in found.spec.stored(layout)
        ]
        new_config = converted_config(source, config, layout, dtype)
        used = {name for found in sources for name in found.names}
        plans += [carry(folder, name) for name in folder.tensors if name not in used]
        write_checkpoint(
            destination, plans, metadata=METADATA[layout], max_shard_bytes=max_shard_bytes, progress=progress
        )
    write_json_atomic(destination / "config.json", new_config)
    copy_small_files(source, destination)


def refuse_same_folder(source: Path, destination: Path) -> None:
    """Raises a CheckpointError if the two are one folder."""
    if source.resolve() == destination.resolve():
        raise CheckpointError(f"{destination}: is the source itself; choose another folder to write to")


def _find_float_sources(
    folder: CheckpointFolder, config: ErnieConfig, dtype: str | None
) -> Sequence[Source | QuantisedSource]:
    sources: Sequence[Source | QuantisedSource]
    if config.quantization_config is None:
        sources, problems = find_sources(folder, checkpoint_tensors(config))
    elif dtype is None:
        raise CheckpointError(f"{folder.path}: is quantised; give the dtype to turn it into (--dtype)")
    else:
        sources, problems = quantised_sources(folder, checkpoint_tensors(config), config.quantization_config)
    raise_problems(folder.path, problems, "Download the files again, or correct config.json.")
    return sources


Values = Callable[[], tuple[np.ndarray, str]]  # a whole -Paddle tensor and its safetensors dtype


def plan_part(spec: TensorSpec, part: Part, dtype: str, values: Values) -> TensorPlan:
    """One part of a -Paddle tensor, as a tensor of its own in that dtype."""

    def produce() -> np.ndarray:
        array, found = values()
        return convert(np.ascontiguousarray(part.take(array)), found, dtype)

    # In the -Paddle layout `part` is the tensor itself: see TensorSpec.stored.
    return TensorPlan(part.name, dtype, part.shape, produce)


def _values(folder: CheckpointFolder, source: Source | QuantisedSource) -> tuple[np.ndarray, str]:
    if isinstance(source, Source):
        return assemble(folder, source)
    weight = dequantize(read_quantised(folder, source))
    for name in source.names:
        folder.release(name)
    return weight, "F32"


def assemble(folder: CheckpointFolder, source: Source, dtype: str | None = None) -> tuple[np.ndarray, str]:
    """Puts the parts of one tensor together: the -Paddle tensor, in `dtype` or that in which they are stored."""
    dtype = dtype or stored_dtype(folder, source)
    whole = np.empty(source.spec.shape, DTYPES[dtype].storage)
    for part in source.parts:
        copy_part(folder, part, whole, dtype)
    return whole, dtype


def carry(folder: CheckpointFolder, name: str) -> TensorPlan:
    """A tensor that the table of names does not know, as it is."""
    entry = folder.tensors[name]
    return TensorPlan(name, entry.dtype, entry.shape, partial(folder.read, name))


def stored_dtype(folder: CheckpointFolder, source: Source) -> str:
    """The dtype of all parts of a tensor; float32 where they differ."""
    dtypes = {folder.tensors[part.name].dtype for part in source.parts}
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def _target_dtype(folder: CheckpointFolder, source: Source | QuantisedSource, dtype: str | None) -> str:
    if dtype is None and isinstance(source, Source):
        return stored_dtype(folder, source)
    return _storage_dtype(source.spec, str(dtype))


def _storage_dtype(spec: TensorSpec, dtype: str) -> str:
    return "F32" if spec.float32 else dtype_from_framework_name(dtype)


def _check_choice(layout: str, dtype: str | None) -> None:
    if layout not in LAYOUTS:
        raise CheckpointError(f"layout {layout!r} is unknown; choose {' or '.join(map(repr, LAYOUTS))}")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise CheckpointError(f"dtype {dtype!r} is not one of checkpoints; choose float32, bfloat16 or float16")


def converted_config(source: Path, config: ErnieConfig, layout: str, dtype: str | None) -> dict[str, Any]:
    """The source's config.json in the spelling of the layout, with the keys written out whose defaults differ.

    What it says about quantisation is left out.
    """
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    new = config.replace(dtype=dtype or config.dtype).to_dict(layout)
    unset = [key for key in new if key in ALWAYS_WRITTEN]
    spelled = {"torch_dtype": "dtype"} if layout == PADDLE else {"dtype": "torch_dtype"}
    content = {spelled.get(key, key): value for key, value in raw.items() if key not in QUANTISATION_KEYS}
    for key in ("architectures", "dtype", "torch_dtype"):
        if key in new and (key in content or (dtype is not None and key != "architectures")):
            content[key] = new[key]
    return content | {key: new[key] for key in unset if key not in _canonical(raw)}


def _canonical(raw: dict[str, Any]) -> set[str]:
    nested = raw.get("rope_parameters")
    return {ALIASES.get(key, key) for key in raw} | (set(nested) if isinstance(nested, dict) else set())


def copy_small_files(source: Path, destination: Path) -> None:
    """Tokenizer, chat template, generation_config.json, preprocessor_config.json and the like."""
    for file in sorted(source.iterdir()):
        is_weights = file.name.endswith((".safetensors", ".safetensors.index.json"))
        if file.is_file() and not is_weights and file.name != "config.json" and file.stat().st_size < SMALL_FILE_BYTES:
            _copy_atomically(file, destination / file.name)


def _copy_atomically(source: Path, destination: Path) -> None:
    partial_copy = destination.with_name(destination.name + ".partial")
    try:
        shutil.copyfile(source, partial_copy)
        os.replace(partial_copy, destination)
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot be written: {error.strerror or error}") from error
    finally:
        partial_copy.unlink(missing_ok=True)
