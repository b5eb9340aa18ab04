"""Tags in the text of messages (<image>, <video>, and ms-swift's <bbox> and <ref-object>) and what they stand for."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes, check_fields, has_content
from erniekit.data.records.values import json_of, kind_of, list_of
from erniekit.data.vision.boxes import relative_box
from erniekit.data.vision.images import IMAGE_OPTIONS, ImageOptions, image_size
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.parts import merged, options_inside, unknown_inside
from erniekit.utils.wording import count_of

MEDIA = ("images", "image", "videos", "video")  # fields of a record, see RecordMedia
_TAG = re.compile(r"<(image|video|audio)>")
_OBJECT_TAG = re.compile(r"<(bbox|ref-object)>")
_OF_OBJECTS = ("ref", "bbox", "bbox_type", "image_id")
_BOX_TYPES = {"real": "pixels", "norm1": "fraction", "norm1000": "relative"}


@dataclass(frozen=True)
class FormatOptions:
    """How records are read. `boxes`: what the numbers of boxes in answers are (see boxes.py).
    `missing_tags`: what to do with pictures of a record whose text has no tag at all, "error" or "front" (put the tags
    in front of the first question).
    """

    reader: MediaReader
    boxes: str = "relative"
    missing_tags: str = "error"
    images: ImageOptions = IMAGE_OPTIONS


@dataclass(frozen=True)
class RecordMedia:
    """The media that a record lists beside its messages, and ms-swift's `objects`."""

    images: list[Any]
    videos: list[Any]
    objects: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, record: dict[str, Any], notes: Notes) -> "RecordMedia":
        """The fields images (or image), videos (or video) and objects of a record. A single source is a list of one."""
        objects = json_of(record.get("objects"), "'objects'", notes) or {}
        if not isinstance(objects, dict):
            raise BadRecord(
                f"'objects' must be an object, not {kind_of(objects)}", 'write {"bbox": [...], "ref": [...]}'
            )
        check_fields(objects, _OF_OBJECTS, "'objects'", {}, notes)
        return cls(_listed(record, "images", "image", notes), _listed(record, "videos", "video", notes), objects)


def _listed(record: dict[str, Any], name: str, single: str, notes: Notes) -> list[Any]:
    given = [key for key in (name, single) if has_content(record.get(key))]
    if len(given) > 1:
        raise BadRecord(f"the record has both {name!r} and {single!r}", "keep one of them")
    if not given:
        return []
    value = record[given[0]]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = json_of(value, repr(given[0]), notes)
    return value if isinstance(value, list) else [value]


def fill_tags(
    turns: Sequence[dict[str, Any]], media: RecordMedia, options: FormatOptions, notes: Notes
) -> list[dict[str, Any]]:
    """Messages in which tags and parts without a source are the record's media, in order. BadRecord, with both numbers,
    where there are more or fewer tags than media.

    Tags in answers are text: the model writes no pictures.
    """
    given = {"image": media.images, "video": media.videos}
    result = [_with_places(turn) for turn in turns]
    for kind, sources in given.items():
        places = sum(1 for _ in _places(result, kind))
        if not places and sources and options.missing_tags == "front":
            _put_in_front(result, kind, len(sources))
            notes.doubts.add(f"no <{kind}> tag in the text: the tags are put in front of the first question")
            places = len(sources)
        if places != len(sources):
            hint = f"write <{kind}> once for each, where it belongs"
            if not places:
                hint += ", or set missing_media_tags: front"
            raise BadRecord(f"{count_of(places, f'<{kind}> tag')} for {count_of(len(sources), kind)}", hint)
        for part, source in zip(list(_places(result, kind)), sources, strict=True):
            _fill_part(part, kind, source, notes)
    pictures = [part["image"] for turn in result for part in _parts(turn) if part["type"] == "image"]
    _fill_objects(result, media.objects, pictures, options, notes)
    return [
        {**turn, "content": merged(turn["content"])} if isinstance(turn["content"], list) else turn for turn in result
    ]


def _fill_part(part: dict[str, Any], kind: str, source: Any, notes: Notes) -> None:
    """Give a part its source, and the options that stand beside it."""
    part.update({kind: source, **options_inside(kind, source)})
    notes.unused.update(f"{name!r} of {kind}s" for name in unknown_inside(kind, source))


