"""Pictures of every kind: what is loaded, at what size, cut into which patches; and what is refused."""

from __future__ import annotations

import base64
import functools
import io
import pathlib
import re
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ernie45.config import VisionConfig
from ernie45.errors import ErnieError
from ernie45.processing.image import (
    FRAME_LIMITS,
    PICTURE_LIMITS,
    ImageLimits,
    encode_picture,
    load_animation,
    load_image,
    patches_of,
    resize,
    smart_resize,
)
from ernie45.processing.sources import FetchLimits

VISION = VisionConfig.from_dict({}, {})
TOKEN = 28 * 28
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def pixels(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), dtype=np.uint8)


@functools.cache
def photo() -> Image.Image:
    """Smooth enough for lossy formats to keep."""
    return Image.fromarray(pixels(6, 8)).resize((80, 60), Image.Resampling.BICUBIC)


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG by hand, which may claim any size and hold what Pillow does not write."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("given_size", "expected"),
    [
        ((448, 448), (448, 448)),
        ((1344, 1792), (1344, 1792)),
        ((450, 447), (448, 448)),
        ((70, 98), (56, 112)),  # 2.5 and 3.5 tokens: halves go to the even neighbour
        ((126, 154), (112, 168)),  # 4.5 and 5.5
        ((10, 100), (28, 112)),  # 0.36 tokens: at least one
        ((1, 1), (56, 56)),  # one token is too few: grown to 4
        ((28, 28), (56, 56)),
        ((3000, 4000), (1904, 2520)),  # 107 x 143 tokens are too many: shrunk to 68.06 x 90.75, floored
        ((14, 2800), (28, 2800)),  # 200 times as wide as high: left so
        ((14, 2801), (28, 5600)),  # more: 200 times the rounded height
        ((5000, 1), (5600, 28)),
        ((10, 8000), (28, 5600)),
        ((100, 20001), (112, 22400)),  # 100 is nearest to 4 tokens
    ],
)
def test_sizes_computed_by_hand(given_size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert smart_resize(*given_size) == expected


@pytest.mark.parametrize(
    ("given_size", "expected"),
    [
        ((720, 1280), (728, 1288)),  # 26 x 46 tokens: exactly as many as allowed
        ((1080, 1920), (700, 1288)),  # shrunk to 25.94 x 46.11
        ((448, 448), (504, 504)),  # grown to 17.29 x 17.29
        ((240, 320), (420, 560)),
    ],
)
def test_sizes_of_frames_computed_by_hand(given_size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert smart_resize(*given_size, FRAME_LIMITS) == expected


def test_the_published_limits() -> None:
    assert (PICTURE_LIMITS.min_pixels, PICTURE_LIMITS.max_pixels) == (3136, 4842768)
    assert (FRAME_LIMITS.min_pixels, FRAME_LIMITS.max_pixels) == (234416, 937664)
    assert ImageLimits() == PICTURE_LIMITS


sides = st.integers(1, 20000)


@given(sides, sides, st.sampled_from([PICTURE_LIMITS, FRAME_LIMITS]))
@example(1, 20000, PICTURE_LIMITS)
@settings(max_examples=300)
def test_every_picture_has_a_size_of_whole_tokens_within_the_limits(
    height: int, width: int, limits: ImageLimits
) -> None:
    found = smart_resize(height, width, limits)
    assert all(side % 28 == 0 and side > 0 for side in found)
    assert limits.min_pixels <= found[0] * found[1] <= limits.max_pixels
    assert smart_resize(width, height, limits) == found[::-1]
    if max(height, width) <= 200 * min(height, width):
        # There is one scale at which both sides are less than a token away from what was given.
        smallest = max((found[0] - 28) / height, (found[1] - 28) / width)
        largest = min((found[0] + 28) / height, (found[1] + 28) / width)
        assert smallest < largest


@given(st.integers(2, 78), st.integers(2, 78))
def test_a_size_that_fits_stays(rows: int, columns: int) -> None:
    assert smart_resize(rows * 28, columns * 28) == (rows * 28, columns * 28)


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ErnieError, match="10x5000 pixels: no size in multiples of 28 has 784 to 7840 pixels"):
        smart_resize(5000, 10, ImageLimits(TOKEN, 10 * TOKEN))
    with pytest.raises(ErnieError, match="at least 1"):
        smart_resize(0, 10)
    for smallest, largest in ((0, 10), (10, 9), (-5, -1)):
        with pytest.raises(ErnieError, match="0 < min_pixels <= max_pixels"):
            ImageLimits(smallest, largest)


def test_resize_is_pillows_bicubic_and_leaves_what_fits() -> None:
    image = photo()
    assert resize(image, (60, 80)) is image
    assert resize(image, (28, 56)).size == (56, 28)
    np.testing.assert_array_equal(resize(image, (28, 56)), image.resize((56, 28), Image.Resampling.BICUBIC))


def test_rows_and_columns_of_patches_by_hand() -> None:
    """Two frames of 2 x 4 patches; every patch is filled with its own (frame, row, column)."""
    frames = np.zeros((2, 28, 56, 3), np.uint8)
    for frame, row, column in np.ndindex(2, 2, 4):
        frames[frame, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14] = (frame, row, column)
    patches, grid = patches_of(frames, VISION)
    assert grid == (2, 2, 4) and patches.shape == (16, 588) and patches.dtype == np.uint8
    assert patches.flags.c_contiguous
    frame = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert [tuple(row[[0, 196, 392]]) for row in patches] == [(0, *at) for at in frame] + [(1, *at) for at in frame]


def test_inside_a_patch_channels_come_first_then_rows() -> None:
    frames = np.zeros((1, 28, 28, 3), np.uint8)
    frames[0, 15, 3] = (7, 8, 9)  # patch of the second row, first column; y 1, x 3 within it
    patches, _ = patches_of(frames, VISION)
    assert {(int(row), int(column)): int(patches[row, column]) for row, column in np.argwhere(patches)} == {
        (2, 17): 7, (2, 196 + 17): 8, (2, 392 + 17): 9,
    }  # fmt: skip


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from([(14, 2), (2, 2), (4, 1), (3, 3)]))
@settings(max_examples=30)
def test_the_picture_can_be_put_together_again(count: int, rows: int, columns: int, shape: tuple[int, int]) -> None:
    side, merge = shape
    tower = {"patch_size": side, "spatial_merge_size": merge}
    vision = VisionConfig.from_dict(tower, {})
    frames = np.random.default_rng(rows).integers(
        0, 256, (count, rows * side * merge, columns * side * merge, 3), dtype=np.uint8
    )
    patches, (frame_count, high, wide) = patches_of(frames, vision)
    assert (frame_count, high, wide) == (count, rows * merge, columns * merge)
    again = np.zeros_like(frames)
    places = np.ndindex(count, rows, columns, merge, merge)
    for patch, (frame, block_row, block_column, row, column) in zip(patches, places, strict=True):
        top, left = (block_row * merge + row) * side, (block_column * merge + column) * side
        again[frame, top : top + side, left : left + side] = patch.reshape(3, side, side).transpose(1, 2, 0)
    np.testing.assert_array_equal(again, frames)


