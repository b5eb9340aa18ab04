"""Pictures and videos that a user types into a conversation: `<image>path</image>` in a question, or a line
`/image path` before it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes
from erniekit.data.vision.encode import VisionSpec
from erniekit.data.vision.images import load_image
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.parts import merged
from erniekit.data.vision.plan import plan_media
from erniekit.tools.image_tools import picture_part
from erniekit.utils.errors import UserError
from erniekit.utils.wording import count_of

COMMANDS = {"/image": "image", "/video": "video"}
_TAG = re.compile(r"<(image|img|video)>(.*?)</\1>")
_KINDS = {"image": "image", "img": "image", "video": "video"}


@dataclass(frozen=True)
class Medium:
    """A picture or video of a conversation: its content part, and what it is in a few words. A picture's part has its
    pixels, so that the file may change afterwards; a video is read again when it is needed.
    """

    part: dict[str, Any]
    description: str


def command_of(line: str) -> tuple[str, str] | None:
    """("image" or "video", path) of a line that begins with such a command; None for another line."""
    word, _, path = line.strip().partition(" ")
    return (COMMANDS[word], path.strip()) if word in COMMANDS else None


def has_media(line: str) -> bool:
    """Whether a question names pictures or videos by tags."""
    return _TAG.search(line) is not None


def content_of(line: str, before: list[Medium], spec: VisionSpec, notes: Notes) -> tuple[Any, list[Medium]]:
    """The content of a question, and the pictures and videos in it, in order. `before`: those that stand before its
    text. UserError names the one that cannot be read.
    """
    media, parts, at = list(before), [medium.part for medium in before], 0
    for match in _TAG.finditer(line):
        media.append(open_medium(_KINDS[match[1]], match[2].strip(), spec, notes))
        parts += [{"type": "text", "text": line[at : match.start()]}, media[-1].part]
        at = match.end()
    return merged([*parts, {"type": "text", "text": line[at:]}]), media


def open_medium(kind: str, path: str, spec: VisionSpec, notes: Notes) -> Medium:
    """A picture or video by its path, which is relative to the current directory. It is decoded here, so that a broken
    file is refused before anything is asked.
    """
    name = path if len(path) <= 80 else f"{path[:40]}..."
    if not path:
        raise UserError(f"{kind}: there is no path. Write <{kind}>path</{kind}>, or a line /{kind} path.")
    reader = MediaReader(Path.cwd(), spec.allow_urls)
    try:
        part: dict[str, Any] = {"type": kind, kind: path}
        if kind == "image":
            part = picture_part(load_image(path, reader, spec.images, notes))
        (plan,) = plan_media([part], reader, spec.settings, spec.video, notes)
        if kind == "video":
            plan.patches(notes)
    except BadRecord as error:
        where = f" (paths are relative to {reader.directory})" if "there is no file" in error.reason else ""
        raise UserError(f"{name}: {error.reason}{where}") from None
    frames = "" if plan.frames is None else f"{count_of(plan.frames, 'frame')} of "
    size = f"{frames}{plan.width} x {plan.height} pixels"
    return Medium(part, f"{name}, {size}, {count_of(plan.geometry.tokens, 'token')}")
