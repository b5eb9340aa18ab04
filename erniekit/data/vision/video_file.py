"""Decoding video files with PyAV (extra `video`): FFmpeg's decoders, BSD licence, one wheel for all Pythons."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from erniekit.data.records.errors import BadRecord, MissingPackage
from erniekit.data.records.fields import Notes
from erniekit.utils.wording import count_of

try:
    import av
    from av.sidedata.sidedata import Type as SideData
except ImportError as missing:
    raise MissingPackage(
        "reading video files needs PyAV. Hint: pip install 'erniekit[video]', or give videos as directories of frames."
    ) from missing

av.logging.set_level(None)  # damaged frames are reported by us, with the row's place


_LONGEST = 30 * 86400.0  # seconds of a video


@dataclass(frozen=True)
class VideoInfo:
    """What a video says of itself: its size in pixels as it is shown, its number of frames and frames a second.
    `quarter_turns`: by how many quarters of a turn to the left the stored frames are turned to be shown. `times`
    [count]: the seconds of its frames after the first one; None where frame i is shown at i / rate.
    """

    width: int
    height: int
    count: int
    rate: float
    quarter_turns: int = 0
    times: np.ndarray | None = None


def probe(file: BinaryIO, name: str, max_frames: int, max_seconds: float) -> VideoInfo:
    """Read the header of a video, and decode one frame, which alone says how it is turned. The packets are read,
    without decoding them, where the header has no number of frames, or more than are shown, or no steady rate.
    """
    end = time.monotonic() + max_seconds
    with _container(file, name) as (container, stream):
        width, height = _stored_size(stream, name)
        rate, count = float(stream.average_rate or stream.guessed_rate or 0), stream.frames
        if _hides_frames(container, stream, rate):
            count = 0
        if count > max_frames:
            raise _too_long(name, count, max_frames)
        header_suffices = count > 0 and rate > 0 and _header_is_steady(stream, rate)
        first = next(_frames(container, stream, name, end), None)
        turns = 0 if first is None else _quarter_turns(first)
        if turns % 2:
            width, height = height, width
    times = None
    if not header_suffices:
        shown = _shown_times(file, name, end)
        if len(shown) >= count:  # a file that breaks off has fewer: decoding will say so
            count = len(shown)
            rate, times = _own_times(rate, shown)
    if count > max_frames:
        raise _too_long(name, count, max_frames)
    if not rate:
        raise BadRecord(f"{name} does not say how many frames a second it has", "convert it, or extract its frames")
    return VideoInfo(width, height, count, rate, turns, times)


def _stored_size(stream: Any, name: str) -> tuple[int, int]:
    """Width and height of the frames as they are stored."""
    codec = stream.codec_context  # None: of a kind that FFmpeg does not know
    if not codec or not codec.width or not codec.height:
        raise BadRecord(f"{name} does not say the size of its frames", "does FFmpeg read it?")
    return codec.width, codec.height


def _hides_frames(container: Any, stream: Any, rate: float) -> bool:
    """Whether an MP4 or MOV file has more frames than are shown: it was cut without encoding it again. The header of
    other formats may be wrong about the duration, as where a file breaks off.
    """
    if not rate or not stream.duration or "mp4" not in container.format.name:
        return False
    return bool(stream.frames > stream.duration * float(stream.time_base) * rate + 1)


def _header_is_steady(stream: Any, rate: float) -> bool:
    """Whether the index in the header lists all frames, at equal distances."""
    index = getattr(stream, "index_entries", None)  # not in all versions of PyAV
    if index is None or not 0 < len(index) == stream.frames:
        return False
    return _is_steady(np.array([entry.timestamp for entry in index], np.float64) * float(stream.time_base), rate)


def _is_steady(times: np.ndarray, rate: float) -> bool:
    """Whether frame i is shown at i / rate seconds after the first one, to within half the distance of two frames: a
    container may round its times.
    """
    return bool((np.abs(times - times[0] - np.arange(len(times)) / rate) < 0.5 / rate).all())


def _own_times(rate: float, times: np.ndarray) -> tuple[float, np.ndarray | None]:
    """The frames a second, and the seconds of all frames where they do not follow from it. The header alone counts
    where a packet says no time, or the file is damaged: all at one time, or far from one another.
    """
    span = float(times[-1] - times[0])
    if not 0 < span < _LONGEST or (rate and _is_steady(times, rate)):
        return rate, None
    mean = (len(times) - 1) / span
    return mean, None if _is_steady(times, mean) else times - times[0]


def _shown_times(file: BinaryIO, name: str, end: float) -> np.ndarray:
    """The seconds [F] of the frames that are shown, in their order; not a number where a packet does not say it."""
    file.seek(0)
    times = []
    with _container(file, name) as (container, stream):
        for packet in container.demux(stream):
            if packet.size > 0 and not packet.is_discard:
                times.append(math.nan if packet.pts is None else packet.pts * float(packet.time_base))
            _check_time(end, name)
    if not times:
        raise BadRecord(f"{name} has no frames", "is the file complete?")
    return np.sort(np.array(times, np.float64))


def _too_long(name: str, count: int, max_frames: int) -> BadRecord:
    return BadRecord(f"{name} has {count:,} frames, at most {max_frames:,} are read", "divide the video")


def _quarter_turns(frame: Any) -> int:
    """The number of quarter turns to the left by which a frame is rotated for display, by its display matrix. Phones
    store what they film upright in this way, and the decoder of ERNIE's training code turns it, too.
    """
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return 0
    across, down = np.frombuffer(matrix, np.int32)[:2].tolist()
    return round(-math.atan2(down, across) / (math.pi / 2)) % 4


def decode(
    file: BinaryIO, name: str, info: VideoInfo, indices: list[int], nearby: int, end: float, notes: Notes | None
) -> Iterator[np.ndarray]:
    """The frames of rising `indices`, uint8 [height, width, 3]. For a frame that cannot be decoded the one before it
    is used, if it is at most `nearby` frames away.
    """
    wanted = list(reversed(indices))
    last: Any = None
    last_index = -1
    with _container(file, name) as (container, stream):
        for last_index, last in enumerate(_frames(container, stream, name, end)):
            while wanted and last_index == wanted[-1]:
                yield _pixels(last, info)
                wanted.pop()
            if not wanted:
                return
    while wanted:
        if last is None or wanted[-1] - last_index > nearby:
            raise BadRecord(
                f"{name} has a frame {wanted[-1]} by its header, but only {count_of(last_index + 1, 'frame')} can be "
                "decoded",
                "is the file complete?",
            )
        if notes is not None:
            notes.doubts.add("a video has fewer frames than its header says; the last one is used again")
        yield _pixels(last, info)
        wanted.pop()


def _pixels(frame: Any, info: VideoInfo) -> np.ndarray:
    width, height = (info.height, info.width) if info.quarter_turns % 2 else (info.width, info.height)
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
    return np.ascontiguousarray(np.rot90(pixels, info.quarter_turns)) if info.quarter_turns else pixels


def _frames(container: Any, stream: Any, name: str, end: float) -> Iterator[Any]:
    """The frames that can be decoded, in the order of showing them."""
    for packet in container.demux(stream):
        _check_time(end, name)
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            continue  # a damaged packet: frames nearby stand in for it


def _check_time(end: float, name: str) -> None:
    if time.monotonic() > end:
        raise BadRecord(
            f"decoding {name} takes too long", "shorten it, extract its frames, or raise video_decode_seconds"
        )


@contextmanager
def _container(file: BinaryIO, name: str) -> Iterator[tuple[Any, Any]]:
    try:
        with av.open(file, metadata_errors="ignore") as container:
            stream = container.streams.best("video")  # not the cover of an album
            if stream is None:
                raise BadRecord(f"{name} has no video", "is it the right file?")
            yield container, stream
    except av.error.FFmpegError as error:
        raise BadRecord(f"{name} cannot be decoded: {error.strerror or error}", "is the file complete?") from None
