"""The tokenizer of ERNIE 4.5: special tokens first, sentencepiece for the text between them."""

from __future__ import annotations

import operator
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, overload

from ernie45.chat import Message, choose_template, render_chat
from ernie45.errors import ErnieError, TokenizerError
from ernie45.stream_decoder import StreamDecoder
from ernie45.tokenizer_files import CONFIG_FILE, TOKENIZER_FILES, TokenizerFiles, read_chat_templates
from ernie45.vocabulary import SPACE_SYMBOL, Vocabulary


class _RoleToken:
    """An attribute such as `eos_token`: the text of that special token, or None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._role = name

    def __get__(self, tokenizer: ErnieTokenizer, owner: type | None = None) -> str | None:
        return tokenizer.special_tokens.get(self._role)


class _RoleId:
    """An attribute such as `eos_token_id`: the id of that special token, or None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._role = name.removesuffix("_id")

    def __get__(self, tokenizer: ErnieTokenizer, owner: type | None = None) -> int | None:
        token = tokenizer.special_tokens.get(self._role)
        return None if token is None else tokenizer.convert_tokens_to_ids(token)


class ErnieTokenizer:
    """Text to token ids and back.

    Registered special and added tokens are split off first (leftmost, then longest); sentencepiece encodes the spans
    between them. No token is ever added: a chat template writes those it wants. Where the sentencepiece model has byte
    pieces and an identity normalizer without dummy prefix (as the published one), `decode(encode(text)) == text` for
    every text.

    Attributes:
        special_tokens: the token text of each role, such as {"eos_token": "</s>"}; None where a role is switched off.
        chat_templates: the checkpoint's Jinja templates by name; {} where it has none and a built-in one is used.
        vocabulary: the tables of all tokens.
        padding_side: "right" or "left", from tokenizer_config.json.
    """

    bos_token, bos_token_id = _RoleToken(), _RoleId()
    eos_token, eos_token_id = _RoleToken(), _RoleId()
    pad_token, pad_token_id = _RoleToken(), _RoleId()
    unk_token, unk_token_id = _RoleToken(), _RoleId()
    sep_token, sep_token_id = _RoleToken(), _RoleId()
    cls_token, cls_token_id = _RoleToken(), _RoleId()
    mask_token, mask_token_id = _RoleToken(), _RoleId()

    def __init__(self, files: TokenizerFiles) -> None:
        """Build from file contents. Raises TokenizerError naming the file that is broken."""
        import sentencepiece

        self._files = files
        self.vocabulary = vocabulary = Vocabulary.from_files(files)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.model)
        except (RuntimeError, OSError) as error:
            raise TokenizerError(f"{files.where(files.model_file)}: sentencepiece cannot load it: {error}") from error
        self._ids = {token: index for index, token in vocabulary.tokens.items()}
        self._length = max(vocabulary.tokens) + 1
        self._space_symbol_ids = _space_symbol_ids(vocabulary)
        longest_first = sorted(vocabulary.atomic, key=len, reverse=True)
        self._atomic = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.special_tokens: dict[str, str | None] = dict(vocabulary.roles)
        self.chat_templates: dict[str, str] = read_chat_templates(files)
        self.padding_side: str = files.table(CONFIG_FILE).get("padding_side") or "right"
        _check_padding_side(self.padding_side, f"{files.where(CONFIG_FILE)}: padding_side")

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | pathlib.Path,
        *,
        revision: str | None = None,
        cache_dir: str | pathlib.Path | None = None,
    ) -> ErnieTokenizer:
        """Load from a folder, or from a published name. Raises TokenizerError (files) or CheckpointError (download)."""
        from ernie45.checkpoint.hub import resolve_folder

        folder = resolve_folder(
            name_or_folder, revision=revision, cache_dir=cache_dir, allow_patterns=list(TOKENIZER_FILES)
        )
        return cls(TokenizerFiles.read(folder))

    def save_pretrained(self, folder: str | pathlib.Path) -> None:
        """Write the files as they were read. Other tokenizer files already in `folder` are replaced or removed."""
        self._files.write(folder)

    # ---- vocabulary

    @property
    def vocab_size(self) -> int:
        """Number of pieces in the sentencepiece model, without added tokens."""
        return self.vocabulary.num_pieces

    def __len__(self) -> int:
        """One more than the highest token id. Generation must mask the ids from here to the model's vocab_size."""
        return self._length

    @property
    def all_special_ids(self) -> list[int]:
        """The ids that skip_special_tokens drops, ascending."""
        return sorted(self.vocabulary.special)

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...
    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """The id of a token, or the ids of several; the unknown id for what is not a token."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self._ids.get(tokens, self.vocabulary.unknown_id)
        if index is None:
            raise ErnieError(f"{tokens!r} is not a token of {self._files.folder}, which has no unknown token either.")
        return index

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str: ...
    @overload
    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]: ...
    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> str | list[str]:
        """The token of an id, or the tokens of several; `<|unused_ID|>` for an id that no token has."""
        if isinstance(ids, int):
            return self.vocabulary.token(ids)
        return [self.vocabulary.token(index) for index in _id_list(ids)]

    # ---- text to ids

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """The token ids of a text; nothing is added at either end.

        With allow_special=False special strings in the text are encoded as the plain characters they are written with,
        so that text from outside cannot bring in control tokens. Raises ErnieError for a lone surrogate.
        """
        _check_encodable(text)
        if not allow_special:
            return self._encode_span(text)
        ids: list[int] = []
        start = 0
        for match in self._atomic.finditer(text):
            ids += self._encode_span(text[start : match.start()])
            ids.append(self._ids[match[0]])
            start = match.end()
        return ids + self._encode_span(text[start:])

    def _encode_span(self, text: str) -> list[int]:
        """Encode text without special tokens.

        sentencepiece writes spaces as U+2581, so a U+2581 of the text itself is spelled in byte pieces instead.
        """
        if SPACE_SYMBOL not in text or self._space_symbol_ids is None:
            return self._processor.encode(text, out_type=int)
        first, *rest = text.split(SPACE_SYMBOL)
        ids = self._processor.encode(first, out_type=int)
        for part in rest:
            ids += self._space_symbol_ids + self._processor.encode(part, out_type=int)
        return ids

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        padding: bool = False,
        padding_side: Literal["left", "right"] | None = None,
        return_tensors: Literal["np", "pd"] | None = None,
    ) -> dict[str, Any]:
        """Encode a batch.

        Args:
            texts: one text is a batch of one.
            padding: pad with pad_token_id to the longest text.
            padding_side: where to pad; by default `self.padding_side`. Generation wants "left".
            return_tensors: "np" or "pd" for int64 arrays, None for lists.

        Returns:
            {"input_ids": [batch, length], "attention_mask": [batch, length], 1 for text and 0 for padding}.
        """
        rows = [self.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
        masks = [[1] * len(row) for row in rows]
        if padding:
            side = padding_side or self.padding_side
            _check_padding_side(side, "padding_side")
            pad_token_id = self.pad_token_id
            if pad_token_id is None:
                raise ErnieError("padding: this tokenizer has no pad_token. Encode the texts one by one.")
            rows, masks = _pad(rows, pad_token_id, side), _pad(masks, 0, side)
        return {"input_ids": _as_tensor(rows, return_tensors), "attention_mask": _as_tensor(masks, return_tensors)}

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tokenize: bool = True,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **template_kwargs: Any,
    ) -> list[int] | str:
        """The prompt of a conversation, as ids or (tokenize=False) as text.

        Args:
            messages: [{"role": ..., "content": ...}, ...] as in `ernie45.chat.render_chat`. Special strings inside the
                contents become special tokens too: remove them from text that is not trusted.
            add_generation_prompt: end with the header of the assistant's turn. Always handed to the template: the
                published ones take it as true where it is undefined.
            enable_thinking: handed to the template unless None; what None means is the template's choice.
            tools: descriptions of functions, as JSON-like dicts.
            chat_template: the name of one of `chat_templates`, or the source of another template.
            template_kwargs: further variables of the template.
        """
        template = choose_template(
            self.chat_templates, chat_template, has_tools=bool(tools), thinks_in_turns="<|im_start|>" in self._ids
        )
        variables = {**self.special_tokens, **template_kwargs, "enable_thinking": enable_thinking, "tools": tools}
        text = render_chat(template, messages, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text) if tokenize else text

    # ---- ids to text

    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids, without any clean-up.

        Bytes that are not UTF-8 become U+FFFD each. An id that no token has becomes `<|unused_ID|>`, or nothing with
        skip_special_tokens. Raises ErnieError for what is not an id.
        """
        stream = StreamDecoder(self, skip_special_tokens)
        pieces = [stream.push(index) for index in _id_list(ids)]
        return "".join(pieces) + stream.flush()


