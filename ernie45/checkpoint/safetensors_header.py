"""The header of a safetensors file: reading it, and checking it in full before any tensor is touched.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the length N of the header as a little-endian
integer, N bytes of JSON, then the tensors' bytes without gaps. Since the header states where the last tensor ends, a
truncated file is found by comparing the header with the size of the file, without reading the data.
"""

from __future__ import annotations

import json
import math
import reprlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ernie45.checkpoint.dtypes import DTYPES
from ernie45.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
MAX_RANK = 32
_LENGTH_BYTES = 8
_GIT_LFS_START = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor is stored.

    Attributes:
        name: the tensor's name in the file.
        dtype: safetensors dtype, a key of `dtypes.DTYPES`.
        shape: the dimensions, outermost first.
        file: the file that holds it.
        start: offset of its first byte, counted from the beginning of the file.
        stop: offset after its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def byte_count(self) -> int:
        """Bytes the tensor takes in the file."""
        return self.stop - self.start


def read_header(file: BinaryIO, path: Path, file_size: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read and check the header of the open file `path`, which has `file_size` bytes.

    Returns:
        The tensors by name, in the order of the header, and the header's `__metadata__`, empty if it has none.

    Raises:
        CheckpointError: not a safetensors file, truncated or too long, or a header that contradicts itself.
    """
    header, data_start = _read_json(file, path, file_size)
    metadata = _parse_metadata(header.pop("__metadata__", {}), path)
    tensors = {name: _parse_entry(name, value, path, data_start) for name, value in header.items()}
    _check_coverage(tensors, path, data_start, file_size)
    return tensors, metadata


def _read_json(file: BinaryIO, path: Path, file_size: int) -> tuple[dict[str, Any], int]:
    """The header as parsed JSON, and the offset at which the data begins."""
    file.seek(0)
    start = _read_bytes(file, path, min(file_size, 64))
    if file_size == 0:
        raise CheckpointError(f"{path}: the file is empty; download it again")
    if start.startswith(_GIT_LFS_START):
        raise CheckpointError(
            f"{path}: is a Git LFS pointer, a few lines of text in place of the real file; run `git lfs pull` in its "
            "folder, or download the file itself"
        )
    if file_size < _LENGTH_BYTES:
        raise CheckpointError(
            f"{path}: {file_size} bytes are too few for a safetensors file (at least {_LENGTH_BYTES}); "
            "download it again"
        )
    (length,) = struct.unpack("<Q", start[:_LENGTH_BYTES])
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: not a safetensors file: its first 8 bytes announce a header of {length} bytes, the limit is "
            f"{MAX_HEADER_BYTES}"
        )
    if _LENGTH_BYTES + length > file_size:
        raise CheckpointError(
            f"{path}: truncated, or not a safetensors file: it announces a header of {length} bytes, but the file "
            f"has {file_size} bytes in all; download it again"
        )
    file.seek(_LENGTH_BYTES)
    return _parse_header(_read_bytes(file, path, length), path), _LENGTH_BYTES + length


def _read_bytes(file: BinaryIO, path: Path, count: int) -> bytes:
    try:
        content = file.read(count)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) != count:
        raise CheckpointError(f"{path}: changed while being opened; open it again")
    return content


def _parse_header(content: bytes, path: Path) -> dict[str, Any]:
    if not content.startswith(b"{"):
        raise CheckpointError(f"{path}: not a safetensors file: its header begins with {content[:8]!r}, not with '{{'")
    try:
        header: dict[str, Any] = parse_json(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged header: {error}; download it again") from error
    return header


def parse_json(content: bytes) -> Any:
    """Parse UTF-8 JSON, refusing keys that occur twice.

    Raises:
        ValueError: invalid UTF-8 or JSON, a duplicate key, nesting too deep, a number of thousands of digits.
    """
    try:
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant
        )
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} occurs twice")
        result[key] = value
    return result


def _parse_metadata(metadata: Any, path: Path) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(_is_text(text) for item in metadata.items() for text in item):
        raise CheckpointError(
            f"{path}: damaged header: '__metadata__' must map text to text, found {reprlib.repr(metadata)}"
        )
    return metadata


def _parse_entry(name: str, value: Any, path: Path, data_start: int) -> TensorEntry:
    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: damaged header: tensor {name!r}: {what}; download the file again")

    if not _is_text(name):
        raise damaged("its name is not valid Unicode")
    if not isinstance(value, dict):
        raise damaged(f"expected an object with dtype, shape and data_offsets, found {reprlib.repr(value)}")
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in value]
    if missing:
        raise damaged(f"no {' and no '.join(missing)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise damaged(f"unknown dtype {reprlib.repr(dtype)}, expected one of {', '.join(DTYPES)}")
    if not _is_list_of_sizes(shape) or len(shape) > MAX_RANK:
        raise damaged(f"shape must be a list of at most {MAX_RANK} non-negative integers, found {reprlib.repr(shape)}")
    if not _is_list_of_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(f"data_offsets must be two ascending non-negative integers, found {reprlib.repr(offsets)}")
    item_size = DTYPES[dtype].item_size
    if math.prod(size for size in shape if size) * item_size >= 2**63:
        raise damaged(f"shape {reprlib.repr(shape)} is larger than any memory")
    expected, found = math.prod(shape) * item_size, offsets[1] - offsets[0]
    if expected != found:
        raise damaged(f"{dtype} of shape {shape} takes {expected} bytes, but data_offsets {offsets} span {found}")
    return TensorEntry(name, dtype, tuple(shape), path, data_start + offsets[0], data_start + offsets[1])


def _is_text(value: Any) -> bool:
    """True for text that UTF-8 can encode; JSON escapes can also spell lone surrogates, which it cannot."""
    try:
        return isinstance(value, str) and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


def _is_list_of_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)  # True is an int too


def _check_coverage(tensors: dict[str, TensorEntry], path: Path, data_start: int, file_size: int) -> None:
    """Check that the tensors follow one another without gap or overlap and end where the file ends."""
    position = data_start
    for entry in sorted(tensors.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != position:
            problem = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: damaged header: tensor {entry.name!r} {problem}: it begins at byte "
                f"{entry.start - data_start} of the data, expected {position - data_start}; download the file again"
            )
        position = entry.stop
    if file_size < position:
        raise CheckpointError(
            f"{path}: truncated: {file_size} bytes, but its header describes {position} "
            f"({position - file_size} are missing); download it again"
        )
    if file_size > position:
        raise CheckpointError(
            f"{path}: too long: {file_size} bytes, but its header describes {position} "
            f"({file_size - position} too many); download it again"
        )
