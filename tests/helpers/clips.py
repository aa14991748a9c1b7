"""Small videos whose frames carry their own number, so that a test can tell which frames it got."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

WIDTH, HEIGHT = 160, 96
BITS, SIDE = 10, 16


def numbered_frame(number: int) -> np.ndarray:
    """[96, 160, 3] uint8: grey, with the number in binary as black and white squares along the lower edge."""
    frame = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    for bit in range(BITS):
        frame[-SIDE:, bit * SIDE : (bit + 1) * SIDE] = 255 if number >> bit & 1 else 0
    return frame


def number_of(image: Image.Image) -> int:
    """The number that `numbered_frame` put there, read back after lossy coding."""
    grey = np.asarray(image.convert("L"))
    centres = grey[-SIDE // 2, SIDE // 2 :: SIDE]
    return sum(1 << bit for bit, value in enumerate(centres) if value > 128)


def clip(
    count: int,
    rate: int = 25,
    *,
    container: str = "mp4",
    codec: str = "mpeg4",
    times: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> bytes:
    """A video of numbered frames.

    Args:
        count: number of frames.
        rate: frames per second.
        container: FFmpeg's name of the format.
        codec: FFmpeg's name of the encoder.
        times: when each frame is shown, in units of 1 / rate; None: one after the other.
        options: of the encoder.
        container_options: of the format.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip"
        _write(path, count, rate, container, codec, times, options or {}, container_options or {})
        return path.read_bytes()


def _write(
    path: Path,
    count: int,
    rate: int,
    container: str,
    codec: str,
    times: Sequence[int] | None,
    options: dict[str, str],
    container_options: dict[str, str],
) -> None:
    with av.open(str(path), "w", format=container, options=container_options) as output:
        stream: Any = output.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), "rgb24")
            frame.pts, frame.time_base = times[number] if times else number, Fraction(1, rate)
            output.mux(stream.encode(frame))
        if count:
            output.mux(stream.encode())
        else:
            output.start_encoding()


def sound(with_cover: bool = False) -> bytes:
    """An MP4 file with a second of silence and no moving pictures, but perhaps a cover."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        voice: Any = output.add_stream("aac", rate=16000)
        if with_cover:
            cover: Any = output.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
            output.mux(cover.encode(av.VideoFrame.from_ndarray(numbered_frame(0), "rgb24")))
            output.mux(cover.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        output.mux(voice.encode(frame))
        output.mux(voice.encode())
    return file.getvalue()


def with_noise(content: bytes, first: int) -> bytes:
    """A video in which the packets from `first` on are overwritten."""
    damaged = bytearray(content)
    with av.open(io.BytesIO(content)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for start, size in places[first:]:
        damaged[start : start + size] = b"\xff" * size
    return bytes(damaged)


def turned(content: bytes, quarters: int) -> bytes:
    """An MP4 file with the note that its pictures are to be shown turned clockwise by quarter turns."""
    cosine, sine = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarters % 4]
    upright = np.array([1, 0, 0, 0, 1, 0, 0, 0, 1], np.int64)
    note = np.array([cosine, sine, 0, -sine, cosine, 0, 0, 0, 1], np.int64)
    unit = np.array([1 << 16, 1 << 16, 1 << 30] * 3)
    before, after = ((matrix * unit).astype(">i4").tobytes() for matrix in (upright, note))
    place = content.index(before, content.index(b"tkhd"))
    return content[:place] + after + content[place + len(after) :]
