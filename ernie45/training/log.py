"""The record of a training run: a CSV file always, TensorBoard or VisualDL besides."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie45.checkpoint.writer import write_text_atomic
from ernie45.errors import ErnieError

STEP = "step"
# What a recipe's `report_to` may name: the module with a LogWriter or SummaryWriter, the class, the package to install.
_BOARDS = {
    "visualdl": ("visualdl", "LogWriter", "visualdl"),
    "tensorboard": ("tensorboardX", "SummaryWriter", "tensorboardX"),
}


class CsvLog:
    """A CSV file with one row per training step, flushed after each row.

    Numbers are written so that reading them back gives the same bits.

    Args:
        path: the file.
        columns: their names; the first is "step".
        after: keep the rows up to this step, as a resumed run wants it; 0 starts a new file.

    Raises:
        ErnieError: the file cannot be written, or holds other columns.
    """

    def __init__(self, path: Path, columns: Sequence[str], after: int = 0):
        self.path, self.columns = path, list(columns)
        rows = [row for row in _read(path, self.columns) if int(row[STEP]) <= after] if after else []
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text_atomic(path, text.getvalue())
        self._file = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, self.columns, lineterminator="\n")

    def write(self, values: Mapping[str, Any]) -> None:
        """One row; columns that `values` lacks stay empty."""
        self._writer.writerow({name: _text(value) for name, value in values.items()})
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Board:
    """Curves for VisualDL or TensorBoard.

    Args:
        kind: "visualdl" or "tensorboard".
        folder: where its files go.

    Raises:
        ErnieError: there is no such kind, or its package is not installed.
    """

    def __init__(self, kind: str, folder: Path):
        if kind not in _BOARDS:
            raise ErnieError(f"report_to: expected none, {' or '.join(_BOARDS)}, found {kind!r}")
        module, writer, package = _BOARDS[kind]
        try:
            self._writer = getattr(importlib.import_module(module), writer)(str(folder))
        except ImportError as error:
            raise ErnieError(f"report_to: {kind} is not installed; pip install {package}") from error

    def write(self, values: Mapping[str, Any]) -> None:
        """One point on every curve, at `values["step"]`."""
        for name, value in values.items():
            if name != STEP and isinstance(value, int | float):
                self._writer.add_scalar(name, value, values[STEP])

    def close(self) -> None:
        """Writes out what is still in memory."""
        self._writer.close()


Log = CsvLog | Board


def _read(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(columns):
            raise ErnieError(f"{path}: holds other columns than this run writes; move the file away")
        # A killed run may have left half a row at the end.
        return [row for row in reader if row[columns[-1]] is not None]


def _text(value: Any) -> Any:
    return repr(value) if isinstance(value, float) else value
