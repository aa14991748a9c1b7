"""Reading a checkpoint: check everything first, then one tensor at a time; `loading` puts them into a model.

It hides the layout of the files, their dtype, and how a tensor gets into a parameter without a second copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import paddle
from paddle import Tensor

from ernie45.checkpoint.dtypes import DTYPES, FLOAT_DTYPES, convert, dtype_from_framework_name
from ernie45.checkpoint.folder import CheckpointFolder
from ernie45.checkpoint.names import (
    CODES_SUFFIX,
    PADDLE,
    Part,
    QuantisedTensor,
    TensorSpec,
    aliases,
    detect_layout,
    quantised_kind,
    quantised_tensors,
    weight_bytes,
)
from ernie45.errors import CheckpointError
from ernie45.memory import available_bytes, format_bytes
from ernie45.quantization.config import QuantizationConfig
from ernie45.quantization.weights import Quantised

CHUNK_BYTES = 8 * 2**20
# What a process needs beside the weights: activations, buffers of the reader, Paddle itself.
HEADROOM_BYTES = 200 * 2**20


@dataclass(frozen=True)
class Source:
    """Where one parameter comes from: the tensors of the file that hold it, oriented as found."""

    spec: TensorSpec
    parts: tuple[Part, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of the folder."""
        return tuple(part.name for part in self.parts)