def test_frames_that_cannot_be_cut() -> None:
    for frames in (np.zeros((28, 28, 3), np.uint8), np.zeros((1, 28, 28, 4), np.uint8), np.zeros((1, 28, 28, 3))):
        with pytest.raises(ErnieError, match="expected uint8"):
            patches_of(frames, VISION)
    with pytest.raises(ErnieError, match="frames of 28x30 pixels: resize"):
        patches_of(np.zeros((1, 30, 28, 3), np.uint8), VISION)


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000), (10, 8000), (60, 80), (448, 448)])
def test_pictures_of_odd_sizes_become_patches(size: tuple[int, int]) -> None:
    source = save(Image.fromarray(pixels(*size)), "PNG")
    patches, grid = encode_picture(source, PICTURE_LIMITS, VISION)
    height, width = smart_resize(*size)
    assert grid == (1, height // 14, width // 14) and patches.shape == (grid[1] * grid[2], 588)
    expected = Image.fromarray(pixels(*size)).resize((width, height), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(patches, patches_of(np.asarray(expected)[None], VISION)[0])


def test_a_size_may_be_asked_for_first() -> None:
    _, grid = encode_picture(photo(), PICTURE_LIMITS, VISION, size=(140, 281))
    assert grid == (1, 10, 20)


# The formats and modes of pictures


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000"])
def test_lossless_formats(kind: str) -> None:
    content = save(photo(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    image = load_image(content)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(image, photo())


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_jpeg(options: dict[str, bool]) -> None:
    difference = np.asarray(load_image(save(photo(), "JPEG", quality=95, **options)), int) - np.asarray(photo(), int)
    assert np.abs(difference).mean() < 3


def test_from_every_kind_of_source(tmp_path: pathlib.Path) -> None:
    content = save(photo(), "PNG")
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    text = base64.b64encode(content).decode()
    sources = (content, io.BytesIO(content), path, str(path), path.as_uri(), text, f"data:image/png;base64,{text}")
    for source in (*sources, photo(), np.asarray(photo())):
        np.testing.assert_array_equal(load_image(source), photo())


def test_cmyk() -> None:
    ink = Image.new("CMYK", (4, 3), (0, 255, 255, 0))
    assert load_image(ink).getpixel((0, 0)) == (255, 0, 0)
    red, green, blue = load_image(save(ink, "JPEG", quality=95)).getpixel((2, 2))
    assert red > 240 and green < 15 and blue < 15


def test_grey_one_bit_and_palette() -> None:
    assert load_image(Image.new("L", (2, 2), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert load_image(save(Image.new("1", (2, 2), 1), "PNG")).getpixel((0, 0)) == WHITE
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 6, 5, 4])
    palette.putpixel((1, 0), 1)
    image = load_image(save(palette, "PNG"))
    assert [image.getpixel((x, 0)) for x in range(2)] == [(9, 8, 7), (6, 5, 4)]


def test_transparency_shows_white() -> None:
    half = load_image(save(Image.new("RGBA", (2, 2), (200, 0, 100, 128)), "PNG")).getpixel((0, 0))
    assert half == (227, 127, 177)
    assert load_image(Image.new("RGBA", (2, 2), (200, 0, 100, 0))).getpixel((0, 0)) == WHITE
    assert load_image(save(Image.new("LA", (2, 2), (0, 0)), "PNG")).getpixel((0, 0)) == WHITE
    assert load_image(Image.new("La", (2, 2), (0, 0))).getpixel((0, 0)) == WHITE
    assert load_image(Image.new("RGBa", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_a_palette_with_transparency(transparency: int | bytes) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 6, 5, 4])
    palette.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF")[: 2 if transparency == 1 else 1]:
        image = load_image(save(palette, kind, transparency=transparency))
        assert [image.getpixel((x, 0)) for x in range(2)] == [(9, 8, 7), WHITE]


def test_one_transparent_colour() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (4, 5, 6))
    loaded = load_image(save(image, "PNG", transparency=(4, 5, 6)))
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [(1, 2, 3), WHITE]


DEEP = np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "I", "I;16", "I;16B"])
def test_grey_of_16_bits_keeps_its_upper_half(kind: str) -> None:
    image = Image.fromarray(DEEP)
    if kind == "I":
        source: Any = Image.fromarray(DEEP.astype(np.int32))
    elif kind.startswith("I;16"):
        source = Image.frombytes(kind, (5, 1), DEEP.astype(">u2" if kind.endswith("B") else "<u2").tobytes())
    else:
        source = save(image, kind)
    loaded = np.asarray(load_image(source))
    assert loaded[0].tolist() == [[value] * 3 for value in (0, 0, 1, 128, 255)]


def test_colours_of_16_bits_are_read_as_grey_of_16_bits_is() -> None:
    rows = b"\0" + np.repeat(DEEP.astype(">u2"), 3, axis=1).tobytes()
    np.testing.assert_array_equal(load_image(png(5, 1, 16, 2, rows)), load_image(Image.fromarray(DEEP)))


def test_a_transparent_value_in_grey_of_16_bits() -> None:
    rows = b"\0" + DEEP.astype(">u2").tobytes()
    loaded = load_image(png(5, 1, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 256))))
    assert np.asarray(loaded)[0, :, 0].tolist() == [0, 0, 255, 128, 255]


