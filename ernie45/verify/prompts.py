"""The texts that models are compared on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ernie45.errors import ErnieError

if TYPE_CHECKING:
    from ernie45.tokenizer import ErnieTokenizer

# Prose, a question, arithmetic and verse in Chinese; prose, a question, code and a list in English.
PROMPTS = (
    "长江是亚洲最长的河流，它发源于",
    "问：为什么海水是咸的？\n答：",
    "小明有12个苹果，送给小红5个，又买了8个，现在他有",
    "床前明月光，疑是地上霜。",
    "Once upon a time, in a village by the sea, there lived",
    "Question: Why do leaves turn yellow in autumn?\nAnswer:",
    "def fibonacci(n):\n    if n < 2:\n",
    "The days of the week are Monday, Tuesday,",
)


def prompts_from_file(path: str | Path) -> list[str]:
    """One prompt per line of a UTF-8 file; blank lines are left out.

    Raises:
        ErnieError: the file cannot be read, is not UTF-8 or has no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ErnieError(f"prompts file {path}: {error}; expected UTF-8 text with one prompt per line") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ErnieError(f"prompts file {path}: has no prompt; expected UTF-8 text with one prompt per line")
    return prompts


def encode_prompts(tokenizer: ErnieTokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt, as plain text.

    Raises:
        ErnieError: there is no prompt, or one without a token.
    """
    if isinstance(prompts, str) or not prompts:
        raise ErnieError(f"prompts: expected a list of at least one text, found {prompts!r}")
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    for number, row in enumerate(rows, start=1):
        if not row:
            raise ErnieError(f"prompt {number} is empty; leave it out or give it some text")
    return rows
