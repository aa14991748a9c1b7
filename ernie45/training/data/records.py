"""What the lines of data files hold, whatever their format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ernie45.chat import Message, check_messages
from ernie45.errors import ErnieError


@dataclass(frozen=True)
class Conversation:
    """Messages in the OpenAI form, and which of them are learned.

    Attributes:
        messages: {"role", "content", ...}; content is a text or a list of parts as `ErnieProcessor` takes them; an
            assistant's may have `reasoning_content` and `tool_calls`.
        learned: for each message whether the model learns to write it; true for messages of the assistant only.
        tools: descriptions of functions for the chat template.
    """

    messages: tuple[Message, ...]
    learned: tuple[bool, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Preference:
    """Two ways in which a conversation went on, of which one is better.

    Attributes:
        prompt: the messages before.
        chosen, rejected: messages that follow, of which the assistant's are compared; they begin and end with one.
        tools: as of `Conversation`.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Text:
    """A document to learn as a whole."""

    text: str


Record = Conversation | Preference | Text


def conversation_of(messages: Sequence[Message], learned: Sequence[bool], tools: Sequence[Any]) -> Conversation:
    """Checked. Raises ErnieError if these are no messages, or none of them is learned."""
    check_messages(messages)
    if not any(learned):
        raise ErnieError("no answer in it is to be learned")
    return Conversation(tuple(messages), tuple(learned), tuple(tools))


def preference_of(prompt: Sequence[Message], sides: Sequence[Sequence[Message]], tools: Sequence[Any]) -> Preference:
    """From the prompt and its chosen and rejected continuation, checked.

    Raises:
        ErnieError: these are no messages, or no two different responses of the assistant.
    """
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if not (side and side[0]["role"] == side[-1]["role"] == "assistant"):
            raise ErnieError(f"the {name} response must begin and end with a message of the assistant")
    chosen, rejected = sides
    if chosen == rejected:
        raise ErnieError("the chosen and the rejected response are the same")
    check_messages(prompt)
    return Preference(tuple(prompt), tuple(chosen), tuple(rejected), tuple(tools))
