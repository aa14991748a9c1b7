"""Adapters in a folder, under the names that upstream gives them: `lora_config.json` and `peft_model.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie45.checkpoint.dtypes import FLOAT_DTYPES, convert
from ernie45.checkpoint.folder import CheckpointFolder
from ernie45.checkpoint.reader import raise_problems, to_numpy
from ernie45.checkpoint.safetensors_file import SafetensorsFile
from ernie45.checkpoint.safetensors_header import parse_json
from ernie45.checkpoint.writer import TensorPlan, write_json_atomic, write_tensors_atomic
from ernie45.errors import CheckpointError, ErnieError
from ernie45.lora.adapters import A, B, attach, of, refuse_adapted, remove
from ernie45.lora.config import LoraConfig
from ernie45.models.pretrained import PretrainedModel

CONFIG_NAME = "lora_config.json"
WEIGHTS_NAME = "peft_model.safetensors"
PICKLED_NAME = "lora_model_state.pdparams"
SHARDS = "peft_model-*-of-*.safetensors"
# Upstream's other kinds of adapters, which these weights would mean something else for.
OTHER_KINDS = ("enable_lora_list", "lora_use_mixer", "use_mora", "nola", "pissa", "do_qat", "trainable_bias")


def save(model: PretrainedModel, folder: str | Path, *, progress: bool = True) -> None:
    """Writes the adapters of a model into a folder, which upstream's tools read too.

    Each file replaces an older one whole. `lora_config.json` is written last: a folder in which it is missing was
    interrupted.

    Args:
        folder: created if needed.
        progress: show a progress bar when writing takes longer than a second.

    Raises:
        ErnieError: the model has no adapters.
        CheckpointError: too little disk space, or the folder cannot be written.
    """
    folder, config = Path(folder), of(model).config
    plans = [
        TensorPlan(name, "F32", tuple(tensor.shape), partial(_values, tensor))
        for name, tensor in tensors(model).items()
    ]
    try:
        (folder / CONFIG_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder / CONFIG_NAME}: cannot be replaced: {error.strerror or error}") from error
    write_tensors_atomic(folder / WEIGHTS_NAME, plans, metadata={"format": "np"}, progress=progress)
    write_json_atomic(folder / CONFIG_NAME, to_dict(config))


def load(model: PretrainedModel, folder: str | Path) -> list[str]:
    """Puts the adapters of a folder on a model that has none; everything else is frozen, as by `apply`.

    Args:
        folder: as `save` or upstream wrote it.

    Returns:
        The published names of the modules with an adapter.

    Raises:
        ErnieError: the model has adapters already.
        CheckpointError: lists everything that is wrong: files that are missing or damaged, tensors that are missing,
            have the wrong shape or belong to another model. The model is unchanged then.
    """
    refuse_adapted(model)
    folder = Path(folder)
    config = _read_config(folder / CONFIG_NAME)
    with _open(folder) as file:
        try:
            names = attach(model, config)
        except ErnieError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        own = tensors(model)
        problems = list(_problems(own, file))
        if problems:
            remove(model)
            raise_problems(folder, problems, "Were these adapters trained on another model?")
        for name, tensor in own.items():
            values = convert(file.read(name), file.tensors[name].dtype, "F32")
            tensor.copy_(paddle.to_tensor(values), True)
    return names


def tensors(model: PretrainedModel) -> dict[str, Tensor]:
    """A and B by published name, those of stacked experts as views."""
    return {name: tensor for name, tensor in model.weights().items() if name.endswith((f".{A}", f".{B}"))}


def _values(tensor: Tensor) -> np.ndarray:
    return to_numpy(tensor)[0]


def to_dict(config: LoraConfig) -> dict[str, Any]:
    """The content of `lora_config.json`, with upstream's keys."""
    return {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "rslora": config.rslora,
        "scaling": config.scale,
        "target_modules": list(config.targets),
        "dtype": "float32",
        "merge_weights": False,
        "tensor_parallel_degree": -1,
    }


def _read_config(path: Path) -> LoraConfig:
    try:
        raw = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a folder with adapters needs it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(raw, Mapping) or "r" not in raw or "target_modules" not in raw:
        raise CheckpointError(f"{path}: expected an object with r, lora_alpha and target_modules")
    other = [key for key in OTHER_KINDS if raw.get(key)]
    if other:
        raise CheckpointError(f"{path}: sets {', '.join(other)}; only plain LoRA and rsLoRA are supported")
    targets = raw["target_modules"]
    try:
        return LoraConfig(
            raw["r"],
            raw.get("lora_alpha", 8),  # what the key's absence means upstream
            (targets,) if isinstance(targets, str) else tuple(targets or ()),
            raw.get("rslora", False),
            raw.get("lora_dropout", 0.0),
        )
    except (ErnieError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _open(folder: Path) -> SafetensorsFile | CheckpointFolder:
    if (folder / WEIGHTS_NAME).exists():
        return SafetensorsFile(folder / WEIGHTS_NAME)
    if any(folder.glob(SHARDS)):
        return CheckpointFolder(folder)
    if (folder / PICKLED_NAME).exists():
        raise CheckpointError(
            f"{folder}: has {PICKLED_NAME}, a pickle, which can run any code when it is opened and is never read here; "
            f"save the adapters as safetensors ({WEIGHTS_NAME})"
        )
    raise CheckpointError(f"{folder}: has no {WEIGHTS_NAME}; is this a folder with adapters?")


def _problems(own: Mapping[str, Tensor], file: SafetensorsFile | CheckpointFolder) -> list[str]:
    found = file.tensors
    problems = [f"{name}: missing, expected {list(own[name].shape)}" for name in own if name not in found]
    problems += [f"{name}: no place for it in this model" for name in found if name not in own]
    for name in own.keys() & found.keys():
        entry, shape = found[name], list(own[name].shape)
        if list(entry.shape) != shape:
            problems.append(f"{name}: shape {list(entry.shape)}, expected {shape}")
        elif entry.dtype not in FLOAT_DTYPES:
            problems.append(f"{name}: dtype {entry.dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
    return sorted(problems)