def test_grey_beyond_16_bits_is_refused() -> None:
    for value in (-1, 0x10000):
        with pytest.raises(ErnieError, match=f"grey values from {value} to {value}, expected 0 to 65535"):
            load_image(Image.new("I", (2, 2), value))


def test_float_pictures() -> None:
    values = np.array([[0, 0.5, 1]], np.float32)
    assert np.asarray(load_image(save(Image.fromarray(values), "TIFF")))[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(ErnieError, match="floats from 0 to 255, expected 0 to 1"):
        load_image(Image.fromarray(values * 255))


# An L whose transposes all differ, as each orientation stores it.
UPRIGHT = np.array([[255, 0], [255, 0], [255, 255]], np.uint8)


def stored(orientation: int) -> np.ndarray:
    return {
        1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1],
        5: UPRIGHT.T, 6: np.rot90(UPRIGHT), 7: UPRIGHT[::-1, ::-1].T, 8: np.rot90(UPRIGHT, -1),
    }[orientation]  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientations(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    big = np.kron(stored(orientation), np.ones((16, 16), np.uint8))
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    content = save(Image.fromarray(big).convert("RGB"), kind, exif=exif, **options)
    loaded = np.asarray(load_image(content))[8::16, 8::16, 0]
    np.testing.assert_array_equal(loaded > 128, UPRIGHT > 128)
    np.testing.assert_array_equal(load_image(content), ImageOps.exif_transpose(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage that is no TIFF", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"", b"Exif\0\0"]
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_unreadable_exif_is_no_orientation(exif: bytes) -> None:
    np.testing.assert_array_equal(load_image(save(photo(), "PNG", exif=exif)), photo())


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientations_change_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(load_image(save(photo(), "PNG", exif=exif)), photo())


def test_a_given_image_is_not_changed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(save(photo(), "PNG", exif=exif)))
    assert load_image(image).size == (60, 80)
    assert image.size == (80, 60) and image.getexif()[0x0112] == 6


# Arrays


def test_arrays() -> None:
    grey, colour, alpha = pixels(5, 4, 1), pixels(5, 4, 3), pixels(5, 4, 4)
    np.testing.assert_array_equal(load_image(colour), colour)
    np.testing.assert_array_equal(load_image(colour[::-1, ::2]), colour[::-1, ::2])
    for array in (grey, grey[..., 0]):
        np.testing.assert_array_equal(load_image(array), np.repeat(grey, 3, axis=2))
    opacity = alpha[..., 3:].astype(float) / 255
    expected = alpha[..., :3] * opacity + 255 * (1 - opacity)
    assert np.abs(np.asarray(load_image(alpha)) - expected).max() <= 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_of_floats_keep_every_8_bit_value(dtype: type) -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    np.testing.assert_array_equal(load_image((every / 255).astype(dtype)), np.repeat(every, 3, axis=2))


@pytest.mark.parametrize("shape", [(), (5,), (0, 4), (4, 0, 3), (4, 4, 2), (4, 4, 5), (3, 40, 40), (1, 4, 4, 3)])
def test_arrays_of_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ErnieError, match=r"ndarray.*expected \[height, width\]"):
        load_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int64, np.uint16, complex, object, str])
