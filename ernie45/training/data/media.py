"""Pictures and videos of a data file's line, as parts of OpenAI messages."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie45.chat import Message
from ernie45.errors import ErnieError
from ernie45.processing.messages import KINDS
from ernie45.processing.sources import BASE64, SCHEME, SHORTEST_BASE64

LISTS = {"image": "images", "video": "videos"}  # keys that hold what the marks <image> and <video> stand for


def resolve(source: Any, folder: Path) -> Any:
    """`source` with a relative path made to start at `folder`; addresses, data: URLs and base64 stay as they are."""
    if isinstance(source, list):
        return [resolve(frame, folder) for frame in source]
    if not isinstance(source, str) or SCHEME.match(source) or source[:5].lower() == "data:":
        return source
    path = folder / os.path.expanduser(source)
    if not path.exists() and len(source) >= SHORTEST_BASE64 and BASE64.fullmatch("".join(source.split())):
        return source
    return str(path)


def place_media(messages: Sequence[Message], fields: Mapping[str, Any], folder: Path) -> list[Message]:
    """Messages in which the marks <image> and <video> are the entries of `images` and `videos`, in order.

    A mark is text where the line has no such list. Parts that are pictures or videos already get their paths resolved.

    Raises:
        ErnieError: not as many marks as entries.
    """
    left = {kind: iter(fields.get(key, ())) for kind, key in LISTS.items()}
    marks = re.compile("|".join(f"<({kind})>" for kind, key in LISTS.items() if key in fields) or "(?!)")

    def split(text: str) -> Iterator[dict[str, Any]]:
        start = 0
        for mark in marks.finditer(text):
            kind = mark[0].strip("<>")
            source = next(left[kind], None)
            if source is None:
                raise ErnieError(f"{LISTS[kind]}: fewer entries than the messages have marks <{kind}>")
            yield from text_parts(text[start : mark.start()])
            yield medium_part(kind, source, folder)
            start = mark.end()
        yield from text_parts(text[start:])

    placed = [_with_parts(message, split, folder) for message in messages]
    for kind, rest in left.items():
        if (more := len(list(rest))) > 0:
            raise ErnieError(f"{LISTS[kind]}: {more} entries have no mark <{kind}> in the messages")
    return placed


def _with_parts(message: Message, split: Callable[[str], Iterator[dict[str, Any]]], folder: Path) -> Message:
    content = message.get("content")
    if isinstance(content, str):
        parts = list(split(content))
        return message if all(part["type"] == "text" for part in parts) else {**message, "content": parts}
    if not isinstance(content, list):
        return message
    parts = []
    for part in content:
        parts += list(split(part["text"])) if part["type"] == "text" else [_resolved(part, folder)]
    return {**message, "content": parts}


def text_parts(text: str) -> list[dict[str, Any]]:
    """The part for a text, if it is not empty."""
    return [{"type": "text", "text": text}] if text else []


def medium_part(kind: str, source: Any, folder: Path) -> dict[str, Any]:
    """The part for an entry of a list: a path, an address, a list of frames, or an object with `url` and settings."""
    inner = dict(source) if isinstance(source, Mapping) else {"url": source}
    if f"{kind}_url" in inner:
        inner["url"] = inner.pop(f"{kind}_url")
    inner["url"] = resolve(inner.get("url"), folder)
    return {"type": f"{kind}_url", f"{kind}_url": inner}


def _resolved(part: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    kind = KINDS.get(part["type"], part["type"])
    changed = dict(part)
    for key in (f"{kind}_url", kind, "url"):
        value = part.get(key)
        if isinstance(value, Mapping):
            changed[key] = {**value, "url": resolve(value.get("url"), folder)}
        elif value is not None:
            changed[key] = resolve(value, folder)
    return changed
