"""Videos in requests: data URIs of MP4, QuickTime, WebM, Matroska or AVI, decoded while the request is read.

Only files that begin as these formats do are given to FFmpeg: its readers of playlists would open other files and
addresses.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from erniekit.data.records.errors import BadRecord, MissingPackage
from erniekit.data.records.fields import Notes
from erniekit.data.vision.media import base64_content
from erniekit.data.vision.plan import MediaPlan
from erniekit.data.vision.video import VideoOptions
from erniekit.serve.server_errors import ApiError
from erniekit.serve.server_fields import type_name
from erniekit.utils.wording import count_of

MAX_FRAME_PIXELS = 50_000_000
MAX_DECODE_SECONDS = 60.0  # for one video: a request is read by a thread that others wait for
_KINDS = tuple(f"data:video/{name}" for name in ("mp4", "quicktime", "webm", "x-matroska", "x-msvideo", "avi"))
_FORMATS = "MP4, QuickTime, WebM, Matroska or AVI"


@dataclass(frozen=True)
class _Decoded(MediaPlan):
    """A video whose patches are decoded already, so that nothing can fail once the answer has begun."""

    decoded: np.ndarray = None  # type: ignore[assignment]

    def patches(self, notes: Notes | None = None) -> np.ndarray:
        return self.decoded


def video_content(part: dict[str, Any], name: str) -> bytes:
    """The bytes of a part {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,..."}}. Raises ApiError
    that says what is wrong with it.
    """
    name = f"{name}.video_url"
    video = part.get("video_url")
    url = video.get("url") if isinstance(video, dict) else video
    if not isinstance(url, str):
        raise _wrong(name, f'expected {{"url": "data:video/mp4;base64,..."}}, got {type_name(url)}')
    content = uri_content(url, _KINDS, "videos", _FORMATS, name)
    is_known = content[4:8] == b"ftyp" or content[:4] == b"\x1aE\xdf\xa3"
    if not is_known and not (content[:4] == b"RIFF" and content[8:12] == b"AVI "):
        raise _wrong(name, f"the data URI holds no {_FORMATS}")
    return content


def uri_content(url: str, kinds: Sequence[str], what: str, formats: str, name: str) -> bytes:
    """The bytes of a data URI in base64 (RFC 2397) whose media type is one of `kinds`; its parameters change nothing.
    Raises ApiError for anything else.
    """
    head, comma, data = url.partition(",")
    kind, *parameters = (word.strip() for word in head.lower().split(";"))
    if kind not in kinds or parameters[-1:] != ["base64"] or not comma:
        raise _wrong(
            name,
            f"{what} are taken as data URIs of {formats} in base64 alone; the server opens no addresses and no files. "
            f"Got {head[:60]!r}",
        )
    try:
        return base64_content(data)
    except ValueError:
        raise _wrong(name, "the data URI is not valid base64") from None


def video_options(options: VideoOptions) -> VideoOptions:
    """The options of the configuration, with the time that a request may take."""
    return replace(options, max_seconds=min(options.max_seconds, MAX_DECODE_SECONDS))


def decoded(plans: Sequence[MediaPlan], places: Sequence[str], context: int, notes: Notes) -> list[MediaPlan]:
    """The plans, of which those of videos are decoded. `places`: the fields that they came from. Raises ApiError for a
    video that cannot be, whose frames are too large, or that has more tokens than the context.
    """
    result: list[MediaPlan] = []
    for plan, place in zip(plans, places, strict=True):
        if plan.frames is None:
            result.append(plan)
            continue
        if plan.width * plan.height > MAX_FRAME_PIXELS:
            raise _wrong(place, f"a video has frames of {plan.width} x {plan.height} pixels, which is too large")
        if plan.geometry.tokens >= context:
            raise _wrong(
                place,
                f"a video of {count_of(plan.frames, 'frame')} has {count_of(plan.geometry.tokens, 'token')}, and the "
                f"context is {context}; a shorter video, or video_max_frames and video_max_pixels in the server's "
                "YAML, makes fewer",
            )
        with placed(place):
            result.append(_Decoded(**vars(plan), decoded=plan.patches(notes)))
    return result


@contextmanager
def placed(place: str) -> Iterator[None]:
    """A context in which errors about the picture or video of the field `place` become ApiErrors."""
    try:
        yield
    except BadRecord as error:
        raise _wrong(place, error.reason) from None
    except MissingPackage:
        message = "messages: this server reads no videos: PyAV is not installed (pip install 'erniekit[video]')."
        raise ApiError(501, message, "messages", "videos_not_supported") from None


def _wrong(name: str, what: str) -> ApiError:
    return ApiError(400, f"{name}: {what}.", name, "invalid_value")
