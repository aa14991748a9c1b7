"""From whatever stands for a video in a message to the frames that the model sees, their times drawn on them."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ernie45.errors import ErnieError
from ernie45.processing.frame_sampling import VideoOptions, sample_frames
from ernie45.processing.image import load_animation, load_image, resize
from ernie45.processing.sources import VIDEO_FETCH, FetchLimits, describe, read_bytes
from ernie45.processing.timestamps import render_timestamp
from ernie45.processing.video_file import FewerFramesError, VideoFile

SizeRule = Callable[[int, int], tuple[int, int]]

# How GIF, PNG, WebP and AVIF files begin. Pillow reads them all; FFmpeg has no animated WebP.
_ANIMATION = re.compile(rb"GIF8|\x89PNG|RIFF....WEBP|....ftypavi[fs]", re.DOTALL)


@dataclass(frozen=True)
class Frames:
    """Frames of one video, ready to be cut into patches.

    Attributes:
        images: RGB with the time drawn at the top left; an even number of them, because the model takes pairs: the last
            frame of an odd number stands twice.
        timestamps: seconds from the beginning of the video, one per image.
    """

    images: list[Image.Image]
    timestamps: list[float]


def load_video(
    source: Any,
    options: VideoOptions | None = None,
    *,
    size_rule: SizeRule | None = None,
    generator: np.random.Generator | int | None = None,
    fetch: FetchLimits = VIDEO_FETCH,
    progress: bool = True,
) -> Frames:
    """Chooses frames of a video and draws their times on them.

    Frame i of n is taken to be shown at i * duration / n seconds, also where the real rate varies: so it was in
    training. A file that is cut short is a shorter video.

    Args:
        source: one of
            * a video file, as anything that `sources.read_bytes` takes (a path is not read into memory);
            * an animated GIF, PNG, WebP or AVIF, likewise;
            * frames recorded at `options.fps`, all of which are taken: a list of anything that `load_image` takes, or
              an array [frames, height, width, 3] uint8.
        options: which frames; None: the defaults.
        size_rule: from the (height, width) of the first frame to the one that all frames get, once their times are
            drawn: memory then never holds the chosen frames in their original size. None: they keep it.
        generator: random numbers, or their seed, for `frames_sample="rand"`.
        fetch: limits on reading the source.
        progress: show a progress bar when reading or decoding takes longer than a second.

    Raises:
        ErnieError: not readable, not a video, no frames, damaged before the last chosen frame, or PyAV is missing.
    """
    options = options or VideoOptions()
    if isinstance(source, (list, tuple, np.ndarray)):
        times = [index / options.fps for index in range(len(source))]
        return _stamped(_listed(source), times, size_rule)
    name = _name(source)
    with _open(source, fetch) as file:
        if _is_animation(file):
            pictures, times = _from_animation(file, name, options, generator, fetch)
            return _stamped(pictures, times, size_rule)
        video = VideoFile.probe(file, name, progress)
        try:
            return _from_file(video, options, size_rule, generator, progress)
        except FewerFramesError as shorter:
            if not shorter.count:
                raise
            return _from_file(replace(video, count=shorter.count), options, size_rule, generator, progress)


@contextlib.contextmanager
def _open(source: Any, fetch: FetchLimits) -> Iterator[BinaryIO]:
    """The source as a file that can be read more than once; one on disk is not read into memory."""
    if not _is_path(source):
        yield io.BytesIO(read_bytes(source, fetch))
        return
    try:
        file = open(os.path.expanduser(source), "rb")  # noqa: SIM115 (an error of the caller's block is not its own)
    except OSError as error:
        raise ErnieError(f"{describe(source)}: cannot be read ({error.strerror}).") from error
    with file:
        yield file


def _is_path(source: Any) -> bool:
    return isinstance(source, (str, os.PathLike)) and os.path.isfile(os.path.expanduser(source))


def _name(source: Any) -> str:
    """The source in messages and beside progress bars."""
    return Path(source).name if _is_path(source) else describe(source)


def _is_animation(file: BinaryIO) -> bool:
    head = file.read(16)
    file.seek(0)
    return _ANIMATION.match(head) is not None


def _from_animation(
    file: BinaryIO,
    name: str,
    options: VideoOptions,
    generator: np.random.Generator | int | None,
    fetch: FetchLimits,
) -> tuple[list[Image.Image], list[float]]:
    """The chosen frames of an animation and their times in seconds."""
    try:
        frames, durations = load_animation(file, fetch=fetch)
    except ErnieError as error:
        raise ErnieError(f"{name}: {error}") from error
    count, duration = len(frames), sum(durations)
    indices = sample_frames(count, count / duration, duration, options, generator)
    return [frames[index] for index in indices], [index * duration / count for index in indices]


def _from_file(
    video: VideoFile,
    options: VideoOptions,
    size_rule: SizeRule | None,
    generator: np.random.Generator | int | None,
    progress: bool,
) -> Frames:
    indices = sample_frames(video.count, video.rate, video.duration, options, generator)
    times = [index * video.duration / video.count for index in indices]
    return _stamped(video.frames(indices, progress), times, size_rule)


def _listed(frames: Sequence[Any] | np.ndarray) -> Iterator[Image.Image]:
    """The frames of a list or array as pictures."""
    if isinstance(frames, np.ndarray) and frames.ndim != 4:
        raise ErnieError(
            f"video: an array of frames {list(frames.shape)}, expected [frames, height, width, 3]. "
            "Give a single frame inside a list."
        )
    if not len(frames):
        raise ErnieError("video: a list without frames. Give at least one.")
    for index, frame in enumerate(frames):
        try:
            yield load_image(frame)
        except ErnieError as error:
            raise ErnieError(f"video: frame {index} of the {len(frames)} in the list: {error}") from error


def _stamped(pictures: Iterable[Image.Image], times: list[float], size_rule: SizeRule | None) -> Frames:
    """Draws the times, resizes, and makes the number even."""
    images: list[Image.Image] = []
    size: tuple[int, int] | None = None
    for picture, seconds in zip(pictures, times, strict=True):
        image = render_timestamp(picture, seconds)
        if size_rule is not None:
            size = size or size_rule(image.height, image.width)
            image = resize(image, size)
        images.append(image)
    if len(images) % 2:
        return Frames([*images, images[-1]], [*times, times[-1]])
    return Frames(images, times)
