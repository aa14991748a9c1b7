"""`ernie45 quantize`: a checkpoint in 8 or 4 bits, written while it is read, one weight at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from ernie45.checkpoint.convert import (
    METADATA,
    assemble,
    carry,
    converted_config,
    copy_small_files,
    plan_part,
    refuse_same_folder,
    stored_dtype,
)
from ernie45.checkpoint.folder import CheckpointFolder
from ernie45.checkpoint.names import (
    PADDLE,
    checkpoint_tensors,
    quantised_kind,
    quantised_tensors,
    settle_config,
)
from ernie45.checkpoint.reader import Source, find_sources, raise_problems
from ernie45.checkpoint.writer import DEFAULT_SHARD_BYTES, TensorPlan, write_checkpoint, write_json_atomic
from ernie45.config import ErnieConfig
from ernie45.errors import CheckpointError, ErnieError
from ernie45.quantization.config import WINT8, QuantizationConfig
from ernie45.quantization.weights import quantize


def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    kind: str,
    *,
    embedding: str = WINT8,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
) -> tuple[int, int]:
    """Writes a checkpoint with quantised weights under the published quantised -Paddle names.

    Linear weights and experts are quantised to `kind`, embedding and head as `embedding` says. Router and correction
    bias are float32, vision tower and adapter bfloat16; norms and what the table of names does not know stay as they
    are. Tokenizer files and other small ones are copied.

    Args:
        source: a checkpoint folder that is not quantised, in either layout.
        destination: another folder; a checkpoint already there is replaced.
        kind: "wint8" or "wint4".
        embedding: "wint8", "wint4" or "bfloat16".
        max_shard_bytes: larger files are split.
        progress: show a progress bar.

    Returns:
        before, after: bytes of all tensors of the source, and of the destination.

    Raises:
        CheckpointError: lists everything wrong with the source, names a weight that holds NaN or infinity, or says
            why the destination cannot be written.
        ConfigError: config.json is missing or broken, or `kind` or `embedding` is unknown.
    """
    source, destination = Path(source), Path(destination)
    quantization = QuantizationConfig.uniform(kind, embedding)
    refuse_same_folder(source, destination)
    config = ErnieConfig.from_pretrained(source)
    if config.quantization_config is not None:
        raise CheckpointError(f"{source}: is quantised already; quantise the checkpoint that it was made from")
    with CheckpointFolder(source) as folder:
        config = settle_config(config, folder.tensors)
        sources, problems = find_sources(folder, checkpoint_tensors(config))
        raise_problems(source, problems, "Download the files again, or correct config.json.")
        plans = [plan for found in sources for plan in _plans(folder, found, quantization)]
        plans += [carry(folder, name) for name in _unknown_names(folder, sources, config)]
        new_config = converted_config(source, config, PADDLE, None)
        write_checkpoint(
            destination, plans, metadata=METADATA[PADDLE], max_shard_bytes=max_shard_bytes, progress=progress
        )
        before = folder.total_bytes
    write_json_atomic(
        destination / "config.json", {**new_config, "quantization_config": quantization.to_dict(), "is_quantized": True}
    )
    copy_small_files(source, destination)
    return before, sum(plan.byte_count for plan in plans)


def _plans(folder: CheckpointFolder, source: Source, quantization: QuantizationConfig) -> list[TensorPlan]:
    kind = quantised_kind(source.spec, quantization)
    if kind is not None:
        return _Quantising(folder, source, kind).plans()
    dtype = _dtype_of_the_rest(folder, source)
    return [
        plan_part(source.spec, part, dtype, partial(assemble, folder, source)) for part in source.spec.stored(PADDLE)
    ]


def _dtype_of_the_rest(folder: CheckpointFolder, source: Source) -> str:
    if source.spec.float32:
        return "F32"
    kept = ("embedding", "head", "vision tower", "adapter")
    return "BF16" if source.spec.group in kept else stored_dtype(folder, source)


def _unknown_names(folder: CheckpointFolder, sources: list[Source], config: ErnieConfig) -> list[str]:
    """Tensors that are none of the model's; the copy of a tied embedding, as large as all the rest, is dropped."""
    used = {name for source in sources for name in source.names}
    copies = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return [name for name in folder.tensors if name not in used | copies]


class _Quantising:
    """One weight, quantised when its codes are written; its scales wait for their turn, which comes next."""

    def __init__(self, folder: CheckpointFolder, source: Source, kind: str):
        self.folder = folder
        self.source = source
        self.kind = kind
        self.scales: np.ndarray | None = None

    def plans(self) -> list[TensorPlan]:
        codes, scales = quantised_tensors(self.source.spec, self.kind)
        return [
            TensorPlan(codes.name, codes.dtype, codes.shape, self.produce_codes),
            TensorPlan(scales.name, scales.dtype, scales.shape, self.produce_scales),
        ]

    def produce_codes(self) -> np.ndarray:
        spec = self.source.spec
        with _weight(self.folder, self.source) as (weight, dtype):
            try:
                quantised = quantize(weight, dtype, self.kind, outputs_first=spec.outputs_first)
            except ErnieError as error:
                raise CheckpointError(f"{self.folder.path}: {spec.name}: {error}") from error
        self.scales = quantised.scales
        return quantised.codes

    def produce_scales(self) -> np.ndarray:
        assert self.scales is not None  # the writer produces tensors in the order of their plans
        scales, self.scales = self.scales, None
        return scales


@contextlib.contextmanager
def _weight(folder: CheckpointFolder, source: Source) -> Iterator[tuple[np.ndarray, str]]:
    """The -Paddle tensor and its dtype: a view of the file where it holds just that."""
    (part, *others) = source.parts
    if others or not part.is_whole:
        yield assemble(folder, source)
    else:
        yield folder.read(part.name), folder.tensors[part.name].dtype
        folder.release(part.name)
