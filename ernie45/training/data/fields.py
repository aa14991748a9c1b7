"""Fields of a line, checked. All of these raise ErnieError, naming the field, where it has wrong content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ernie45.chat import Message
from ernie45.errors import ErnieError


def listed(value: Any) -> list[Any]:
    """The list itself, or the value as the only entry of one."""
    return value if isinstance(value, list) else [value]


def decoded(value: Any, where: str) -> Any:
    """The value itself, or what it says where it is JSON in a text. Raises ErnieError, naming `where`."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ErnieError(f"{where}: a text that is not JSON ({error})") from error


def message_of(role: str, content: Any) -> dict[str, Any]:
    """A message in the OpenAI form."""
    return {"role": role, "content": content}


def system_of(fields: Mapping[str, Any]) -> list[Message]:
    """The message that `system` holds, if there is one."""
    system = fields.get("system", "")
    if not isinstance(system, str):
        raise ErnieError(f"system is a {type(system).__name__}, expected a text")
    return [message_of("system", system)] if system else []


def text_of(fields: Mapping[str, Any], key: str) -> str:
    """A text that is not empty."""
    value = fields[key]
    if not isinstance(value, str) or not value.strip():
        raise ErnieError(f"{key} is {value!r}, expected a text that is not empty")
    return value


def texts_of(fields: Mapping[str, Any], key: str, empty: bool = False) -> list[str]:
    """A list of texts; one text is a list of one."""
    values = listed(fields[key])
    if not (values or empty) or not all(isinstance(value, str) and value.strip() for value in values):
        raise ErnieError(f"{key} is {values!r:.80}, expected texts that are not empty")
    return values


def labels_of(fields: Mapping[str, Any], answers: int) -> list[bool]:
    """Which of so many answers are learned; all, where `label` is missing."""
    labels = listed(fields.get("label", [1] * answers))
    if len(labels) != answers or not all(label in (0, 1) for label in labels):
        raise ErnieError(f"label is {labels}, expected 0 or 1 for each of the {answers} answers")
    return [bool(label) for label in labels]


def tools_of(fields: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The list of tools, which may be JSON in a text."""
    tools = listed(decoded(fields.get("tools") or [], "tools"))
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise ErnieError("tools: expected a list of objects that describe functions")
    return tools
