"""Counting and decoding frames of video files: formats, rates, rotation, damage."""

from __future__ import annotations

import io
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from ernie45.errors import ErnieError
from ernie45.processing.video_file import FewerFramesError, VideoFile, _measured_rate

pytest.importorskip("av", reason="takes the extra `video`")

from tests.helpers.clips import HEIGHT, WIDTH, clip, number_of, sound, turned, with_noise


def probe(content: bytes) -> VideoFile:
    return VideoFile.probe(io.BytesIO(content), "clip", progress=False)


def numbers(video: VideoFile, *indices: int) -> list[int]:
    return [number_of(image) for image in video.frames(indices, progress=False)]


FORMATS = [
    ("mp4", "mpeg4"),
    ("mp4", "libx264"),
    ("mov", "mpeg4"),
    ("matroska", "libx264"),
    ("webm", "libvpx"),
    ("avi", "mpeg4"),
    ("mpegts", "libx264"),
    ("mpeg", "mpeg1video"),
    ("flv", "flv"),
]


@pytest.mark.parametrize(("container", "codec"), FORMATS)
def test_formats(container: str, codec: str) -> None:
    video = probe(clip(40, container=container, codec=codec))
    assert (video.count, video.rate) == (40, 25.0)
    assert video.duration == 1.6
    assert numbers(video, 0, 7, 7, 20, 39) == [0, 7, 7, 20, 39]


def test_frames_that_are_stored_out_of_order() -> None:
    video = probe(clip(40, codec="libx264", options={"bf": "3", "g": "12"}))
    assert numbers(video, *range(40)) == list(range(40))


def test_a_raw_stream_without_times() -> None:
    video = probe(clip(30, container="h264", codec="libx264"))
    assert (video.count, video.rate) == (30, 25.0)
    assert numbers(video, 3, 29) == [3, 29]


def test_one_frame() -> None:
    video = probe(clip(1))
    assert (video.count, video.rate) == (1, 25.0)
    assert numbers(video, 0) == [0]


def test_frames_outside_the_edit_list_do_not_count() -> None:
    content = bytearray(clip(40))
    start = content.index(b"elst") + 16  # version and flags, number of entries, duration, then the time of the start
    content[start : start + 4] = (10 * 512).to_bytes(4, "big")
    video = probe(bytes(content))
    assert video.count == 30
    assert numbers(video, 0, 29) == [10, 39]


# Rates.


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_variable_rate_is_averaged(container: str) -> None:
    # Twenty frames in a row, then twenty of which each stays ten times as long.
    times = [*range(20), *(20 + 10 * k for k in range(20))]
    video = probe(clip(40, rate=25, container=container, times=times))
    assert video.count == 40
    assert video.duration == pytest.approx(220 / 25, rel=0.06)
    assert numbers(video, 19, 20, 39) == [19, 20, 39]


def test_rounded_times_do_not_change_a_stated_rate() -> None:
    # Matroska counts milliseconds: 29 frames end after 966 instead of 966.67.
    assert probe(clip(29, rate=30, container="matroska")).rate == 30.0


def test_no_rate_is_measured_where_times_are_missing() -> None:
    assert _measured_rate([0, 1, 2, 3], 1, Fraction(1, 10)) == 10.0
    assert _measured_rate([0, None, 2, 3], 1, Fraction(1, 10)) == 0.0
    assert _measured_rate([], 0, Fraction(1, 10)) == 0.0


# Rotation.


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_frames_are_turned_upright(quarters: int) -> None:
    video = probe(turned(clip(3), quarters))
    image = next(video.frames([2], progress=False))
    assert image.size == ((WIDTH, HEIGHT) if quarters % 2 == 0 else (HEIGHT, WIDTH))
    # `rotate` turns counterclockwise: it undoes what the note asks for.
    assert number_of(image.rotate(90 * quarters, expand=True)) == 2
    assert image.mode == "RGB"


# Damage.


def test_a_file_that_is_cut_short_is_a_shorter_video() -> None:
    content = clip(60, container_options={"movflags": "faststart"})
    video = probe(content[: len(content) * 2 // 3])
    assert 20 < video.count < 60
    assert video.rate == 25.0
    assert numbers(video, 0, video.count - 1) == [0, video.count - 1]


def test_fewer_frames_than_promised() -> None:
    content = clip(10)
    with pytest.raises(FewerFramesError, match="clip: only 10 frames of the video decode") as caught:
        list(VideoFile(io.BytesIO(content), "clip", 12, 25.0).frames([3, 11], progress=False))
    assert caught.value.count == 10


def test_a_lost_packet_of_a_broadcast_loses_the_same_frames_in_counting_and_decoding() -> None:
    content = clip(60, container="mpegts", options={"b": "2000000"})
    middle = len(content) // 2 // 188 * 188
    video = probe(content[:middle] + content[middle + 188 :])
    assert 50 < video.count < 60
    assert len(numbers(video, *range(video.count))) == video.count


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_damage_counts_only_before_the_last_chosen_frame(codec: str) -> None:
    video = probe(with_noise(clip(60, codec=codec, options={"bf": "0"}), first=40))
    assert video.count == 60
    assert numbers(video, 0, 39) == [0, 39]
    with pytest.raises(ErnieError, match=r"clip: the video is damaged \(.*re-encode it: ffmpeg -i FILE "):
        numbers(video, 0, 45)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "clip: not a video file, or one whose beginning is damaged. Give MP4"),
        (b"The quick brown fox.\n" * 100, "clip: not a video file"),
        (b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/secret\n#EXT-X-ENDLIST\n", "clip: not a video file"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "clip: not a video file"),
    ],
)
def test_not_a_video(content: bytes, message: str) -> None:
    with pytest.raises(ErnieError, match=message):
        probe(content)


@pytest.mark.parametrize("name", ["notes.txt", "film.mp4"])
def test_text_in_a_file_is_no_video_whatever_its_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("Nothing to see here.\n" * 50)
    with path.open("rb") as file, pytest.raises(ErnieError, match="not a video file"):
        VideoFile.probe(file, name)


@pytest.mark.parametrize(("with_cover", "found"), [(False, "only audio"), (True, "only a cover picture and audio")])
def test_sound_alone(with_cover: bool, found: str) -> None:
    with pytest.raises(ErnieError, match=f"clip: no video track, {found}. Give a file with moving pictures."):
        probe(sound(with_cover))


@pytest.mark.parametrize("container", ["mp4", "avi", "matroska"])
def test_no_frames(container: str) -> None:
    with pytest.raises(ErnieError, match="^clip: (the video has no frames|no video track, nor any other|not a video)"):
        probe(clip(0, container=container))


def test_without_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    content = clip(2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ErnieError, match=r'takes PyAV. Run: pip install "ernie45\[video\]"'):
        probe(content)


def test_the_file_stays_open() -> None:
    file = io.BytesIO(clip(2))
    VideoFile.probe(file, "clip")
    assert not file.closed
