"""Text while it is generated: streamers to hand to `generate`, and the iterator `stream`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import numpy as np

from ernie45.errors import ErnieError
from ernie45.generation.request import Request, prepare
from ernie45.generation.steps import steps
from ernie45.generation.text import RowText

if TYPE_CHECKING:
    from ernie45.models.pretrained import PretrainedModel
    from ernie45.tokenizer import ErnieTokenizer


class Streamer(Protocol):
    """What `generate` can be given to watch the tokens."""

    def put(self, ids: np.ndarray) -> None:
        """One new token per row, [rows] int64; the pad token in rows that had ended before."""

    def end(self) -> None:
        """No more tokens follow; called after an error or Ctrl-C too."""


class TextStreamer:
    """Prints the text of one row as it comes, and a newline at its end.

    Args:
        tokenizer: decodes the tokens.
        skip_special_tokens: leave out tokens such as `</s>`.
        stop_strings: those given to `generate`, so that they are not printed.
        file: where to print, by default the standard output.
    """

    def __init__(
        self,
        tokenizer: ErnieTokenizer,
        skip_special_tokens: bool = True,
        stop_strings: Sequence[str] = (),
        file: TextIO | None = None,
    ):
        self._text = RowText(tokenizer, stop_strings, skip_special_tokens)
        self._file = file

    def put(self, ids: np.ndarray) -> None:
        """Prints what the next token makes certain."""
        if len(ids) != 1:
            raise ErnieError(f"TextStreamer: prints one row, found {len(ids)}; give generate one prompt and one reply")
        self._print(self._text.push(int(ids[0])))

    def end(self) -> None:
        """Prints the rest and a newline."""
        self._print(self._text.flush() + "\n")

    def _print(self, text: str) -> None:
        file = self._file or sys.stdout
        file.write(text)
        file.flush()


def stream(
    model: PretrainedModel,
    prompt: Any,
    *,
    tokenizer: ErnieTokenizer,
    skip_special_tokens: bool = True,
    **arguments: Any,
) -> Iterator[str]:
    """The reply to one prompt, piece by piece; all pieces together are its whole text, without the stop string.

    Leaving the loop early leaves a cache consistent.

    Args:
        model: the model.
        prompt: text to continue; or messages ([{"role": "user", "content": ...}]) for the chat template; or ids.
        tokenizer: of the model.
        skip_special_tokens: leave out tokens such as `</s>`.
        arguments: as for `ernie45.generation.generate.generate`, without num_beams and num_return_sequences.

    Raises:
        ErnieError: something is wrong with the arguments (before the first piece is asked for).
    """
    request = prepare(model, _prompt_ids(prompt, tokenizer), tokenizer=tokenizer, **arguments)
    if len(request.prompts) != 1 or request.config.num_return_sequences != 1 or request.config.num_beams != 1:
        raise ErnieError(
            f"stream: one prompt, one reply and no beams; found {len(request.prompts)} prompts, "
            f"num_return_sequences={request.config.num_return_sequences}, num_beams={request.config.num_beams}"
        )
    return _pieces(model, request, request.row_texts(1, skip_special_tokens))


def _pieces(model: PretrainedModel, request: Request, texts: list[RowText]) -> Iterator[str]:
    for step in steps(model, request, texts):
        if step.texts[0]:
            yield step.texts[0]
    rest = texts[0].flush()
    if rest:
        yield rest


def _prompt_ids(prompt: Any, tokenizer: ErnieTokenizer) -> Any:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        return tokenizer.apply_chat_template(prompt)
    return prompt
