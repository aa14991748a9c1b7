"""What people really send: each odd picture or video gives a correct result or one clear error that says what is wrong.

They go the whole way, as a message to the processor.
"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from PIL import Image

from ernie45.errors import ErnieError
from ernie45.processing.processor import ErnieProcessor
from tests.helpers.vision import write_processor_folder

Grid = tuple[int, int, int]
SMALL = {"video_min_pixels": 784}  # frames stay as small as the tests make them


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> ErnieProcessor:
    return ErnieProcessor.from_pretrained(write_processor_folder(tmp_path_factory.mktemp("vision")), **SMALL)


def solid(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), 0 if mode in ("1", "L", "P", "I;16") else (40, 120, 200, 255)[: len(mode)])


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def noise(width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype("uint8"))


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 2.5 billion pixels."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    return encoded(solid(112, 56), "JPEG", exif=exif)


def gif(*colours: str) -> bytes:
    frames = [Image.new("RGB", (56, 56), colour) for colour in colours]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=500)


def clip(frames: int, *, audio: bool = False) -> bytes:
    """An MP4 file with so many frames; or with sound only."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000) if audio else container.add_stream("mpeg4", rate=4)
        if audio:
            sound = av.AudioFrame.from_ndarray(np.zeros([1, 1024], "float32"), format="fltp", layout="mono")
            sound.sample_rate = 16000
            made = [sound]
        else:
            stream.width, stream.height, stream.pix_fmt = 56, 56, "yuv420p"
            picture = np.full([56, 56, 3], 128, "uint8")
            made = [av.VideoFrame.from_ndarray(picture, format="rgb24") for _ in range(frames)]
        container.start_encoding()  # the header is written even if nothing follows
        for frame in made:
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def image(source: Any, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": source, **more}}


def video(source: Any, **settings: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": source}, **settings}


RIGHT: dict[str, tuple[Callable[[], dict[str, Any]], Grid]] = {
    "one pixel": (lambda: image(solid(1, 1)), (1, 4, 4)),  # grown to the least number of pixels
    "1 x 5000": (lambda: image(solid(1, 5000)), (1, 400, 2)),  # at most 200 times as high as wide
    "8000 x 10": (lambda: image(solid(8000, 10)), (1, 2, 400)),
    "CMYK JPEG": (lambda: image(encoded(solid(56, 56, "CMYK"), "JPEG")), (1, 4, 4)),
    "1 bit": (lambda: image(solid(56, 56, "1")), (1, 4, 4)),
    "16 bit": (lambda: image(encoded(solid(56, 56, "I;16"), "PNG")), (1, 4, 4)),
    "palette with transparency": (lambda: image(encoded(solid(56, 56, "P"), "PNG", transparency=0)), (1, 4, 4)),
    "turned by EXIF": (lambda: image(rotated()), (1, 8, 4)),
    "animated GIF as a picture": (lambda: image(gif("red", "blue")), (1, 4, 4)),
    "animated GIF as a video": (lambda: video(gif("red", "blue")), (2, 4, 4)),
    "exact size asked for": (lambda: image(solid(500, 500), image_width=84, image_height=56), (1, 4, 6)),
    "grey array": (lambda: image(np.zeros([56, 56], "uint8")), (1, 4, 4)),
    "one-frame video": (lambda: video(clip(1)), (2, 4, 4)),  # its frame is repeated
    "odd number of frames": (lambda: video([solid(56, 56)] * 3), (4, 4, 4)),
    "frames of several sizes": (lambda: video([solid(56, 56), solid(90, 30)]), (2, 4, 4)),
    "bare base64": (lambda: image(base64.b64encode(encoded(solid(56, 56), "PNG")).decode()), (1, 4, 4)),
}

WRONG: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "truncated JPEG": (lambda _: image(encoded(noise(), "JPEG")[:-900]), "truncated|cannot be decoded|broken|damaged"),
    "decompression bomb": (lambda _: image(bomb()), "pixels"),
    "empty bytes": (lambda _: image(b""), "empty"),
    "not a picture": (lambda _: image(b"%PDF-1.4 something else"), "not a picture|picture"),
    "missing file": (lambda folder: image(folder / "nowhere.png"), "nowhere.png"),
    "a folder": (lambda folder: image(folder), "directory|folder"),
    "broken data URL": (lambda _: image("data:image/png;base64,@@@"), "base64"),
    "unreachable host": (lambda _: image("http://127.0.0.1:9/photo.png"), "127.0.0.1:9"),
    "unknown scheme": (lambda _: image("ftp://example.com/photo.png"), "ftp"),
    "five channels": (lambda _: image(np.zeros([8, 8, 5], "uint8")), r"\[8, 8, 5\]"),
    "array without pixels": (lambda _: image(np.zeros([0, 8, 3], "uint8")), r"\[0, 8, 3\]|pixel|empty"),
    "floats beyond 1": (lambda _: image(np.full([8, 8, 3], 200.0)), "0.*1"),
    "NaN": (lambda _: image(np.full([8, 8, 3], np.nan)), "NaN|finite|0.*1"),
    "a truth value": (lambda _: image(True), "True|bool"),
    "no url": (lambda _: {"type": "image_url", "image_url": {}}, "url"),
    "width alone": (lambda _: image(solid(56, 56), image_width=84), "image_height|image_width"),
    "unknown part": (lambda _: {"type": "audio_url", "audio_url": {"url": "x.mp3"}}, "audio_url"),
    "no frames": (lambda _: video([]), "frame"),
    "zero-frame video": (lambda _: video(clip(0)), "frame|video"),
    "sound only": (lambda _: video(clip(0, audio=True)), "video|frame"),
    "text named mp4": (lambda folder: video(_text(folder / "clip.mp4")), "clip.mp4"),
    "contradicting settings": (lambda _: video([solid(56, 56)] * 4, min_frames=9, max_frames=3), "min_frames"),
    "unknown sampling": (lambda _: video([solid(56, 56)] * 4, frames_sample="best"), "frames_sample"),
}


def _text(path: Path) -> Path:
    path.write_text("this is no video", encoding="utf-8")
    return path


def conversation(part: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]


@pytest.mark.parametrize("name", RIGHT)
def test_correct_result(processor: ErnieProcessor, name: str) -> None:
    make, grid = RIGHT[name]
    inputs = processor(conversation(make()))
    assert inputs["grid_thw"].tolist() == [list(grid)]
    tokens = max(1, grid[0] // 2) * grid[1] * grid[2] // 4
    assert int((inputs["input_ids"] == processor.vision.placeholder_id).astype("int64").sum()) == tokens
    assert inputs["images"].shape == [int(np.prod(grid)), 588] and inputs["images"].dtype == paddle.uint8


@pytest.mark.parametrize("name", WRONG)
def test_one_clear_error(processor: ErnieProcessor, tmp_path: Path, name: str) -> None:
    make, message = WRONG[name]
    with pytest.raises(ErnieError, match=message) as caught:
        processor(conversation(make(tmp_path)))
    text = str(caught.value)
    assert len(text) < 600 and "\n" not in text.strip() and "Traceback" not in text
    assert "content" in text  # which part of which message


def test_more_pictures_than_places(processor: ErnieProcessor) -> None:
    """A template that leaves a picture out."""
    template = "{{ messages[0].content[1].text }}"
    with pytest.raises(ErnieError, match="template|picture"):
        processor(conversation(image(solid(56, 56))), chat_template=template)


def test_places_without_pictures(processor: ErnieProcessor) -> None:
    """Text that contains what stands for a picture."""
    for text in ("<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>"):
        with pytest.raises(ErnieError):
            processor([{"role": "user", "content": f"Look: {text}"}])
