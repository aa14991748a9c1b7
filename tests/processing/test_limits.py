"""Limits on pictures and videos: the defaults, every name, and what is refused."""

from __future__ import annotations

import pytest

from ernie45.errors import ErnieError
from ernie45.processing.frame_sampling import VideoOptions
from ernie45.processing.image import ImageLimits
from ernie45.processing.limits import SETTINGS, MediaLimits


def test_defaults_are_those_of_the_published_models():
    limits = MediaLimits()
    assert limits.image == ImageLimits(3136, 4_842_768)
    assert limits.video == ImageLimits(234_416, 937_664)
    assert limits.frames == VideoOptions(fps=2, min_frames=16, max_frames=180, target_frames=-1)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_name_sets_its_field_and_no_other(name: str):
    part, field = SETTINGS[name]
    value = "leading" if field == "frames_sample" else 20 if part == "frames" else 500_000
    changed = MediaLimits().replace(**{name: value})
    assert getattr(getattr(changed, part), field) == value
    default = getattr(getattr(MediaLimits(), part), field)
    assert changed.replace(**{name: default}) == MediaLimits() != changed


def test_changes_add_up():
    limits = MediaLimits().replace(fps=1).replace(video_max_frames=30, image_max_pixels=10_000)
    assert (limits.frames.fps, limits.frames.max_frames, limits.image.max_pixels) == (1, 30, 10_000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_max_pixel": 3}, "no setting image_max_pixel; there are image_min_pixels, "),
        ({"image_max_pixels": "3"}, "image_max_pixels must be a positive integer, found '3'"),
        ({"video_min_pixels": True}, "video_min_pixels must be a positive integer, found True"),
        ({"image_max_pixels": 3}, "min_pixels 3136 and max_pixels 3"),
        ({"fps": 1, "video_fps": 2}, "fps is given twice, as fps and video_fps"),
        ({"frames_sample": "last"}, "frames_sample must be one of"),
        ({"min_frames": 200}, "min_frames 200 exceeds max_frames 180"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ErnieError, match=message):
        MediaLimits().replace(**settings)
