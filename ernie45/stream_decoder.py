"""Token ids to text, one token at a time."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

from ernie45.vocabulary import SPACE_SYMBOL

if TYPE_CHECKING:
    from ernie45.tokenizer import ErnieTokenizer


class StreamDecoder:
    """Decodes token by token; the pieces together are the text that `decode` returns.

    A character whose bytes come as several tokens is held back until it is whole.

        stream = StreamDecoder(tokenizer)
        for token_id in generated:
            print(stream.push(token_id), end="")
        print(stream.flush())
    """

    def __init__(self, tokenizer: ErnieTokenizer, skip_special_tokens: bool = True) -> None:
        self._vocabulary = tokenizer.vocabulary
        self._skip_special_tokens = skip_special_tokens
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors=_REPLACE_EACH_BYTE)
        self._at_run_start = True

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly empty."""
        token = self._vocabulary.token(token_id)
        if self._is_verbatim(token_id, token):
            return self.flush() + ("" if self._is_skipped(token_id) else token)
        if token_id in self._vocabulary.byte_values:
            self._at_run_start = False
            return self._bytes.decode(bytes([self._vocabulary.byte_values[token_id]]))
        return self._bytes.decode(b"", final=True) + self._decode_piece(token)

    def flush(self) -> str:
        """The rest, when no more tokens follow. The decoder can then be used for another text."""
        self._at_run_start = True
        return self._bytes.decode(b"", final=True)

    def _is_verbatim(self, token_id: int, token: str) -> bool:
        vocabulary = self._vocabulary
        return token_id >= vocabulary.num_pieces or token_id in vocabulary.special or token in vocabulary.atomic

    def _is_skipped(self, token_id: int) -> bool:
        vocabulary = self._vocabulary
        return self._skip_special_tokens and (token_id in vocabulary.special or token_id not in vocabulary.tokens)

    def _decode_piece(self, piece: str) -> str:
        """A piece as text. Models that put a space before each run of text get it taken away again, as sentencepiece
        does: one space with a dummy prefix, all leading ones where extra whitespace is removed."""
        removes_all = self._vocabulary.removes_extra_whitespaces
        if self._at_run_start and (removes_all or self._vocabulary.adds_dummy_prefix):
            stripped = piece.removeprefix(SPACE_SYMBOL)
            self._at_run_start = not stripped and (removes_all or stripped == piece)
            piece = stripped
        return piece.replace(SPACE_SYMBOL, " ")


_REPLACE_EACH_BYTE = "ernie45.replace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """sentencepiece replaces every undecodable byte by itself, where Python's "replace" takes several at once."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd", error.start + 1


codecs.register_error(_REPLACE_EACH_BYTE, _replace_each_byte)
