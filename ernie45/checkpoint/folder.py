"""A checkpoint folder: one safetensors file, or several with an index, seen as one set of tensors.

Which files count, in this order:
1. `model.safetensors`;
2. the shards that `model.safetensors.index.json` names;
3. without either: a complete set NAME-00001-of-0000N.safetensors ... NAME-0000N-of-0000N.safetensors;
4. or the only *.safetensors file of the folder, whatever its name.
Anything else is refused. Pickled files (.pdparams, .bin, ...) can run code when opened and are never opened.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from pathlib import Path

import numpy as np

from ernie45.checkpoint.safetensors_file import SafetensorsFile
from ernie45.checkpoint.safetensors_header import TensorEntry, parse_json
from ernie45.errors import CheckpointError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_SHARD_PATTERN = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>(?!00000)\d{5})\.safetensors")
_PLAIN_RELATIVE_PATH = re.compile(r"[\w.+ -]+(/[\w.+ -]+)*", re.ASCII)
_LONGEST_SHARD_PATH = 255
_PICKLED_SUFFIXES = (".pdparams", ".pdiparams", ".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MOST_PROBLEMS_SHOWN = 30


class CheckpointFolder:
    """The tensors of a checkpoint folder, checked when constructed and read one at a time.

    Args:
        path: the folder.

    Attributes:
        path: the folder.
        files: the safetensors files that make up the checkpoint.
        tensors: every tensor, by name.
        metadata: the `__metadata__` of the files together; where they differ, the first file's value.

    Raises:
        CheckpointError: lists everything that is wrong: missing, truncated or damaged files, tensors that the index
            promises and the files lack, tensors in two files, a broken index.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            what = "is a file" if self.path.exists() else "does not exist"
            raise CheckpointError(f"{self.path}: {what}, expected a checkpoint folder")
        problems: list[str] = []
        promised = _find_files(self.path, problems)
        opened = _open_files(self.path, promised, problems)
        self.tensors, self._file_of = _merge(opened, problems)
        if problems and any(self.path.glob("*.partial")):
            problems.append("files named *.partial: a write to this folder was interrupted, or goes on; write it again")
        _report(self.path, problems)
        self.files = [file.path for file in opened.values()]
        self.metadata: dict[str, str] = {}
        for file in reversed(opened.values()):
            self.metadata.update(file.metadata)

    def __enter__(self) -> CheckpointFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors together, without headers."""
        return sum(entry.byte_count for entry in self.tensors.values())

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, a read-only view of its mapped file: see `SafetensorsFile.read`.

        Raises:
            CheckpointError: no such tensor, or its file changed since it was checked.
        """
        return self._holder(name).read(name)

    def release(self, name: str) -> None:
        """Drop the pages of the tensor `name` from resident memory: see `SafetensorsFile.release`."""
        self._holder(name).release(name)

    def close(self) -> None:
        """Unmap all files. Reading again maps them again."""
        for file in self._file_of.values():
            file.close()

    def _holder(self, name: str) -> SafetensorsFile:
        if name not in self._file_of:
            close = difflib.get_close_matches(name, self._file_of, n=3)
            hint = f"; the closest names are {', '.join(close)}" if close else ""
            raise CheckpointError(f"{self.path}: no tensor {name!r} among its {len(self._file_of)}{hint}")
        return self._file_of[name]


def _find_files(folder: Path, problems: list[str]) -> dict[str, list[str]]:
    """The files of the checkpoint, relative to the folder, each with the tensors that the index expects in it."""
    if os.path.lexists(folder / SINGLE_NAME):  # also a dangling link: its own error is clearer than "not found"
        return {SINGLE_NAME: []}
    if os.path.lexists(folder / INDEX_NAME):
        return read_index(folder / INDEX_NAME, problems)
    return _find_files_without_index(folder, problems)


def read_index(path: Path, problems: list[str]) -> dict[str, list[str]]:
    """The tensors that an index places in each file; what is wrong with it is added to `problems`."""
    try:
        index = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        problems.append(f"{path.name}: cannot be read: {error}; download it again")
        return {}
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        problems.append(f"{path.name}: expected an object with a non-empty 'weight_map', found {reprlib.repr(index)}")
        return {}
    promised: dict[str, list[str]] = {}
    refused: set[str] = set()
    for tensor, shard in weight_map.items():
        if _is_safe_shard_path(shard):
            promised.setdefault(shard, []).append(tensor)
        else:
            refused.add(reprlib.repr(shard))
    for shard in sorted(refused):
        problems.append(f"{path.name}: refuses {shard} as a shard: expected a .safetensors file inside the folder")
    return promised


