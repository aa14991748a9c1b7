"""Which frames of a video the model sees. Indices only: nothing is decoded here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ernie45.errors import ConfigError, ErnieError

SAMPLES = ("leading", "middle", "rand")
RULES = ("fps", "target")


@dataclass(frozen=True)
class VideoOptions:
    """How many frames of a video are taken, and which. `target_frames` outranks the bounds, which outrank `fps`.

    The default rule is the one that the published checkpoints were tuned with (ERNIEKit) and are served with
    (FastDeploy): frames at exactly `fps` while their number is within the bounds. PaddleFormers' processor only derives
    a number of frames from `fps` and spreads it evenly, which gives other frames for most videos of 8 to 90 seconds;
    outside of these both rules agree.

    Attributes:
        fps: frames per second of the video that are taken; also the rate at which a list of frames was recorded.
        min_frames: a video with fewer than this at `fps` gives this many, or all that it has.
        max_frames: a video with more than this at `fps` gives this many.
        target_frames: take this many (or all, if there are fewer), whatever the bounds say; -1: let `fps` decide.
        frames_sample: which frame stands for its stretch of the video: "leading" the first (FastDeploy's default),
            "middle" the one in the middle (the default everywhere else), "rand" a random one.
        rule: "fps" (ERNIEKit, FastDeploy) or "target" (PaddleFormers), see above.

    Raises:
        ConfigError: an impossible value.
    """

    fps: float = 2.0
    min_frames: int = 16
    max_frames: int = 180
    target_frames: int = -1
    frames_sample: str = "middle"
    rule: str = "fps"

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ConfigError("video options: " + "; ".join(problems))


def _problems(options: VideoOptions) -> Iterator[str]:
    if not _is_positive(options.fps):
        yield f"fps must be a positive number, found {options.fps!r}"
    counts = {name: getattr(options, name) for name in ("min_frames", "max_frames", "target_frames")}
    unset = {"target_frames": -1}
    wrong = [name for name, value in counts.items() if not _is_count(value) and value != unset.get(name)]
    for name in wrong:
        allowed = "a positive integer, or -1 for none" if name in unset else "a positive integer"
        yield f"{name} must be {allowed}, found {counts[name]!r}"
    if not wrong and options.min_frames > options.max_frames:
        yield f"min_frames {options.min_frames} exceeds max_frames {options.max_frames}"
    for name, choices in (("frames_sample", SAMPLES), ("rule", RULES)):
        if getattr(options, name) not in choices:
            yield f"{name} must be one of {', '.join(choices)}, found {getattr(options, name)!r}"


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def sample_frames(
    count: int,
    video_fps: float,
    duration: float,
    options: VideoOptions,
    generator: np.random.Generator | int | None = None,
) -> list[int]:
    """Indices of the frames to take, in ascending order; at least one.

    At a fixed rate an index repeats if `options.fps` exceeds the video's own rate, and rounding may give one frame more
    or a few fewer than the bounds say, as in ERNIEKit.

    Args:
        count: frames of the video, at least 1.
        video_fps: their average rate, frames per second.
        duration: seconds.
        options: what to take.
        generator: random numbers for "rand", or their seed; the other ways are deterministic.

    Raises:
        ErnieError: a video without frames, or without a positive rate and duration.
    """
    if count < 1 or not (_is_positive(video_fps) and _is_positive(duration)):
        raise ErnieError(
            f"video: cannot choose frames from {count} frames at {video_fps} per second in {duration} seconds: "
            "all three must be positive; re-encode the video or pass a list of frames"
        )
    random = np.random.default_rng(generator)
    target = _target(duration, options)
    if target is None:
        return _at_rate(count, video_fps, options, random)
    return _one_per_interval(count, target, options.frames_sample, random)


def _target(duration: float, options: VideoOptions) -> int | None:
    """How many frames to spread evenly over the video; None: take them at `options.fps`."""
    if options.target_frames > 0:
        return options.target_frames
    wanted = int(duration * options.fps)
    bounded = min(max(wanted, options.min_frames), options.max_frames)
    return None if options.rule == "fps" and bounded == wanted else bounded


def _one_per_interval(count: int, target: int, sample: str, random: np.random.Generator) -> list[int]:
    """One frame of each of `target` equal intervals, or every frame if there are fewer."""
    edges = np.linspace(0, count, min(target, count) + 1).astype(np.int64)
    first, last = edges[:-1], edges[1:] - 1
    if sample == "leading":
        return first.tolist()
    if sample == "middle":
        return ((first + last) // 2).tolist()
    # ERNIEKit never draws the last frame of an interval, and falls back to a permutation if one has a single frame.
    return random.integers(first, last, endpoint=True).tolist()


def _at_rate(count: int, video_fps: float, options: VideoOptions, random: np.random.Generator) -> list[int]:
    """The frames nearest to the start, the middle or a random time of each 1 / fps seconds."""
    step = 1 / options.fps
    length = count / video_fps
    if options.frames_sample == "leading":
        times = np.arange(0, length, step)
    else:
        times = np.arange(step / 2, length + step / 2, step)
    if options.frames_sample == "rand":
        times += (random.random(times.shape) - 0.5) * step
    indices = np.around(times * video_fps).astype(np.int64)
    # Rounding puts the only time of a very short video beyond its end.
    return indices[indices < count].tolist() or [count - 1]