def test_arrays_of_other_types(dtype: type) -> None:
    with pytest.raises(ErnieError, match="an array of .*expected uint8, or floats from 0 to 1"):
        load_image(np.zeros((4, 4, 3), dtype))


@pytest.mark.parametrize("value", [-0.01, 1.01, 255.0, np.nan, np.inf])
def test_floats_out_of_range(value: float) -> None:
    with pytest.raises(ErnieError, match="expected 0 to 1"):
        load_image(np.array([[0.5, value]]))


# Animations


def animation(kind: str, count: int = 3, **options: Any) -> bytes:
    frames = [Image.new("RGB", (20, 10), (80 * index, 0, 250 - 80 * index)) for index in range(count)]
    return save(frames[0], kind, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    content = animation(kind, duration=[200, 50, 1000], **options)
    assert load_image(content).getpixel((5, 5)) == (0, 0, 250)
    frames, durations = load_animation(content)
    assert [frame.getpixel((5, 5)) for frame in frames] == [(80 * index, 0, 250 - 80 * index) for index in range(3)]
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (20, 10))}
    assert durations == pytest.approx([0.2, 0.05, 1.0])


def test_frames_that_paint_over_a_part_and_leave_the_rest() -> None:
    frames = [Image.new("RGB", (20, 10), "red") for _ in range(2)]
    frames[1].putpixel((3, 3), (0, 255, 0))
    content = save(frames[0], "GIF", save_all=True, append_images=frames[1:], disposal=1)
    loaded, _ = load_animation(content)
    assert [loaded[1].getpixel(at) for at in ((3, 3), (4, 4))] == [(0, 255, 0), (255, 0, 0)]


