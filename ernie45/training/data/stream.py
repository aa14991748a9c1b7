"""Batches from data files, without end or for some epochs; resumable to the sample."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ernie45.errors import ErnieError
from ernie45.training.data.balance import balanced, cost, imbalance, in_order
from ernie45.training.data.encode import Encoder, Example, Pair
from ernie45.training.data.files import DataFiles, Mix, Source
from ernie45.training.data.packing import Batch, first_fit, pack

Row = list[Example | Pair]


@dataclass(frozen=True)
class _Sample:
    """A sequence, and where it came from: epoch, place in its order, number among the sequences of the line."""

    origin: tuple[int, int, int]
    sequence: Example | Pair


class DataStream(Iterator[Batch]):
    """Batches of a rank.

    Samples are read a window at a time, packed into rows, and the rows dealt to steps and ranks. Every rank reads and
    encodes the whole window, and then keeps its own rows: all ranks have the same number of batches, of similar cost
    (see `balance`), and together they learn the same samples whatever their number.

    Args:
        sources: data files, with weights or without.
        encoder: makes sequences from their lines.
        rows: of a batch.
        length: of a row; None: `encoder.max_length`. Without packing, rows are as long as the longest of the batch.
        rank, ranks: which batches these are.
        epochs: None: without end. At the end the last batch is filled with empty rows.
        mix, shuffle, seed, samples: see `DataFiles`.
        packing: several sequences to a row; else every row has one.
        window: in steps. More of them pack and balance better, and need more memory.
        max_bad_lines: lines that cannot be understood are reported and skipped, up to so many.
        report: gets a message for each of them; by default they go to standard error, from rank 0.

    Attributes:
        imbalance: of the newest window: as its rows came, and as they were dealt (see `balance.imbalance`).
        bad_lines: how many lines could not be understood so far.

    Raises:
        ErnieError: files or settings that cannot be; when iterating, too many bad lines, or none that is of use.
    """

    def __init__(
        self,
        sources: Sequence[Source | str | Path],
        encoder: Encoder,
        *,
        rows: int = 1,
        length: int | None = None,
        rank: int = 0,
        ranks: int = 1,
        epochs: int | None = None,
        mix: Mix = "concat",
        shuffle: bool = True,
        seed: int = 0,
        samples: int | None = None,
        packing: bool = True,
        window: int = 8,
        max_bad_lines: int = 100,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.files = DataFiles(sources, mix=mix, shuffle=shuffle, seed=seed, samples=samples)
        self.encoder, self.rows, self.epochs, self.packing = encoder, rows, epochs, packing
        self.length = encoder.max_length if length is None else length
        self.rank, self.ranks, self.window, self.max_bad_lines = rank, ranks, window, max_bad_lines
        self._report = report or (_to_stderr if rank == 0 else _to_nowhere)
        self._check()
        self.imbalance = (1.0, 1.0)
        self._epoch, self._place = 0, 0  # of the next line to read
        self._useful = False  # whether anything of the epoch was
        self._carried: list[_Sample] = []
        self._bad: set[int] = set()  # numbers of lines
        self._batches: list[list[Row]] = []
        self._start, self._given = self._position(), 0  # of the window, and its batches that were given out

    @property
    def bad_lines(self) -> int:
        """See the class."""
        return len(self._bad)

    def __iter__(self) -> DataStream:
        return self

    def __next__(self) -> Batch:
        while not self._batches:
            self._fill_window()
        self._given += 1
        pad_token_id = self.encoder.tokenizer.pad_token_id or 0
        return pack(self._batches.pop(0), self.length if self.packing else None, pad_token_id)

    # ---- resuming

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as something that JSON can hold; a few numbers, however large the data."""
        return {"data": self._fingerprint(), "window": self._start, "given": self._given}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues exactly where `state()` was taken, of this stream or of that of another rank.

        Raises:
            ErnieError: the state of a stream over other files or with other settings.
        """
        found = self._fingerprint()
        different = [key for key in found if state["data"].get(key) != found[key]]
        if different:
            names = "; ".join(f"{key} is {found[key]}, was {state['data'].get(key)}" for key in different)
            raise ErnieError(f"this state is of another data stream ({names}): start anew, or restore these settings")
        window = state["window"]
        self._bad = set(window["bad"])
        self._carried = [self._sample(*origin) for origin in window["carried"]]
        self._epoch, self._place, self._useful = window["epoch"], window["place"], window["useful"]
        self.encoder.dropped = window["dropped"]
        self._batches, self._start, self._given = [], self._position(), 0
        if state["given"]:
            self._fill_window()
            del self._batches[: state["given"]]
            self._given = state["given"]

    def _position(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "place": self._place,
            "useful": self._useful,
            "carried": [list(sample.origin) for sample in self._carried],
            "bad": sorted(self._bad),
            "dropped": self.encoder.dropped,
        }

    def _fingerprint(self) -> dict[str, Any]:
        settings = ("rows", "length", "ranks", "epochs", "packing", "window")
        own = {name: getattr(self, name) for name in settings}
        return {**self.files.fingerprint(), **own, **self.encoder.settings}

    def _sample(self, epoch: int, place: int, number: int) -> _Sample:
        return _Sample((epoch, place, number), self._sequences(epoch, place)[number])

    # ---- windows

    def _fill_window(self) -> None:
        """Reads, packs and deals the next window. Raises StopIteration behind the last one."""
        self._start, self._given = self._position(), 0
        samples, self._carried = self._carried, []
        wanted = self.window * self.ranks * self.rows * (self.length if self.packing else 1)
        filled = sum(map(self._size, samples))
        while filled < wanted and self._more():
            new = self._read()
            filled += sum(map(self._size, new))
            samples += new
        if not samples:
            raise StopIteration
        self._deal(self._to_rows(samples), last=not self._more())

    def _size(self, sample: _Sample) -> int:
        return len(sample.sequence) if self.packing else 1

    def _more(self) -> bool:
        return self.epochs is None or self._epoch < self.epochs

    def _read(self) -> list[_Sample]:
        """The sequences of the next line; none if it is bad or too long."""
        epoch, place = self._epoch, self._place
        try:
            sequences = self._sequences(epoch, place)
        except ErnieError as error:
            self._skip(epoch, place, error)
            sequences = []
        self._advance(bool(sequences))
        return [_Sample((epoch, place, number), sequence) for number, sequence in enumerate(sequences)]

    def _sequences(self, epoch: int, place: int) -> Sequence[Example | Pair]:
        with self.files.naming(epoch, place):
            return self.encoder(self.files.read(epoch, place))

    def _skip(self, epoch: int, place: int, error: ErnieError) -> None:
        number = int(self.files.order(epoch)[place])
        if number in self._bad:  # in an earlier epoch
            return
        self._bad.add(number)
        if self.bad_lines > self.max_bad_lines:
            raise ErnieError(
                f"more than {self.max_bad_lines} lines of the data files cannot be used, the newest: {error}. "
                "Correct them, or raise max_bad_lines"
            ) from error
        self._report(f"skipped: {error}")

    def _advance(self, useful: bool) -> None:
        self._place, self._useful = self._place + 1, self._useful or useful
        if self._place < len(self.files.order(self._epoch)):
            return
        if not self._useful:
            raise ErnieError(
                f"nothing in the data files is of use: {self.bad_lines} lines cannot be understood, and "
                f"{self.encoder.dropped} sequences are longer than {self.encoder.max_length} tokens (max_length)"
            )
        self._epoch, self._place, self._useful = self._epoch + 1, 0, False

    def _to_rows(self, samples: list[_Sample]) -> list[list[_Sample]]:
        if not self.packing:
            return [[sample] for sample in samples]
        rows = first_fit([len(sample.sequence) for sample in samples], self.length)
        return [[samples[number] for number in row] for row in rows]

    def _deal(self, rows: list[list[_Sample]], last: bool) -> None:
        """Makes the batches of the window. Rows that fill no step go into the next window, the emptiest first."""
        per_step = self.ranks * self.rows
        excess = len(rows) % per_step
        sequences: list[Row]
        if last:
            sequences = [[sample.sequence for sample in row] for row in rows]
            sequences += [[self.encoder.empty()] for _ in range(-len(rows) % per_step)]
        else:
            filled = np.array([sum(map(self._size, row)) for row in rows])
            kept = set(np.argsort(-filled, kind="stable")[: len(rows) - excess].tolist())
            self._carried = [sample for index, row in enumerate(rows) if index not in kept for sample in row]
            sequences = [[sample.sequence for sample in rows[index]] for index in sorted(kept)]
        costs = [cost(row) for row in sequences]
        plan = as_they_come = in_order(len(sequences), self.ranks, self.rows)
        if self.ranks > 1:
            plan = balanced(
                costs, self.ranks, self.rows, np.random.default_rng([self.files.seed, self._epoch, self._place])
            )
        self.imbalance = (imbalance(costs, as_they_come), imbalance(costs, plan))
        self._batches = [[sequences[index] for index in step[self.rank]] for step in plan]

    def _check(self) -> None:
        settings = {"rows": self.rows, "ranks": self.ranks, "window": self.window, "epochs": self.epochs or 1}
        for name, value in settings.items():
            if value < 1:
                raise ErnieError(f"{name} is {value}, expected a positive number")
        if not 0 <= self.rank < self.ranks:
            raise ErnieError(f"rank is {self.rank}, expected 0 to {self.ranks - 1} for {self.ranks} ranks")
        if self.packing and self.length < self.encoder.max_length:
            raise ErnieError(
                f"rows of {self.length} tokens cannot hold sequences of up to {self.encoder.max_length} "
                "(max_length of the encoder): make them as long"
            )


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


def _to_nowhere(message: str) -> None:
    """The other ranks report the same lines."""
