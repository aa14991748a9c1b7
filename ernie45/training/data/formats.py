"""One line of a data file, in any of upstream's formats, as a conversation, a preference, or a text.

| format | keys | becomes |
|---|---|---|
| ERNIEKit text | `src`, `tgt`; `system`, `label`, `is_system` | Conversation |
| ERNIEKit preference | `src`, `tgt`, `response`, `sort`; `system`, `is_system` | Preference |
| ERNIEKit media | `text_info`; `image_info`, `video_info`, `order`, `system`, `is_system`, `tools` | Conversation |
| messages | `messages`; `system`, `tools`, `images`, `videos`, `label` | Conversation |
| messages, preference | `messages`, `chosen_response`, `rejected_response`; the others as above | Preference |
| alpaca | `instruction`, `output`; `input`, `history`, `system` | Conversation |
| alpaca, preference | `question` or `instruction`, `chosen`, `rejected`; `input`, `history`, `system` | Preference |
| text | `text` | Text |

The format is recognised from the keys of each line. Two things differ from upstream: `label` is also heeded in the
ERNIEKit formats (its converter loses it), and alpaca's `instruction` and `input` have a line break between them (it
glues them together).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ernie45.chat import Message
from ernie45.errors import ErnieError
from ernie45.training.data.erniekit import erniekit, erniekit_media, erniekit_preference
from ernie45.training.data.fields import message_of, system_of, text_of, texts_of
from ernie45.training.data.messages import from_messages, messages_preference
from ernie45.training.data.records import (
    Conversation,
    Preference,
    Record,
    Text,
    conversation_of,
    preference_of,
)


def read_line(line: bytes, folder: Path) -> Record:
    """What one line of a .jsonl file says.

    Args:
        line: UTF-8.
        folder: that of the file: relative paths of pictures and videos start there.

    Raises:
        ErnieError: not a JSON object, of no known format, or with wrong content.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ErnieError(f"not JSON ({error}); expected one object in one line") from error
    if not isinstance(fields, dict):
        raise ErnieError(f"a {type(fields).__name__}, expected one object ({{...}}) in one line")
    return parse(fields, folder)


def parse(fields: Mapping[str, Any], folder: Path) -> Record:
    """What an object of any of the formats says; arguments and errors as of `read_line`."""
    keys = {key for key, value in fields.items() if value is not None}
    for wanted, reader in READERS:
        if wanted <= keys:
            try:
                return reader({key: fields[key] for key in keys}, folder)
            except (TypeError, AttributeError, LookupError) as error:  # a list where a text belongs, and the like
                names = ", ".join(sorted(wanted))
                raise ErnieError(f"a field has another type than the format of {names} has ({error})") from error
    formats = "; ".join(", ".join(sorted(wanted)) for wanted, _ in READERS)
    raise ErnieError(f"the keys {', '.join(sorted(keys)) or 'none'} are of no known format: expected one of: {formats}")


def _alpaca(fields: Mapping[str, Any], folder: Path) -> Conversation:
    messages = [*_alpaca_prompt(fields), message_of("assistant", text_of(fields, "output"))]
    return conversation_of(messages, [message["role"] == "assistant" for message in messages], ())


def _alpaca_preference(fields: Mapping[str, Any], folder: Path) -> Preference:
    sides = [[message_of("assistant", text_of(fields, key))] for key in ("chosen", "rejected")]
    return preference_of(_alpaca_prompt(fields), sides, ())


def _alpaca_prompt(fields: Mapping[str, Any]) -> list[Message]:
    messages = system_of(fields)
    for turn in fields.get("history", ()):
        if not isinstance(turn, list) or len(turn) != 2:
            raise ErnieError(f"history holds {turn!r}, expected [question, answer]")
        messages += [message_of("user", turn[0]), message_of("assistant", turn[1])]
    question = text_of(fields, "instruction" if "instruction" in fields else "question")
    return [*messages, message_of("user", "\n".join(filter(None, [question, fields.get("input")])))]


def _plain_text(fields: Mapping[str, Any], folder: Path) -> Text:
    texts = texts_of(fields, "text")
    if len(texts) != 1:
        raise ErnieError(f"text holds {len(texts)} texts, expected one in a line")
    return Text(texts[0])


Reader = Callable[[Mapping[str, Any], Path], Record]
READERS: tuple[tuple[set[str], Reader], ...] = (  # the first one of which a line has all keys
    ({"src", "tgt", "response", "sort"}, erniekit_preference),
    ({"src", "tgt"}, erniekit),
    ({"text_info"}, erniekit_media),
    ({"messages", "chosen_response", "rejected_response"}, messages_preference),
    ({"messages"}, from_messages),
    ({"instruction", "chosen", "rejected"}, _alpaca_preference),
    ({"question", "chosen", "rejected"}, _alpaca_preference),
    ({"instruction", "output"}, _alpaca),
    ({"text"}, _plain_text),
)