def test_durations_that_no_browser_would_show() -> None:
    assert load_animation(animation("GIF"))[1] == [0.1] * 3
    assert load_animation(animation("GIF", duration=10))[1] == [0.1] * 3
    assert load_animation(animation("GIF", duration=20))[1] == [0.02] * 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF"])
def test_a_still_picture_is_one_frame(kind: str) -> None:
    content = save(photo(), kind)
    frames, durations = load_animation(content)
    assert len(frames) == 1 and durations == [0.1]
    np.testing.assert_array_equal(frames[0], load_image(content))


@pytest.mark.parametrize("kind", ["TIFF", "MPO"])
def test_pages_and_second_views_are_no_frames(kind: str) -> None:
    assert len(load_animation(animation(kind))[0]) == 1


def test_a_picture_for_viewers_without_animations_is_no_frame() -> None:
    content = animation("PNG", count=4, default_image=True, duration=50)
    assert load_image(content).getpixel((0, 0)) == (0, 0, 250)
    frames, durations = load_animation(content)
    assert [frame.getpixel((0, 0)) for frame in frames] == [(80 * i, 0, 250 - 80 * i) for i in (1, 2, 3)]
    assert durations == [0.05] * 3


def test_a_given_image_counts_from_where_it_stands() -> None:
    image = Image.open(io.BytesIO(animation("GIF")))
    image.seek(2)
    assert load_image(image).getpixel((0, 0)) == (160, 0, 90)
    assert len(load_animation(image)[0]) == 3


def test_an_animation_of_too_many_pixels() -> None:
    assert len(load_animation(animation("GIF"), max_pixels=600)[0]) == 3
    with pytest.raises(ErnieError, match="3 frames of 20x10 pixels, of which at most 599"):
        load_animation(animation("GIF"), max_pixels=599)


