"""Decoding video files with PyAV (extra `video`): FFmpeg's decoders, BSD licence, one wheel for all Pythons."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from erniekit.data.records.errors import BadRecord, MissingPackage
from erniekit.data.records.fields import Notes

try:
    import av
except ImportError as missing:
    raise MissingPackage(
        "reading video files needs PyAV. Hint: pip install 'erniekit[video]', or give videos as directories of frames."
    ) from missing

av.logging.set_level(None)  # damaged frames are reported by us, with the row's place


@dataclass(frozen=True)
class VideoInfo:
    """What the header of a video says: its size in pixels, its number of frames and frames a second."""

    width: int
    height: int
    count: int
    rate: float


def probe(file: BinaryIO, name: str, max_frames: int, max_seconds: float) -> VideoInfo:
    """Read the header of a video. Where it has no number of frames, the packets are counted without decoding them."""
    with _container(file, name) as (container, stream):
        count = stream.frames
        if count <= 0:
            end, count = time.monotonic() + max_seconds, 0
            for packet in container.demux(stream):
                count += packet.size > 0
                _check_time(end, name)
        if count <= 0:
            raise BadRecord(f"{name} has no frames", "is the file complete?")
        if count > max_frames:
            raise BadRecord(f"{name} has {count:,} frames, at most {max_frames:,} are read", "divide the video")
        width, height = stream.codec_context.width, stream.codec_context.height
        if not width or not height:
            raise BadRecord(f"{name} does not say the size of its frames", "is the file complete?")
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise BadRecord(f"{name} does not say how many frames a second it has", "convert it, or extract its frames")
        return VideoInfo(width, height, count, float(rate))


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
                f"{name} has a frame {wanted[-1]} by its header, but only {last_index + 1} frames can be decoded",
                "is the file complete?",
            )
        if notes is not None:
            notes.doubts.add("a video has fewer frames than its header says; the last one is used again")
        yield _pixels(last, info)
        wanted.pop()


def _pixels(frame: Any, info: VideoInfo) -> np.ndarray:
    return frame.to_ndarray(format="rgb24", width=info.width, height=info.height)


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
            if not container.streams.video:
                raise BadRecord(f"{name} has no video", "is it the right file?")
            yield container, container.streams.video[0]
    except av.error.FFmpegError as error:
        raise BadRecord(f"{name} cannot be decoded: {error.strerror or error}", "is the file complete?") from None
