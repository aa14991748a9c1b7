"""From a checked checkpoint into the weights of a model, one tensor at a time.

A weight in memory is a parameter or packed for the CPU kernels, and one in the file is a float tensor or codes with
scales; this module knows the ways from each to each, so that memory never holds more than the model and one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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
from ernie45.quantization.config import QuantizationConfig
from ernie45.quantization.weights import Quantised, dequantize, quantize


def load(
    folder: CheckpointFolder,
    sources: Sequence[Source | QuantisedSource],
    weights: Mapping[str, Tensor | PackedWeight],
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
            quantised = _quantised(folder, source, quantization)
            weight = weights[source.spec.name]
            if isinstance(weight, PackedWeight):
                _fill_packed(folder, source, quantised, weight)
            else:
                _fill_parameter(folder, source, quantised, weight)
            for name in source.names:
                folder.release(name)
                bar.update(folder.tensors[name].byte_count)


def _quantised(
    folder: CheckpointFolder, source: Source | QuantisedSource, quantization: QuantizationConfig | None
) -> Quantised | None:
    if isinstance(source, QuantisedSource):
        return read_quantised(folder, source)
    kind = None if quantization is None else quantised_kind(source.spec, quantization)
    if kind is None:
        return None
    values, dtype = _values(folder, source)
    try:
        return quantize(values, dtype, kind, outputs_first=source.spec.outputs_first)
    except ErnieError as error:
        raise CheckpointError(f"{folder.path}: {source.spec.name}: {error}") from error


def _fill_packed(
    folder: CheckpointFolder, source: Source | QuantisedSource, quantised: Quantised | None, weight: PackedWeight
) -> None:
    if quantised is not None:
        _write_rows(weight, quantised.codes, lambda rows: rows)
        weight.write_scales(quantised.scales)
        return
    assert isinstance(source, Source)
    values, dtype = _values(folder, source)
    _write_rows(weight, values, lambda rows: convert(rows, dtype, "BF16"))


def _fill_parameter(
    folder: CheckpointFolder, source: Source | QuantisedSource, quantised: Quantised | None, parameter: Tensor
) -> None:
    with ParameterStorage(parameter) as storage:
        if quantised is not None:
            storage.array[...] = convert(dequantize(quantised), "F32", storage.dtype)
            return
        assert isinstance(source, Source)
        for part in source.parts:
            copy_part(folder, part, storage.array, storage.dtype)


def _values(folder: CheckpointFolder, source: Source) -> tuple[np.ndarray, str]:
    """A whole -Paddle tensor and its dtype: a view of the file where it is stored like that."""
    part = source.parts[0]
    if len(source.parts) > 1 or part.transposed or part.columns is not None:
        return assemble(folder, source)
    return folder.read(part.name), folder.tensors[part.name].dtype


def _write_rows(weight: PackedWeight, values: np.ndarray, prepare: Callable[[np.ndarray], np.ndarray]) -> None:
    """Packs a few MB of rows at a time; the number of rows is even, as pairs of inputs lie together."""
    step = 64 * max(1, CHUNK_BYTES // max(1, 64 * values[:1].nbytes))
    for first in range(0, len(values), step):
        weight.write(prepare(values[first : first + step]), first)
