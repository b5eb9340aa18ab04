"""Pictures and videos of one sample: measured from their headers, decoded when the sample is used."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from erniekit.data.batch import Modality
from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes
from erniekit.data.vision.geometry import Geometry, Patching, PixelLimits, measure
from erniekit.data.vision.images import image_size, load_image, patchify, resize
from erniekit.data.vision.media import MediaReader, describe
from erniekit.data.vision.processor_files import ProcessorSettings
from erniekit.data.vision.video import Video, VideoOptions, open_video
from erniekit.utils.errors import DataError


@dataclass(frozen=True)
class MediaPlan:
    """A picture or a video of a sample: what it will be resized to, and how to decode it. `frames` is None for a
    picture.
    """

    part: dict[str, Any]
    width: int
    height: int
    limits: PixelLimits
    geometry: Geometry
    reader: MediaReader
    options: VideoOptions
    video: Video | None = None

    @property
    def modality(self) -> Modality:
        return Modality.IMAGE if self.video is None else Modality.VIDEO

    @property
    def name(self) -> str:
        """What it is, for messages."""
        return describe(self.part[self.part["type"]])

    def within(self, limits: PixelLimits, patching: Patching) -> "MediaPlan":
        """The same medium under other limits."""
        frames = None if self.video is None else len(self.video.times)
        geometry = measured(self.name, self.width, self.height, frames, limits, patching)
        values = vars(self) | {"limits": limits, "geometry": geometry}
        return MediaPlan(**values)

    def patches(self, patching: Patching, notes: Notes | None = None) -> np.ndarray:
        """Decode it: uint8 patches [P, 3 * patch * patch]."""
        if self.video is not None:
            frames = self.video.frames(self.geometry, self.options.choice.draw_time, notes)
        else:
            pixels = load_image(self.part["image"], self.reader, self.options.images, notes)
            frames = resize(pixels, self.geometry)[None]
        return patchify(frames, patching)


def plan_media(
    parts: Sequence[dict[str, Any]],
    reader: MediaReader,
    settings: ProcessorSettings,
    options: VideoOptions,
    notes: Notes | None = None,
) -> list[MediaPlan]:
    """Measure pictures and videos. A part's own min_pixels and max_pixels come first. BadRecord for what cannot be."""
    plans = []
    for part in parts:
        video = open_video(part, reader, options, notes) if part["type"] == "video" else None
        size = image_size(part["image"], reader, options.images) if video is None else (video.width, video.height)
        limits = _limits(part, settings.images if video is None else settings.videos)
        name = describe(part[part["type"]])
        frames = None if video is None else len(video.times)
        geometry = measured(name, *size, frames, limits, settings.patching)
        plans.append(MediaPlan(part, *size, limits, geometry, reader, options, video))
    return plans


def measured(
    name: str, width: int, height: int, frames: int | None, limits: PixelLimits, patching: Patching
) -> Geometry:
    """geometry.measure, whose error becomes the record's."""
    try:
        return measure(width, height, frames, limits, patching)
    except DataError as error:
        raise BadRecord(f"{name}: {error}", "change the limits, or leave it out") from None


def _limits(part: dict[str, Any], default: PixelLimits) -> PixelLimits:
    limits = []
    for key, value in default._asdict().items():
        own = part.get(key, value)
        if not isinstance(own, int) or isinstance(own, bool) or own < 1:
            raise BadRecord(f"{key} of a picture or video must be a positive integer, not {own!r}", "mend or remove it")
        limits.append(own)
    if limits[0] > limits[1]:
        limits[0] = limits[1]
    return PixelLimits(*limits)
