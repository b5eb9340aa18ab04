"""Content of messages as parts: {"type": "text", "text"}, {"type": "image", "image": source} and {"type": "video",
"video": source}, from the forms in which OpenAI's API, transformers and data sets write them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import has_content
from erniekit.data.records.values import kind_of, text_of
from erniekit.data.vision.media import SOURCES

# type of a part -> what it is, and the keys that may name its source
_KINDS = {
    "image": ("image", ("image", "image_url", "url", "path", "bytes")),
    "image_url": ("image", ("image_url", "url")),
    "input_image": ("image", ("image_url",)),
    "video": ("video", ("video", "video_url", "url", "path", "bytes", "frames")),
    "video_url": ("video", ("video_url", "url")),
}
_TEXT = ("text", "input_text", "output_text")
_OPTIONS = {
    "image": ("min_pixels", "max_pixels"),
    "video": (
        "min_pixels",
        "max_pixels",
        "fps",
        "time_stamps",
        "video_fps",
        "min_frames",
        "max_frames",
        "target_frames",
    ),
}
_HARMLESS = ("detail", "width", "height", "id", "format", "cache_control")


def options_of(what: str) -> tuple[str, ...]:
    """The fields that a picture or video, "image" or "video", may have beside its source."""
    return _OPTIONS[what]


def options_inside(what: str, source: Any) -> dict[str, Any]:
    """The options of a picture or video, "image" or "video", that stand in the object that names its source."""
    if not isinstance(source, Mapping):
        return {}
    return {key: source[key] for key in _OPTIONS[what] if source.get(key) is not None}


def unknown_inside(what: str, source: Any) -> list[str]:
    """The other fields of such an object that are not read, in order."""
    if not isinstance(source, Mapping):
        return []
    known = (*SOURCES, *_OPTIONS[what], "type", *_HARMLESS)
    return [key for key, value in source.items() if key not in known and has_content(value)]


def content_parts(content: Sequence[Any], name: str) -> list[dict[str, Any]]:
    """The parts of a content list. The source of a media part may be None: the record names it elsewhere."""
    return [_part(part, f"{name}[{i}]") for i, part in enumerate(content)]


def _part(part: Any, name: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": text_of(part, name, empty_ok=True)}
    kind = _type_of(part)
    if kind in _TEXT:
        return {"type": "text", "text": text_of(part.get("text"), f"{name}.text", empty_ok=True)}
    if not isinstance(kind, str) or kind not in _KINDS:
        what = f"a part of type {kind!r}" if isinstance(part, dict) else kind_of(part)
        raise BadRecord(f"{name} is {what}", "the parts are text, image (or image_url) and video (or video_url)")
    return _medium(part, name, *_KINDS[kind])


def _type_of(part: Any) -> Any:
    """The type of a part; in Qwen's form, {"image": ...} or {"text": ...}, its only key is the type."""
    if not isinstance(part, dict) or part.get("type") is not None:
        return part["type"] if isinstance(part, dict) else None
    return next((kind for kind in ("text", "image", "video") if kind in part), None)


def _medium(part: dict[str, Any], name: str, what: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """A picture or video, whose source one of `keys` names."""
    given = [key for key in keys if part.get(key) is not None]
    if len(given) > 1:
        raise BadRecord(f"{name} names {len(given)} sources ({', '.join(given)})", "keep one")
    options = {key: value for key, value in part.items() if key in _OPTIONS[what]}
    known = (*keys, *options, "type", *_HARMLESS)
    unknown = next((key for key, value in part.items() if key not in known and has_content(value)), None)
    if unknown is not None:
        known_options = ", ".join(_OPTIONS[what])
        raise BadRecord(f"{name} has the unknown field {unknown!r}", f"the options of a part are {known_options}")
    source = part[given[0]] if given else None
    return {"type": what, what: source, **options_inside(what, source), **options}


def media_of(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The pictures and videos of messages, in order."""
    for message in messages:
        if isinstance(message["content"], list):
            yield from (part for part in message["content"] if part["type"] != "text")


def text_in(content: Any) -> str:
    """The text of a content: all its text parts joined."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part["type"] == "text")
    return content or ""


def merged(parts: Sequence[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Parts as the content of a message: neighbouring texts joined, empty ones left out, plain text where there is
    nothing else.
    """
    result: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] != "text":
            result.append(part)
        elif result and result[-1]["type"] == "text":
            result[-1] = {"type": "text", "text": result[-1]["text"] + part["text"]}
        elif part["text"]:
            result.append(part)
    return result if any(part["type"] != "text" for part in result) else text_in(result)
