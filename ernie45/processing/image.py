"""Pictures: from any source to RGB, to a size that the model sees, to patches."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from ernie45.config import VisionConfig
from ernie45.errors import ErnieError
from ernie45.processing.sources import PICTURE_FETCH, FetchLimits, describe, read_bytes

FACTOR = 28  # of the published models: pixels along a side of a token
MAX_ASPECT_RATIO = 200
# Pillow itself refuses above this, unless told otherwise, and warns above half of it.
MAX_PIXELS = 178_956_970
MAX_ANIMATION_PIXELS = 2**29
FASTEST_FRAME = 0.01  # seconds
USUAL_FRAME = 0.1

# What is read. Pillow knows many more formats, one of which (EPS) starts another program.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF")
DEEP_GREY_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
MODES_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa", "P")  # a palette's entries may be transparent
# What undoes each value of the EXIF tag Orientation; 1 and unknown values leave the picture as it is.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """How many pixels a picture, or a frame of a video, may have after resizing; the defaults are for pictures.

    They stand for 4 to 6177 tokens of 28 x 28 pixels each (for a frame of a video, 299 to 1196, of which two frames
    share one).
    """

    min_pixels: int = 4 * FACTOR**2
    max_pixels: int = 6177 * FACTOR**2

    def __post_init__(self) -> None:
        """Raises ErnieError unless 0 < min_pixels <= max_pixels."""
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ErnieError(
                f"image limits: min_pixels {self.min_pixels} and max_pixels {self.max_pixels}, "
                "expected 0 < min_pixels <= max_pixels."
            )


PICTURE_LIMITS = ImageLimits()
FRAME_LIMITS = ImageLimits(min_pixels=299 * FACTOR**2, max_pixels=1196 * FACTOR**2)


def encode_picture(
    source: Any, limits: ImageLimits, vision: VisionConfig, size: tuple[int, int] | None = None
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The patches and the grid (see `patches_of`) of one picture, read by `load_image`.

    Args:
        source: anything that `load_image` reads.
        limits: on the pixels that the model sees.
        vision: the model's.
        size: (height, width) to give the picture first, whatever its own; None leaves it.
    """
    image = load_image(source)
    if size is not None:
        image = resize(image, size)
    image = resize(image, smart_resize(image.height, image.width, limits, vision.factor))
    return patches_of(np.asarray(image)[None], vision)


