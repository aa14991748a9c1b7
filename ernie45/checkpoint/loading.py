"""From a checked checkpoint into the weights of a model, one tensor at a time.

A weight in memory is a parameter, packed for the CPU kernels or of few bits for those of a GPU, and one in the file
is a float tensor or codes with scales; this module knows the ways from each to each, so that memory never holds more
than the model and one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from paddle import Tensor
from tqdm import tqdm

from ernie45.checkpoint.convert import assemble
from ernie45.checkpoint.dtypes import convert
from ernie45.checkpoint.folder import CheckpointFolder
from ernie45.checkpoint.names import quantised_kind
from ernie45.checkpoint.reader import CHUNK_BYTES, ParameterStorage, QuantisedSource, Source, copy_part, read_quantised
from ernie45.errors import CheckpointError, ErnieError
from ernie45.ops.packed import PackedWeight
from ernie45.ops.weight_only import WeightOnly
from ernie45.quantization.config import QuantizationConfig
from ernie45.quantization.weights import Quantised, dequantize, quantize


def load(
    folder: CheckpointFolder,
    sources: Sequence[Source | QuantisedSource],
    weights: Mapping[str, Tensor | PackedWeight | WeightOnly],
    quantization: QuantizationConfig | None,
    progress: bool,
) -> None:
    """Fills weights from the folder, converting or quantising them, and drops each tensor once it is read.

    Args:
        folder: the checkpoint.
        sources: where each weight comes from.
        weights: by -Paddle name. A parameter gets the values that its quantised weight stands for.
        quantization: how float tensors of the folder are quantised; None: they are not.
        progress: show a progress bar when it takes longer than a second.

    Raises:
        CheckpointError: a weight that is to be quantised holds NaN or infinity.
    """
    total = sum(folder.tensors[name].byte_count for source in sources for name in source.names)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc=f"Loading {folder.path.name}", delay=1, disable=not progress
    ) as bar:
        for source in sources:
            weight = weights[source.spec.name]
            kind = _kind(source, quantization)
            if kind is None:
                assert isinstance(source, Source)
                _fill(folder, source, weight)
            else:
                _fill_quantised(folder, source, kind, weight)
            for name in source.names:
                folder.release(name)
                bar.update(folder.tensors[name].byte_count)


def _kind(source: Source | QuantisedSource, quantization: QuantizationConfig | None) -> str | None:
    """How the weight is quantised in memory or in the file; None: it is not."""
    if isinstance(source, QuantisedSource):
        return source.kind
    return None if quantization is None else quantised_kind(source.spec, quantization)


def _fill(folder: CheckpointFolder, source: Source, weight: Tensor | PackedWeight | WeightOnly) -> None:
    if isinstance(weight, Tensor):
        with ParameterStorage(weight) as storage:
            for part in source.parts:
                copy_part(folder, part, storage.array, storage.dtype)
        return
    values, dtype = _values(folder, source, "BF16")
    for first, rows in _pieces(folder, source, values):
        weight.write(convert(rows, dtype, "BF16"), first)


def _fill_quantised(
    folder: CheckpointFolder,
    source: Source | QuantisedSource,
    kind: str,
    weight: Tensor | PackedWeight | WeightOnly,
) -> None:
    pieces = _read_pieces(folder, source) if isinstance(source, QuantisedSource) else _quantise(folder, source, kind)
    if isinstance(weight, Tensor):
        with ParameterStorage(weight) as storage:
            for first, piece in pieces:
                values = dequantize(piece)
                storage.array[first : first + len(values)] = convert(values, "F32", storage.dtype)
        return
    scales = []
    for first, piece in pieces:
        for row, rows in _pieces(folder, source, piece.codes):
            weight.write(rows, first + row)
        scales.append(piece.scales)
    weight.write_scales(np.concatenate(scales))


def _read_pieces(folder: CheckpointFolder, source: QuantisedSource) -> Iterator[tuple[int, Quantised]]:
    yield 0, read_quantised(folder, source)


def _quantise(folder: CheckpointFolder, source: Source, kind: str) -> Iterator[tuple[int, Quantised]]:
    """The quantised weight with the row of the tensor at which it begins: whole, or in pieces where rows are outputs,
    which have their own scales. (Only the embedding is both so large and like that.)"""
    values, dtype = _values(folder, source)
    outputs_first = source.spec.outputs_first
    try:
        for first, rows in _pieces(folder, source, values) if outputs_first else [(0, values)]:
            yield first, quantize(rows, dtype, kind, outputs_first=outputs_first)
    except ErnieError as error:
        raise CheckpointError(f"{folder.path}: {source.spec.name}: {error}") from error


def _values(folder: CheckpointFolder, source: Source, dtype: str | None = None) -> tuple[np.ndarray, str]:
    """A whole -Paddle tensor and its dtype: a view of the file where it is stored like that, else put together in
    `dtype` (None: the dtype of the file)."""
    part = source.parts[0]
    if len(source.parts) > 1 or not part.is_whole:
        return assemble(folder, source, dtype)
    return folder.read(part.name), folder.tensors[part.name].dtype


def _pieces(
    folder: CheckpointFolder, source: Source | QuantisedSource, values: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """A few MB of rows at a time, and the first of them; the pages of the file are let go behind them.

    The number of rows is a multiple of 64, because inputs lie together in pairs, fours and groups.
    """
    step = 64 * max(1, CHUNK_BYTES // max(1, 64 * values[:1].nbytes))
    for first in range(0, len(values), step):
        yield first, values[first : first + step]
        for name in source.names:
            folder.release(name)
