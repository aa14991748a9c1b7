"""Where the answers stand in a conversation that a chat template, any template, has rendered.

For each answer the template renders the messages before it as the prompt that the model gets at inference, and the
messages up to it as history. What the history has beyond the prompt is what the model has to write, up to the special
token with which the template ends every answer.

Answers whose prompt continues the history of the one before share one sequence. An empty thought in front of them, with
which prompts forbid thinking, stays there, as in upstream's training, though histories show none at inference. Where a
template rewrites earlier turns, such as one that drops their reasoning, a new sequence begins: each answer is learned
behind the prompt that it will have.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ernie45.chat import Message
from ernie45.errors import ErnieError
from ernie45.processing.messages import MARKER
from ernie45.training.data.records import Conversation

Render = Callable[[Sequence[Message], bool, bool], str]  # messages, as a prompt for an answer, which thinks
PROBE = "Probe"
EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*$")  # what prompts end with that forbid thinking; history omits it


@dataclass(frozen=True)
class Answer:
    """An answer to learn.

    Attributes:
        index: that of its message.
        prompt: the text before it, as at inference.
        body: what the model writes, without the token that ends it.
        history: all text up to it and with it, as prompts of later answers begin.
        rest: the end of `history`, behind the body.
    """

    index: int
    prompt: str
    body: str
    history: str
    rest: str


def answer_end(render: Render, special: Sequence[str]) -> str:
    """The special token with which the template ends every answer; "" if it ends them with none.

    Args:
        render: the template.
        special: the texts of all special tokens.
    """
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    ending = render(conversation, False, False).rpartition(PROBE)[2].rstrip()
    return max((token for token in special if ending.endswith(token)), key=len, default="")


def find_answer(conversation: Conversation, index: int, render: Render, end: str) -> Answer:
    """The answer that message `index` is.

    Args:
        conversation: what it is part of.
        index: a message of the assistant.
        render: the template.
        end: as of `answer_end`.

    Raises:
        ErnieError: the template writes the answer otherwise than its prompt begins, leaves part of it out, or ends it
            without `end`; or there is nothing to learn in it.
    """
    message, where = conversation.messages[index], f"messages[{index}]"
    if index == 0:
        raise ErnieError(f"{where}: an answer to nothing; for text without a question give lines with `text`")
    thinks = bool(message.get("reasoning_content")) or _text(message).lstrip().startswith("<think>")
    prompt = render(conversation.messages[:index], True, thinks)
    history = render(conversation.messages[: index + 1], False, thinks)
    begun = next((text for text in (prompt, EMPTY_THOUGHT.sub("", prompt)) if history.startswith(text)), None)
    if begun is None:
        at = next(i for i, (left, right) in enumerate(zip(prompt, f"{history}\0", strict=False)) if left != right)
        raise ErnieError(
            f"{where}: the chat template does not continue the prompt that it makes: the prompt ends in "
            f"{prompt[at:][-60:]!r} where it then writes {history[at:][:60]!r}. Reasoning belongs into "
            "`reasoning_content`; else give another chat_template"
        )
    written = history[len(begun) :]
    body, _, after = written.rpartition(end) if end else (written, "", "")
    if after.strip() or not history.rstrip().endswith(end):
        raise ErnieError(f"{where}: the chat template does not end it with {end}, as other answers: {written[-60:]!r}")
    _check_complete(message, body, where)
    return Answer(index, prompt, body, history, written[len(body) :])


def sequences(answers: Sequence[Answer]) -> list[list[Answer]]:
    """Answers that can be learned in one sequence, together."""
    chains: list[list[Answer]] = []
    for answer in answers:
        if chains and answer.prompt.startswith(chains[-1][-1].history):
            chains[-1].append(answer)
        else:
            chains.append([answer])
    return chains


def _check_complete(message: Message, body: str, where: str) -> None:
    if not body.strip():
        raise ErnieError(f"{where}: an answer without content")
    if MARKER.search(body):
        raise ErnieError(f"{where}: an answer with a picture or video, which the model cannot write; give it label 0")
    for name, text in (("content", _text(message)), ("reasoning_content", message.get("reasoning_content") or "")):
        if text.strip() not in body:
            raise ErnieError(f"{where}: the chat template leaves its {name} out; give another chat_template")
    for call in message.get("tool_calls") or ():
        if call["function"]["name"] not in body:
            raise ErnieError(f"{where}: the chat template leaves its tool calls out; give another chat_template")


def _text(message: Message) -> str:
    """The text of a message; of parts the longest, which a template that shows them all has in one piece."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return max((part["text"] for part in content if part["type"] == "text"), key=len, default="")
