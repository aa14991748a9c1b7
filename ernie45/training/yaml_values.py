"""YAML text, and its values as the types of a dataclass."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from ernie45.errors import ErnieError

_WORDS = {int: "a whole number", bool: "true or false", str: "a text"}


def read_yaml(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML file.

    Raises:
        ErnieError: it cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ErnieError(f"{path}: the recipe cannot be read: {error}") from error
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise ErnieError(f"{path}: expected keys and values, found {type(content).__name__}")
    return content


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text stands for; an ErnieError that begins with `where` if it is none."""
    try:
        import yaml
    except ImportError as error:
        raise ErnieError('recipes need PyYAML: pip install "ernie45[train]"') from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ErnieError(f"{where}: is no YAML: {error}") from error


def convert(value: Any, kind: Any) -> Any:
    """The value as that type.

    Raises:
        ValueError: it cannot be; the message says what was found and expected.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else convert(value, arguments[0])
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"expected one of {', '.join(arguments)}, found {value!r}")
        return value
    if origin is tuple:
        parts = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        parts = parts if isinstance(parts, list) else [parts]
        return tuple(convert(part, arguments[0]) for part in parts)
    if kind is float:
        return _number(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"expected {_WORDS[kind]}, found {value!r}")
    return value


def _number(value: Any) -> float:
    """YAML 1.1 takes 1e-5, without a point, for text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a number, found {value!r}")
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"expected a number, found {value!r}") from None
