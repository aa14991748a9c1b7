"""Asks the small model that comes with the package some questions, shows it a picture and a clip, and says how fast.

python examples/demo.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ernie45 import ErnieForConditionalGeneration, ErnieProcessor

NAME = "ernie45-tiny"
MEDIA = Path(__file__).with_name("media")
QUESTIONS = ("23+58=?", "What is the number of layers of ERNIE-4.5-21B-A3B?")
THINK_ABOUT = "478加256等于多少？"
SHADES = " .:-=+*#%@"


def main() -> None:
    """Streams the answers."""
    start = time.perf_counter()
    processor = ErnieProcessor.from_pretrained(NAME)
    model = ErnieForConditionalGeneration.from_pretrained(NAME)
    print(f"Loaded {NAME} in {time.perf_counter() - start:.2f} s\n")

    tokens, start = 0, time.perf_counter()
    for shown, content, thinking in conversations():
        print(shown)
        print("Assistant: ", end="", flush=True)
        inputs = processor([{"role": "user", "content": content}], enable_thinking=thinking)
        answer = ""
        for piece in model.stream(inputs, processor=processor, max_new_tokens=64):
            print(piece, end="", flush=True)
            answer += piece
        print("\n")
        tokens += inputs["input_ids"].shape[1] + len(processor.tokenizer.encode(answer))
    seconds = time.perf_counter() - start
    print(f"{tokens} tokens read and written in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s")


def conversations() -> Iterator[tuple[str, Any, bool]]:
    """What is printed before the answer, what the model gets, and whether it shall think."""
    for question in QUESTIONS:
        yield f"User: {question}", question, False
    yield f"User, who wants it to think: {THINK_ABOUT}", THINK_ABOUT, True
    pictures = [MEDIA / "seven.png", MEDIA / "three.png"]
    shown = "\n".join(beside(*map(drawing, pictures)))
    for question in ("What do the digits add up to?", "Which digit is larger?"):
        parts = [{"type": "image_url", "image_url": {"url": picture}} for picture in pictures]
        yield f"{shown}\nUser: {question}", [*parts, {"type": "text", "text": question}], False
        shown = "The same pictures."
    clip = {"type": "video_url", "video_url": {"url": MEDIA / "clip.gif"}}
    shown = f"[{MEDIA.name}/clip.gif]"
    for question in ("What came after 4?", "When did 9 appear?"):
        yield f"{shown}\nUser: {question}", [clip, {"type": "text", "text": question}], False
        shown = "The same clip."


def drawing(picture: Path, columns: int = 24, rows: int = 12) -> list[str]:
    """A picture as lines of text; a terminal's characters are twice as high as they are wide."""
    grey = Image.open(picture).convert("L").resize((columns, rows))
    levels = [grey.getpixel((x, y)) * (len(SHADES) - 1) // 255 for y in range(rows) for x in range(columns)]
    return ["".join(SHADES[level] for level in levels[row * columns :][:columns]) for row in range(rows)]


def beside(*drawings: list[str]) -> list[str]:
    """Drawings of the same height side by side."""
    return ["   ".join(lines) for lines in zip(*drawings, strict=True)]


if __name__ == "__main__":
    main()
