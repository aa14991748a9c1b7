"""The files of a tokenizer folder: reading them, writing them back, and the chat templates among them."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ernie45.errors import TokenizerError

# The first name is what ERNIE 4.5 publishes; the others are older spellings that serving engines also accept.
MODEL_FILES = ("tokenizer.model", "spm.model", "ernie_token_100k.model")
CONFIG_FILE = "tokenizer_config.json"
ADDED_TOKENS_FILE = "added_tokens.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_JSON_FILE = "chat_template.json"
TOKENIZER_FILES = (
    *MODEL_FILES, CONFIG_FILE, ADDED_TOKENS_FILE, SPECIAL_TOKENS_FILE, TEMPLATE_FILE, TEMPLATE_JSON_FILE,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """The bytes of the tokenizer files of one folder, by file name."""

    folder: str
    contents: Mapping[str, bytes]

    @classmethod
    def read(cls, folder: str | pathlib.Path) -> TokenizerFiles:
        """Read what `folder` holds of TOKENIZER_FILES. Raises TokenizerError if there is no sentencepiece model."""
        path = pathlib.Path(folder)
        try:
            contents = {name: (path / name).read_bytes() for name in TOKENIZER_FILES if (path / name).is_file()}
        except OSError as error:
            raise TokenizerError(f"{path}: cannot read the tokenizer files: {error}") from error
        if not any(name in contents for name in MODEL_FILES):
            raise TokenizerError(
                f"{path}: no {MODEL_FILES[0]} in this folder. Copy it from the published checkpoint "
                "(a folder with only tokenizer.json cannot be read)."
            )
        return cls(str(path), contents)

    def write(self, folder: str | pathlib.Path) -> None:
        """Write the files unchanged into `folder`, and remove other tokenizer files there that would shadow them."""
        path = pathlib.Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name, content in self.contents.items():
                temporary = path / f".{name}.{os.getpid()}.tmp"
                try:
                    temporary.write_bytes(content)
                    os.replace(temporary, path / name)
                finally:
                    temporary.unlink(missing_ok=True)
            for name in set(TOKENIZER_FILES) - set(self.contents):
                (path / name).unlink(missing_ok=True)
        except OSError as error:
            raise TokenizerError(f"{path}: cannot write the tokenizer files: {error}") from error

    def where(self, name: str) -> str:
        """The path of a file, for messages."""
        return os.path.join(self.folder, name)

    @property
    def model_file(self) -> str:
        """The name of the sentencepiece model in this folder."""
        return next(name for name in MODEL_FILES if name in self.contents)

    def text(self, name: str) -> str:
        """A file as UTF-8 text."""
        try:
            return self.contents[name].decode("utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{self.where(name)}: not UTF-8 text ({error}). Download the file again.") from error

    def table(self, name: str) -> dict[str, Any]:
        """A JSON file that must hold an object; {} where the file is absent."""
        if name not in self.contents:
            return {}
        try:
            table = json.loads(self.text(name))
        except (json.JSONDecodeError, RecursionError) as error:
            raise TokenizerError(f"{self.where(name)}: invalid JSON ({error}). Download the file again.") from error
        if not isinstance(table, dict):
            raise TokenizerError(f"{self.where(name)}: expected a JSON object, found {type(table).__name__}.")
        return table


def read_chat_templates(files: TokenizerFiles) -> dict[str, str]:
    """The Jinja chat templates by name ("default" where it has none); {} where the folder has none."""
    if TEMPLATE_FILE in files.contents:
        return {"default": files.text(TEMPLATE_FILE)}
    for file in (CONFIG_FILE, TEMPLATE_JSON_FILE):
        value = files.table(file).get("chat_template")
        if value is not None:
            return _named_templates(value, files.where(file))
    return {}


def _named_templates(value: Any, where: str) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    try:
        templates = {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError):
        templates = {}
    if not templates or not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise TokenizerError(f'{where}: chat_template must be a string or a list of {{"name": ..., "template": ...}}.')
    return templates
