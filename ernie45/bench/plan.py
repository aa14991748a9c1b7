"""What is measured: prompts and their continuation, and pictures and videos of vision-language models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar


@dataclass(frozen=True)
class Task:
    """A prompt of `prompt` tokens in each of `batch` rows, then `new` tokens (0: only the prompt)."""

    method: ClassVar[str] = "run"  # of the implementation

    batch: int
    prompt: int
    new: int


@dataclass(frozen=True)
class EncodeTask:
    """So many pictures or videos of one size through vision tower and adapter, all at once.

    Attributes:
        width, height: in pixels.
        frames: 1 for a picture, an even number for a video.
        count: how many.
    """

    method: ClassVar[str] = "encode"

    width: int
    height: int
    frames: int = 1
    count: int = 1

    def __str__(self) -> str:
        """For example "one video of 16 frames of 448x448" or "8 pictures of 448x448"."""
        kind = "picture" if self.frames == 1 else "video"
        frames = f"{self.frames} frames of " if self.frames > 1 else ""
        number = "one" if self.count == 1 else self.count
        return f"{number} {kind}{'s' if self.count > 1 else ''} of {frames}{self.width}x{self.height}"


@dataclass(frozen=True)
class AnswerTask:
    """A prompt of one picture, in pixels, and `text` tokens of text, then `new` tokens."""

    method: ClassVar[str] = "answer"

    width: int
    height: int
    text: int
    new: int


AnyTask = Task | EncodeTask | AnswerTask


@dataclass(frozen=True)
class Plan:
    """What is measured. The first prompt, context and batch are for every contender, the others for extended ones.

    Attributes:
        prompts: tokens of the prompts whose time is measured.
        contexts: tokens after which decoding is measured.
        batches: rows.
        new: tokens to decode.
        rounds: how often.
        threads: CPU threads.
        seconds: decoding stops after so many, however few tokens it made.
        media: pictures, of which the first also begins a prompt, and videos; for every contender.
        together: so many of the largest picture are measured at once; for extended contenders.
        text: tokens of text in the prompt with a picture.
    """

    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    new: int
    rounds: int
    threads: int
    seconds: float = 8.0
    media: tuple[EncodeTask, ...] = ()
    together: int = 8
    text: int = 16

    def prefill_task(self, prompt: int) -> Task:
        """The task that shows the time of this prompt; the one that decodes after it, if there is one."""
        return Task(self.batches[0], prompt, self.new if prompt in self.contexts else 0)

    def decode_task(self, context: int, batch: int | None = None) -> Task:
        """The task that shows the time of decoding."""
        return Task(batch or self.batches[0], context, self.new)

    @property
    def pictures(self) -> list[EncodeTask]:
        """The media that are no videos."""
        return [task for task in self.media if task.frames == 1]

    @property
    def largest_picture(self) -> EncodeTask:
        """The picture with the most pixels; there must be one."""
        return max(self.pictures, key=lambda task: task.width * task.height)

    @property
    def together_task(self) -> EncodeTask:
        """Several of the largest picture."""
        return replace(self.largest_picture, count=self.together)

    @property
    def answer_task(self) -> AnswerTask:
        """The prompt that begins with the first picture."""
        picture = self.pictures[0]
        return AnswerTask(picture.width, picture.height, self.text, self.new)

    def tasks(self, extended: bool) -> list[AnyTask]:
        """What a contender has to do, each task once, ordinary ones first.

        The largest picture is the very first, before anything else leaves memory behind that it could use.
        """
        found: list[AnyTask] = [self.largest_picture, *self.media, self.answer_task] if self.media else []
        found += [self.prefill_task(self.prompts[0]), self.decode_task(self.contexts[0])]
        if extended:
            found += [self.prefill_task(prompt) for prompt in self.prompts]
            found += [self.decode_task(context) for context in self.contexts]
            found += [self.decode_task(self.contexts[0], batch) for batch in self.batches]
            found += [self.together_task] if self.media else []
        return list(dict.fromkeys(found))
