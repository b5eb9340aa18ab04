"""ERNIEKit's format for pictures: text_info, image_info, video_info and order.

text_info holds texts with a tag: "mask" is a prompt, "no_mask" an answer. Neighbours with one tag are one message. A
picture stands before the text whose index it names (matched_text_index), or where `order` puts it, and always belongs
to a prompt.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import PurePath
from typing import Any

from PIL import Image

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes, check_fields, has_content
from erniekit.data.records.tool_calls import tool_calls_of
from erniekit.data.records.values import kind_of, list_of, text_of
from erniekit.data.vision.parts import merged, options_inside, options_of
from erniekit.utils.wording import count_of

_TAGS = ("mask", "no_mask")
_NOT_SHOWN = ("subtitles", "asr")
_KINDS = {"text": "text_info", "image": "image_info", "video": "video_info"}
_OF_TEXTS = ("text", "tag", "tool_calls", "tool_response")
_OF_MEDIA = (
    *("image_url", "matched_text_index", "is_valid", "is_video", "time_stamp", *_NOT_SHOWN),
    *("image_width", "image_height"),  # the file itself says them
)
_IN_THE_TEXT = "write the thought into the text, between <think> and </think>"
_IN_THE_RECORD = "media stand in the record's image_info and video_info: move it there, or remove it"
# fields of an item of text_info by which some format or tool decides what is trained -> what to do about them
_DECISIVE_IN_TEXTS = {
    **dict.fromkeys(
        ("label", "loss", "loss_mask", "loss_weight", "weight", "train"),
        "use type messages, whose records have a 'label', a 0 or 1 for each answer, or remove it",
    ),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thought"), _IN_THE_TEXT),
    **dict.fromkeys(("image", "images", "image_url", "image_info", "video", "videos", "video_info"), _IN_THE_RECORD),
    "function_call": "call it 'tool_calls', a list",
}
_DECISIVE_IN_MEDIA = {"extracted_frame_indices": "give the frames as a list with time_stamp, or remove it"}

Part = dict[str, Any]


def read_erniekit(record: dict[str, Any], notes: Notes) -> list[dict[str, Any]]:
    """The messages of a record. BadRecord names the item and the rule that it breaks."""
    texts = [_text_item(item, f"text_info[{i}]", notes) for i, item in enumerate(list_of(record, "text_info"))]
    media = {kind: _media_items(record, kind, notes) for kind in ("image", "video")}
    system: list[dict[str, Any]] = []
    first = 0
    if _flag(record, "is_system"):
        system, first = _system(texts), 2
    before = _by_order(record, texts, media) if has_content(record.get("order")) else _by_index(texts, media)
    for i, items in enumerate(before):
        if items and i < first:
            raise BadRecord("a picture stands before the system text", "let it stand before the first prompt")
        if items and texts[i]["tag"] != "mask":
            raise BadRecord(
                f"a picture stands before text_info[{i}], which is an answer (no_mask)",
                "media stand only before prompts (mask): check matched_text_index or order",
            )
    if texts[first]["tag"] != "mask":
        raise BadRecord(f"text_info[{first}] is an answer (no_mask)", "the first text must be a prompt (mask)")
    return system + _messages(texts[first:], before[first:], first, notes)


def _text_item(item: Any, name: str, notes: Notes) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise BadRecord(f"{name} must be an object, not {kind_of(item)}", 'write {"text": ..., "tag": "mask"}')
    check_fields(item, _OF_TEXTS, _KINDS["text"], _DECISIVE_IN_TEXTS, notes)
    if item.get("tag") not in _TAGS:
        raise BadRecord(f"{name} has the tag {item.get('tag')!r}", 'a prompt has "mask", an answer "no_mask"')
    if has_content(item.get("tool_calls")) and item["tag"] != "no_mask":
        raise BadRecord(f"{name} has tool_calls and is a prompt", "only answers (no_mask) call functions")
    if item.get("tool_response") and item["tag"] != "mask":
        raise BadRecord(f"{name} is a tool_response and an answer", "results of tools are prompts (mask)")
    return {**item, "text": text_of(item.get("text", ""), f"{name}.text", empty_ok=True)}


def _flag(record: dict[str, Any], name: str) -> bool:
    value = record.get(name)
    if value not in (None, 0, 1):
        raise BadRecord(f"{name!r} must be 0 or 1", "1 means that text_info[0] is the system text")
    return bool(value)


def _system(texts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The system text, which is followed by an answer that only keeps the tags alternating."""
    if len(texts) < 3 or texts[0]["tag"] != "mask" or texts[1]["tag"] != "no_mask":
        raise BadRecord(
            "'is_system' is 1, but text_info does not begin with the system text (mask), an answer to be ignored "
            "(no_mask) and a prompt",
            "add the ignored answer, or set is_system to 0",
        )
    return [{"role": "system", "content": text_of(texts[0]["text"], "text_info[0].text")}]