# What is refused


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    """The header claims 12000 x 12000 pixels, and there is not one: decoding would complain about something else."""
    bomb = png(12000, 12000, 8, 2, b"")
    with pytest.raises(ErnieError, match="bytes>: a picture of 12000x12000 pixels, of which at most 100000000"):
        load_image(bomb, max_pixels=10**8)
    with pytest.raises(ErnieError, match="12000x12000"):
        load_animation(bomb, max_pixels=10**8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_beyond_what_pillow_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ErnieError, match="MAX_IMAGE_PIXELS"):
        load_image(png(60000, 60000, 8, 2, b""))
    assert before == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ErnieError, match="a picture of 60000x60000 pixels, of which at most"):
        load_image(png(60000, 60000, 8, 2, b""))


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_where_warnings_are_errors_so_is_pillows() -> None:
    with pytest.raises(ErnieError, match="MAX_IMAGE_PIXELS"):
        load_image(png(10000, 10000, 8, 2, b""))


def test_the_limit_is_exact_and_holds_for_every_source() -> None:
    for source in (photo(), np.asarray(photo()), save(photo(), "PNG")):
        assert load_image(source, max_pixels=4800).size == (80, 60)
        with pytest.raises(ErnieError, match="80x60 pixels, of which at most 4799"):
            load_image(source, max_pixels=4799)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM"])
def test_a_file_cut_short_is_an_error_or_all_there(kind: str) -> None:
    """Check sums and end marks may be missing without loss."""
    content = save(photo(), "JPEG", progressive=True) if kind == "progressive" else save(photo(), kind)
    whole = np.asarray(load_image(content))
    ends = {*range(1, len(content), max(1, len(content) // 60)), *range(len(content) - 14, len(content))}
    for end in sorted(ends):
        try:
            found = load_image(content[:end])
        except ErnieError as error:
            assert re.search(r"^<\d+ bytes>: (not a picture|.*If the file is cut short)", str(error))
            assert end < len(content)
        else:
            assert len(content) - end <= 32
            np.testing.assert_array_equal(found, whole)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
def test_damaged_files_give_a_picture_or_an_error(kind: str) -> None:
    content = save(photo(), kind)
    generator = np.random.default_rng(0)
    outcomes = set()
    for _ in range(40):
        damaged = bytearray(content)
        for place in generator.integers(0, min(len(content), 400), 4):
            damaged[place] = generator.integers(0, 256)
        try:
            outcomes.add(load_image(bytes(damaged), max_pixels=10**6).mode)
        except ErnieError as error:
            outcomes.add(type(error))
    assert outcomes <= {"RGB", ErnieError} and ErnieError in outcomes


@pytest.mark.parametrize(
    "content",
    [b"x", b"GIF89a", b"\xff\xd8\xff", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0"],
)
def test_no_picture(content: bytes, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ErnieError, match=f"<{len(content)} bytes>: not a picture.*Give one of JPEG, PNG"):
        load_image(content)
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with pytest.raises(ErnieError, match=r"photo\.png': not a picture"):
        load_image(path)


@pytest.mark.parametrize("kind", ["EPS", "TGA"])
def test_formats_that_are_not_read_although_pillow_could(kind: str) -> None:
    with pytest.raises(ErnieError, match="not a picture that can be read"):
        load_image(save(photo(), kind))


def test_no_content() -> None:
    with pytest.raises(ErnieError, match="empty"):
        load_image(b"")
    with pytest.raises(ErnieError, match="0x0 pixels, expected at least 1x1"):
        load_image(Image.new("RGB", (0, 0)))


def test_an_image_whose_file_is_closed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(save(photo(), "PNG"))
    with Image.open(path) as image:
        pass
    with pytest.raises(ErnieError, match="PngImageFile.*cannot be decoded"):
        load_image(image)


def test_the_source_may_not_be_larger_than_its_limit() -> None:
    with pytest.raises(ErnieError, match="larger than the 100 bytes"):
        load_image(save(photo(), "PNG"), fetch=FetchLimits(max_bytes=100))
    with pytest.raises(ErnieError, match="from a list"):
        load_image([photo()])
