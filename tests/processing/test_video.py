"""From a source to stamped frames, end to end."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ernie45.errors import ErnieError
from ernie45.processing import video as video_module
from ernie45.processing import video_file
from ernie45.processing.frame_sampling import VideoOptions
from ernie45.processing.sources import FetchLimits
from ernie45.processing.timestamps import render_timestamp
from ernie45.processing.video import Frames, load_video
from ernie45.processing.video_file import VideoFile

pytest.importorskip("av", reason="takes the extra `video`")

from tests.helpers.clips import HEIGHT, WIDTH, clip, number_of, numbered_frame


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def load(source: Any, **options: Any) -> Frames:
    return load_video(source, VideoOptions(**options), progress=False)


def numbers(frames: Frames) -> list[int]:
    return [number_of(image) for image in frames.images]


def assert_same(left: Image.Image, right: Image.Image) -> None:
    np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


# Video files.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_frames": 4, "frames_sample": "leading"}, [0, 62, 125, 187]),
        ({"target_frames": 4}, [30, 93, 155, 218]),
        ({"frames_sample": "leading"}, [0, 12, 25, 38, 50, 62, 75, 88, 100, 112, 125, 138, 150, 162, 175, 188, 200,
                                        212, 225, 238]),
        ({}, [6, 19, 31, 44, 56, 69, 81, 94, 106, 119, 131, 144, 156, 169, 181, 194, 206, 219, 231, 244]),
        ({"max_frames": 2, "min_frames": 2}, [62, 187]),
        ({"rule": "target", "fps": 0.4, "min_frames": 2}, [30, 93, 155, 218]),
    ],
)  # fmt: skip
def test_the_frames_of_ten_seconds(options: dict[str, Any], expected: list[int]) -> None:
    frames = load(clip(250), **options)
    assert numbers(frames) == expected
    assert frames.timestamps == pytest.approx([index / 25 for index in expected])


def test_random_frames_repeat_with_their_seed() -> None:
    content, options = clip(100), VideoOptions(target_frames=10, frames_sample="rand")
    one, two, other = (numbers(load_video(content, options, generator=seed, progress=False)) for seed in (1, 1, 2))
    assert one == two != other


def test_times_are_drawn_at_full_size_before_resizing() -> None:
    content = clip(50)
    whole = load(content, target_frames=2)
    small = load_video(content, VideoOptions(target_frames=2), size_rule=lambda h, w: (h // 2, w // 2), progress=False)
    plain = list(VideoFile.probe(io.BytesIO(content), "clip").frames([12, 37]))
    for image, half, frame, seconds in zip(whole.images, small.images, plain, (0.48, 1.48), strict=True):
        assert_same(image, render_timestamp(frame, seconds))
        assert_same(half, image.resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.BICUBIC))


def test_an_odd_number_of_frames_ends_with_the_last_one_twice() -> None:
    frames = load(clip(50), target_frames=3)
    assert numbers(frames) == [7, 24, 41, 41]
    assert frames.timestamps == pytest.approx([0.28, 0.96, 1.64, 1.64])
    assert_same(frames.images[2], frames.images[3])


def test_a_video_of_one_frame_becomes_two() -> None:
    frames = load(clip(1))
    assert numbers(frames) == [0, 0]
    assert frames.timestamps == [0.0, 0.0]


def test_a_rate_above_that_of_the_video_repeats_frames() -> None:
    assert numbers(load(clip(10, rate=5), fps=10, min_frames=1, frames_sample="leading")) == [
        0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6, 7, 8, 8, 8, 9, 9,
    ]  # fmt: skip


def test_a_miscounted_video_is_sampled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    true_count = VideoFile.probe

    def too_many(*arguments: Any) -> VideoFile:
        video = true_count(*arguments)
        return VideoFile(video.file, video.name, video.count + 1, video.rate)

    monkeypatch.setattr(video_module.VideoFile, "probe", too_many)
    frames = load(clip(10))
    assert numbers(frames) == list(range(10))
    assert frames.timestamps[-1] == pytest.approx(9 / 25)


def test_a_video_of_which_nothing_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_file, "_decoded", lambda *_: iter(()))
    with pytest.raises(ErnieError, match="bytes>: only 0 frames of the video decode"):
        load(clip(10))


# Where a video comes from.


@pytest.mark.parametrize(
    "wrap",
    [
        lambda content, path: content,
        lambda content, path: path,
        lambda content, path: str(path),
        lambda content, path: path.as_uri(),
        lambda content, path: io.BytesIO(content),
        lambda content, path: "data:video/mp4;base64," + base64.b64encode(content).decode(),
        lambda content, path: base64.b64encode(content).decode(),
    ],
    ids=["bytes", "Path", "str", "file URL", "file", "data URL", "base64"],
)
def test_sources(tmp_path: Path, wrap: Callable[[bytes, Path], Any]) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip(20))
    assert numbers(load(wrap(path.read_bytes(), path), target_frames=2)) == [4, 14]


def test_an_http_url(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(clip(20))
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            frames = load(f"http://127.0.0.1:{server.server_port}/clip.mp4", target_frames=2)
        finally:
            server.shutdown()
    assert numbers(frames) == [4, 14]


def test_a_path_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip(4))
    monkeypatch.setattr(video_module, "read_bytes", lambda *_: pytest.fail("read whole"))
    assert numbers(load(path)) == [0, 1, 2, 3]


def test_the_limit_on_size_holds_for_content() -> None:
    with pytest.raises(ErnieError, match="larger than the 100 bytes"):
        load_video(clip(4), fetch=FetchLimits(max_bytes=100))


# Frames in a list or an array.


def test_a_list_of_frames_is_taken_whole() -> None:
    first, second, third = (numbered_frame(number) for number in range(3))
    frames = load([first, Image.fromarray(second), third])
    assert numbers(frames) == [0, 1, 2, 2]
    assert frames.timestamps == [0.0, 0.5, 1.0, 1.0]
    assert_same(frames.images[1], render_timestamp(Image.fromarray(second), 0.5))


def test_an_array_of_frames_recorded_at_another_rate() -> None:
    frames = load(np.stack([numbered_frame(number) for number in range(200)]), fps=10)
    assert numbers(frames) == list(range(200))
    assert frames.timestamps[:3] == pytest.approx([0, 0.1, 0.2])


def test_frames_of_different_sizes_get_the_size_of_the_first() -> None:
    pictures = [Image.new("RGB", size) for size in ((40, 30), (100, 10))]
    frames = load_video(pictures, size_rule=lambda height, width: (2 * height, 2 * width))
    assert [image.size for image in frames.images] == [(80, 60), (80, 60)]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "video: a list without frames. Give at least one."),
        (np.zeros((0, 4, 4, 3), np.uint8), "video: a list without frames"),
        (np.zeros((4, 4, 3), np.uint8), r"an array of frames \[4, 4, 3\], expected \[frames, height, width, 3\]"),
        ([numbered_frame(0), b"nothing"], "video: frame 1 of the 2 in the list: "),
    ],
)
def test_bad_lists(frames: Any, message: str) -> None:
    with pytest.raises(ErnieError, match=message):
        load(frames)


# Animations.


def animation(form: str, durations: list[int]) -> bytes:
    images = [Image.fromarray(numbered_frame(number)) for number in range(len(durations))]
    file = io.BytesIO()
    extra = {"lossless": True} if form == "WEBP" else {}
    images[0].save(file, form, save_all=True, append_images=images[1:], duration=durations, **extra)
    return file.getvalue()


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animations(form: str) -> None:
    # Eight frames in 1.6 seconds: two thirds of the time belong to the last, times are spread evenly all the same.
    frames = load(animation(form, [80] * 7 + [1040]), target_frames=4)
    assert numbers(frames) == [0, 2, 4, 6]
    assert frames.timestamps == pytest.approx([0, 0.4, 0.8, 1.2])


def test_an_animation_in_a_file_takes_no_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    path = tmp_path / "clip.gif"
    path.write_bytes(animation("GIF", [100] * 3))
    assert numbers(load(path)) == [0, 1, 2, 2]


def test_a_damaged_animation() -> None:
    with pytest.raises(ErnieError, match="GIF"):
        load(animation("GIF", [100] * 3)[:300])


# Bad input.


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no-such-file.mp4", "'no-such-file.mp4': no such file"),
        (b"", "empty"),
        (17, "cannot read a picture or a video from a int"),
        (b"words, not pictures", "<19 bytes>: not a video file"),
        (None, "NoneType"),
    ],
)
def test_bad_sources(source: Any, message: str) -> None:
    with pytest.raises(ErnieError, match=message):
        load(source)


def test_a_still_picture_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (64, 64)).save(path)
    with pytest.raises(ErnieError, match=r"photo.jpg: not a video file.* a list of one frame"):
        load(path)


def test_a_folder_and_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    for source, message in ((tmp_path, "a folder"), (tmp_path / "empty.mp4", "empty.mp4: not a video file")):
        with pytest.raises(ErnieError, match=message):
            load(source)
