"""The tokens of a tokenizer folder: the sentencepiece model, the added tokens and the roles of special ones."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ernie45.errors import ErnieError, TokenizerError
from ernie45.tokenizer_files import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    MODEL_FILES,
    SPECIAL_TOKENS_FILE,
    TokenizerFiles,
)

# The roles that the published files give, used where the files are absent and tokenizer.model has the token.
PUBLISHED_ROLES = {
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "<|end_of_sentence|>",
    "cls_token": "<|begin_of_sentence|>",
    "mask_token": "<mask:1>",
}

SPACE_SYMBOL = "\u2581"  # how sentencepiece writes a space inside a piece
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # ModelProto.SentencePiece.Type
MARKUP = re.compile(r"<.+>", re.DOTALL)  # the shape of a control token such as <mask:1> or <|end_of_sentence|>


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Every token of a tokenizer.

    Attributes:
        tokens: texts by id, added tokens included.
        num_pieces: how many of them, the first ids, are in the sentencepiece model.
        byte_values: the bytes that byte pieces stand for, by id.
        unknown_id: what sentencepiece gives for text that it has no piece for.
        roles: token texts by role, such as {"eos_token": "</s>"}; None where a file switches a role off.
        atomic: the texts that are one token wherever they stand.
        special: the ids that skip_special_tokens drops.
        model: the serialized sentencepiece model to encode plain text with. In it the atomic pieces are control pieces,
            which text never produces.
        adds_dummy_prefix: the model puts a space before each span of text.
        removes_extra_whitespaces: the model drops leading, trailing and repeated spaces.
    """

    tokens: dict[int, str]
    num_pieces: int
    byte_values: dict[int, int]
    unknown_id: int | None
    roles: dict[str, str | None]
    atomic: frozenset[str]
    special: frozenset[int]
    model: bytes
    adds_dummy_prefix: bool
    removes_extra_whitespaces: bool

    def token(self, index: int) -> str:
        """The text of an id; `<|unused_ID|>` where no token has it. Raises ErnieError for a negative one."""
        if index < 0:
            raise ErnieError(
                f"{index} is not a token id: ids are >= 0 (-100 marks ignored labels: remove those first)."
            )
        return self.tokens.get(index) or f"<|unused_{index}|>"

    @classmethod
    def from_files(cls, files: TokenizerFiles) -> Vocabulary:
        """Read and check the files. Raises TokenizerError naming the file and what is wrong in it."""
        proto = parse_sentencepiece(files.contents[files.model_file], files.where(files.model_file))
        pieces = {piece.piece: index for index, piece in enumerate(proto.pieces)}
        added, marked_special = read_added_tokens(files, pieces)
        token_ids = {**pieces, **added}
        roles = read_roles(files, token_ids)
        named = {text for text in roles.values() if text is not None} | read_extra_special_tokens(files, token_ids)
        named |= marked_special
        markup = {p.piece for p in proto.pieces if p.type == USER_DEFINED and MARKUP.fullmatch(p.piece)}
        atomic = frozenset(named | markup | added.keys())
        invisible = {index for index, piece in enumerate(proto.pieces) if piece.type in (CONTROL, UNKNOWN)}
        for piece in proto.pieces:
            if piece.type == USER_DEFINED and piece.piece in atomic:
                piece.type = CONTROL
        return cls(
            tokens={index: text for text, index in token_ids.items()},
            num_pieces=len(pieces),
            byte_values={i: int(p.piece[3:5], 16) for i, p in enumerate(proto.pieces) if p.type == BYTE},
            unknown_id=next((i for i, p in enumerate(proto.pieces) if p.type == UNKNOWN), None),
            roles=roles,
            atomic=atomic,
            special=frozenset(invisible | {token_ids[text] for text in named}),
            model=proto.SerializeToString(),
            adds_dummy_prefix=proto.normalizer_spec.add_dummy_prefix,
            removes_extra_whitespaces=proto.normalizer_spec.remove_extra_whitespaces,
        )


