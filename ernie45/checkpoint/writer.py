"""Writing a checkpoint: safetensors shards and their index, one tensor in memory at a time, all or nothing.

Names, dtypes and shapes are known before the first tensor is produced, so shards, headers and the space needed are
computed first. Everything is then written under temporary names (NAME.partial) beside the targets; only when all of
it is on the disk does it take the place of what the folder held. Interrupted before that, the folder is unchanged.
One process at a time may write to a folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ernie45.checkpoint.dtypes import DTYPES
from ernie45.checkpoint.folder import INDEX_NAME, SINGLE_NAME
from ernie45.errors import CheckpointError

if TYPE_CHECKING:
    from tqdm import tqdm

DEFAULT_SHARD_BYTES = 5_000_000_000  # as in the published checkpoints

_OWN_SHARD_PATTERN = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PARTIAL_SUFFIX = ".partial"
_WRITE_STEP_BYTES = 1 << 26  # between two updates of the progress bar
_BAR_DELAY_SECONDS = 1.0  # what is written sooner needs no progress bar
_HEADER_ALIGNMENT = 8
_SPARE_BYTES = 1 << 20


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written.

    Attributes:
        name: its name in the file.
        dtype: safetensors dtype, a key of `dtypes.DTYPES`.
        shape: its dimensions.
        produce: called once, when its turn comes; returns the array with that shape and the dtype's numpy storage
            (uint16 bits for BF16).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    produce: Callable[[], np.ndarray]

    @property
    def byte_count(self) -> int:
        """Bytes the tensor takes in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].item_size


@dataclass(frozen=True)
class _Shard:
    name: str
    header: bytes
    plans: list[TensorPlan]  # in the order in which they are produced
    starts: list[int]  # where each begins in the file


def write_checkpoint(
    folder: str | Path,
    tensors: Iterable[TensorPlan],
    *,
    metadata: dict[str, str],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
) -> list[Path]:
    """Write tensors as `model.safetensors`, or as shards with an index where they exceed `max_shard_bytes`.

    The same input always gives the same bytes. Within a file wider dtypes come first, so that every tensor is
    aligned. Safetensors files of the same naming scheme that the folder held before are replaced or removed.

    Args:
        folder: the destination, created if absent.
        tensors: what to write; in this order each is produced, checked, written and dropped before the next.
        metadata: the files' `__metadata__`, for instance {"format": "np"}.
        max_shard_bytes: bytes of tensors per file; a single larger tensor gets a file of its own.
        progress: show a progress bar with bytes and rate on stderr.

    Returns:
        The files written: the safetensors files in order, then the index if there is one.

    Raises:
        CheckpointError: a plan that cannot be written, a produced array unlike its plan, no space, a failed write.
    """
    folder = Path(folder)
    plans = list(tensors)
    _check_plans(plans, metadata, max_shard_bytes)
    shards = _plan_shards(plans, metadata, max_shard_bytes)
    index = _index_json(shards) if len(shards) > 1 else None
    with _destination(folder):
        _check_space(folder, sum(len(shard.header) for shard in shards) + sum(plan.byte_count for plan in plans))
        with _progress_bar(plans, progress) as bar:
            for shard in shards:
                _write_shard(folder, shard, bar)
        if index is not None:
            _write_durably(_partial(folder / INDEX_NAME), index)
    with _disk_errors(folder):
        _put_in_place(folder, [shard.name for shard in shards], has_index=index is not None)
    names = [shard.name for shard in shards] + ([INDEX_NAME] if index is not None else [])
    return [folder / name for name in names]


