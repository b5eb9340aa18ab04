"""Which frames of a video are used, and the time that is drawn on them: numbers only, as in ERNIE 4.5's training code.

Videos come as files, or as frames that were extracted before: then all of them are used, up to the bound.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from erniekit.data.records.errors import BadRecord
from erniekit.utils.errors import DataError

FONT = Path(__file__).parent / "fonts" / "Roboto-Regular.ttf"
_TEXT_SHARE = 0.1  # of the shorter side: the height of the text; of that height: the width of its outline


@dataclass(frozen=True)
class FrameOptions:
    """How many frames of a video are used, and which.

    `target_frames` says how many; without it there are `fps` of a second, but at least `min_frames` and at most
    `max_frames`. `sample`: "leading" takes the first frame of each interval, "middle" the one in its middle.
    `draw_time`: draw the time on each frame. `assumed_rate`: frames a second of extracted frames that come without
    times; None: as many as `fps`.
    """

    fps: float = 2.0
    min_frames: int = 16
    max_frames: int = 480
    target_frames: int | None = None
    sample: str = "middle"
    draw_time: bool = True
    assumed_rate: float | None = None


TRAINING_CHOICE = FrameOptions()  # the defaults of ERNIE's training code


def choose_frames(count: int, rate: float, options: FrameOptions) -> list[int]:
    """The indices of the frames to use of a video of `count` frames, `rate` a second. None is there twice."""
    if options.target_frames is not None:
        return pick_from_intervals(count, options.target_frames, options.sample)
    wanted = int(count / rate * options.fps)
    if wanted < options.min_frames:
        return pick_from_intervals(count, options.min_frames, options.sample)
    if wanted > options.max_frames:
        return pick_from_intervals(count, options.max_frames, options.sample)
    if options.fps >= rate:  # half of each step would be rounded to the same frame
        return list(range(count))
    shift = 0.5 if options.sample == "middle" else 0.0
    indices = (round((i + shift) / options.fps * rate) for i in range(math.ceil(count / rate * options.fps)))
    return [index for index in indices if index < count]


def choose_shown_frames(times: np.ndarray, options: FrameOptions) -> list[int]:
    """The indices of the frames to use of a video whose frames are not at equal distances. `times` [F]: their seconds,
    rising from 0.

    They are those that are shown at the moments at which `choose_frames` would take one of a steady rate, each once.
    Where these are fewer than the options ask for at least, frames are chosen by their number.
    """
    count = len(times)
    duration = float(times[-1]) * count / (count - 1)
    wanted, step = duration * options.fps, 1 / options.fps
    bounded = options.target_frames or min(max(int(wanted), options.min_frames), options.max_frames)
    if options.target_frames or bounded != int(wanted):
        wanted, step = bounded, duration / bounded
    shift = 0.5 if options.sample == "middle" else 0.0
    moments = (np.arange(math.ceil(wanted)) + shift) * step
    shown = np.unique(np.searchsorted(times, moments + 1e-6 * step, side="right") - 1).tolist()
    least = min(count, options.target_frames or options.min_frames)
    return shown if len(shown) >= least else pick_from_intervals(count, least, options.sample)


def pick_from_intervals(count: int, wanted: int, sample: str) -> list[int]:
    """One frame of each of `wanted` equal intervals of `count` frames; all frames if there are not as many."""
    if wanted >= count:
        return list(range(count))
    bounds = np.linspace(0, count, wanted + 1).astype(int).tolist()
    if sample == "leading":
        return bounds[:-1]
    return [(start + end - 1) // 2 for start, end in itertools.pairwise(bounds)]


def time_text(seconds: float) -> str:
    """What is drawn on a frame: `time: HH:MM:SS.ss`."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"time: {hours:02d}:{minutes:02d}:{rest:05.2f}"


def text_height(width: int, height: int) -> int:
    """The height in pixels of the time on frames of this size; BadRecord where there is no room for it."""
    result = int(min(width, height) * _TEXT_SHARE)
    if result < 1:
        raise BadRecord(
            f"frames of {width} x {height} pixels are too small to draw the time on",
            "leave the row out, or set render_timestamp: false",
        )
    return result


def draw_time(frame: np.ndarray, seconds: float) -> np.ndarray:
    """A frame uint8 [H, W, 3] with its time in the upper left corner, black with a white outline."""
    height = text_height(frame.shape[1], frame.shape[0])
    image = Image.fromarray(frame)
    ImageDraw.Draw(image).text(
        (0, 0),
        time_text(seconds),
        font=_font(height),
        fill=(0, 0, 0),
        stroke_width=int(height * _TEXT_SHARE),
        stroke_fill=(255, 255, 255),
    )
    return np.asarray(image)


@functools.lru_cache(maxsize=64)
def _font(height: int) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(str(FONT), height)
    except (OSError, ImportError) as error:
        raise DataError(
            f"the font that draws the time on frames cannot be loaded from {FONT} ({error}). "
            "Install erniekit again, or set render_timestamp: false, which departs from what the models were trained "
            "on."
        ) from None
