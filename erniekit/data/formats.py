"""One record of a data file -> one Sample. Pure functions; every field is checked, none is ignored.

Types: `erniekit` (src/tgt), `alpaca`, `messages` (also called `chatml`), `sharegpt`, and `text` (pretraining: {"text":
...} or {"tgt": [...]}; at stage PT the type `erniekit` means this one). At stage DPO the first four mean pairs of
answers, see preference_formats. Whatever the type, a record may also carry the fields of METADATA, which are for its
owner and never reach the model; any other field that the type does not know is an error, because a mistyped field name
is how training data gets lost.
"""

import difflib
from collections.abc import Callable
from typing import Any

from erniekit.data.preference_formats import PREFERENCE_FORMATS
from erniekit.data.record import (
    BadRecord,
    Sample,
    alpaca_prompt,
    conversation,
    kind_of,
    label_of,
    list_of,
    system_messages,
    text_of,
    texts_of,
    turn_of,
)
from erniekit.utils.errors import DataError

METADATA = ("id", "source", "category", "lang", "metadata")
ALIASES = {"chatml": "messages"}

_SIGNATURES = {  # field -> the type that a record with it probably is of
    "messages": "messages",
    "conversations": "sharegpt",
    "instruction": "alpaca",
    "src": "erniekit",
    "text": "text",
    "prompt": "messages",
}
_PAIR_FIELDS = ("response", "chosen", "rejected", "chosen_response", "rejected_response")


def parse_record(record: Any, type_name: str, where: str = "record") -> Sample:
    """Check a record and turn it into a Sample.

    `type_name` is a key of FORMATS, of PREFERENCE_FORMATS, or an alias; `where` ("file:line") opens the message of the
    DataError that a wrong record raises.
    """
    parse, known = (FORMATS | PREFERENCE_FORMATS)[ALIASES.get(type_name, type_name)]
    try:
        if not isinstance(record, dict):
            raise BadRecord(
                f"a record must be an object with named fields, not {kind_of(record)}",
                "write one JSON object per record",
            )
        _check_fields(record, known, type_name)
        return parse(record)
    except BadRecord as bad:
        raise DataError(f"{where}: {bad.reason}. Hint: {bad.hint}.") from None


def _check_fields(record: dict[str, Any], known: tuple[str, ...], type_name: str) -> None:
    unknown = next((name for name in record if name not in known and name not in METADATA), None)
    _check_stage(record, type_name, unknown)
    if unknown is None:
        return
    if "text_info" in record or "image_info" in record:
        raise BadRecord(
            f"field {unknown!r} does not belong to type {type_name}",
            "this looks like vision-language data (stage VL-SFT), which this version cannot train on",
        )
    like = next((what for field, what in _SIGNATURES.items() if field in record and field not in known), None)
    if like:
        raise BadRecord(
            f"field {unknown!r} does not belong to type {type_name}",
            f"this looks like {like}; set the dataset type to {like}" + (" and stage: PT" if like == "text" else ""),
        )
    nearest = difflib.get_close_matches(str(unknown), known, n=1, cutoff=0.6)
    raise BadRecord(
        f"unknown field {unknown!r} for type {type_name}"
        + (f"; the nearest known one is {nearest[0]!r}" if nearest else ""),
        f"rename or remove it (known: {', '.join(known)}; ignored on purpose: {', '.join(METADATA)})",
    )


def _check_stage(record: dict[str, Any], type_name: str, unknown: str | None) -> None:
    """Single answers at stage DPO, and pairs of answers at another stage."""
    like = next((what for field, what in _SIGNATURES.items() if field in record), "")
    is_pair = any(field in record for field in _PAIR_FIELDS)
    if type_name in PREFERENCE_FORMATS and not is_pair and like:
        raise BadRecord(
            "one answer, but stage: DPO trains on pairs of answers, a chosen and a rejected one "
            "(fields response, or chosen and rejected)",
            "set stage: SFT to train on single answers, or give preference data"
            if like != "text"
            else "set stage: PT to train on plain text, or give preference data",
        )
    if type_name not in PREFERENCE_FORMATS and is_pair and unknown is not None:
        raise BadRecord(
            "two answers, a chosen and a rejected one: this looks like preference data (stage DPO)",
            "set stage: DPO" + (f" and the dataset type to {like}" if like not in ("", type_name) else ""),
        )


def _erniekit(record: dict[str, Any]) -> Sample:
    src, tgt = texts_of(record, "src"), texts_of(record, "tgt")
    if len(src) != len(tgt):
        raise BadRecord(f"'src' has {len(src)} turns and 'tgt' has {len(tgt)}", "each user turn needs its answer")
    label = label_of(record, len(tgt))
    messages = system_messages(record)
    is_system = record.get("is_system")
    if is_system not in (None, 0, 1):
        raise BadRecord("'is_system' must be 0 or 1", "1 means that src[0] is the system text")
    if is_system:
        if messages:
            raise BadRecord("both 'system' and 'is_system' give a system text", "keep one of them")
        if len(src) < 2:
            raise BadRecord(
                "'is_system' is 1 but there is no turn after the system text", "add the turns, or set it to 0"
            )
        messages = [{"role": "system", "content": text_of(src[0], "src[0]")}]
        src, tgt, label = src[1:], tgt[1:], label and label[1:]
    first = 1 if is_system else 0
    for i, (question, answer) in enumerate(zip(src, tgt, strict=True), first):
        messages.append({"role": "user", "content": text_of(question, f"src[{i}]")})
        messages.append({"role": "assistant", "content": text_of(answer, f"tgt[{i}]")})
    return Sample(messages, label=label)


def _alpaca(record: dict[str, Any]) -> Sample:
    for name in ("instruction", "output"):
        if name not in record:
            raise BadRecord(f"field {name!r} is missing", "every alpaca record needs 'instruction' and 'output'")
    answer = {"role": "assistant", "content": text_of(record["output"], "'output'")}
    return Sample([*alpaca_prompt(record, "instruction"), answer])


def _messages(record: dict[str, Any]) -> Sample:
    turns = [turn_of(turn, f"messages[{i}]", "role", "content") for i, turn in enumerate(list_of(record, "messages"))]
    return conversation(record, turns, "messages")


def _sharegpt(record: dict[str, Any]) -> Sample:
    turns = [
        turn_of(turn, f"conversations[{i}]", "from", "value") for i, turn in enumerate(list_of(record, "conversations"))
    ]
    return conversation(record, system_messages(record) + turns, "conversations")


def _pretraining(record: dict[str, Any]) -> Sample:
    """`text` or `tgt` is one document; several strings are its paragraphs and are joined by a newline."""
    if ("text" in record) == ("tgt" in record):
        raise BadRecord("exactly one of 'text' and 'tgt' must be there", 'write {"text": "the document"}')
    name = "text" if "text" in record else "tgt"
    return Sample(
        kind="text", text="\n".join(text_of(part, f"{name}[{i}]") for i, part in enumerate(texts_of(record, name)))
    )


FORMATS: dict[str, tuple[Callable[[dict[str, Any]], Sample], tuple[str, ...]]] = {
    "erniekit": (_erniekit, ("src", "tgt", "system", "label", "is_system")),
    "alpaca": (_alpaca, ("instruction", "input", "output", "history", "system")),
    "messages": (_messages, ("messages", "tools", "label")),
    "sharegpt": (_sharegpt, ("conversations", "system", "tools", "label")),
    "text": (_pretraining, ("text", "tgt")),
}