def _space_symbol_ids(vocabulary: Vocabulary) -> list[int] | None:
    """U+2581 in byte pieces; None where the model has none, or would add a space to the text after them."""
    if vocabulary.adds_dummy_prefix or vocabulary.removes_extra_whitespaces:
        return None
    byte_ids = {value: index for index, value in vocabulary.byte_values.items()}
    spelled = SPACE_SYMBOL.encode()
    return [byte_ids[byte] for byte in spelled] if set(spelled) <= byte_ids.keys() else None


def _check_encodable(text: str) -> None:
    if not isinstance(text, str):
        raise ErnieError(f"text is a {type(text).__name__}, expected a str.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ErnieError(
            f"text has a lone surrogate {text[error.start]!r} at position {error.start}, which no UTF-8 text can hold. "
            'Remove it, for example with text.encode("utf-8", "replace").decode().'
        ) from error


def _id_list(ids: int | Iterable[int]) -> list[int]:
    """Ids given as one id, a list, a NumPy array or a tensor."""
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    try:
        return [operator.index(value) for value in ([values] if isinstance(values, int) else values)]
    except TypeError as error:
        raise ErnieError(
            f"ids must be one sequence of integers ({error}). Decode the rows of a batch one by one."
        ) from error


def _check_padding_side(side: str, where: str) -> None:
    if side not in ("left", "right"):
        raise ErnieError(f'{where} is {side!r}, expected "left" or "right".')


def _pad(rows: list[list[int]], value: int, side: str) -> list[list[int]]:
    longest = max(map(len, rows), default=0)
    padding = [[value] * (longest - len(row)) for row in rows]
    return [more + row if side == "left" else row + more for row, more in zip(rows, padding, strict=True)]


def _as_tensor(rows: list[list[int]], kind: str | None) -> Any:
    if kind is None:
        return rows
    if kind not in ("np", "pd"):
        raise ErnieError(f'return_tensors is {kind!r}, expected "np", "pd" or None.')
    if len({len(row) for row in rows}) > 1:
        raise ErnieError("return_tensors: the texts have different lengths. Pass padding=True.")
    import numpy

    array = numpy.array(rows, dtype="int64").reshape(len(rows), len(rows[0]) if rows else 0)
    if kind == "np":
        return array
    import paddle

    return paddle.to_tensor(array)