def write_tensors_atomic(
    path: str | Path, tensors: Iterable[TensorPlan], *, metadata: dict[str, str], progress: bool = True
) -> None:
    """Write tensors into one safetensors file; the old file stays whole until the new one is.

    Args:
        path: the file; its folder is created if absent.
        tensors, metadata, progress: as of `write_checkpoint`.

    Raises:
        CheckpointError: as of `write_checkpoint`.
    """
    path, plans = Path(path), list(tensors)
    _check_plans(plans, metadata, DEFAULT_SHARD_BYTES)
    shard = _make_shard(path.name, plans, metadata)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    _check_space(path.parent, len(shard.header) + sum(plan.byte_count for plan in plans))
    try:
        with _progress_bar(plans, progress) as bar:
            _write_shard(path.parent, shard, bar)
        with _disk_errors(path):
            os.replace(_partial(path), path)
    finally:
        _partial(path).unlink(missing_ok=True)


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON (UTF-8, keys in their order); the old file stays whole until the new one is.

    Raises:
        CheckpointError: the file cannot be written.
    """
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8; the old file stays whole until the new one is.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}{_PARTIAL_SUFFIX}")
    try:
        _write_durably(partial, text.encode("utf-8"))
        with _disk_errors(path):
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _check_plans(plans: list[TensorPlan], metadata: dict[str, str], max_shard_bytes: int) -> None:
    if not plans:
        raise CheckpointError("nothing to write: the list of tensors is empty")
    if max_shard_bytes <= 0:
        raise CheckpointError(f"max_shard_bytes must be positive, found {max_shard_bytes}")
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise CheckpointError(f"metadata must map text to text, found {metadata!r}")
    names: set[str] = set()
    for plan in plans:
        if plan.name in names or plan.name == "__metadata__":
            raise CheckpointError(f"cannot write tensor {plan.name!r}: the name is taken")
        if plan.dtype not in DTYPES:
            raise CheckpointError(f"cannot write tensor {plan.name!r}: unknown dtype {plan.dtype!r}")
        if any(size < 0 for size in plan.shape):
            raise CheckpointError(f"cannot write tensor {plan.name!r}: negative size in shape {plan.shape}")
        names.add(plan.name)


def _plan_shards(plans: list[TensorPlan], metadata: dict[str, str], max_shard_bytes: int) -> list[_Shard]:
    groups: list[list[TensorPlan]] = []
    room = 0
    for plan in plans:
        if not groups or plan.byte_count > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(plan)
        room -= plan.byte_count
    if len(groups) == 1:
        return [_make_shard(SINGLE_NAME, groups[0], metadata)]
    return [
        _make_shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group, metadata)
        for number, group in enumerate(groups, start=1)
    ]


def _make_shard(name: str, group: list[TensorPlan], metadata: dict[str, str]) -> _Shard:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for plan in sorted(group, key=lambda plan: -DTYPES[plan.dtype].item_size):
        offsets = [position, position + plan.byte_count]
        header[plan.name] = {"dtype": plan.dtype, "shape": list(plan.shape), "data_offsets": offsets}
        position += plan.byte_count
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    first = 8 + len(text)
    starts = [first + header[plan.name]["data_offsets"][0] for plan in group]
    return _Shard(name, struct.pack("<Q", len(text)) + text, group, starts)


def _index_json(shards: list[_Shard]) -> bytes:
    weight_map = {plan.name: shard.name for shard in shards for plan in shard.plans}
    total = sum(plan.byte_count for shard in shards for plan in shard.plans)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


@contextlib.contextmanager
def _destination(folder: Path) -> Iterator[None]:
    """Create the folder; remove temporary files of an earlier interrupted write, and ours if this one fails."""
    existed = folder.is_dir()
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_partials(folder)
    try:
        yield
    except BaseException:
        _remove_partials(folder)
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _remove_partials(folder: Path) -> None:
    for path in folder.glob(f"model*.safetensors*{_PARTIAL_SUFFIX}"):
        path.unlink(missing_ok=True)


def _check_space(folder: Path, needed: int) -> None:
    with _disk_errors(folder):
        free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise CheckpointError(
            f"{folder}: not enough space: the checkpoint takes {needed / 1e9:.2f} GB (beside the one it replaces), "
            f"{free / 1e9:.2f} GB are free"
        )


def _progress_bar(plans: list[TensorPlan], progress: bool) -> tqdm:
    from tqdm import tqdm

    total = sum(plan.byte_count for plan in plans)
    return tqdm(total=total, desc="writing", unit="B", unit_scale=True, delay=_BAR_DELAY_SECONDS, disable=not progress)


def _write_shard(folder: Path, shard: _Shard, bar: tqdm) -> None:
    path = _partial(folder / shard.name)
    with _disk_errors(path):
        file = path.open("wb")
    with file:
        with _disk_errors(path):
            file.write(shard.header)
        for plan, start in zip(shard.plans, shard.starts, strict=True):
            array = _produce(plan)
            with _disk_errors(path):
                file.seek(start)
                _write_array(file, array, bar)
            del array  # before the next one is produced
        with _disk_errors(path):
            _flush_to_disk(file)


def _produce(plan: TensorPlan) -> np.ndarray:
    array = plan.produce()
    storage = DTYPES[plan.dtype].storage
    if not isinstance(array, np.ndarray) or array.dtype != storage or array.shape != tuple(plan.shape):
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise CheckpointError(
            f"tensor {plan.name!r}: expected a numpy array {storage} {list(plan.shape)} for {plan.dtype}, found {found}"
        )
    return array


def _write_array(file: BinaryIO, array: np.ndarray, bar: tqdm) -> None:
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, content.size, _WRITE_STEP_BYTES):
        piece = content[start : start + _WRITE_STEP_BYTES]
        file.write(piece.data)
        bar.update(piece.size)


def _write_durably(path: Path, content: bytes) -> None:
    with _disk_errors(path), path.open("wb") as file:
        file.write(content)
        _flush_to_disk(file)


def _flush_to_disk(file: BinaryIO) -> None:
    """Make sure that the data precedes the renaming even if the power fails."""
    file.flush()
    os.fsync(file.fileno())


def _put_in_place(folder: Path, names: list[str], *, has_index: bool) -> None:
    """Swap the finished temporary files in, in an order that never leaves a mixture of two checkpoints.

    Shards of the same names are removed before the first new one arrives, so whatever interrupts this leaves the old
    checkpoint, the new one, or visibly missing shards.
    """
    index_path = folder / INDEX_NAME
    if has_index:
        for name in names:
            (folder / name).unlink(missing_ok=True)
    for name in names:
        os.replace(_partial(folder / name), folder / name)
    if has_index:
        os.replace(_partial(index_path), index_path)
        (folder / SINGLE_NAME).unlink(missing_ok=True)
    else:
        index_path.unlink(missing_ok=True)
    for path in folder.iterdir():
        if _OWN_SHARD_PATTERN.fullmatch(path.name) and path.name not in names:
            path.unlink()


def _partial(path: Path) -> Path:
    return path.with_name(path.name + _PARTIAL_SUFFIX)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
