"""Records with pictures and videos -> samples whose messages have content parts. Pure functions but for the sizes of
pictures, which boxes in pixels need.

Types: `erniekit` (text_info, image_info, video_info), `messages` (also `chatml`), `sharegpt` and `alpaca` with `images`
and `videos` and the tags <image> and <video>, OpenAI's content lists, and ms-swift's `objects` and agent roles. A
record without pictures is a sample of text.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from erniekit.data.records.errors import BadRecord, reading
from erniekit.data.records.fields import DECISIVE, Notes, check_fields, has_content
from erniekit.data.records.formats import ALIASES, VISION_TYPE, with_content
from erniekit.data.records.formats import FORMATS as TEXT_FORMATS
from erniekit.data.records.prompt_formats import CLOSERS, PROMPT_NAMES, RL_SUFFIX, read_prompt
from erniekit.data.records.sample import Sample, alpaca_prompt, check_order, label_of, sharegpt_keys, system_messages
from erniekit.data.records.tool_calls import match_calls, tools_of
from erniekit.data.records.values import kind_of, list_of, text_of
from erniekit.data.vision.boxes import convert_arguments, convert_text, doubt_about
from erniekit.data.vision.erniekit_format import read_erniekit
from erniekit.data.vision.images import image_size
from erniekit.data.vision.tags import MEDIA, FormatOptions, RecordMedia, fill_tags
from erniekit.data.vision.text_and_pairs import READERS
from erniekit.data.vision.turns import read_turn
from erniekit.utils.wording import count_of

_MEDIA = (*MEDIA, "objects")
_ALL_MEDIA = ("image_info", "video_info", *_MEDIA)
_SIGNATURES = {  # field -> the type that a record with it probably is
    "text_info": "erniekit",
    "messages": "messages",
    "conversations": "sharegpt",
    "instruction": "alpaca",
    "src": "erniekit",
    "text": "text",
}
_LABELS = "use type messages or sharegpt, which have a 0 or 1 for each answer, or remove it"
_READ = Callable[[dict[str, Any], FormatOptions, Notes], Sample]


class _Shown(NamedTuple):
    """A picture of a record, and whether it is the result of a tool."""

    source: Any
    by_tool: bool


def parse_vision_record(
    record: Any, type_name: str, where: str, options: FormatOptions, notes: Notes | None = None
) -> Sample:
    """Check a record and turn it into a Sample; the content of a message is text or a list of parts (see
    `parts`).

    `type_name` is a key of FORMATS or an alias, also with VISION_TYPE behind it; `where` ("file:line") opens the
    message of the DataError that a wrong record raises. To `notes` is added what was skipped or doubtful.
    """
    notes = Notes() if notes is None else notes
    with reading(where):
        if not isinstance(record, dict):
            raise BadRecord(f"a record must be an object with named fields, not {kind_of(record)}", "write an object")
        name = ALIASES.get(type_name, type_name).removesuffix(VISION_TYPE)
        _check_type(record, name)
        is_text = name == "erniekit" and "src" in record and "text_info" not in record
        read, fields = _ERNIEKIT_TEXT if is_text else FORMATS[name]
        media = "image_info and video_info, beside text_info" if name == "erniekit" else "images and videos"
        decisive = DECISIVE | dict.fromkeys(_ALL_MEDIA, f"type {name} has {media}") | {"label": _LABELS}
        if not name.endswith(RL_SUFFIX):  # prompts keep other fields, and check them themselves
            check_fields(record, fields, f"type {name}", decisive, notes)
        sample = read(record, options, notes)
        if sample.kind == "text":
            return sample
        if has_content(record.get("objects")) and "bbox" in record["objects"]:  # an object, or its text
            options = replace(options, boxes="relative")  # what they have put into the answers is so
        return _with_relative_boxes(sample, options, notes)


def _check_type(record: dict[str, Any], name: str) -> None:
    """Raise BadRecord if the fields of the record are those of other types only."""
    signatures = _SIGNATURES | (dict.fromkeys(PROMPT_NAMES, "messages") if name.endswith(RL_SUFFIX) else {})
    given = with_content(record, FORMATS[name][1])
    likely_types = [likely_type for field, likely_type in signatures.items() if field in given]
    if not likely_types or name.removesuffix(" (DPO)").removesuffix(RL_SUFFIX) in likely_types:
        return
    likely = likely_types[0]
    hint = f"set the dataset type to {likely}"
    if likely == "text":
        hint = "set stage: VL-PT to train on plain text"
    elif name == "text":
        hint += " and stage: VL-SFT"
    raise BadRecord(f"this record is of type {likely}, not {name}", hint)


def _messages(record: dict[str, Any], options: FormatOptions, notes: Notes) -> Sample:
    return _of_turns(record, "messages", ("role", "content"), options, notes)


def _sharegpt(record: dict[str, Any], options: FormatOptions, notes: Notes) -> Sample:
    return _of_turns(record, "conversations", sharegpt_keys(record.get("conversations")), options, notes)


def _of_turns(record: dict[str, Any], name: str, keys: tuple[str, str], options: FormatOptions, notes: Notes) -> Sample:
    turns = [read_turn(turn, f"{name}[{i}]", keys, notes) for i, turn in enumerate(list_of(record, name))]
    if turns[0]["role"] == "system" and not turns[0]["content"]:
        notes.doubts.add("an empty system message is left out")
        del turns[0]
    return _finished(record, system_messages(record) + turns, name, options, notes)


def _alpaca(record: dict[str, Any], options: FormatOptions, notes: Notes) -> Sample:
    for name in ("instruction", "output"):
        if name not in record:
            raise BadRecord(f"field {name!r} is missing", "every alpaca record needs 'instruction' and 'output'")
    answer = {"role": "assistant", "content": text_of(record["output"], "'output'")}
    return _finished(record, [*alpaca_prompt(record, "instruction"), answer], "instruction", options, notes)


def _finished(
    record: dict[str, Any], turns: list[dict[str, Any]], name: str, options: FormatOptions, notes: Notes
) -> Sample:
    """The sample of turns whose tags and sourceless parts are filled from the record's media."""
    check_order(turns, name)
    turns = fill_tags(turns, RecordMedia.of(record, notes), options, notes)
    tools = tools_of(record, notes)
    label = label_of(record, sum(turn["role"] == "assistant" for turn in turns))
    return Sample(match_calls(turns, tools, name, notes), tools=tools, label=label)


