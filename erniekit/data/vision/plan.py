"""Pictures and videos of one sample: measured from their headers, decoded when the sample is used."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from erniekit.data.packed_batch import Modality
from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes
from erniekit.data.vision.frames import text_height
from erniekit.data.vision.images import image_size, load_picture, patchify, resize
from erniekit.data.vision.media import MediaReader, describe, unwrap
from erniekit.data.vision.processor_files import ProcessorSettings
from erniekit.data.vision.smart_resize import TOKEN_AREA, Geometry, Patching, PixelLimits, measure, smart_resize
from erniekit.data.vision.video import VideoOptions, open_video
from erniekit.utils.errors import DataError

SMALLEST_AREA = 4 * TOKEN_AREA  # pixels that no picture is shrunk below


@dataclass(frozen=True)
class MediaPlan:
    """A picture or a video of a sample: its size, what it will be resized to, and how to decode it. It can be sent to
    another process.

    `frames` is the number of frames that are used, None for a picture. `thinned`: only some of the frames that were
    chosen are used, so that the sample fits.
    """

    part: dict[str, Any]
    width: int
    height: int
    frames: int | None
    limits: PixelLimits
    geometry: Geometry
    reader: MediaReader
    options: VideoOptions
    patching: Patching
    thinned: bool = False

    @property
    def modality(self) -> Modality:
        """Picture or video."""
        return Modality.IMAGE if self.frames is None else Modality.VIDEO

    @property
    def name(self) -> str:
        """The name of its kind for messages."""
        return describe(self.part[self.part["type"]])

    @property
    def num_bytes(self) -> int:
        """About how much memory it takes: more than a little only where the record holds the picture itself."""
        source = self.part[self.part["type"]]
        return 1000 + sum(_size(item) for item in (source if isinstance(source, list | tuple) else [source]))

    def at_most(self, max_pixels: int, frames: int | None = None) -> "MediaPlan":
        """The same with a smaller bound of pixels, and for a video of fewer frames. The bound of a picture whose shape
        has no size so small is the next one, in whole tokens, at which it has one.
        """
        count = self.frames if frames is None or self.frames is None else min(self.frames, frames)
        limits = self.limits
        for bound in range(max_pixels, self.limits.max_pixels, TOKEN_AREA):
            smaller = PixelLimits(min(self.limits.min_pixels, bound), bound)
            if _is_possible(self.width, self.height, smaller, self.patching):
                limits = smaller
                break
        geometry = measure(self.width, self.height, count, limits, self.patching)
        thinned = self.thinned or count != self.frames
        return replace(self, limits=limits, geometry=geometry, frames=count, thinned=thinned)

    def pixels(self, notes: Notes | None = None) -> np.ndarray:
        """Decode and resize it: uint8 [frames of the grid, H, W, 3]. BadRecord for what cannot be decoded."""
        if self.frames is None:
            picture = load_picture(self.part["image"], self.reader, self.options.images, notes)
            return resize(picture, self.geometry)[None]
        video = open_video(self.part, self.reader, self.options, notes)
        if self.thinned:
            video = video.thinned(self.frames)
        return video.frames(self.geometry, self.options.choice.draw_time, notes)

    def patches(self, notes: Notes | None = None) -> np.ndarray:
        """The `pixels` as uint8 patches [P, 3 * patch * patch]."""
        return patchify(self.pixels(notes), self.patching)


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
        frames = None
        if part["type"] == "video":
            video = open_video(part, reader, options, notes)
            width, height, frames = video.width, video.height, len(video.times)
            if options.choice.draw_time:
                text_height(width, height)  # before training: decoding would say it in the middle of a run
        else:
            width, height = image_size(part["image"], reader, options.images)
        limits = _limits(part, settings.images if frames is None else settings.videos)
        try:
            geometry = measure(width, height, frames, limits, settings.patching)
        except DataError as error:
            source = part[part["type"]]
            name = "" if isinstance(source, np.ndarray) else f"{describe(source)}: "  # in memory it has none
            raise BadRecord(f"{name}{error}", "change the limits, or leave it out") from None
        plans.append(MediaPlan(part, width, height, frames, limits, geometry, reader, options, settings.patching))
    return plans


def tokens_of(plans: Sequence[MediaPlan]) -> int:
    """Tokens of all placeholders."""
    return sum(plan.geometry.tokens for plan in plans)


def shrink(plans: Sequence[MediaPlan], budget: int) -> list[MediaPlan] | None:
    """Pictures and videos that together have at most `budget` tokens: one bound of pixels for all, as large as
    possible; where the smallest is not small enough, videos lose frames, half of them at a time, down to two. None if
    that is not enough either.
    """
    most = None
    while True:
        bound = largest_bound(plans, budget, most)
        if bound is not None:
            return [plan.at_most(bound, most) for plan in plans]
        longest = max((plan.frames or 0 for plan in plans), default=0)
        most = (longest if most is None else most) // 2
        if most < 2:
            return None


def largest_bound(plans: Sequence[MediaPlan], budget: int, most_frames: int | None = None) -> int | None:
    """The largest max_pixels, a whole number of tokens, with which the media have at most `budget` tokens; None if
    there is none.
    """
    low, high = SMALLEST_AREA // TOKEN_AREA, max((plan.limits.max_pixels // TOKEN_AREA for plan in plans), default=0)
    best = None
    while low <= high:
        middle = (low + high) // 2
        if tokens_of([plan.at_most(middle * TOKEN_AREA, most_frames) for plan in plans]) <= budget:
            best, low = middle * TOKEN_AREA, middle + 1
        else:
            high = middle - 1
    return best


def _is_possible(width: int, height: int, limits: PixelLimits, patching: Patching) -> bool:
    """Whether a picture has a size within the limits."""
    try:
        smart_resize(width, height, limits, patching.factor)
    except DataError:
        return False
    return True


def _size(source: Any) -> int:
    """The size of the bytes or the text that a source consists of."""
    try:
        source = unwrap(source)
    except BadRecord:
        return 0
    if isinstance(source, np.ndarray):
        return source.nbytes
    return len(source) if isinstance(source, str | bytes | bytearray | memoryview) else 0


def _limits(part: dict[str, Any], default: PixelLimits) -> PixelLimits:
    limits = []
    for key, value in default._asdict().items():
        own = value if part.get(key) is None else part[key]
        if not isinstance(own, int) or isinstance(own, bool) or own < 1:
            raise BadRecord(f"{key} of a picture or video must be a positive integer, not {own!r}", "fix or remove it")
        limits.append(own)
    if part.get("min_pixels") is not None and limits[0] > limits[1]:
        raise BadRecord(
            f"min_pixels of a picture or video is {limits[0]}, and max_pixels is {limits[1]}",
            "give both so that the first is not larger",
        )
    return PixelLimits(min(limits), limits[1])
