"""Frame indices against values worked out by hand, and what holds for every video."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.errors import ConfigError, ErnieError
from ernie45.processing.frame_sampling import VideoOptions, sample_frames


def sample(count: int, video_fps: float, generator: int | None = None, **options: Any) -> list[int]:
    return sample_frames(count, video_fps, count / video_fps, VideoOptions(**options), generator)


# Target mode: the intervals between int(linspace(0, n, k + 1)).


def test_leading_takes_the_first_frame_of_each_interval() -> None:
    assert sample(10, 1.0, target_frames=4, frames_sample="leading") == [0, 2, 5, 7]


def test_middle_rounds_down_inside_each_interval() -> None:
    # Intervals 0-1, 2-4, 5-6, 7-9.
    assert sample(10, 1.0, target_frames=4, frames_sample="middle") == [0, 3, 5, 8]


def test_rand_reaches_every_frame_of_each_interval_and_no_other() -> None:
    drawn = np.array([sample(10, 1.0, seed, target_frames=4, frames_sample="rand") for seed in range(200)])
    assert [sorted(set(column.tolist())) for column in drawn.T] == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]


@pytest.mark.parametrize("how", ["leading", "middle", "rand"])
def test_a_target_beyond_the_video_takes_every_frame(how: str) -> None:
    assert sample(5, 30.0, target_frames=9, frames_sample=how) == [0, 1, 2, 3, 4]


def test_the_target_outranks_the_bounds() -> None:
    assert sample(100, 1.0, target_frames=2, min_frames=16) == [24, 74]
    assert sample(400, 1.0, target_frames=200, max_frames=180, frames_sample="leading") == list(range(0, 400, 2))


# Fixed rate.


def test_leading_at_a_fixed_rate() -> None:
    assert sample(50, 25.0, fps=2, min_frames=1, frames_sample="leading") == [0, 12, 25, 38]  # 12.5 and 37.5 to even


def test_middle_at_a_fixed_rate() -> None:
    assert sample(40, 10.0, fps=2, min_frames=1) == [2, 8, 12, 18, 22, 28, 32, 38]  # 2.5, 7.5, 12.5... to even


def test_times_that_round_beyond_the_end_are_dropped() -> None:
    # Times 0.25, 0.75... 7.75 at one frame per second: 0.25 to 0, 0.75 to 1, 1.25 to 1... and 7.75 to 8, which is none.
    assert sample(8, 1.0, fps=2, min_frames=16) == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]


def test_a_last_part_of_an_interval_has_a_frame_too_if_it_reaches_its_middle() -> None:
    # 8.3 s: int(16.6) = 16 keeps the fixed rate, which then finds 17 times up to 8.25 s.
    assert sample(249, 30.0) == [round((k + 0.5) * 15) for k in range(17)]


def test_rand_at_a_fixed_rate_stays_in_its_half_second() -> None:
    for seed in range(50):
        taken = sample(1000, 100.0, seed, fps=2, frames_sample="rand")
        assert len(taken) >= 19
        assert all(50 * k <= index <= 50 * (k + 1) for k, index in enumerate(taken))


# Bounds and rules.


def test_a_short_video_gets_the_least_number() -> None:
    assert sample(120, 30.0, frames_sample="leading") == [int(k * 7.5) for k in range(16)]


def test_a_long_video_gets_the_largest_number() -> None:
    taken = sample(30 * 600, 30.0)
    assert len(taken) == 180
    assert taken[:3] == [49, 149, 249]


def test_the_rules_differ_only_between_the_bounds() -> None:
    # 10.25 s at 24 frames per second: ERNIEKit takes 0.25 s, 0.75 s..., PaddleFormers the middles of 20 intervals.
    by_rate, by_target = sample(246, 24.0), sample(246, 24.0, rule="target")
    assert by_rate == [6 + 12 * k for k in range(20)]
    assert by_target == [(int(12.3 * k) + int(12.3 * (k + 1)) - 1) // 2 for k in range(20)]
    assert by_rate != by_target
    for seconds in (3, 1000):
        assert sample(24 * seconds, 24.0) == sample(24 * seconds, 24.0, rule="target")


def test_the_defaults_are_those_of_the_processors() -> None:
    assert VideoOptions() == VideoOptions(2.0, 16, 180, -1, "middle", "fps")


# Any video.


@settings(max_examples=200)
@given(
    count=st.integers(1, 5000),
    fps=st.floats(0.5, 120),
    wanted=st.floats(0.1, 30),
    low=st.integers(1, 40),
    more=st.integers(0, 200),
    target=st.sampled_from([-1, 1, 7, 100]),
    how=st.sampled_from(["leading", "middle", "rand"]),
    rule=st.sampled_from(["fps", "target"]),
)
def test_any_video(
    count: int, fps: float, wanted: float, low: int, more: int, target: int, how: str, rule: str
) -> None:
    options = VideoOptions(wanted, low, low + more, target, how, rule)
    taken = sample_frames(count, fps, count / fps, options, generator=3)
    assert taken == sorted(taken)
    assert taken and taken[0] >= 0 and taken[-1] < count
    assert all(type(index) is int for index in taken)
    assert taken == sample_frames(count, fps, count / fps, options, generator=3)
    if target > 0:
        assert len(set(taken)) == len(taken) == min(target, count)
    elif rule == "target":
        assert len(set(taken)) == len(taken)
        assert min(low, count) <= len(taken) <= low + more
    else:
        assert len(taken) <= low + more + 1


@given(count=st.integers(1, 3000), target=st.integers(1, 300))
def test_leading_middle_and_rand_share_their_intervals(count: int, target: int) -> None:
    options = VideoOptions(target_frames=target, frames_sample="leading")
    leading = sample_frames(count, 25.0, count / 25, options)
    middle = sample_frames(count, 25.0, count / 25, replace(options, frames_sample="middle"))
    random = sample_frames(count, 25.0, count / 25, replace(options, frames_sample="rand"), generator=0)
    for first, centre, drawn, following in zip(leading, middle, random, [*leading[1:], count], strict=True):
        assert first <= centre < following
        assert first <= drawn < following


def test_a_generator_goes_on_where_a_seed_starts_again() -> None:
    options = VideoOptions(target_frames=20, frames_sample="rand")
    generator = np.random.default_rng(5)
    first = sample_frames(1000, 25.0, 40.0, options, generator)
    assert first == sample_frames(1000, 25.0, 40.0, options, 5)
    assert first != sample_frames(1000, 25.0, 40.0, options, generator)


@pytest.mark.parametrize("how", ["leading", "middle", "rand"])
def test_a_very_short_video_keeps_a_frame(how: str) -> None:
    for seed in range(20):
        assert sample(1, 1.0, seed, fps=1, min_frames=1, frames_sample=how) == [0]


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps must be a positive number, found 0"),
        ({"fps": float("nan")}, "fps must be a positive number, found nan"),
        ({"fps": "2"}, "fps must be a positive number, found '2'"),
        ({"min_frames": 0}, "min_frames must be a positive integer, found 0"),
        ({"max_frames": 1.5}, "max_frames must be a positive integer, found 1.5"),
        ({"max_frames": True}, "max_frames must be a positive integer, found True"),
        ({"target_frames": 0}, "target_frames must be a positive integer, or -1 for none, found 0"),
        ({"min_frames": 20, "max_frames": 10}, "min_frames 20 exceeds max_frames 10"),
        ({"frames_sample": "last"}, "frames_sample must be one of leading, middle, rand, found 'last'"),
        ({"rule": "best"}, "rule must be one of fps, target, found 'best'"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^video options: {message}$"):
        VideoOptions(**options)


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match="fps.*min_frames.*rule"):
        VideoOptions(fps=-1, min_frames=-1, rule="")


@pytest.mark.parametrize(("count", "fps", "duration"), [(0, 25.0, 1.0), (10, 0.0, 1.0), (10, 25.0, 0.0)])
def test_a_video_that_cannot_be_sampled(count: int, fps: float, duration: float) -> None:
    with pytest.raises(ErnieError, match=f"{count} frames at {fps} per second in {duration} seconds"):
        sample_frames(count, fps, duration, VideoOptions())
