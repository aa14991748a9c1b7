"""Splitting what a model generated into reasoning, answer and tool calls."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from ernie45.errors import ErnieError

# The names under which serving engines know the three wire formats.
WIRE_FORMATS = ("ernie-45-vl", "ernie-x1", "ernie-45-vl-thinking")

_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
_END_MARKERS = ("<|im_end|>", "<|end_of_sentence|>", "</s>")
_BLOCK = re.compile(r"<(?P<tag>response|tool_call)>(?P<body>.*?)(?:</(?P=tag)>|\Z)", re.DOTALL)
_TOOL_CALL = re.compile(r"<tool_call>(?P<body>.*?)(?:</tool_call>|\Z)", re.DOTALL)
_MAX_MISSING_BRACES = 4


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One call of a tool that the model asks for."""

    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Response:
    """A generated message. `reasoning` is None where the model did not think."""

    reasoning: str | None
    content: str
    tool_calls: list[ToolCall] = dataclasses.field(default_factory=list)


def prompt_opens_thinking(prompt: str) -> bool | None:
    """Whether the last think token of a rendered prompt opens (True) or closes (False) thinking; None without one."""
    opened, closed = prompt.rfind(_THINK_OPEN), prompt.rfind(_THINK_CLOSE)
    return None if opened == closed else opened > closed


def parse_response(text: str, wire_format: str | None = None, prompt_opened_thinking: bool | None = None) -> Response:
    """Split generated text into reasoning, content and tool calls.

    Decode with skip_special_tokens=False where a tokenizer counts the think or tool tags among its special tokens;
    end-of-turn tokens at the end of `text` are dropped.

    Args:
        text: the new text only, without the prompt.
        wire_format: one of WIRE_FORMATS, or None to recognise it from the text:
            "ernie-45-vl" (and every plain text model): text before the first `</think>` is reasoning, the rest content;
            "ernie-x1" (the text Thinking model): then `<response>` and `<tool_call>` blocks;
            "ernie-45-vl-thinking": then either only `<tool_call>` blocks or only content.
        prompt_opened_thinking: the value of `prompt_opens_thinking` for the prompt. True: text without `</think>` is
            unfinished reasoning. False: the prompt closed its thinking, a stray `</think>` is content. None: not known.

    A tool call that is not a JSON object with a name stays in `content` as it was generated.
    Raises ErnieError for an unknown wire format.
    """
    text = _drop_end_markers(text)
    reasoning, rest = _split_reasoning(text, prompt_opened_thinking)
    wire_format = wire_format or _recognise(rest)
    if wire_format == "ernie-x1":
        content, calls = _parse_blocks(rest)
    elif wire_format == "ernie-45-vl-thinking":
        content, calls = _parse_tool_calls(rest)
    elif wire_format == "ernie-45-vl":
        content, calls = rest, []
    else:
        raise ErnieError(f"wire_format is {wire_format!r}, expected None or one of {', '.join(WIRE_FORMATS)}.")
    return Response(reasoning, content, calls)


def _drop_end_markers(text: str) -> str:
    stripped = text.rstrip()
    while stripped.endswith(_END_MARKERS):
        text = stripped = next(stripped.removesuffix(m) for m in _END_MARKERS if stripped.endswith(m))
        stripped = stripped.rstrip()
    return text


def _split_reasoning(text: str, prompt_opened_thinking: bool | None) -> tuple[str | None, str]:
    """(reasoning or None, the text after it without its leading newlines)."""
    opened = text.lstrip().startswith(_THINK_OPEN)
    before, closing, after = text.partition(_THINK_CLOSE)
    may_think = opened or prompt_opened_thinking is not False
    if not may_think or not (closing or opened or prompt_opened_thinking):
        return None, text
    if opened:
        before = before.lstrip().removeprefix(_THINK_OPEN)
    return before.strip("\n") or None, after.lstrip("\n")


def _recognise(rest: str) -> str:
    """The wire format of the text after the reasoning."""
    start = rest.lstrip("\n")
    if start.startswith("<response>"):
        return "ernie-x1"
    return "ernie-45-vl-thinking" if start.startswith("<tool_call>") else "ernie-45-vl"


def _parse_blocks(text: str) -> tuple[str, list[ToolCall]]:
    """The `<response>` and `<tool_call>` blocks of the text Thinking model; text outside of them is content too."""
    contents: list[str] = []
    calls: list[ToolCall] = []
    end = 0
    for block in _BLOCK.finditer(text):
        contents.append(text[end : block.start()])
        call = _parse_tool_call(block["body"]) if block["tag"] == "tool_call" else None
        if call is not None:
            calls.append(call)
        else:
            contents.append(block["body"] if block["tag"] == "response" else block[0])
        end = block.end()
    contents.append(text[end:])
    return "\n".join(part.strip("\n") for part in contents if part.strip()), calls


def _parse_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """Tool calls count only where nothing but newlines stands before the first one."""
    if not text.lstrip("\n").startswith("<tool_call>"):
        return text, []
    calls: list[ToolCall] = []

    def collect(match: re.Match[str]) -> str:
        call = _parse_tool_call(match["body"])
        if call is None:
            return match[0]
        calls.append(call)
        return ""

    content = _TOOL_CALL.sub(collect, text)
    return content.strip("\n"), calls


def _parse_tool_call(body: str) -> ToolCall | None:
    """The call in `body`, or None if it is not one. Closing braces that are missing at the end are supplied."""
    for missing in range(_MAX_MISSING_BRACES + 1):
        value = _load_object(body.strip() + "}" * missing)
        if value is not None:
            break
    else:
        return None
    name, arguments = value.get("name"), value.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _load_object(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return ToolCall(name, arguments)


def _load_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