def _with_places(turn: dict[str, Any]) -> dict[str, Any]:
    """A message whose tags are parts without a source."""
    if turn["role"] == "assistant":
        return turn
    content = turn["content"]
    whole = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts: list[dict[str, Any]] = []
    for part in whole:
        if part["type"] != "text":
            parts.append(dict(part))
            continue
        pieces = _TAG.split(part["text"])
        for i, piece in enumerate(pieces):
            if i % 2 == 0:
                parts.append({"type": "text", "text": piece})
            elif piece == "audio":
                raise BadRecord("the text has an <audio> tag", "sound is not known: remove it, or the record")
            else:
                parts.append({"type": piece, piece: None})
    return {**turn, "content": parts}


def _parts(turn: dict[str, Any]) -> list[dict[str, Any]]:
    return turn["content"] if isinstance(turn["content"], list) else []


def _places(turns: Sequence[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    """The media parts without a source."""
    for turn in turns:
        yield from (part for part in _parts(turn) if part["type"] == kind and part[kind] is None)


def _put_in_front(turns: list[dict[str, Any]], kind: str, count: int) -> None:
    first = next(turn for turn in turns if turn["role"] == "user")
    first["content"] = [{"type": kind, kind: None} for _ in range(count)] + first["content"]


def _fill_objects(
    turns: list[dict[str, Any]], objects: dict[str, Any], pictures: list[Any], options: FormatOptions, notes: Notes
) -> None:
    """Replace <bbox> by boxes in ERNIE's convention and <ref-object> by names, in the order of all messages."""
    if not objects:
        return
    boxes = _boxes(objects, pictures, options, notes)
    names = list_of(objects, "ref") if has_content(objects.get("ref")) else []
    stock = {"bbox": iter(boxes), "ref-object": iter(names)}
    used = {"bbox": 0, "ref-object": 0}

    def fill(match: re.Match[str]) -> str:
        used[match[1]] += 1
        value = next(stock[match[1]], None)
        return "" if value is None else str(value)

    for turn in turns:
        if isinstance(turn["content"], str):
            turn["content"] = _OBJECT_TAG.sub(fill, turn["content"])
        for part in _parts(turn):
            if part["type"] == "text":
                part["text"] = _OBJECT_TAG.sub(fill, part["text"])
    for tag, values in (("bbox", boxes), ("ref-object", names)):
        if used[tag] != len(values):
            raise BadRecord(
                f"{count_of(used[tag], f'<{tag}> tag')} for {count_of(len(values), 'entry', 'entries')} of objects",
                f"write <{tag}> once for each",
            )


def _boxes(
    objects: dict[str, Any], pictures: list[Any], options: FormatOptions, notes: Notes
) -> list[list[int | float]]:
    """The boxes of `objects` in the relative convention."""
    given = list_of(objects, "bbox") if has_content(objects.get("bbox")) else []
    kind = objects.get("bbox_type") or "real"
    if not isinstance(kind, str) or kind not in _BOX_TYPES:
        raise BadRecord(f"bbox_type is {kind!r}", f"the types are {', '.join(_BOX_TYPES)}")
    convention = _BOX_TYPES[kind]
    which = _pictures_of_boxes(objects, len(given), len(pictures), convention)
    result = []
    for i, (box, index) in enumerate(zip(given, which, strict=True)):
        if not isinstance(box, list) or len(box) not in (2, 4):
            raise BadRecord(f"objects.bbox[{i}] must be [x, y] or [x1, y1, x2, y2]", "see the row")

        def size(index: int = index) -> tuple[int, int]:
            return image_size(pictures[index], options.reader, options.images)

        result.append(relative_box(box, convention, size, f"objects.bbox[{i}]"))
        if convention != "fraction" and max(box) <= 1 and any(value % 1 for value in box):
            notes.doubts.add("boxes of objects look like fractions of the picture: set their bbox_type to norm1")
    return result


def _pictures_of_boxes(objects: dict[str, Any], count: int, num_pictures: int, convention: str) -> list[int]:
    """The number of the picture that each box is in; only boxes in pixels need it."""
    which = objects.get("image_id")
    if which is None:
        if convention == "pixels" and count and num_pictures != 1:
            raise BadRecord(f"boxes in pixels and {num_pictures} pictures", "say with image_id which one each is in")
        return [0] * count
    if not isinstance(which, list) or len(which) != count:
        raise BadRecord(f"image_id must have a number for each of {count_of(count, 'box', 'boxes')}", "or leave it out")
    for i, index in enumerate(which):
        if not isinstance(index, int) or not 0 <= index < num_pictures:
            raise BadRecord(
                f"image_id[{i}] is {index!r} and the record has {count_of(num_pictures, 'picture')}", "count from 0"
            )
    return which
