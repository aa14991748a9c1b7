"""The text of a reply while its tokens come, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ernie45.errors import ErnieError
from ernie45.stream_decoder import StreamDecoder

if TYPE_CHECKING:
    from ernie45.tokenizer import ErnieTokenizer


class RowText:
    """The text of one row, up to the first stop string.

    Text that may be the beginning of a stop string is held back until that is decided, so nothing is ever retracted.

    Args:
        tokenizer: decodes the tokens.
        stop_strings: the text ends before the first of them.
        skip_special_tokens: leave out tokens such as `</s>`.

    Attributes:
        stopped: a stop string has come.
    """

    def __init__(self, tokenizer: ErnieTokenizer, stop_strings: Sequence[str] = (), skip_special_tokens: bool = True):
        self.stopped = False
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens)
        self._stop_strings = stop_strings
        self._held = ""

    def push(self, token_id: int) -> str:
        """The text that is certain now."""
        return self._release(self._decoder.push(token_id))

    def flush(self) -> str:
        """The rest, when no more tokens follow."""
        text = self._release(self._decoder.flush()) + self._held
        self._held = ""
        return text

    def _release(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [start for stop in self._stop_strings if (start := text.find(stop)) >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(text) - self._undecided(text)
        self._held = "" if found else text[end:]
        return text[:end]

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        lengths = (n for stop in self._stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(lengths, default=0)


def has_stop(tokenizer: ErnieTokenizer, stop_strings: Sequence[str], token_ids: Iterable[int]) -> bool:
    """Whether the text of these tokens, special ones left out, has a stop string in it."""
    text = RowText(tokenizer, stop_strings)
    for token_id in token_ids:
        text.push(token_id)
    return text.stopped


def read_stop_strings(
    stop_strings: str | Sequence[str] | None, tokenizer: ErnieTokenizer | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Checks stop strings.

    Returns:
        the strings, and the ids of those that are a special token: the text may leave them out.

    Raises:
        ErnieError: an empty one, no string, or no tokenizer to make text with.
    """
    strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings or ())
    if not strings:
        return (), ()
    wrong = [string for string in strings if not isinstance(string, str) or not string]
    if wrong:
        raise ErnieError(f"stop_strings: expected texts of at least one character, found {wrong[0]!r}")
    if tokenizer is None:
        raise ErnieError("stop_strings: they are looked for in the text: pass tokenizer= too")
    encoded = [tokenizer.encode(string) for string in strings]
    return strings, tuple(ids[0] for ids in encoded if len(ids) == 1 and ids[0] in tokenizer.all_special_ids)