def smart_resize(
    height: int, width: int, limits: ImageLimits = PICTURE_LIMITS, factor: int = FACTOR
) -> tuple[int, int]:
    """The (height, width) at which the model sees a picture: multiples of `factor` that keep to `limits`.

    The rule is that of Baidu's processor, to the last pixel: sides are rounded half to even; too large a picture
    shrinks to the floor, too small a one grows to the ceiling, at its aspect ratio. A side more than 200 times as long
    as the other is first changed to 200 times the other's rounded length. (transformers raises an error there.)

    Raises:
        ErnieError: a side is not positive, or no size keeps to the limits.
    """
    if height < 1 or width < 1:
        raise ErnieError(f"a picture of {width}x{height} pixels: both sides must be at least 1.")
    given = f"{width}x{height}"
    height, width = _less_extreme(height, width, factor)
    rows, columns = (max(1, round(side / factor)) for side in (height, width))
    if rows * columns * factor**2 > limits.max_pixels:
        shrink = math.sqrt(height * width / limits.max_pixels)
        rows, columns = (math.floor(side / shrink / factor) for side in (height, width))
    elif rows * columns * factor**2 < limits.min_pixels:
        grow = math.sqrt(limits.min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
    if not limits.min_pixels <= rows * columns * factor**2 <= limits.max_pixels:
        raise ErnieError(
            f"a picture of {given} pixels: no size in multiples of {factor} has {limits.min_pixels} to "
            f"{limits.max_pixels} pixels at its aspect ratio. Widen the image limits, or crop it."
        )
    return rows * factor, columns * factor


def _less_extreme(height: int, width: int, factor: int) -> tuple[int, int]:
    short, long = sorted((height, width))
    if long / short <= MAX_ASPECT_RATIO:
        return height, width
    short = max(factor, round(short / factor) * factor)
    long = short * MAX_ASPECT_RATIO
    return (long, short) if height > width else (short, long)


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`image` at `size` (height, width), bicubic on its 8-bit values as in Pillow; itself where it has that size."""
    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)


def patches_of(frames: np.ndarray, vision: VisionConfig) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cut pictures into patches.

    Args:
        frames: [T, H, W, channels] uint8; H and W multiples of `vision.factor`. A picture is one frame.
        vision: the model's.

    Returns:
        patches: [T * gh * gw, vision.patch_bytes] uint8. Rows go frame by frame, through the blocks of
            merge_size x merge_size patches row by row, and through each block row by row. Columns are (channel, y, x).
        grid: (T, gh, gw), counted in patches.

    Raises:
        ErnieError: another shape or dtype.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != vision.channels:
        raise ErnieError(
            f"frames: found {frames.dtype} {list(frames.shape)}, expected uint8 [frames, height, width, "
            f"{vision.channels}]."
        )
    count, height, width, channels = frames.shape
    if height % vision.factor or width % vision.factor:
        raise ErnieError(f"frames of {width}x{height} pixels: resize both sides to multiples of {vision.factor}.")
    side, merge = vision.patch_size, vision.merge_size
    blocks = (height // vision.factor, width // vision.factor)
    # Two copies, whole runs of a row first, then channels: half the time of one that moves single bytes.
    runs = frames.reshape(count, blocks[0], merge, side, blocks[1], merge, side * channels)
    patches = runs.transpose(0, 1, 4, 2, 5, 3, 6).reshape(-1, side * side, channels)
    grid = (count, height // side, width // side)
    return patches.transpose(0, 2, 1).reshape(-1, vision.patch_bytes), grid


def load_image(source: Any, max_pixels: int = MAX_PIXELS, fetch: FetchLimits = PICTURE_FETCH) -> Image.Image:
    """A picture in RGB, upright, as it is meant to be looked at.

    * It is turned as its EXIF orientation says. EXIF data that cannot be read count as absent.
    * What is transparent shows white.
    * Grey of 16 bits keeps its upper 8 bits, which is what Pillow does to colours of 16 bits; its own conversion of
      grey clips at 255 instead, and leaves most pictures white. Mode "I", in which Pillow opens some files of 16 bits,
      is read the same way; grey values beyond 16 bits are an error.
    * Floats are brightness from 0 to 1, in an array as in a file.
    * CMYK, palettes, one bit: converted by Pillow. Colour profiles are not applied.
    * Of several frames the first counts, or the one at which a given PIL image stands. See `load_animation`.

    Args:
        source: a PIL image; an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8, or of floats in 0..1;
            or anything that `sources.read_bytes` reads.
        max_pixels: width x height at most, checked in the file's header before anything is decoded. Pillow's own
            `PIL.Image.MAX_IMAGE_PIXELS` holds besides.
        fetch: limits on reading the source.

    Raises:
        ErnieError: not readable, not a picture, cut short, damaged, too many pixels, or values out of range.
    """
    image = _open(source, max_pixels, fetch)
    return _decode(image, describe(source))


def load_animation(
    source: Any, max_pixels: int = MAX_ANIMATION_PIXELS, fetch: FetchLimits = PICTURE_FETCH
) -> tuple[list[Image.Image], list[float]]:
    """All frames of an animated GIF, PNG, WebP or AVIF, each as `load_image` gives it, and how long each is shown.

    Any other picture is one frame. Durations are in seconds; where a file gives 10 ms or less, or nothing, a frame is
    shown for 100 ms, as in web browsers.

    Args:
        source: as for `load_image`.
        max_pixels: width x height x frames at most.
        fetch: limits on reading the source.

    Raises:
        ErnieError: as `load_image`.
    """
    where = describe(source)
    image = _open(source, max_pixels, fetch)
    # A PNG may begin with a picture for viewers without animations, which is none of the frames.
    first = int(getattr(image, "default_image", False))
    frames: list[Image.Image] = []
    durations: list[float] = []
    while _turn_to(image, first + len(frames), where):
        _check_pixels(image, len(frames) + 1, max_pixels, where)
        frames.append(_decode(image, where))
        durations.append(_duration(image))
    return frames, durations


def _turn_to(image: Image.Image, index: int, where: str) -> bool:
    """Whether there is a frame `index`; if so, the image stands there."""
    if image.format not in ANIMATED_FORMATS:
        return index == 0
    try:
        image.seek(index)
    except EOFError:
        return False
    except Exception as error:
        raise _damaged(image, where, error) from error
    return True


def _duration(image: Image.Image) -> float:
    seconds = float(image.info.get("duration", 0)) / 1000
    return seconds if seconds > FASTEST_FRAME else USUAL_FRAME


def _open(source: Any, max_pixels: int, fetch: FetchLimits) -> Image.Image:
    """The image of a source, not decoded yet, of at most `max_pixels`."""
    where = describe(source)
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, np.ndarray):
        image = _from_array(source, where)
    else:
        image = _open_content(read_bytes(source, fetch), where)
    if not image.width or not image.height:
        raise ErnieError(f"{where}: a picture of {image.width}x{image.height} pixels, expected at least 1x1.")
    _check_pixels(image, 1, max_pixels, where)
    return image


def _open_content(content: bytes, where: str) -> Image.Image:
    known = set(Image.registered_extensions().values())
    try:
        return Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in known])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ErnieError(f"{where}: more pixels than PIL.Image.MAX_IMAGE_PIXELS allows ({error}).") from error
    except Exception as error:  # on damaged headers Pillow lets through whatever its parsers raise
        raise ErnieError(
            f"{where}: not a picture that can be read (its {len(content)} bytes begin with {content[:8]!r}). "
            f"Give one of {', '.join(FORMATS)}."
        ) from error


def _check_pixels(image: Image.Image, frames: int, max_pixels: int, where: str) -> None:
    if image.width * image.height * frames > max_pixels:
        count = f"{frames} frames" if frames > 1 else "a picture"
        raise ErnieError(
            f"{where}: {count} of {image.width}x{image.height} pixels, of which at most {max_pixels} are decoded. "
            "Give a smaller picture, or raise max_pixels if you trust it."
        )


def _decode(image: Image.Image, where: str) -> Image.Image:
    try:
        image.load()
        if image.mode in DEEP_GREY_MODES:
            colours = _from_deep_grey(image, where)
        elif image.mode == "F":
            colours = _from_array(np.asarray(image), where).convert("RGB")
        elif image.mode in MODES_WITH_ALPHA or "transparency" in image.info:
            colours = _on_white(image)
        else:
            colours = image.convert("RGB")
    except ErnieError:
        raise
    except Exception as error:  # decoders raise many things besides OSError on damaged files
        raise _damaged(image, where, error) from error
    orientation = _orientation(image)
    return colours.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else colours


def _damaged(image: Image.Image, where: str, error: Exception) -> ErnieError:
    return ErnieError(
        f"{where}: a {image.format or 'PIL'} picture of {image.width}x{image.height} pixels in mode {image.mode} that "
        f"cannot be decoded ({error}). If the file is cut short or damaged, get it again; else convert it to PNG."
    )


def _from_deep_grey(image: Image.Image, where: str) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ErnieError(
            f"{where}: grey values from {values.min()} to {values.max()}, expected 0 to 65535 in mode {image.mode}. "
            "Scale them to 8 bits."
        )
    grey = (values >> 8).astype(np.uint8)
    if "transparency" in image.info:  # a PNG's one value that is transparent
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    premultiplied = {"La": "LA", "RGBa": "RGBA"}  # which Pillow converts to nothing else
    colours = image.convert(premultiplied.get(image.mode, "RGBA")).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")


def _orientation(image: Image.Image) -> Any:
    """The EXIF tag of a loaded image (some formats turn themselves when they are loaded, and drop it)."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a picture whose EXIF data are damaged is still a picture
        return None


def _from_array(array: np.ndarray, where: str) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if not array.size or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise ErnieError(
            f"{where}: an array {list(array.shape)}, expected [height, width] or [height, width, 1, 3 or 4]. "
            "Move channels to the end, and give several pictures one by one."
        )
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise ErnieError(
                f"{where}: floats from {array.min():g} to {array.max():g}, expected 0 to 1. "
                "Undo any normalisation, or divide by 255."
            )
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ErnieError(f"{where}: an array of {array.dtype}, expected uint8, or floats from 0 to 1. Convert it.")
    return Image.fromarray(array)
