"""What `verify` found, as data and as tables."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from ernie45.verify.agreement import Agreement
from ernie45.verify.speed import Speed

EXCERPT = 40  # columns of a prompt that the table shows


@dataclass(frozen=True)
class PromptRow:
    """One prompt, the continuation that both models were given, and how far they agree on it."""

    prompt: str
    continuation: str
    agreement: Agreement


@dataclass(frozen=True)
class Report:
    """The result of `verify`; `str(report)` is Markdown.

    Attributes:
        model: name or folder.
        reference: how the reference ran, for example "float32 on cpu".
        variant: how the verified model ran.
        rows: one per prompt: prompt and continuation in one forward pass.
        overall: all rows together.
        decoding: the continuations again, one token at a time from the cache, as generation computes them.
        speeds: one per prompt length and output length, of the verified model.
    """

    model: str
    reference: str
    variant: str
    rows: tuple[PromptRow, ...]
    overall: Agreement
    decoding: Agreement
    speeds: tuple[Speed, ...]

    def __str__(self) -> str:
        """Title, the table of errors, and the table of speeds if they were measured."""
        title = f"{self.model}: {self.variant}, compared with {self.reference} in plain Paddle"
        tables = [title, self.agreement_table()]
        return "\n\n".join([*tables, self.speed_table()] if self.speeds else tables)

    def agreement_table(self) -> str:
        """One line per prompt, then all of them in one pass, and all continuations token by token."""
        head = ["prompt", "positions", "mean error", "max error", "mean cosine", "min cosine", "top-1 agreement"]
        named = [(_excerpt(row.prompt), row.agreement) for row in self.rows]
        named += [("all, in one pass", self.overall), ("all, token by token", self.decoding)]
        return markdown_table(head, [[name, *_cells(agreement)] for name, agreement in named])

    def speed_table(self) -> str:
        """One line per prompt length and output length."""
        head = ["prompt tokens", "new tokens", "first token", "tokens/s", "time per output token"]
        return markdown_table(
            head,
            [
                [
                    str(speed.prompt),
                    str(speed.output),
                    f"{1000 * speed.first_token:.1f} ms",
                    f"{speed.tokens_per_second:.1f}",
                    "" if speed.per_token is None else f"{1000 * speed.per_token:.2f} ms",
                ]
                for speed in self.speeds
            ],
        )


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that is aligned in a terminal too: the first column to the left, numbers to the right."""
    widths = [max(_width(row[column]) for row in [head, *rows]) for column in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(_padded(row, widths)) + " |" for row in [head, rule, *rows])


def _padded(row: list[str], widths: list[int]) -> list[str]:
    spaces = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
    return [row[0] + spaces[0], *(space + cell for space, cell in zip(spaces[1:], row[1:], strict=True))]


def _width(text: str) -> int:
    """Columns of a terminal: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _excerpt(prompt: str) -> str:
    text = " ".join(prompt.split())
    if _width(text) > EXCERPT:
        while _width(text) > EXCERPT - 3:
            text = text[:-1]
        text += "..."
    return text.replace("|", "\\|")


def _cells(agreement: Agreement) -> list[str]:
    return [
        str(agreement.positions),
        f"{agreement.mean_error:.2e}",
        f"{agreement.max_error:.2e}",
        f"{agreement.mean_cosine:.6f}",
        f"{agreement.min_cosine:.6f}",
        f"{agreement.top1:.4f}",
    ]