def _media_items(record: dict[str, Any], kind: str, notes: Notes) -> list[dict[str, Any]]:
    name = _KINDS[kind]
    value = record.get(name)
    if not has_content(value):
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadRecord(f"{name!r} must be a list of objects", 'write [{"image_url": ..., "matched_text_index": 0}]')
    for i, item in enumerate(value):
        check_fields(item, (*_OF_MEDIA, *options_of(kind)), name, _DECISIVE_IN_MEDIA, notes)
        if item.get("image_url") is None:
            raise BadRecord(f"{name}[{i}] has no image_url", "the source has this name in video_info too")
        if item.get("is_valid") is False:
            raise BadRecord(f"{name}[{i}] says is_valid: false", "remove the record, or the mark if it can be used")
        if any(has_content(item.get(field)) for field in _NOT_SHOWN):
            notes.doubts.add("subtitles of a video are not shown to the model")
    return value


def _by_index(texts: Sequence[Any], media: dict[str, list[dict[str, Any]]]) -> list[list[Part]]:
    """The media before each text, from matched_text_index."""
    found: list[list[tuple[str, dict[str, Any]]]] = [[] for _ in texts]
    for kind, items in media.items():
        for i, item in enumerate(items):
            index = item.get("matched_text_index", 0)
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(texts):
                raise BadRecord(
                    f"{_KINDS[kind]}[{i}] has the matched_text_index {index!r}, but text_info has "
                    f"{count_of(len(texts), 'item')}",
                    "it is the index of the text that the picture stands before, counted from 0",
                )
            found[index].append((kind, item))
    for index, placed in enumerate(found):
        if len({kind for kind, _ in placed}) > 1:
            raise BadRecord(
                f"pictures and videos stand before text_info[{index}] and nothing says in which order", "give 'order'"
            )
    return [_grouped(placed) for placed in found]


def _by_order(record: dict[str, Any], texts: Sequence[Any], media: dict[str, list[dict[str, Any]]]) -> list[list[Part]]:
    """The media before each text, from `order`: {"type": ["image", "text", ...], "index": [0, 0, ...]}."""
    kinds, indices = _checked_order(
        record["order"], {"text": len(texts), **{kind: len(items) for kind, items in media.items()}}
    )
    before: list[list[Part]] = []
    waiting: list[tuple[str, dict[str, Any]]] = []
    for kind, index in zip(kinds, indices, strict=True):
        if kind == "text":
            before.append(_grouped(waiting))
            waiting = []
        else:
            waiting.append((kind, media[kind][index]))
    if waiting:
        raise BadRecord("'order' ends with a picture", "media stand before the prompt that they belong to")
    return before


