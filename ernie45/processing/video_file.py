"""Chosen frames of a video file, decoded with PyAV (FFmpeg), which the extra `video` installs."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image
from tqdm import tqdm

from ernie45.errors import ErnieError

if TYPE_CHECKING:
    import av

# Containers of one self-contained video. Playlists (hls, concat, dash) are left out because they make FFmpeg open
# whatever files and addresses they name; still pictures and text (which FFmpeg can draw) because they are no videos.
_FORMATS = (
    "3gp,asf,av1,avi,dv,flv,gxf,h261,h263,h264,hevc,ivf,m4v,matroska,mov,mpeg,mpegts,mpegvideo,mxf,nsv,nut,obu,ogg,rm,"
    "swf,vc1,vvc,webm,wtv,yuv4mpegpipe"
)
# Containers round times (Matroska to milliseconds): below this difference the stated rate is the exact one.
_RATE_TOLERANCE = 0.01
_UPRIGHT = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
_REPAIR = "Get the file again, or re-encode it: ffmpeg -i FILE -c:v libx264 repaired.mp4"


class FewerFramesError(ErnieError):
    """Fewer frames come out of a video than its packets promised."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__(f"{name}: only {count} frames of the video decode. {_REPAIR}")
        self.count = count


@dataclass(frozen=True)
class VideoFile:
    """A video whose frames have been counted.

    Attributes:
        file: open for reading and seeking; stays open.
        name: for messages.
        count: number of frames.
        rate: average number of frames per second.
    """

    file: BinaryIO
    name: str
    count: int
    rate: float

    @classmethod
    def probe(cls, file: BinaryIO, name: str, progress: bool = True) -> VideoFile:
        """Counts frames by reading every packet, without decoding: what containers say of themselves is often wrong.

        Raises:
            ErnieError: PyAV is not installed; not a video file, or one without a picture track or frames.
        """
        times, last_duration = [], 0
        with _opened(file, name) as (container, stream):
            packets = tqdm(container.demux(stream), f"Counting {name}", unit="frame", delay=1, disable=not progress)
            for packet in packets:
                if _holds_frame(packet):
                    times.append(packet.pts)
                    last_duration = packet.duration or 0
            rate = _rate(times, last_duration, stream)
        if not times:
            raise ErnieError(f"{name}: the video has no frames, or was cut short before them. {_REPAIR}")
        return cls(file, name, len(times), rate)

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.count / self.rate if self.rate else 0.0

    def frames(self, indices: Sequence[int], progress: bool = True) -> Iterator[Image.Image]:
        """The frames at ascending `indices`, upright, RGB; one that is asked for twice comes twice.

        Raises:
            FewerFramesError: the video ends before the last of them.
            ErnieError: a frame up to the last of them does not decode.
        """
        wanted, last, index = Counter(indices), indices[-1], -1
        with (
            _opened(self.file, self.name) as (container, stream),
            tqdm(desc=f"Decoding {self.name}", total=last + 1, unit="frame", delay=1, disable=not progress) as bar,
        ):
            stream.thread_type = "AUTO"
            for index, frame in enumerate(_decoded(container, stream)):
                bar.update()
                if wanted[index]:
                    yield from itertools.repeat(_upright(frame), wanted[index])
                if index == last:
                    return
        raise FewerFramesError(self.name, index + 1)


@contextlib.contextmanager
def _opened(file: BinaryIO, name: str) -> Iterator[tuple[Any, Any]]:
    """The container and its picture track; FFmpeg's errors become ErnieErrors, inside the block too."""
    av = _import_av()
    file.seek(0)
    try:
        container = av.open(file, container_options={"format_whitelist": _FORMATS})
    except (av.FFmpegError, OSError) as error:
        raise ErnieError(
            f"{name}: not a video file, or one whose beginning is damaged. Give MP4, WebM, Matroska, AVI, MPEG or the "
            "like; a still picture as an image, or as a list of one frame."
        ) from error
    try:
        with container:
            yield container, _picture_track(container, name)
    except (av.FFmpegError, OSError) as error:
        raise ErnieError(f"{name}: the video is damaged ({error.strerror or error}). {_REPAIR}") from error


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ErnieError('reading video files takes PyAV. Run: pip install "ernie45[video]"') from error
    return av


def _picture_track(container: Any, name: str) -> Any:
    stream = container.streams.best("video")
    is_cover = stream is not None and stream.disposition & type(stream.disposition).attached_pic
    if stream is None or is_cover:
        kinds = {"a cover picture" if is_cover and other is stream else other.type for other in container.streams}
        found = f"only {' and '.join(sorted(kinds))}" if kinds else "nor any other"
        raise ErnieError(f"{name}: no video track, {found}. Give a file with moving pictures.")
    if stream.codec_context is None:
        raise ErnieError(f"{name}: no decoder for this kind of video. {_REPAIR}")
    return stream


def _holds_frame(packet: av.Packet) -> bool:
    """Not the empty packet at the end, one outside the edit list, or one that the end of the file cuts off."""
    return bool(packet.size) and not packet.is_discard and not packet.is_corrupt


def _rate(times: list[int | None], last_duration: int, stream: av.VideoStream) -> float:
    """Frames per second: the stated rate if the packets' times agree with it, else what they say; 0 if unknown."""
    stated = float(stream.average_rate or 0)
    measured = _measured_rate(times, last_duration, stream.time_base)
    if measured and abs(stated - measured) > _RATE_TOLERANCE * measured:
        return measured
    return stated


def _measured_rate(times: list[int | None], last_duration: int, time_base: Fraction | None) -> float:
    """Frames per second from presentation times; 0 if these do not tell."""
    known = [time for time in times if time is not None]
    if not known or len(known) < len(times) or time_base is None:
        return 0.0
    between = max(known) - min(known)
    last_duration = last_duration or between // max(1, len(known) - 1)
    seconds = (between + last_duration) * time_base
    return float(len(known) / seconds) if seconds else 0.0


def _decoded(container: Any, stream: Any) -> Iterator[av.VideoFrame]:
    for packet in container.demux(stream):
        if not packet.is_corrupt:
            yield from packet.decode()


def _upright(frame: av.VideoFrame) -> Image.Image:
    """As RGB, turned by the quarter turns that the camera noted; `rotation` counts counterclockwise, as Pillow does."""
    image = frame.to_image()
    turn = round(frame.rotation / 90) * 90 % 360
    return image.transpose(_UPRIGHT[turn]) if turn else image
