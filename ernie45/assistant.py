"""A model and what makes its prompts, for programs that take any published checkpoint, with or without vision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ernie45.errors import ErnieError

if TYPE_CHECKING:
    from ernie45.models.pretrained import PretrainedModel
    from ernie45.processing.processor import ErnieProcessor
    from ernie45.tokenizer import ErnieTokenizer


@dataclass(frozen=True)
class Assistant:
    """A loaded model.

    Attributes:
        model: an `ErnieForCausalLM` or an `ErnieForConditionalGeneration`, as the checkpoint is.
        tokenizer: of it.
        processor: of a vision-language model, else None.
    """

    model: PretrainedModel
    tokenizer: ErnieTokenizer
    processor: ErnieProcessor | None

    @classmethod
    def load(cls, name: str, *, needs_vision: bool = False, revision: str | None = None, **options: Any) -> Assistant:
        """Loads a checkpoint with the class that it is for.

        Args:
            name: folder or hub name.
            needs_vision: there are pictures to show.
            revision: branch, tag or commit on the hub.
            options: of `from_pretrained`, such as dtype and quantization.

        Raises:
            ErnieError: the checkpoint cannot be loaded, or is a text model where pictures are to be shown.
        """
        from ernie45 import ErnieConfig, ErnieForCausalLM, ErnieForConditionalGeneration, ErnieProcessor, ErnieTokenizer

        config = ErnieConfig.from_pretrained(name, revision=revision)
        if config.vision is not None:
            processor = ErnieProcessor.from_pretrained(name, revision=revision)
            seeing = ErnieForConditionalGeneration.from_pretrained(name, revision=revision, **options)
            return cls(seeing, processor.tokenizer, processor)
        if needs_vision:
            raise ErnieError(
                f"{name}: is a text model and sees no pictures; take a vision-language one, such as "
                "baidu/ERNIE-4.5-VL-28B-A3B-Paddle"
            )
        tokenizer = ErnieTokenizer.from_pretrained(name, revision=revision)
        return cls(ErnieForCausalLM.from_pretrained(name, revision=revision, **options), tokenizer, None)

    def reply(
        self, messages: Sequence[dict[str, Any]], *, enable_thinking: bool | None = None, **options: Any
    ) -> Iterator[str]:
        """The answer to a conversation, piece by piece.

        Args:
            messages: in the OpenAI form.
            enable_thinking: for the chat template.
            options: of `stream`, such as cache and max_new_tokens.
        """
        make = self.tokenizer.apply_chat_template if self.processor is None else self.processor
        prompt = make(messages, enable_thinking=enable_thinking)
        return self.model.stream(prompt, tokenizer=self.tokenizer, **options)


def user_message(text: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> dict[str, Any]:
    """A question with pictures and videos in front of it, each an address, a path or what else a processor takes."""
    if not images and not videos:
        return {"role": "user", "content": text}
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    parts += [{"type": "video_url", "video_url": {"url": video}} for video in videos]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