def _checked_order(order: Any, counts: dict[str, int]) -> tuple[list[str], list[int]]:
    """The types and indices of `order`, which names each of the items that there are once, the texts in their order."""
    kinds, indices = (order.get(key) if isinstance(order, dict) else None for key in ("type", "index"))
    if not isinstance(kinds, list) or not isinstance(indices, list) or len(kinds) != len(indices):
        raise BadRecord(
            "'order' must have two lists of one length", 'write {"type": ["image", ...], "index": [0, ...]}'
        )
    for kind in kinds:
        if not isinstance(kind, str) or kind not in counts:
            raise BadRecord(f"'order' has the type {kind!r}", "the types are text, image and video")
    for kind, count in counts.items():
        _check_indices([index for k, index in zip(kinds, indices, strict=True) if k == kind], kind, count)
    return kinds, indices


def _check_indices(given: list[Any], kind: str, count: int) -> None:
    """Each of `count` items of one kind is named once, and texts are in their order."""
    if not all(type(index) is int for index in given) or sorted(given) != list(range(count)):
        raise BadRecord(f"'order' names the items {given} of {_KINDS[kind]}, which has {count}", "name each once")
    if kind == "text" and given != sorted(given):
        raise BadRecord(f"'order' puts the texts into the order {given}", "leave them in theirs")


def _grouped(items: Sequence[tuple[str, dict[str, Any]]]) -> list[Part]:
    """Media items as parts; neighbouring pictures that are frames are one video."""
    parts: list[Part] = []
    for is_frames, group in groupby(items, key=lambda item: _is_frame(*item)):
        if is_frames:
            parts.append(_frames([item for _, item in group]))
            continue
        for kind, item in group:
            part: Part = {"type": kind, kind: item["image_url"], **options_inside(kind, item)}
            if kind == "video" and item.get("time_stamp") is not None:
                part["time_stamps"] = item["time_stamp"]
            parts.append(part)
    return parts


def _is_frame(kind: str, item: dict[str, Any]) -> bool:
    """Whether an item is a frame of a video, not a whole medium."""
    if kind == "image":
        return bool(item.get("is_video"))
    source = item["image_url"]
    suffix = PurePath(source).suffix.lower() if isinstance(source, str) else ""
    return Image.registered_extensions().get(suffix) not in (None, "GIF", "MPEG")


def _frames(items: Sequence[dict[str, Any]]) -> Part:
    part: Part = {
        "type": "video",
        "video": [item["image_url"] for item in items],
        **options_inside("video", items[0]),
    }
    times = [item.get("time_stamp") for item in items]
    if any(time is not None for time in times):
        part["time_stamps"] = times
    return part


def _messages(
    texts: Sequence[dict[str, Any]], before: Sequence[list[Part]], first: int, notes: Notes
) -> list[dict[str, Any]]:
    """The messages of texts, of which neighbours with one tag are one message."""

    def role(pair: tuple[int, dict[str, Any]]) -> str:
        item = pair[1]
        return "assistant" if item["tag"] == "no_mask" else "tool" if item.get("tool_response") else "user"

    messages = []
    for who, group in groupby(enumerate(texts), key=role):
        items = list(group)
        name = f"text_info[{items[0][0] + first}]"
        parts = [part for i, item in items for part in (*before[i], {"type": "text", "text": item["text"]})]
        content = merged(_stripped(parts))
        calls = [call for _, item in items for call in _calls(item, name, notes)]
        if not content and not calls and who != "tool":
            raise BadRecord(f"{name} is empty", "give it text, or remove it")
        messages.append({"role": who, "content": content} | ({"tool_calls": calls} if calls else {}))
    return messages


def _calls(item: dict[str, Any], name: str, notes: Notes) -> list[dict[str, Any]]:
    calls = item.get("tool_calls")
    return tool_calls_of(calls, name, notes) if has_content(calls) else []


def _stripped(parts: Sequence[Part]) -> list[Part]:
    """Parts without white space around their texts, as ERNIEKit reads them."""
    return [{**part, "text": part["text"].strip()} if part["type"] == "text" else part for part in parts]