def _is_safe_shard_path(shard: object) -> bool:
    """True for a relative path of plain names that stays inside the folder."""
    return (
        isinstance(shard, str)
        and len(shard) <= _LONGEST_SHARD_PATH
        and shard.endswith(".safetensors")
        and _PLAIN_RELATIVE_PATH.fullmatch(shard) is not None
        and ".." not in shard.split("/")
    )


def _find_files_without_index(folder: Path, problems: list[str]) -> dict[str, list[str]]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        problems.append(f"cannot be listed: {error.strerror}; make the folder readable")
        return {}
    candidates = [name for name in names if name.endswith(".safetensors")]
    if not candidates:
        problems.append(_explain_no_safetensors(names))
        return {}
    shards = [match for name in candidates if (match := _SHARD_PATTERN.fullmatch(name))]
    if len(candidates) == 1 and not shards:
        return {candidates[0]: []}
    sets = {(match["stem"], match["count"]) for match in shards}
    if len(sets) != 1 or len(shards) != len(candidates):
        problems.append(
            f"neither {SINGLE_NAME} nor {INDEX_NAME}, and it is not clear which of these make up the checkpoint: "
            f"{', '.join(candidates)}; keep one file or one set of shards, or restore the index"
        )
        return {}
    ((stem, count),) = sets
    return {f"{stem}-{number:05d}-of-{count}.safetensors": [] for number in range(1, int(count) + 1)}


def _explain_no_safetensors(names: list[str]) -> str:
    pickled = [name for name in names if name.endswith(_PICKLED_SUFFIXES)]
    if pickled:
        return (
            f"no .safetensors file, only {', '.join(pickled[:5])}: pickled files can run code when opened, so this "
            "library never opens them; convert them to safetensors with the tool that wrote them"
        )
    found = ", ".join(names[:10]) or "nothing"
    return f"no .safetensors file; expected {SINGLE_NAME} or {INDEX_NAME} with its shards, found {found}"


def _open_files(folder: Path, promised: dict[str, list[str]], problems: list[str]) -> dict[str, SafetensorsFile]:
    opened: dict[str, SafetensorsFile] = {}
    for name, tensors in promised.items():
        if not os.path.lexists(folder / name):
            count = f" (the index places {len(tensors)} tensors in it)" if tensors else ""
            problems.append(f"{name}: missing{count}; download it")
            continue
        try:
            opened[name] = file = SafetensorsFile(folder / name)
        except CheckpointError as error:
            problems.append(str(error).removeprefix(f"{folder}/"))
            continue
        absent = [tensor for tensor in tensors if tensor not in file.tensors]
        if absent:
            problems.append(
                f"{name}: lacks {len(absent)} of the {len(tensors)} tensors that {INDEX_NAME} places in it: "
                f"{', '.join(map(repr, absent[:5]))}{', ...' if len(absent) > 5 else ''}; "
                "the index and the file are of different versions: download both again"
            )
    return opened


def _merge(
    opened: dict[str, SafetensorsFile], problems: list[str]
) -> tuple[dict[str, TensorEntry], dict[str, SafetensorsFile]]:
    tensors: dict[str, TensorEntry] = {}
    file_of: dict[str, SafetensorsFile] = {}
    for file in opened.values():
        for name, entry in file.tensors.items():
            if name in tensors:
                first, second = tensors[name].file.name, file.path.name
                problems.append(f"tensor {name!r} is in two files, {first} and {second}; download both again")
                continue
            tensors[name], file_of[name] = entry, file
    return tensors, file_of


def _report(folder: Path, problems: list[str]) -> None:
    if not problems:
        return
    if len(problems) == 1:
        raise CheckpointError(f"{folder}: {problems[0]}")
    shown = problems[:_MOST_PROBLEMS_SHOWN]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more problems")
    raise CheckpointError(f"{folder}: {len(problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in shown))
