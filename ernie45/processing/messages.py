"""Pictures and videos inside messages of the OpenAI form, and their places in the prompt that a template makes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from ernie45.chat import Message, check_messages
from ernie45.config import VisionConfig
from ernie45.errors import ErnieError
from ernie45.processing.image import MAX_PIXELS
from ernie45.processing.positions import token_grid

if TYPE_CHECKING:
    from ernie45.tokenizer import ErnieTokenizer

IMAGE, VIDEO = "image", "video"
KINDS = {"image_url": IMAGE, "image": IMAGE, "video_url": VIDEO, "video": VIDEO}  # by type of a part
VIDEO_SETTINGS = ("fps", "min_frames", "max_frames", "target_frames", "frames_sample")

# What templates write where a picture or a video belongs. The published ones write `image@placeholder`; those of
# checkpoints converted for transformers write the name of the token.
MARKER = re.compile(
    r"<\|IMAGE_START\|><\|(?:image@placeholder|IMAGE_PLACEHOLDER)\|><\|IMAGE_END\|>"
    r"|<\|VIDEO_START\|><\|(?:video@placeholder|VIDEO_PLACEHOLDER)\|><\|VIDEO_END\|>"
)


@dataclass(frozen=True)
class Medium:
    """A picture or a video that a message holds.

    Attributes:
        kind: IMAGE or VIDEO.
        source: whatever `load_image` or `load_video` reads.
        size: height and width to resize a picture to first; None: its own.
        settings: for a video, the settings of `MediaLimits` that its part overrides.
        where: its place in the messages, for errors.
    """

    kind: str
    source: Any
    size: tuple[int, int] | None
    settings: dict[str, Any]
    where: str


def read_media(messages: Sequence[Message], where: str = "messages") -> tuple[list[Message], list[Medium]]:
    """Takes the pictures and videos out of a conversation.

    Returns:
        The messages for the template, in which each of them is {"type": "image_url"} or {"type": "video_url"} without
        content, and the media in order.

    Raises:
        ErnieError: not messages, a part of unknown type, without source, or with half a size.
    """
    check_messages(messages, where)
    shown: list[Message] = []
    media: list[Medium] = []
    for index, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, list):
            shown.append(message)
            continue
        parts = []
        for number, part in enumerate(content):
            if part["type"] != "text":
                media.append(_read_medium(part, f'{where}[{index}]["content"][{number}]'))
                part = {"type": f"{media[-1].kind}_url", f"{media[-1].kind}_url": {"url": ""}}
            parts.append(part)
        shown.append({**message, "content": parts})
    return shown, media


def _read_medium(part: Mapping[str, Any], where: str) -> Medium:
    kind = KINDS.get(part["type"])
    if kind is None:
        raise ErnieError(f"{where} has the type {part['type']!r}, expected text, {', '.join(KINDS)}")
    value = next((part[key] for key in (f"{kind}_url", kind, "url") if part.get(key) is not None), None)
    inner = value if isinstance(value, Mapping) else {"url": value}
    source = inner.get("url")
    if source is None:
        raise ErnieError(
            f'{where} has no {kind}, expected {{"type": "{kind}_url", "{kind}_url": {{"url": ...}}}} with an address, '
            "a path, base64, bytes or what is loaded already"
        )
    fields = {**part, **inner}
    settings = {key: fields[key] for key in VIDEO_SETTINGS if fields.get(key) is not None} if kind == VIDEO else {}
    return Medium(kind, source, _read_size(fields, where) if kind == IMAGE else None, settings, where)


def _read_size(fields: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    width, height = fields.get("image_width"), fields.get("image_height")
    if width is None and height is None:
        return None
    if not (_is_side(width) and _is_side(height)):
        raise ErnieError(
            f"{where} has image_width {width!r} and image_height {height!r}, expected two positive integers or neither"
        )
    if width * height > MAX_PIXELS:
        raise ErnieError(f"{where} asks for {width}x{height} pixels, of which at most {MAX_PIXELS} are made")
    return height, width


def _is_side(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_places(prompt: str, media: Sequence[Medium]) -> None:
    """Raises ErnieError unless the prompt has a place for every picture and video, in their order, and no other."""
    places = [IMAGE if marker.startswith("<|IMAGE") else VIDEO for marker in MARKER.findall(prompt)]
    kinds = [medium.kind for medium in media]
    if places != kinds:
        raise ErnieError(
            f"the prompt has places for {_in_words(places)}, the messages hold {_in_words(kinds)}: the chat template "
            "must show each of them once and in order, and no text may hold such a place, "
            "<|IMAGE_START|><|image@placeholder|><|IMAGE_END|> or its like for videos"
        )


def _in_words(kinds: Sequence[str]) -> str:
    return f"{kinds.count(IMAGE)} pictures and {kinds.count(VIDEO)} videos"


def encode_prompt(prompt: str, grid: np.ndarray, tokenizer: ErnieTokenizer, vision: VisionConfig) -> np.ndarray:
    """Token ids of a prompt, [s] int64, with as many placeholders in each place as its picture or video needs.

    The text before, between and after the places is encoded piece by piece, as in training: where a piece begins can
    change its tokens.

    Args:
        prompt: what the template made, checked by `check_places`.
        grid: [items, 3] frames, rows and columns of patches.

    Raises:
        ErnieError: text that holds a placeholder token itself.
    """
    counts = token_grid(grid, vision).prod(axis=1).tolist()
    pieces = [tokenizer.encode(piece) for piece in MARKER.split(prompt)]
    if any(vision.placeholder_id in piece for piece in pieces):
        token = tokenizer.convert_ids_to_tokens(vision.placeholder_id)
        raise ErnieError(f"a text of the messages holds {token}, which stands for a picture: remove it from the text")
    ids = pieces[0]
    for marker, count, piece in zip(MARKER.findall(prompt), counts, pieces[1:], strict=True):
        start, end = vision.delimiter_ids[:2] if marker.startswith("<|IMAGE") else vision.delimiter_ids[2:]
        ids += [start, *[vision.placeholder_id] * count, end, *piece]
    return np.array(ids, "int64")
