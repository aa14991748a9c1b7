"""Reading one .safetensors file through a memory map."""

from __future__ import annotations

import contextlib
import mmap
import stat
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ernie45.checkpoint.dtypes import DTYPES
from ernie45.checkpoint.safetensors_header import TensorEntry, read_header
from ernie45.errors import CheckpointError

__all__ = ["SafetensorsFile", "TensorEntry"]


class SafetensorsFile:
    """One .safetensors file, checked when constructed and mapped into memory when first read.

    Args:
        path: the file.

    Attributes:
        path: the file.
        tensors: what the file holds, by name, in the order of the header.
        metadata: the header's `__metadata__`, text to text; empty if it has none.

    Raises:
        CheckpointError: the file cannot be opened, is not a safetensors file, is truncated or contradicts itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with _open(self.path) as file:
            self._file_size = _file_size(file)
            self.tensors, self.metadata = read_header(file, self.path, self._file_size)
        self._map: mmap.mmap | None = None

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` as a read-only array with its storage dtype (uint16 bits for BF16).

        The array is a view of the mapped file, nothing is copied; only a tensor that other software stored at an
        unaligned offset comes as a copy. A view stays valid after `release` and `close`.

        Raises:
            CheckpointError: no such tensor, or the file changed since it was checked.
        """
        entry = self._entry(name)
        storage = DTYPES[entry.dtype].storage
        if entry.byte_count == 0:
            empty = np.empty(entry.shape, storage)
            empty.flags.writeable = False
            return empty
        count = entry.byte_count // storage.itemsize
        array = np.frombuffer(self._mapped(), storage, count, entry.start).reshape(entry.shape)
        if not array.flags.aligned:
            array = array.copy()
            array.flags.writeable = False
        return array

    def release(self, name: str) -> None:
        """Drop the pages of the tensor `name` from this process's resident memory.

        Views stay valid: a page that is touched again is read again. Pages shared with a neighbouring tensor are
        kept. Does nothing where the system offers no `madvise`.
        """
        entry = self._entry(name)
        if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = entry.stop // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        """Unmap the file, at once or when the last view of it goes. Reading again maps it again."""
        mapped, self._map = self._map, None
        if mapped is None:
            return
        with contextlib.suppress(BufferError):  # views are alive: they hold the mapping, and the last one frees it
            mapped.close()

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: no tensor {name!r} among the {len(self.tensors)} in this file")
        return self.tensors[name]

    def _mapped(self) -> mmap.mmap:
        """The mapping, made when first needed. Its size is checked each time: touching a page past the end kills."""
        if self._map is None:
            with _open(self.path) as file:
                self._check_size(_file_size(file))
                try:
                    self._map = mmap.mmap(file.fileno(), self._file_size, access=mmap.ACCESS_READ)
                except (OSError, ValueError) as error:
                    raise CheckpointError(f"{self.path}: cannot be mapped into memory: {error}") from error
        self._check_size(self._map.size())
        return self._map

    def _check_size(self, size: int) -> None:
        if size != self._file_size:
            raise CheckpointError(
                f"{self.path}: changed while in use: {size} bytes now, {self._file_size} when opened; open it again"
            )


def _open(path: Path) -> BinaryIO:
    try:
        mode = path.stat().st_mode  # before opening: opening a pipe would wait for ever
        if stat.S_ISDIR(mode):
            raise CheckpointError(f"{path}: is a folder, expected a .safetensors file")
        if not stat.S_ISREG(mode):
            raise CheckpointError(f"{path}: is a device, pipe or socket, expected a .safetensors file")
        return path.open("rb")
    except FileNotFoundError as error:
        if path.is_symlink():
            target = path.readlink()
            raise CheckpointError(f"{path}: is a link to {target}, which does not exist; download it again") from error
        raise CheckpointError(f"{path}: no such file") from error
    except PermissionError as error:
        raise CheckpointError(f"{path}: permission denied; make the file readable") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error


def _file_size(file: BinaryIO) -> int:
    return file.seek(0, 2)
