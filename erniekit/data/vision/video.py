"""Videos: a file that PyAV decodes, a directory or a list of frames -> uint8 frames at the size for the model.

Sizes are known from headers (`open_video`), before anything is decoded (`Video.frames`).
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes
from erniekit.data.vision.frames import (
    TRAINING_CHOICE,
    FrameOptions,
    choose_frames,
    choose_shown_frames,
    draw_time,
    pick_from_intervals,
)
from erniekit.data.vision.images import FORMATS, IMAGE_OPTIONS, ImageOptions, image_size, load_image, resize
from erniekit.data.vision.media import MAX_VIDEO_BYTES, MediaReader, describe, kind_of_file, unwrap
from erniekit.data.vision.smart_resize import PUBLISHED, Geometry, Patching, PixelLimits, measure
from erniekit.utils.wording import count_of

_MAX_FRAMES = 2_000_000  # of a file: 18 hours at 30 frames a second
_NEARBY = 10  # frames: how far from a damaged frame another one may stand in for it


@dataclass(frozen=True)
class VideoOptions:
    """How videos are read: the choice of frames, the pixels of pictures that are frames, and how long decoding one
    video may take.
    """

    choice: FrameOptions = TRAINING_CHOICE
    images: ImageOptions = IMAGE_OPTIONS
    max_seconds: float = 300.0


DEFAULT_OPTIONS = VideoOptions()


@dataclass(frozen=True)
class Video:
    """A video whose frames have been chosen but not decoded. `times` [F]: seconds from the start."""

    name: str
    width: int
    height: int
    times: list[float]
    decode: Callable[[Notes | None], Iterator[np.ndarray]] = field(repr=False)

    def measure(self, limits: PixelLimits | None = None, patching: Patching = PUBLISHED) -> Geometry:
        """The geometry of the chosen frames."""
        return measure(self.width, self.height, len(self.times), limits, patching)

    def thinned(self, keep: int) -> "Video":
        """The same video with `keep` of its frames: the first, the last, and others at equal steps between them."""
        kept = np.linspace(0, len(self.times) - 1, keep).round().astype(int).tolist()

        def decode(notes: Notes | None) -> Iterator[np.ndarray]:
            wanted = set(kept)
            yield from (frame for index, frame in enumerate(self.decode(notes)) if index in wanted)

        return replace(self, times=[self.times[index] for index in kept], decode=decode)

    def frames(self, geometry: Geometry, draw: bool = True, notes: Notes | None = None) -> np.ndarray:
        """The decoded frames uint8 [frames of the grid, H, W, 3]: the time is drawn, then they are resized, then the
        last one is repeated until the grid is full.
        """
        result = np.empty((geometry.grid[0], geometry.height, geometry.width, 3), np.uint8)
        done = 0
        for frame, seconds in zip(self.decode(notes), self.times, strict=True):
            result[done] = resize(draw_time(frame, seconds) if draw else frame, geometry)
            done += 1
        result[done:] = result[done - 1]
        return result


def open_video(
    part: dict[str, Any], reader: MediaReader, options: VideoOptions = DEFAULT_OPTIONS, notes: Notes | None = None
) -> Video:
    """The video of a content part {"type": "video", "video": source}, with its frames chosen.

    `source` is what MediaReader opens, a directory of frames, a list of frames (each what load_image takes), or an
    array uint8 [F, H, W, 3]. The part may also have `fps` (frames a second of extracted frames) or `time_stamps`
    (their seconds), and its own `video_fps`, `min_frames`, `max_frames` or `target_frames`.
    """
    source = part.get("video")
    if isinstance(source, np.ndarray):
        return _from_list(list(source), part, reader, options, notes)
    if not isinstance(source, list | tuple):
        source = unwrap(source)
    if isinstance(source, list | tuple):
        return _from_list(list(source), part, reader, options, notes)
    directory = reader.local_path(source)
    if directory is not None and kind_of_file(directory) == "directory":
        return _from_list(_pictures_in(directory), part, reader, options, notes)
    return _from_file(source, part, reader, options)


def require_decoder(parts: Iterable[dict[str, Any]], reader: MediaReader) -> None:
    """MissingPackage if one of the parts is a video file and nothing is installed that decodes it."""
    videos = [part["video"] for part in parts if part["type"] == "video"]
    # in this order, since looking for a package in every record would take longer than checking the record
    if videos and find_spec("av") is None and any(_is_file(source, reader) for source in videos):
        from erniekit.data.vision import video_file  # noqa: F401 - raises it


def _is_file(source: Any, reader: MediaReader) -> bool:
    """Whether a video is neither a directory nor a list of frames."""
    source = source if isinstance(source, list | tuple | np.ndarray) else unwrap(source)
    if isinstance(source, list | tuple | np.ndarray):
        return False
    directory = reader.local_path(source)
    return directory is None or kind_of_file(directory) != "directory"


def _pictures_in(directory: Path) -> list[str]:
    """The pictures of a directory in the order of the numbers in their names, and then of the names (1.png, 01.png)."""
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    files = [path for path in directory.iterdir() if path.suffix.lower() in known and not path.name.startswith(".")]
    if not files:
        raise BadRecord(f"the directory {directory} has no pictures", "a video is a file or a directory of frames")

    def by_number(path: Path) -> list[tuple[int, int, str]]:
        words = re.findall(r"\d+|\D+", path.name)
        return [(0, int(word), "") if word.isdecimal() else (1, 0, word) for word in words]

    # absolute: relative paths are relative to the data file, whose directory `directory` has already
    return [str(path.absolute()) for path in sorted(files, key=lambda path: (by_number(path), path.name))]


def _from_list(
    frames: list[Any], part: dict[str, Any], reader: MediaReader, options: VideoOptions, notes: Notes | None
) -> Video:
    if not frames:
        raise BadRecord("a video has no frames", "give at least one, or remove it")
    choice = _choice(part, options)
    indices = pick_from_intervals(len(frames), choice.target_frames or choice.max_frames, choice.sample)
    times = _times(part, len(frames), choice, notes)
    width, height = image_size(frames[indices[0]], reader, options.images)

    def decode(notes: Notes | None) -> Iterator[np.ndarray]:
        for index in indices:
            pixels = load_image(frames[index], reader, options.images, notes)
            if pixels.shape[:2] != (height, width):
                raise BadRecord(
                    f"frame {index} ({describe(frames[index])}) has {pixels.shape[1]} x {pixels.shape[0]} pixels, the "
                    f"first one {width} x {height}",
                    "all frames of a video must have the same size",
                )
            yield pixels

    return Video(describe(frames), width, height, [times[index] for index in indices], decode)


def _times(part: dict[str, Any], count: int, choice: FrameOptions, notes: Notes | None) -> list[float]:
    """The seconds of all extracted frames."""
    given = part.get("time_stamps")
    if given is not None:
        if not isinstance(given, Sequence) or len(given) != count or not all(_is_number(t) and t >= 0 for t in given):
            raise BadRecord(
                f"time_stamps must have a number of seconds for each of {count_of(count, 'frame')}", "or leave them out"
            )
        return _ascending([float(t) for t in given])
    rate = part.get("fps")
    if rate is None:
        rate = choice.assumed_rate or choice.fps
        if notes is not None:
            notes.doubts.add(
                f"frames of a video come without times; {rate:g} frames a second are assumed (give fps or time_stamps)"
            )
    if not _is_number(rate) or rate <= 0:
        raise BadRecord(f"the fps of a video must be a positive number, not {rate!r}", "give frames a second")
    return [index / rate for index in range(count)]


def _ascending(times: list[float]) -> list[float]:
    """The times of frames, which must not go back."""
    for number, (before, after) in enumerate(pairwise(times), 1):
        if after < before:
            raise BadRecord(
                f"time_stamps go back from {before:g} to {after:g} seconds at frame {number} (counted from 0)",
                "put frames and times into the order of time",
            )
    return times


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)


def _choice(part: dict[str, Any], options: VideoOptions) -> FrameOptions:
    """The options for one video, of which its part may set some."""
    names = {
        "video_fps": "fps",
        "min_frames": "min_frames",
        "max_frames": "max_frames",
        "target_frames": "target_frames",
    }
    own = {field: part[name] for name, field in names.items() if part.get(name) is not None}
    for name, value in own.items():
        if not _is_number(value) or value <= 0 or (name != "fps" and value % 1):
            kind = "number" if name == "fps" else "whole number"
            raise BadRecord(f"{name} of a video must be a positive {kind}, not {value!r}", "fix or remove it")
    whole = {name: value if name == "fps" else int(value) for name, value in own.items()}
    choice = FrameOptions(**{**vars(options.choice), **whole})
    if "max_frames" in own and "min_frames" not in own:
        return replace(choice, min_frames=min(choice.min_frames, choice.max_frames))
    if "min_frames" in own and choice.min_frames > choice.max_frames:
        raise BadRecord(
            f"min_frames of a video is {choice.min_frames}, and max_frames is {choice.max_frames}",
            "give both so that the first is not larger",
        )
    return choice


def _from_file(source: Any, part: dict[str, Any], reader: MediaReader, options: VideoOptions) -> Video:
    from erniekit.data.vision import video_file  # PyAV is an extra

    name = describe(source)
    given = [key for key in ("fps", "time_stamps") if part.get(key) is not None]
    if given:
        raise BadRecord(
            f"{given[0]} stands beside the video file {name}, which says itself when its frames are",
            "write video_fps for the frames to take of a second; fps and time_stamps are those of a list of frames",
        )
    with reader.open(source, MAX_VIDEO_BYTES) as file:
        info = video_file.probe(file, name, _MAX_FRAMES, options.max_seconds)
    choice = _choice(part, options)
    if info.times is None:
        indices = choose_frames(info.count, info.rate, choice)
        times = [index / info.rate for index in indices]
    else:
        indices = choose_shown_frames(info.times, choice)
        times = info.times[indices].tolist()

    def decode(notes: Notes | None) -> Iterator[np.ndarray]:
        end = time.monotonic() + options.max_seconds
        with reader.open(source, MAX_VIDEO_BYTES) as file:
            yield from video_file.decode(file, name, info, indices, _NEARBY, end, notes)

    return Video(name, info.width, info.height, times, decode)
