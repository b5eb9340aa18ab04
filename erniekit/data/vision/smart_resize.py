"""From the size of a picture (and the number of frames of a video) to its grid of patches and its number of tokens.

`measure` is the only place that knows this: counting, packing, decoding, checking and serving call it. The number of
tokens follows from the grid in positions.num_tokens, which the model calls, too, so that the placeholders of a sequence
always agree with the model's features.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from erniekit.data.vision.positions import MERGED_FRAMES, num_tokens
from erniekit.utils.errors import DataError

MAX_RATIO = 200  # of the longer side to the shorter one; beyond it the shorter side decides
TOKEN_AREA = 28 * 28  # pixels that one token of a picture stands for, with the published patches


class PixelLimits(NamedTuple):
    """The smallest and the largest area of a picture, or of one frame, in pixels after resizing."""

    min_pixels: int
    max_pixels: int


# What the published processor configurations say. The training code allows pictures up to 16384 * 784 pixels, which do
# not fit into sequences of 8192 tokens.
IMAGE_LIMITS = PixelLimits(4 * TOKEN_AREA, 6177 * TOKEN_AREA)
VIDEO_LIMITS = PixelLimits(299 * TOKEN_AREA, 1196 * TOKEN_AREA)


@dataclass(frozen=True)
class Patching:
    """How a picture is divided: the side of a patch in pixels, and how many rows and columns of patches become one
    token.
    """

    patch: int = 14
    spatial_merge: int = 2

    @property
    def factor(self) -> int:
        """Both sides of a resized picture are multiples of this."""
        return self.patch * self.spatial_merge


PUBLISHED = Patching()


class Geometry(NamedTuple):
    """A picture or video as the model sees it: the size in pixels after resizing, the grid of patches (frames, rows,
    columns), and the number of tokens between the start and end tags.
    """

    width: int
    height: int
    grid: tuple[int, int, int]
    tokens: int

    @property
    def patches(self) -> int:
        """Patches of all frames."""
        return math.prod(self.grid)


def measure(
    width: int,
    height: int,
    frames: int | None = None,
    limits: PixelLimits | None = None,
    patching: Patching = PUBLISHED,
) -> Geometry:
    """The geometry of a picture of width x height pixels, or of a video of that size if `frames` is given.

    A video with an odd number of frames repeats its last frame. The default of `limits`
    is IMAGE_LIMITS or VIDEO_LIMITS. Raises DataError where no size within the limits exists.
    """
    limits = limits or (IMAGE_LIMITS if frames is None else VIDEO_LIMITS)
    new_width, new_height = smart_resize(width, height, limits, patching.factor)
    rows, columns = new_height // patching.patch, new_width // patching.patch
    if frames is not None and frames < 1:
        raise DataError(f"a video of {frames} frames: it must have at least one")
    all_frames = 1 if frames is None else math.ceil(frames / MERGED_FRAMES) * MERGED_FRAMES
    grid = (all_frames, rows, columns)
    return Geometry(new_width, new_height, grid, int(num_tokens(np.array([grid]), patching.spatial_merge)[0]))


def smart_resize(width: int, height: int, limits: PixelLimits, factor: int = PUBLISHED.factor) -> tuple[int, int]:
    """The size that a picture is resized to, as ERNIE 4.5's training code computes it: both sides are multiples of
    `factor` and at least that, the area lies within the limits, and the shape is kept as well as that allows.

    Sides are rounded half to even. A picture more than 200 times as long as it is wide is first shortened to that
    ratio. Where the area is too large or too small, the sides are computed again from the ones before rounding.
    """
    if width < 1 or height < 1:
        raise DataError(f"a picture of {width} x {height} pixels has no area")
    if max(width, height) > MAX_RATIO * min(width, height):
        width, height = _clamp_ratio(width, height, factor)
    size = _resize(width, height, limits, factor)
    area = size[0] * size[1]
    if area < limits.min_pixels:
        raise DataError(
            f"a picture of {width} x {height} pixels has {area} after resizing and never between min_pixels "
            f"{limits.min_pixels} and max_pixels {limits.max_pixels}: set min_pixels to at most {area}"
        )
    if area > limits.max_pixels:
        raise DataError(
            f"a picture of {width} x {height} pixels cannot be resized to max_pixels {limits.max_pixels}: the smallest "
            f"max_pixels for its shape is {_smallest_max(width, height, limits, factor)}"
        )
    return size


def _resize(width: int, height: int, limits: PixelLimits, factor: int) -> tuple[int, int]:
    new_width, new_height = (max(factor, round(side / factor) * factor) for side in (width, height))
    if new_width * new_height > limits.max_pixels:
        scale = math.sqrt(width * height / limits.max_pixels)
        new_width, new_height = (max(factor, math.floor(side / scale / factor) * factor) for side in (width, height))
    elif new_width * new_height < limits.min_pixels:
        scale = math.sqrt(limits.min_pixels / (width * height))
        new_width, new_height = (math.ceil(side * scale / factor) * factor for side in (width, height))
    return new_width, new_height


def _smallest_max(width: int, height: int, limits: PixelLimits, factor: int) -> int:
    """The smallest max_pixels that a picture of this shape fits into: the short side is not made smaller than `factor`,
    so a long picture has more pixels than were asked for, until the bound is large enough.
    """
    bound = limits.max_pixels
    while True:
        new_width, new_height = _resize(width, height, PixelLimits(limits.min_pixels, bound), factor)
        if new_width * new_height <= bound:
            return bound
        bound = new_width * new_height


def _clamp_ratio(width: int, height: int, factor: int) -> tuple[int, int]:
    short = max(factor, round(min(width, height) / factor) * factor)
    long = short * MAX_RATIO // factor * factor
    return (short, long) if height > width else (long, short)
