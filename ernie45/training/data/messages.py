"""Messages in the OpenAI form, with the marks, lists and roles that PaddleFormers adds to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie45.chat import Message, check_messages
from ernie45.errors import ErnieError
from ernie45.training.data.fields import decoded, labels_of, listed, message_of, system_of, tools_of
from ernie45.training.data.media import place_media
from ernie45.training.data.records import Conversation, Preference, conversation_of, preference_of

ROLES = {"user", "assistant", "system", "tool"}
RENAMED_ROLES = {"observation": "tool", "function": "assistant"}


def from_messages(fields: Mapping[str, Any], folder: Path) -> Conversation:
    """A line with `messages`, and perhaps `images`, `videos`, `tools`, `system`, and `label` for each answer."""
    messages = place_media([*system_of(fields), *standard_messages(fields["messages"], "messages")], fields, folder)
    labels = iter(labels_of(fields, sum(message["role"] == "assistant" for message in messages)))
    learned = [message["role"] == "assistant" and next(labels) for message in messages]
    return conversation_of(messages, learned, tools_of(fields))


def messages_preference(fields: Mapping[str, Any], folder: Path) -> Preference:
    """A line with `messages` and the two ways in which they go on."""
    prompt = place_media([*system_of(fields), *standard_messages(fields["messages"], "messages")], fields, folder)
    sides = [_side(fields[key], key, folder) for key in ("chosen_response", "rejected_response")]
    return preference_of(prompt, sides, tools_of(fields))


def _side(value: Any, where: str, folder: Path) -> list[Message]:
    """A response given as its text, as one message, or as messages."""
    value = message_of("assistant", value) if isinstance(value, str) else value
    return place_media(standard_messages([value] if isinstance(value, Mapping) else value, where), {}, folder)


def standard_messages(messages: Any, where: str) -> list[Message]:
    """Messages with standard roles, and with tool calls in the OpenAI form."""
    if isinstance(messages, Sequence) and not isinstance(messages, str):
        messages = [_standard_message(message) if isinstance(message, Mapping) else message for message in messages]
    check_messages(messages, where)
    for index, message in enumerate(messages):
        if message["role"] not in ROLES:
            known = ", ".join(sorted(ROLES | RENAMED_ROLES.keys()))
            raise ErnieError(f'{where}[{index}]["role"] is {message["role"]!r}, expected one of {known}')
        if not isinstance(message.get("reasoning_content") or "", str):
            raise ErnieError(f'{where}[{index}]["reasoning_content"] is not a text')
    return list(messages)


def _standard_message(message: Message) -> Message:
    role = message.get("role")
    calls = message["content"] if role == "function" and "content" in message else message.get("tool_calls")
    standard = {**message, "role": RENAMED_ROLES.get(role, role) if isinstance(role, str) else role}
    if role == "function":
        standard["content"] = ""
    if calls:
        standard["tool_calls"] = [_call(call) for call in listed(decoded(calls, "tool_calls"))]
    return standard


def _call(call: Any) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ErnieError(f'a tool call is {call!r}, expected {{"name": ..., "arguments": {{...}}}}')
    return {"type": "function", **(call if "function" in call else {}), "function": dict(function)}
