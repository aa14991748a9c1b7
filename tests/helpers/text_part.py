"""The text part of the small model, as text models are published."""

from __future__ import annotations

from pathlib import Path

from ernie45 import ErnieForCausalLM, ErnieTokenizer
from ernie45.chat import PLAIN_TEMPLATE


def text_tokenizer() -> ErnieTokenizer:
    """The tokenizer with the template of text models, which knows nothing of pictures, thoughts and tools."""
    tokenizer = ErnieTokenizer.from_pretrained("ernie45-tiny")
    tokenizer.chat_templates = {"default": PLAIN_TEMPLATE}
    return tokenizer


def write_text_folder(folder: Path) -> Path:
    """A checkpoint of the text part alone."""
    ErnieForCausalLM.from_pretrained("ernie45-tiny", progress=False).save_pretrained(folder, progress=False)
    ErnieTokenizer.from_pretrained("ernie45-tiny").save_pretrained(folder)
    return folder