@dataclass(frozen=True)
class QuantisedSource:
    """Where one quantised weight comes from: names of the tensors with its codes and scales, in that kind."""

    spec: TensorSpec
    kind: str
    codes: str
    scales: str

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of the folder."""
        return (self.codes, self.scales)


def find_sources(folder: CheckpointFolder, specs: Iterable[TensorSpec]) -> tuple[list[Source], list[str]]:
    """Matches the expected tensors with those of the folder.

    Returns:
        sources, problems: problems name every tensor that is missing or has the wrong shape or dtype.

    Raises:
        CheckpointError: the folder's layout is unknown.
    """
    layout = detect_layout(folder.tensors, str(folder.path))
    quantised = next((name for name in folder.tensors if name.endswith(CODES_SUFFIX)), None)
    if quantised is not None:
        raise CheckpointError(
            f"{folder.path}: holds quantised weights ({quantised}), but its config.json has no quantization_config; "
            "download config.json again"
        )
    sources: list[Source] = []
    problems: list[str] = []
    for spec in specs:
        source, found = _find_source(folder, spec, layout)
        sources.append(source)
        problems += found
    return sources, problems


def quantised_sources(
    folder: CheckpointFolder, specs: Iterable[TensorSpec], quantization: QuantizationConfig
) -> tuple[list[Source | QuantisedSource], list[str]]:
    """Matches the expected tensors with those of a folder with quantised -Paddle names.

    Returns:
        sources, problems: one source for each spec, a `QuantisedSource` where `quantization` says so; problems name
            every tensor that is missing or has the wrong shape or dtype.
    """
    sources: list[Source | QuantisedSource] = []
    problems: list[str] = []
    for spec in specs:
        kind = quantised_kind(spec, quantization)
        if kind is None:
            source, found = _find_source(folder, spec, PADDLE)
            sources.append(source)
            problems += found
            continue
        codes, scales = quantised_tensors(spec, kind)
        sources.append(QuantisedSource(spec, kind, codes.name, scales.name))
        problems += [problem for tensor in (codes, scales) if (problem := _quantised_problem(tensor, folder))]
    return sources, problems


def read_quantised(folder: CheckpointFolder, source: QuantisedSource) -> Quantised:
    """The codes and scales of one weight, read-only views of the mapped files."""
    codes, scales = folder.read(source.codes), folder.read(source.scales)
    shape = (source.spec.shape[0], source.spec.shape[1])
    return Quantised(source.kind, shape, codes, scales, source.spec.outputs_first)


def memory_problem(
    specs: Iterable[TensorSpec], dtype: str, quantization: QuantizationConfig | None = None
) -> str | None:
    """Says what is wrong if weights of this dtype, some of them quantised, do not fit into free memory."""
    needed, free = weight_bytes(specs, dtype, quantization) + HEADROOM_BYTES, available_bytes()
    if free is None or needed <= free or paddle.device.get_device() != "cpu":
        return None
    kind = dtype if quantization is None else "quantised"
    return (
        f"not enough memory: {kind} weights and {format_bytes(HEADROOM_BYTES)} of working space need "
        f"{format_bytes(needed)}, {format_bytes(free)} are free; close other programs, "
        'choose dtype="bfloat16" or a smaller model'
    )


def copy_part(folder: CheckpointFolder, part: Part, destination: np.ndarray, dtype: str) -> None:
    """Copies one tensor of the folder into its place in a -Paddle array of storage `dtype`, a few MB at a time."""
    entry = folder.tensors[part.name]
    values = folder.read(part.name)[: part.used_rows]
    step = max(1, CHUNK_BYTES // max(1, values[:1].nbytes))
    for first in range(0, len(values), step):
        part.put(destination, convert(values[first : first + step], entry.dtype, dtype), first)
    folder.release(part.name)


def to_numpy(tensor: Tensor) -> tuple[np.ndarray, str]:
    """A tensor's values and their safetensors dtype; on a CPU a view of the tensor's own memory."""
    dtype = dtype_from_framework_name(str(tensor.dtype).removeprefix("paddle."))
    return np.asarray(_Memory(tensor.detach().cpu().contiguous(), DTYPES[dtype].storage)), dtype


class _Memory:
    """What numpy needs to see a tensor on a CPU; a view by DLPack would be read-only before numpy 2."""

    def __init__(self, tensor: Tensor, storage: np.dtype):
        self.tensor = tensor  # keeps the memory
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(tensor.shape),
            "typestr": storage.str,
            "data": (tensor.data_ptr(), False),
        }


class ParameterStorage:
    """A writable array that is the parameter (CPU), or that is copied into it at the end (other devices)."""

    def __init__(self, parameter: Tensor):
        self.parameter = parameter
        self.host = parameter.detach().cpu()
        self.array, self.dtype = to_numpy(self.host)

    def __enter__(self) -> ParameterStorage:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None and not self.parameter.place.is_cpu_place():
            self.parameter.copy_(self.host, True)  # not set_value, which would give a view memory of its own


def _find_source(folder: CheckpointFolder, spec: TensorSpec, layout: str) -> tuple[Source, list[str]]:
    parts = [_as_found(part, spec, folder) for part in spec.stored(layout)]
    return Source(spec, tuple(parts)), [problem for part in parts if (problem := _problem(part, folder))]


def _quantised_problem(tensor: QuantisedTensor, folder: CheckpointFolder) -> str | None:
    entry = folder.tensors.get(tensor.name)
    if entry is None:
        return f"{tensor.name}: missing, expected {tensor.dtype} {list(tensor.shape)}"
    if (entry.dtype, entry.shape) != (tensor.dtype, tensor.shape):
        found, expected = f"{entry.dtype} {list(entry.shape)}", f"{tensor.dtype} {list(tensor.shape)}"
        return f"{tensor.name}: {found} in {entry.file.name}, expected {expected}"
    return None


def _as_found(part: Part, spec: TensorSpec, folder: CheckpointFolder) -> Part:
    """The part under the name that it has in the folder; turned round if both orientations are published."""
    part = replace(part, name=next((name for name in aliases(part.name) if name in folder.tensors), part.name))
    entry = folder.tensors.get(part.name)
    if entry is None or not spec.either_orientation or entry.shape == part.shape:
        return part
    if entry.shape == part.shape[::-1]:
        return replace(part, shape=entry.shape, transposed=not part.transposed)
    return part


def _problem(part: Part, folder: CheckpointFolder) -> str | None:
    entry = folder.tensors.get(part.name)
    if entry is None:
        return f"{part.name}: missing, expected shape {list(part.shape)}"
    others = [name for name in aliases(part.name) if name in folder.tensors and name != part.name]
    if others:
        return f"{part.name}: stored again as {others[0]}; keep one of them"
    if entry.shape != part.shape:
        return f"{part.name}: shape {list(entry.shape)} in {entry.file.name}, expected {list(part.shape)}"
    if entry.dtype not in FLOAT_DTYPES:
        return f"{part.name}: dtype {entry.dtype} in {entry.file.name}, expected one of {', '.join(FLOAT_DTYPES)}"
    return None


def raise_problems(where: str | Path, problems: list[str], advice: str) -> None:
    """Raises one error that lists all problems, if there are any."""
    if not problems:
        return
    shown = [*problems[:20], *([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])]
    raise CheckpointError(f"{where}: {len(problems)} problem(s): " + "; ".join(shown) + f". {advice}")
