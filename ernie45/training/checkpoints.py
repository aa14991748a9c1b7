"""Checkpoints of a training run, written beside it by a thread.

A run's folder holds, for some steps N,

    checkpoint-N/                        the model, as `save_pretrained` writes it, or its adapters, as `lora.save`
    checkpoint-N/optimizer.safetensors   moments and masters
    checkpoint-N/trainer_state.json      step, place in the data, best evaluation
    latest, best                         text files: which checkpoint that is

A checkpoint is written as `checkpoint-N.partial` and renamed when all of it is on the disk; before one is removed it
is renamed to `checkpoint-N.removed`. So whatever is called `checkpoint-N` is whole, no matter when the run was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie45.checkpoint.dtypes import dtype_from_framework_name
from ernie45.checkpoint.folder import SINGLE_NAME, CheckpointFolder
from ernie45.checkpoint.reader import to_numpy
from ernie45.checkpoint.safetensors_file import SafetensorsFile
from ernie45.checkpoint.writer import (
    TensorPlan,
    write_checkpoint,
    write_json_atomic,
    write_tensors_atomic,
    write_text_atomic,
)
from ernie45.errors import CheckpointError

LATEST, BEST = "latest", "best"
STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"checkpoint-\d+\.(partial|removed)")
_METADATA = {"format": "np"}


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is made of: the live tensors, which are copied before they change.

    Attributes:
        step: steps done.
        tensors: by file, then by name in the file. A large model.safetensors becomes shards with an index.
        documents: what goes into JSON files, by their names: config.json, trainer_state.json, ...
        files: small files to be copied along, such as those of the tokenizer.
        best: whether this one is the best so far.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    documents: Mapping[str, Any]
    files: tuple[Path, ...] = ()
    best: bool = False


@dataclass
class _Work:
    """One checkpoint on its way to the disk."""

    thread: threading.Thread
    copied: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time.

    `save` returns at once. A thread first copies the tensors in memory, while the next forward and backward pass run;
    call `wait_until_copied` before they are changed. The disk is never waited for, unless the next checkpoint comes
    before the last one is written. Until then, the copy takes as much memory as the checkpoint takes on the disk.

    Args:
        folder: of the run; created if needed. What an interrupted run left unfinished there is removed.
        keep: how many of the newest checkpoints stay, at least 1; the best one stays besides.

    Raises:
        CheckpointError: the folder cannot be written.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, max(1, keep)
        self._work: _Work | None = None
        with _disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                if _LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path)

    def save(self, snapshot: Snapshot) -> None:
        """Starts writing a checkpoint.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.close()
        work = _Work(threading.Thread(target=self._run, args=(snapshot,), name=f"checkpoint-{snapshot.step}"))
        self._work = work
        work.thread.start()

    def wait_until_copied(self) -> None:
        """Returns when the tensors of the last snapshot may change.

        Raises:
            CheckpointError: it could not be written. Nothing is lost but the checkpoint: the one before is whole.
        """
        if self._work is not None:
            self._work.copied.wait()
            self._raise_failure(self._work)

    def close(self) -> None:
        """Returns when everything is on the disk; errors as of `wait_until_copied`."""
        work, self._work = self._work, None
        if work is not None:
            work.thread.join()
            self._raise_failure(work)

    def _raise_failure(self, work: _Work) -> None:
        if work.failure is not None:
            self._work = None
            raise CheckpointError(f"{work.thread.name}: could not be written: {work.failure}") from work.failure

    def _run(self, snapshot: Snapshot) -> None:
        work = self._work
        assert work is not None
        try:
            copies = {file: _copies(tensors) for file, tensors in snapshot.tensors.items()}
            work.copied.set()
            self._write(snapshot, copies)
        except BaseException as failure:  # handed to the thread that trains
            work.failure = failure
        finally:
            work.copied.set()

    def _write(self, snapshot: Snapshot, copies: dict[str, list[TensorPlan]]) -> None:
        target = self.folder / f"checkpoint-{snapshot.step}"
        unfinished = target.with_name(f"{target.name}.partial")
        for name, plans in copies.items():
            if name == SINGLE_NAME:
                write_checkpoint(unfinished, plans, metadata=_METADATA, progress=False)
            else:
                write_tensors_atomic(unfinished / name, plans, metadata=_METADATA, progress=False)
        for name, content in snapshot.documents.items():
            write_json_atomic(unfinished / name, content)
        with _disk_errors(target):
            for path in snapshot.files:
                shutil.copyfile(path, unfinished / path.name)
            _remove(target)  # a run that was resumed from an earlier step comes here again
            os.replace(unfinished, target)
        write_text_atomic(self.folder / LATEST, target.name + "\n")
        if snapshot.best:
            write_text_atomic(self.folder / BEST, target.name + "\n")
        self._prune(snapshot.step)

    def _prune(self, newest: int) -> None:
        """Removes what is neither among the newest nor the best; checkpoints past `newest` are of an earlier run."""
        steps = sorted(step for step in _steps(self.folder) if step <= newest)
        kept = {*steps[-self.keep :], *(step for step in _steps(self.folder) if step > newest)}
        with contextlib.suppress(CheckpointError):
            best = pointed(self.folder, BEST)
            kept |= set() if best is None else {_step_of(best)}
        with _disk_errors(self.folder):
            for step in set(steps) - kept:
                _remove(self.folder / f"checkpoint-{step}")


