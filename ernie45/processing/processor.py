"""From conversations with pictures and videos to the inputs of a vision-language model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie45.chat import VISION_TEMPLATE, Message
from ernie45.checkpoint.hub import resolve_folder
from ernie45.config import ErnieConfig, VisionConfig
from ernie45.errors import ConfigError, ErnieError
from ernie45.generation.prompt import left_pad
from ernie45.processing.image import encode_picture, patches_of, smart_resize
from ernie45.processing.limits import SETTINGS, MediaLimits
from ernie45.processing.messages import IMAGE, Medium, check_places, encode_prompt, read_media
from ernie45.processing.positions import position_ids, token_types
from ernie45.processing.video import load_video
from ernie45.tokenizer import ErnieTokenizer
from ernie45.tokenizer_files import TOKENIZER_FILES

SETTINGS_FILE = "preprocessor_config.json"
Encoded = tuple[np.ndarray, tuple[int, int, int]]  # patches and grid of one picture or video


class ErnieProcessor:
    """Makes the inputs of a vision-language model from messages.

    Args:
        tokenizer: the checkpoint's.
        config: the checkpoint's.
        limits: settings of `ernie45.processing.limits.MediaLimits` by name, such as `image_max_pixels` or `max_frames`,
            where they shall differ from those of the published models.

    Attributes:
        tokenizer: for what is text only, such as decoding.
        vision: how pictures become patches and tokens.
        limits: on pictures and videos.

    Raises:
        ConfigError: the config of a text model, ids that the tokenizer has for other tokens, or a wrong setting.
    """

    def __init__(self, tokenizer: ErnieTokenizer, config: ErnieConfig, **limits: Any) -> None:
        if config.vision is None:
            raise ConfigError("config: a text model, which sees no pictures; use ErnieTokenizer alone")
        self.tokenizer, self.vision = tokenizer, config.vision
        self.limits = MediaLimits().replace(**limits)
        self.pad_token_id = config.pad_token_id
        _check_token_ids(tokenizer, self.vision)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None, **limits: Any
    ) -> ErnieProcessor:
        """Reads config.json, the tokenizer and preprocessor_config.json of a folder, or of a model on a hub.

        Of preprocessor_config.json only entries with the names of `limits` count. Its `min_pixels` and `max_pixels` do
        not: Baidu's own processor and FastDeploy replace them by those that are the defaults here, and only their
        training pipeline uses them.

        Raises:
            ErnieError: files that are missing or broken, or what the constructor raises.
        """
        files = ["config.json", SETTINGS_FILE, *TOKENIZER_FILES]
        folder = resolve_folder(name, revision=revision, cache_dir=cache_dir, allow_patterns=files)
        tokenizer, config = ErnieTokenizer.from_pretrained(folder), ErnieConfig.from_pretrained(folder)
        return cls(tokenizer, config, **{**own_limits(folder), **limits})

    def __call__(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        **limits: Any,
    ) -> dict[str, Tensor]:
        """The inputs of `ErnieForConditionalGeneration`, for `model(**inputs)` and `model.generate(**inputs)`.

        A part of a message's content is {"type": "text", "text": ...}, {"type": "image_url", "image_url": {"url": ...}}
        or {"type": "video_url", "video_url": {"url": ...}}; the types "image" and "video" mean the same. Instead of an
        address there may be a path, base64, bytes, a PIL image or an array, and for a video a list of frames. A picture
        with `image_width` and `image_height` gets that size first. A video may have `fps`, `min_frames`, `max_frames`,
        `target_frames` and `frames_sample` of its own, beside `type`.

        Args:
            messages: a conversation, or several for a batch, which is padded on the left.
            add_generation_prompt, enable_thinking, tools, chat_template: as in `ErnieTokenizer.apply_chat_template`.
                A checkpoint without a template gets `ernie45.chat.VISION_TEMPLATE`.
            template_kwargs: further variables of the template.
            limits: settings for this call, by the names of the constructor.

        Returns:
            input_ids [b, s] int64: with one placeholder for each token of a picture or video.
            attention_mask [b, s] int64: 0 for padding.
            token_type_ids [b, s] int64: 0 text, 1 picture or delimiter, 2 video; 0 for padding.
            position_ids [b, s, 3] int64: time, row, column; 0 for padding.
            images [patches, patch_bytes] uint8: of all rows in order, each in the order of its prompt.
            grid_thw [items, 3] int64: frames, rows and columns of patches.

        Raises:
            ErnieError: malformed messages, a picture or video that cannot be read, or a template that leaves it out.
        """
        chosen = self.limits.replace(**limits)
        conversations = [read_media(conversation, where) for conversation, where in _conversations(messages)]
        prompts = [
            self._render(
                shown,
                chat_template,
                template_kwargs,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=enable_thinking,
                tools=tools,
            )
            for shown, _ in conversations
        ]
        for prompt, (_, media) in zip(prompts, conversations, strict=True):
            check_places(prompt, media)
        encoded = self._encode_media([media for _, media in conversations], chosen)
        return self._inputs(prompts, encoded)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of one conversation as text, with a marker where each picture and video belongs.

        Arguments are those of a call. `ernie45.chat.prompt_opens_thinking` says of it how to parse the response.
        """
        shown, _ = read_media(messages)
        return self._render(
            shown,
            chat_template,
            template_kwargs,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=enable_thinking,
            tools=tools,
        )

    def encode_media(self, media: Sequence[Medium]) -> list[Encoded]:
        """Patches and grid (frames, rows and columns of patches) of each picture and video of a conversation.

        Args:
            media: as `ernie45.processing.messages.read_media` finds them.

        Raises:
            ErnieError: one that cannot be read.
        """
        return self._encode_media([media], self.limits)[0]

    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids: see `ErnieTokenizer.decode`."""
        return self.tokenizer.decode(ids, skip_special_tokens)

    def _render(
        self,
        messages: Sequence[Message],
        chat_template: str | None,
        template_kwargs: Mapping[str, Any] | None,
        **options: Any,
    ) -> str:
        if chat_template is None and not self.tokenizer.chat_templates:
            chat_template = VISION_TEMPLATE
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, chat_template=chat_template, **options, **(template_kwargs or {})
        )
        assert isinstance(text, str)
        return text

    def _encode_media(self, media: Sequence[Sequence[Medium]], limits: MediaLimits) -> list[list[Encoded]]:
        """Patches and grid of all media of each conversation; what is given several times is read once."""
        known: dict[Any, Encoded] = {}
        for medium in (medium for row in media for medium in row):
            if _key(medium) not in known:
                known[_key(medium)] = self._encode_medium(medium, limits)
        return [[known[_key(medium)] for medium in row] for row in media]

    def _encode_medium(self, medium: Medium, limits: MediaLimits) -> Encoded:
        try:
            if medium.kind == IMAGE:
                return encode_picture(medium.source, limits.image, self.vision, medium.size)
            return self._encode_video(medium.source, limits.replace(**medium.settings))
        except ErnieError as error:
            raise ErnieError(f"{medium.where}: {error}") from error

    def _encode_video(self, source: Any, limits: MediaLimits) -> Encoded:
        """All frames get the size that the first one gets."""

        def size_of(height: int, width: int) -> tuple[int, int]:
            return smart_resize(height, width, limits.video, self.vision.factor)

        images = load_video(source, limits.frames, size_rule=size_of).images
        return patches_of(np.stack([np.asarray(image) for image in images]), self.vision)

    def _inputs(self, prompts: Sequence[str], encoded: Sequence[Sequence[Encoded]]) -> dict[str, Tensor]:
        vision = self.vision
        grids = [np.array([grid for _, grid in row], "int64").reshape(-1, 3) for row in encoded]
        rows = [encode_prompt(text, grid, self.tokenizer, vision) for text, grid in zip(prompts, grids, strict=True)]
        ids, mask = left_pad(rows, self.pad_token_id)
        types = np.zeros(ids.shape, "int64")
        positions = np.zeros([*ids.shape, 3], "int64")
        for index, (row, grid) in enumerate(zip(rows, grids, strict=True)):
            types[index, mask[index]] = token_types(row, grid, vision)
            positions[index, mask[index]] = position_ids(row, grid, vision)
        patches = [np.zeros([0, vision.patch_bytes], "uint8"), *(patches for row in encoded for patches, _ in row)]
        arrays = {
            "input_ids": ids,
            "attention_mask": mask.astype("int64"),
            "token_type_ids": types,
            "position_ids": positions,
            "images": np.concatenate(patches),
            "grid_thw": np.concatenate(grids),
        }
        return {name: paddle.to_tensor(array) for name, array in arrays.items()}


def own_limits(folder: Path) -> dict[str, Any]:
    """The limits that a checkpoint sets for itself, by name as in `ErnieProcessor`; none if it has no such file.

    Raises:
        ConfigError: the file is broken.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error}); download it again, or remove it") from error
    return {key: content[key] for key in SETTINGS if key in content} if isinstance(content, dict) else {}


def _conversations(messages: Any) -> list[tuple[Sequence[Message], str]]:
    """Each conversation, and how errors call it."""
    if isinstance(messages, list | tuple) and messages and isinstance(messages[0], list | tuple):
        return [(conversation, f"messages[{index}]") for index, conversation in enumerate(messages)]
    return [(messages, "messages")]


def _key(medium: Medium) -> tuple[Any, ...]:
    """Equal for media that are the same after reading: given by equal addresses, or by the same object."""
    named = isinstance(medium.source, str | bytes | os.PathLike)
    source = medium.source if named else id(medium.source)
    return medium.kind, source, medium.size, tuple(medium.settings.items())


def _check_token_ids(tokenizer: ErnieTokenizer, vision: VisionConfig) -> None:
    expected = {
        "<|IMAGE_PLACEHOLDER|>": vision.placeholder_id,
        "<|IMAGE_START|>": vision.image_start_id,
        "<|IMAGE_END|>": vision.image_end_id,
        "<|VIDEO_START|>": vision.video_start_id,
        "<|VIDEO_END|>": vision.video_end_id,
    }
    for token, index in expected.items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != index:
            raise ConfigError(
                f"config: the id of {token} is {index}, but {found} in the tokenizer: take both from one checkpoint"
            )
