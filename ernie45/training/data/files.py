"""Lines of several data files in a mixed order, read from disk one at a time.

A first pass over each file notes where its lines begin (8 bytes a line); an epoch is an order of all lines (8 bytes a
line). Any sample is then found by its epoch and place alone, which is all that resuming needs, and shuffling reaches
over the whole data instead of a buffer.
"""

from __future__ import annotations

import contextlib
import functools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ernie45.errors import ErnieError
from ernie45.training.data.formats import read_line
from ernie45.training.data.records import Record, Text

Mix = Literal["concat", "random", "interleave_under", "interleave_over"]


@dataclass(frozen=True)
class Source:
    """A data file: .jsonl with a sample in each line, or .txt with a text in each line.

    Attributes:
        path: of the file.
        weight: how often it is drawn, relative to the weights of the others.
    """

    path: str | Path
    weight: float = 1.0


class DataFiles:
    """Samples of several files, in an order that depends on nothing but the files, the settings and the epoch.

    Args:
        sources: the files; a path alone has the weight 1.
        mix: what an epoch is. "concat": every line once. The others draw from files by weight, and begin a file again
            when it ends: "random" draws `samples` times; "interleave_under" and "interleave_over" take the files in
            turns, evenly spaced, until the first one has ended, or the last one.
        shuffle: whether lines are shuffled, anew in every epoch; else each file is read from its beginning.
        seed: of the shuffling and drawing.
        samples: of an epoch, for "random"; None: as many as there are lines.

    Raises:
        ErnieError: a file that is missing or without lines, or an impossible setting.
    """

    def __init__(
        self,
        sources: Sequence[Source | str | Path],
        *,
        mix: Mix = "concat",
        shuffle: bool = True,
        seed: int = 0,
        samples: int | None = None,
    ) -> None:
        self.sources = [source if isinstance(source, Source) else Source(source) for source in sources]
        self.mix, self.shuffle, self.seed, self.samples = mix, shuffle, seed, samples
        self._check()
        self._offsets = [_line_offsets(Path(source.path)) for source in self.sources]
        self._counts = np.array([len(offsets) for offsets in self._offsets], "int64")
        self._starts = np.cumsum(self._counts) - self._counts  # the number of each file's first line
        self.order = functools.lru_cache(maxsize=2)(self._order)  # of an epoch: numbers of lines, [samples] int64

    def read(self, epoch: int, place: int) -> Record:
        """A sample.

        Args:
            epoch: from 0 on.
            place: its place in the order of the epoch, less than `len(self.order(epoch))`.

        Raises:
            ErnieError: the line cannot be understood.
        """
        number = int(self.order(epoch)[place])
        file = self._file_of(number)
        path = Path(self.sources[file].path)
        with path.open("rb") as stream:
            stream.seek(self._offsets[file][number - self._starts[file]])
            line = stream.readline()
        return Text(line.decode().strip()) if path.suffix == ".txt" else read_line(line, path.parent)

    @contextlib.contextmanager
    def naming(self, epoch: int, place: int) -> Iterator[None]:
        """Within it, errors name the file and the line of a sample."""
        try:
            yield
        except (ErnieError, UnicodeDecodeError) as error:
            raise ErnieError(f"{self.where(epoch, place)}: {error}") from error

    def where(self, epoch: int, place: int) -> str:
        """File and line of a sample."""
        number = int(self.order(epoch)[place])
        file = self._file_of(number)
        path, offset = self.sources[file].path, self._offsets[file][number - self._starts[file]]
        return f"{path}, line {_line_number(Path(path), offset)}"

    def fingerprint(self) -> dict[str, Any]:
        """What the order depends on: equal for equal orders, wherever the files lie."""
        files = [[Path(source.path).name, Path(source.path).stat().st_size, source.weight] for source in self.sources]
        settings = {"mix": self.mix, "shuffle": self.shuffle, "seed": self.seed, "samples": self.samples}
        return {"files": files, **settings}

    def _check(self) -> None:
        weights = [source.weight for source in self.sources]
        if not self.sources:
            raise ErnieError("no data files: give at least one")
        if self.mix not in get_args(Mix):
            raise ErnieError(f"mix is {self.mix!r}, expected one of {', '.join(get_args(Mix))}")
        if not all(weight > 0 for weight in weights):
            raise ErnieError(f"the weights of the data files are {weights}, expected positive numbers")
        if self.mix == "concat" and len(set(weights)) > 1:
            raise ErnieError('the data files have weights, which mix="concat" has no use for: choose another mix')
        if self.samples is not None and (self.mix != "random" or self.samples < 1):
            raise ErnieError(f'samples is {self.samples}: expected a positive number, and mix="random"')

    def _file_of(self, number: int) -> int:
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def _order(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, epoch])
        if self.mix == "concat":
            total = int(self._counts.sum())
            return generator.permutation(total) if self.shuffle else np.arange(total)
        files = self._turns(generator)
        order = np.empty(len(files), "int64")
        for file, (count, start) in enumerate(zip(self._counts, self._starts, strict=True)):
            drawn = files == file
            order[drawn] = start + self._cycle(int(count), int(drawn.sum()), generator)
        return order

    def _turns(self, generator: np.random.Generator) -> np.ndarray:
        """The file of each sample of an epoch."""
        weights = np.array([source.weight for source in self.sources])
        if self.mix == "random":
            return generator.choice(len(weights), self.samples or int(self._counts.sum()), p=weights / weights.sum())
        rounds = self._counts / weights
        last = rounds.min() if self.mix == "interleave_under" else rounds.max()
        taken = np.maximum(np.rint(last * weights), 1).astype("int64")
        files = np.repeat(np.arange(len(weights)), taken)
        times = np.concatenate([(np.arange(n) + 0.5) / w for n, w in zip(taken, weights, strict=True)])
        return files[np.argsort(times, kind="stable")]

    def _cycle(self, count: int, wanted: int, generator: np.random.Generator) -> np.ndarray:
        """`wanted` lines of a file of `count`, each as often as the others, give or take one."""
        rounds = [generator.permutation(count) if self.shuffle else np.arange(count) for _ in range(0, wanted, count)]
        return np.concatenate([np.empty(0, "int64"), *rounds])[:wanted]


def _line_offsets(path: Path) -> array[int]:
    """Where the lines begin that are not blank."""
    offsets, offset = array("q"), 0
    try:
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    offsets.append(offset)
                offset += len(line)
    except OSError as error:
        raise ErnieError(f"{path}: cannot be read ({error.strerror}); check the path of this data file") from error
    if not offsets:
        raise ErnieError(f"{path}: no lines; expected a data file with a sample in each line")
    return offsets


def _line_number(path: Path, offset: int) -> int:
    """The number, from 1 on, of the line that begins at `offset`."""
    number = 1
    with path.open("rb") as file:
        while offset > 0 and (block := file.read(min(offset, 1 << 20))):
            number += block.count(b"\n")
            offset -= len(block)
    return number