def pointed(folder: Path, pointer: str = LATEST) -> Path | None:
    """The checkpoint that the file `latest` or `best` in a run's folder names; None if there is no such file.

    Raises:
        CheckpointError: the file names something else, or a checkpoint that is not there.
    """
    path = folder / pointer
    try:
        name = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not _NAME.fullmatch(name) or not (folder / name).is_dir():
        found = ", ".join(f"checkpoint-{step}" for step in _steps(folder)) or "none"
        raise CheckpointError(f"{path}: names {name!r}, which is no checkpoint in that folder; there: {found}")
    return folder / name


def read_state(checkpoint: Path) -> dict[str, Any]:
    """trainer_state.json of a checkpoint.

    Raises:
        CheckpointError: it is missing or broken.
    """
    path = checkpoint / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise CheckpointError(f"{path}: is no state of a training run")
    return state


@paddle.no_grad()
def fill(tensors: Mapping[str, Tensor], checkpoint: Path, name: str) -> None:
    """Copies the tensors of one file of a checkpoint, bit by bit, into tensors of the same names.

    Raises:
        CheckpointError: names, shapes or dtypes are not the same; nothing is copied then.
    """
    path = checkpoint / name
    with CheckpointFolder(checkpoint) if name == SINGLE_NAME else SafetensorsFile(path) as file:
        expected = {name: _kind(tensor) for name, tensor in tensors.items()}
        found = {name: (entry.dtype, tuple(entry.shape)) for name, entry in file.tensors.items()}
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if wrong:
            first = wrong[0]
            raise CheckpointError(
                f"{path}: {len(wrong)} tensors are not those of this run, first {first}: found "
                f"{found.get(first)}, expected {expected.get(first)}; resume with the recipe that it was started with"
            )
        for key, tensor in tensors.items():
            tensor.copy_(paddle.to_tensor(file.read(key)), True)
            file.release(key)


def _copies(tensors: Mapping[str, Tensor]) -> list[TensorPlan]:
    """Plans for tensors that are copied here and now."""
    return [TensorPlan(name, *_kind(tensor), partial(_given, _copy(tensor))) for name, tensor in tensors.items()]


def _copy(tensor: Tensor) -> np.ndarray:
    return to_numpy(tensor)[0].copy()


def _given(array: np.ndarray) -> np.ndarray:
    return array


def _kind(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    """The safetensors dtype and the shape."""
    return dtype_from_framework_name(str(tensor.dtype).removeprefix("paddle.")), tuple(tensor.shape)


def _steps(folder: Path) -> list[int]:
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)))


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint so that what a killed process leaves of it is not mistaken for one."""
    if checkpoint.exists():
        removed = checkpoint.with_name(f"{checkpoint.name}.removed")
        os.replace(checkpoint, removed)
        shutil.rmtree(removed)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