def parse_sentencepiece(content: bytes, where: str) -> Any:
    """The sentencepiece ModelProto in `content`. Raises TokenizerError if it is not a whole one."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    if content.startswith(b"version https://git-lfs"):
        raise TokenizerError(f"{where}: a Git LFS pointer, not the file itself. Run `git lfs pull` or download it.")
    advice = "Download the file again."
    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]
    except (DecodeError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{where}: truncated, or not a sentencepiece model ({error}). {advice}") from error
    # The pieces come first in the file: one cut between two pieces still parses, but lacks what follows them.
    if not proto.pieces or not proto.HasField("trainer_spec") or not proto.HasField("normalizer_spec"):
        raise TokenizerError(
            f"{where}: truncated, or not a sentencepiece model ({len(content)} bytes, {len(proto.pieces)} pieces, "
            f"expected pieces, a trainer_spec and a normalizer_spec). {advice}"
        )
    seen: set[str] = set()
    for index, piece in enumerate(proto.pieces):
        # protobuf hands a text that is not UTF-8 over as bytes
        if not isinstance(piece.piece, str) or not piece.piece or piece.piece in seen:
            raise TokenizerError(f"{where}: piece {index} ({piece.piece!r}) is empty, a duplicate or no text. {advice}")
        if piece.type == BYTE and not re.fullmatch("<0x[0-9A-F]{2}>", piece.piece):
            raise TokenizerError(f"{where}: byte piece {index} is {piece.piece!r}, expected <0x00>..<0xFF>. {advice}")
        seen.add(piece.piece)
    return proto


def read_added_tokens(files: TokenizerFiles, pieces: Mapping[str, int]) -> tuple[dict[str, int], set[str]]:
    """The tokens of added_tokens.json and of added_tokens_decoder: ids by text, and the texts marked special."""
    added: dict[str, int] = {}
    owners = {index: text for text, index in pieces.items()}
    special: set[str] = set()
    for file, text, index, is_special in _added_entries(files):
        where = files.where(file)
        if not isinstance(index, int) or isinstance(index, bool) or index < 0 or not text:
            raise TokenizerError(f"{where}: token {text!r} has the id {index!r}, expected a text and an integer >= 0.")
        known = added.get(text, pieces.get(text, index))
        if known != index:
            raise TokenizerError(
                f"{where}: token {text!r} has the id {index}, but {known} elsewhere in {files.folder}."
            )
        if owners.setdefault(index, text) != text:
            raise TokenizerError(
                f"{where}: token {text!r} has the id {index}, which is already {owners[index]!r}. "
                "The files do not belong together: take all of them from one checkpoint."
            )
        added[text] = index
        if is_special:
            special.add(text)
    return added, special


def _added_entries(files: TokenizerFiles) -> Iterator[tuple[str, str, Any, bool]]:
    """(file, text, id, marked special) for each added token of the two files that may list them."""
    for text, index in files.table(ADDED_TOKENS_FILE).items():
        yield ADDED_TOKENS_FILE, text, index, False
    entries = files.table(CONFIG_FILE).get("added_tokens_decoder") or {}
    where = files.where(CONFIG_FILE)
    if not isinstance(entries, dict):
        raise TokenizerError(f"{where}: added_tokens_decoder is a {type(entries).__name__}, expected an object.")
    for key, entry in entries.items():
        text = _token_text(entry, where, f"added_tokens_decoder[{key!r}]")
        index = int(key) if key.isascii() and key.isdigit() else key
        yield CONFIG_FILE, text, index, isinstance(entry, dict) and entry.get("special") is True


def read_roles(files: TokenizerFiles, token_ids: Mapping[str, int]) -> dict[str, str | None]:
    """The token text (or None) of each role; tokenizer_config.json goes before special_tokens_map.json."""
    roles: dict[str, str | None] = {}
    for file in (SPECIAL_TOKENS_FILE, CONFIG_FILE):
        for name, value in files.table(file).items():
            if not name.endswith("_token") or isinstance(value, bool):
                continue
            if value is None:
                roles.setdefault(name, None)
                continue
            roles[name] = _existing_token(value, files.where(file), name, token_ids)
    defaults = {name: text for name, text in PUBLISHED_ROLES.items() if text in token_ids}
    return {**defaults, **roles}


def read_extra_special_tokens(files: TokenizerFiles, token_ids: Mapping[str, int]) -> set[str]:
    """The special tokens that have no role of their own."""
    texts: set[str] = set()
    for file in (SPECIAL_TOKENS_FILE, CONFIG_FILE):
        table = files.table(file)
        for key in ("additional_special_tokens", "extra_special_tokens"):
            values = table.get(key) or []
            if not isinstance(values, (list, dict)):
                raise TokenizerError(f"{files.where(file)}: {key} is a {type(values).__name__}, expected a list.")
            for value in values.values() if isinstance(values, dict) else values:
                texts.add(_existing_token(value, files.where(file), key, token_ids))
    return texts


def _token_text(value: Any, where: str, name: str) -> str:
    """The text of a token written as a string or as {"content": string}."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise TokenizerError(f"{where}: {name} is {value!r}, expected a token text or an object with its content.")
    return text


def _existing_token(value: Any, where: str, name: str, token_ids: Mapping[str, int]) -> str:
    text = _token_text(value, where, name)
    if text not in token_ids:
        raise TokenizerError(
            f"{where}: {name} names the token {text!r}, which is neither in {MODEL_FILES[0]} nor in "
            f"{ADDED_TOKENS_FILE}. Add it there or correct the name."
        )
    return text
