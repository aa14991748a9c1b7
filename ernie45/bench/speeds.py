"""From seconds of single runs to rates, and their share of what the machine allowed just then."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ernie45.bench.limits import Storage, bytes_per_token, operations_per_token
from ernie45.bench.measure import Sample
from ernie45.bench.plan import Task
from ernie45.config import ErnieConfig

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Figure:
    """Median and spread of several values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """The median, the lowest and the highest value."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, scale: float = 1.0) -> str:
        """For example "41.2 (39.8 to 43.0)", three digits or all before the point."""
        return f"{number(self.median * scale)} ({number(self.low * scale)} to {number(self.high * scale)})"


@dataclass(frozen=True)
class Speed:
    """One kind of work of one contender, in all rounds.

    Attributes:
        rate: of tokens per second all rows together, or of whatever is counted.
        limit: the rate that the machine allowed, measured just before each run.
        share: rate over limit, of each run.
    """

    rate: Figure
    limit: Figure
    share: Figure

    @classmethod
    def of(cls, rates: Sequence[float], limits: Sequence[float]) -> Speed:
        """From the rate and the limit of each run."""
        shares = [rate / limit for rate, limit in zip(rates, limits, strict=True)]
        return cls(Figure.of(rates), Figure.of(limits), Figure.of(shares))


def speed(config: ErnieConfig, storage: Storage, kind: str, task: Task, samples: Sequence[Sample]) -> Speed:
    """Tokens per second of one task.

    Args:
        config: architecture.
        storage: how the weights lie in memory.
        kind: "prefill" or "decode".
        task: what was run.
        samples: its runs.
    """
    if kind == DECODE:
        return decode_speed(config, storage, task.batch, samples)
    tokens = task.batch * task.prompt
    return product_speed(storage, tokens, tokens * operations_per_token(config), samples)


def decode_speed(config: ErnieConfig, storage: Storage, batch: int, samples: Sequence[Sample]) -> Speed:
    """Decoded tokens per second; the limit is that of reading the weights."""
    rates = [batch / sample.decode for sample in samples if sample.decode is not None]
    bandwidths = [sample.machine["bandwidth"] for sample in samples]
    return Speed.of(rates, [batch * bandwidth / bytes_per_token(config, storage) for bandwidth in bandwidths])


def product_speed(storage: Storage, count: float, operations: float, samples: Sequence[Sample]) -> Speed:
    """`count` things per time that the work before the first token took; the limit is that of products of matrices.

    Args:
        storage: says in which dtype they are.
        count: tokens, or 1 for how often the work could be done per second.
        operations: of all of them together.
        samples: runs.
    """
    products = [sample.machine[storage.products] or sample.machine["float32"] for sample in samples]
    return Speed.of([count / sample.prefill for sample in samples], [count * rate / operations for rate in products])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Three digits, or all of them before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
