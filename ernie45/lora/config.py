"""What adapters a model gets: rank, scale and the weights beside which they stand."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ernie45.errors import ErnieError

# As upstream: attention and MLPs, experts among them; of vision-language models also those of the vision tower, and the
# adapter between the two (which upstream calls the resampler).
DEFAULT_TARGETS = (
    ".*qkv_proj",
    ".*o_proj",
    ".*up_gate_proj",
    ".*down_proj",
    r".*attn\.qkv",
    r".*attn\.proj",
    r".*mlp\.fc1",
    r".*mlp\.fc2",
    r".*spatial_linear\.0",
    r".*spatial_linear\.2",
    r".*temporal_linear\.0",
    r".*temporal_linear\.2",
    r".*resampler_model\.mlp",
)


@dataclass(frozen=True)
class LoraConfig:
    """How adapters are made.

    Attributes:
        rank: columns of A and rows of B.
        alpha: scale of the adapters, times the rank or its root.
        targets: regular expressions, one of which has to match the whole published name of a module.
        rslora: scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732) instead of alpha / rank.
        dropout: probability with which an entry of an adapter's input is dropped in training.

    Raises:
        ErnieError: a value that is not possible.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, value, good, expected in (
            ("rank", self.rank, _is_integer(self.rank) and self.rank > 0, "a positive integer"),
            ("alpha", self.alpha, _is_number(self.alpha) and self.alpha > 0, "a positive number"),
            ("dropout", self.dropout, _is_number(self.dropout) and 0 <= self.dropout < 1, "0 or more and less than 1"),
            ("rslora", self.rslora, isinstance(self.rslora, bool), "true or false"),
        ):
            if not good:
                raise ErnieError(f"lora: {name} is {value!r}, expected {expected}")
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ErnieError(f"lora: target {pattern!r} is no regular expression: {error}") from error

    @classmethod
    def of(
        cls,
        rank: int,
        alpha: float | None,
        targets: str | Iterable[str] | None,
        rslora: bool,
        dropout: float,
    ) -> LoraConfig:
        """Fills in what is None, and lets patterns begin anywhere behind a dot; see `ernie45.lora.apply`.

        Upstream computes alpha from the rank like this even where the user gives one; here that one counts.
        """
        if alpha is None:
            alpha = 4 if rslora else 2 * rank
        chosen = DEFAULT_TARGETS if targets is None else (targets,) if isinstance(targets, str) else tuple(targets)
        return cls(rank, alpha, tuple(map(_from_a_dot, chosen)), rslora, dropout)

    @property
    def scale(self) -> float:
        """What the product of A and B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def matches(self, name: str) -> bool:
        """Whether the module with this published name gets an adapter."""
        return any(re.fullmatch(pattern, name) for pattern in self.targets)


def _from_a_dot(pattern: str) -> str:
    if not isinstance(pattern, str) or pattern.startswith(".*"):
        return pattern
    return rf"(.*\.)?({pattern})"


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