def _erniekit(record: dict[str, Any], options: FormatOptions, notes: Notes) -> Sample:
    turns = system_messages(record) + read_erniekit(record, notes)
    check_order(turns, "text_info")
    tools = tools_of(record, notes)
    return Sample(match_calls(turns, tools, "text_info", notes), tools=tools)


def _with_relative_boxes(sample: Sample, options: FormatOptions, notes: Notes) -> Sample:
    """The boxes of answers and calls, also of both answers of a pair, checked and in the relative convention."""
    pictures: list[_Shown] = []
    messages = _converted(sample.messages, pictures, "answer", options, notes)
    if sample.answers is None:
        return replace(sample, messages=messages)
    chosen, rejected = (
        _converted(answer, list(pictures), f"the {side} answer", options, notes)
        for side, answer in zip(("chosen", "rejected"), sample.answers, strict=True)
    )
    return replace(sample, messages=messages, answers=(chosen, rejected))


def _converted(
    messages: list[dict[str, Any]], pictures: list[_Shown], name: str, options: FormatOptions, notes: Notes
) -> list[dict[str, Any]]:
    """Messages whose boxes are in the relative convention; their pictures are appended to `pictures`, those of the
    messages before.
    """
    result = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            message = _converted_answer(message, pictures, f"{name} {i}", options, notes)
        elif isinstance(message["content"], list):
            pictures += [
                _Shown(part["image"], message["role"] == "tool")
                for part in message["content"]
                if part["type"] == "image"
            ]
        result.append(message)
    return result


def _converted_answer(
    message: dict[str, Any], pictures: list[_Shown], name: str, options: FormatOptions, notes: Notes
) -> dict[str, Any]:
    def size_of(index: Any) -> tuple[int, int]:
        return image_size(_picture_of_box(pictures, index, name).source, options.reader, options.images)

    result = dict(message)
    for key in ("content", "reasoning_content"):
        if message.get(key):
            doubt = doubt_about(message[key], options.boxes) if pictures else None
            if doubt:
                notes.doubts.add(doubt)
            result[key] = convert_text(message[key], options.boxes, lambda: size_of(None), name)
    if "tool_calls" in message:
        result["tool_calls"] = [
            _converted_call(call, size_of, f"the call in {name}", options.boxes) for call in message["tool_calls"]
        ]
    return result


def _picture_of_box(pictures: list[_Shown], index: Any, name: str) -> _Shown:
    """The picture that a box is in, as tools.image_tools has it: the one that `img_idx` names, or else the last one
    that the user gave. A box is relative to an original picture, not to the crop that a tool gave back.
    """
    if not pictures:
        raise BadRecord(f"{name} has a box in pixels, but its picture is not there", "put the picture before it")
    if index is None:
        return next((shown for shown in reversed(pictures) if not shown.by_tool), pictures[-1])
    is_whole = isinstance(index, int) or (isinstance(index, float) and index.is_integer())
    if not is_whole or isinstance(index, bool) or not 0 <= index < len(pictures):
        raise BadRecord(
            f"{name} has the img_idx {index!r}, and {count_of(len(pictures), 'picture is', 'pictures are')} before it",
            "count from 0",
        )
    return pictures[int(index)]


def _converted_call(
    call: dict[str, Any], size_of: Callable[[Any], tuple[int, int]], name: str, convention: str
) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    converted = convert_arguments(arguments, convention, lambda: size_of(arguments.get("img_idx")), name)
    return {**call, "function": {**function, "arguments": converted}}


def _erniekit_text(record: dict[str, Any], options: FormatOptions, notes: Notes) -> Sample:
    return TEXT_FORMATS["erniekit"].read(record, notes)


def _prompts(name: str) -> tuple[_READ, tuple[str, ...]]:
    """The reader of the prompts of a type, and the fields that it knows."""

    def read_record(record: dict[str, Any], options: FormatOptions, notes: Notes) -> Sample:
        is_text = name == "erniekit" and "text_info" not in record
        read, fields = _ERNIEKIT_TEXT if is_text else _CONVERSATIONS[name]
        return read_prompt(record, name, fields, lambda closed: read(closed, options, notes), notes)

    return read_record, _CONVERSATIONS[name][1]


_ERNIEKIT_TEXT = _erniekit_text, TEXT_FORMATS["erniekit"].fields  # the form of the type erniekit for text alone
_CONVERSATIONS: dict[str, tuple[_READ, tuple[str, ...]]] = {
    "erniekit": (_erniekit, ("text_info", "image_info", "video_info", "order", "system", "is_system", "tools")),
    "messages": (_messages, ("messages", "tools", "label", "system", *_MEDIA)),
    "sharegpt": (_sharegpt, ("conversations", "system", "tools", "label", *_MEDIA)),
    "alpaca": (_alpaca, ("instruction", "input", "output", "history", "system", *_MEDIA)),
}
FORMATS: dict[str, tuple[_READ, tuple[str, ...]]] = {
    **_CONVERSATIONS,
    **READERS,
    **{name + RL_SUFFIX: _prompts(name) for name in CLOSERS},
}
