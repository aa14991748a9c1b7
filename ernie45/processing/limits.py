"""How large pictures and videos may become, under the names that serving engines use."""

from __future__ import annotations

import dataclasses
from typing import Any

from ernie45.errors import ConfigError
from ernie45.processing.frame_sampling import VideoOptions
from ernie45.processing.image import FRAME_LIMITS, PICTURE_LIMITS, ImageLimits

# Each name and the field that it sets. Those beginning with `video_` are FastDeploy's --mm-processor-kwargs; without it
# they stand beside `type` in a message.
SETTINGS = {
    "image_min_pixels": ("image", "min_pixels"),
    "image_max_pixels": ("image", "max_pixels"),
    "video_min_pixels": ("video", "min_pixels"),
    "video_max_pixels": ("video", "max_pixels"),
    **{name: ("frames", name) for name in ("fps", "min_frames", "max_frames", "target_frames", "frames_sample")},
    **{f"video_{name}": ("frames", name) for name in ("fps", "min_frames", "max_frames", "target_frames")},
    "video_frames_sample": ("frames", "frames_sample"),
}


@dataclasses.dataclass(frozen=True)
class MediaLimits:
    """Limits on pictures and videos. The defaults are those of the published models' processor.

    Attributes:
        image: pixels of a picture.
        video: pixels of one frame of a video.
        frames: which frames of a video are taken.
    """

    image: ImageLimits = PICTURE_LIMITS
    video: ImageLimits = FRAME_LIMITS
    frames: VideoOptions = VideoOptions()

    def replace(self, **settings: Any) -> MediaLimits:
        """A copy with some settings changed, by their names in SETTINGS.

        Raises:
            ErnieError: no such setting, one given under both of its names, or an impossible value.
        """
        changes: dict[str, dict[str, Any]] = {"image": {}, "video": {}, "frames": {}}
        for name, value in settings.items():
            part, field = _find(name)
            if field in changes[part]:
                raise ConfigError(f"{field} is given twice, as {' and '.join(sorted({field, name}))}: leave one out")
            if part != "frames" and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError(f"{name} must be a positive integer, found {value!r}")
            changes[part][field] = value
        parts = {part: dataclasses.replace(getattr(self, part), **fields) for part, fields in changes.items()}
        return dataclasses.replace(self, **parts)


def _find(name: str) -> tuple[str, str]:
    if name not in SETTINGS:
        raise ConfigError(f"there is no setting {name}; there are {', '.join(SETTINGS)}")
    return SETTINGS[name]
