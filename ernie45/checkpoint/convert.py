"""Writing checkpoints: from a model, or from another checkpoint in the other layout or dtype.

Both stream: a tensor is produced when its turn to be written has come, and dropped afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
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
    settle_config,
)
from ernie45.checkpoint.reader import Source, copy_part, find_sources, raise_problems, to_numpy
from ernie45.checkpoint.writer import DEFAULT_SHARD_BYTES, TensorPlan, write_checkpoint, write_json_atomic
from ernie45.config import ALIASES, PADDLE_DEFAULTS, PT_DEFAULTS, ErnieConfig
from ernie45.errors import CheckpointError

if TYPE_CHECKING:
    from ernie45.models.causal_lm import ErnieForCausalLM

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
METADATA = {PADDLE: {"format": "np"}, PT: {"format": "pt"}}


def save_model(
    model: ErnieForCausalLM, folder: Path, layout: str, dtype: str, max_shard_bytes: int, progress: bool
) -> None:
    """Writes the weights of a model and its config.json and generation_config.json: see `save_pretrained`."""
    _check_choice(layout, dtype)
    tensors = model.state_dict()
    plans = [
        _plan(spec, part, _storage_dtype(spec, dtype), partial(to_numpy, tensors[spec.name]))
        for spec in checkpoint_tensors(model.config, vision=False)
        for part in spec.stored(layout)
    ]
    write_checkpoint(folder, plans, metadata=METADATA[layout], max_shard_bytes=max_shard_bytes, progress=progress)
    write_json_atomic(folder / "config.json", model.config.replace(dtype=dtype).to_dict(layout))
    write_json_atomic(folder / "generation_config.json", model.generation_config.to_dict())


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
    if source.resolve() == destination.resolve():
        raise CheckpointError(f"{destination}: is the source itself; choose another folder to convert to")
    config = ErnieConfig.from_pretrained(source)
    with CheckpointFolder(source) as folder:
        config = settle_config(config, folder.tensors)
        sources, problems = find_sources(folder, checkpoint_tensors(config))
        raise_problems(source, problems, "Download the files again, or correct config.json.")
        layout = layout or detect_layout(folder.tensors, str(source))
        _check_choice(layout, dtype)
        plans = [
            _plan(found.spec, part, _target_dtype(folder, found, dtype), partial(_assemble, folder, found))
            for found in sources
            for part in found.spec.stored(layout)
        ]
        new_config = _converted_config(source, config, layout, dtype)
        used = {part.name for found in sources for part in found.parts}
        plans += [_carry(folder, name) for name in folder.tensors if name not in used]
        write_checkpoint(
            destination, plans, metadata=METADATA[layout], max_shard_bytes=max_shard_bytes, progress=progress
        )
    write_json_atomic(destination / "config.json", new_config)
    _copy_small_files(source, destination)


Values = Callable[[], tuple[np.ndarray, str]]  # a whole -Paddle tensor and its safetensors dtype


def _plan(spec: TensorSpec, part: Part, dtype: str, values: Values) -> TensorPlan:
    def produce() -> np.ndarray:
        array, found = values()
        return convert(np.ascontiguousarray(part.take(array)), found, dtype)

    # In the -Paddle layout `part` is the tensor itself: see TensorSpec.stored.
    return TensorPlan(part.name, dtype, part.shape, produce)


def _assemble(folder: CheckpointFolder, source: Source) -> tuple[np.ndarray, str]:
    """Puts the parts of one tensor together, in the dtype in which they are stored."""
    dtype = _stored_dtype(folder, source)
    whole = np.empty(source.spec.shape, DTYPES[dtype].storage)
    for part in source.parts:
        copy_part(folder, part, whole, dtype)
    return whole, dtype


def _carry(folder: CheckpointFolder, name: str) -> TensorPlan:
    """A tensor that the table of names does not know, as it is."""
    entry = folder.tensors[name]
    return TensorPlan(name, entry.dtype, entry.shape, partial(folder.read, name))


def _stored_dtype(folder: CheckpointFolder, source: Source) -> str:
    dtypes = {folder.tensors[part.name].dtype for part in source.parts}
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def _target_dtype(folder: CheckpointFolder, source: Source, dtype: str | None) -> str:
    return _stored_dtype(folder, source) if dtype is None else _storage_dtype(source.spec, dtype)


def _storage_dtype(spec: TensorSpec, dtype: str) -> str:
    return "F32" if spec.float32 else dtype_from_framework_name(dtype)


def _check_choice(layout: str, dtype: str | None) -> None:
    if layout not in LAYOUTS:
        raise CheckpointError(f"layout {layout!r} is unknown; choose {' or '.join(map(repr, LAYOUTS))}")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise CheckpointError(f"dtype {dtype!r} is not one of checkpoints; choose float32, bfloat16 or float16")


def _converted_config(source: Path, config: ErnieConfig, layout: str, dtype: str | None) -> dict[str, Any]:
    """The source's config.json in the spelling of the layout, with the keys written out whose defaults differ."""
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    new = config.replace(dtype=dtype or config.dtype).to_dict(layout)
    unset = [key for key in new if key in ALWAYS_WRITTEN]
    spelled = {"torch_dtype": "dtype"} if layout == PADDLE else {"dtype": "torch_dtype"}
    content = {spelled.get(key, key): value for key, value in raw.items()}
    for key in ("architectures", "dtype", "torch_dtype"):
        if key in new and (key in content or (dtype is not None and key != "architectures")):
            content[key] = new[key]
    return content | {key: new[key] for key in unset if key not in _canonical(raw)}


def _canonical(raw: dict[str, Any]) -> set[str]:
    nested = raw.get("rope_parameters")
    return {ALIASES.get(key, key) for key in raw} | (set(nested) if isinstance(nested, dict) else set())


def _copy_small_files(source: Path, destination: Path) -> None:
    """Tokenizer, chat template, generation_config.json and the like."""
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
