"""Converts one record of a data file into one Sample, with pure functions that check every field.

Types: `erniekit` (src/tgt), `alpaca`, `messages` (also called `chatml`), `sharegpt`, and `text` (pretraining: {"text":
...}, {"tgt": [...]} or one message of the assistant; at stage PT the types `erniekit` and `messages` mean this one). At
stage DPO the first four mean pairs of answers, see preference_formats; at stage RL they mean prompts, see
prompt_formats, and at stage KTO judged answers, see judged_formats. The module `fields` describes the treatment of
unknown fields.
"""

from typing import Any

from erniekit.data.records.errors import BadRecord, reading
from erniekit.data.records.fields import DECISIVE, Notes, check_fields, has_content
from erniekit.data.records.judged_formats import JUDGED_TYPES, KTO_SUFFIX, judged_fields, read_judged
from erniekit.data.records.preference_formats import PREFERENCE_FORMATS
from erniekit.data.records.prompt_formats import CLOSERS, PROMPT_NAMES, RL_SUFFIX, read_prompt
from erniekit.data.records.sample import (
    Format,
    Sample,
    alpaca_prompt,
    conversation,
    label_of,
    sharegpt_keys,
    system_messages,
    turn_of,
    turns_of,
)
from erniekit.data.records.values import kind_of, one_of, text_of, texts_of
from erniekit.utils.wording import count_of

ALIASES = {"chatml": "messages"}
VISION_TYPE = " (VL)"  # suffix of the types whose records may contain pictures (data/vision/formats.py)

_SIGNATURES = {  # field -> the type that a record with it probably is
    "messages": "messages",
    "conversations": "sharegpt",
    "instruction": "alpaca",
    "src": "erniekit",
    "text": "text",
    "prompt": "messages",
    "problem": "messages",
}
_PAIR_FIELDS = ("response", "chosen", "rejected", "chosen_response", "rejected_response")


def parse_record(record: Any, type_name: str, where: str = "record", notes: Notes | None = None) -> Sample:
    """Check a record and turn it into a Sample.

    `type_name` is a key of FORMATS or of the other tables below, or an alias. `where` ("file:line") begins the message
    of the DataError that a wrong record raises. Ignored fields and doubts are added to `notes`.
    """
    format = _ALL[ALIASES.get(type_name, type_name)]
    notes = Notes() if notes is None else notes
    with reading(where):
        if not isinstance(record, dict):
            raise BadRecord(
                f"a record must be an object with named fields, not {kind_of(record)}",
                "write one JSON object per record",
            )
        _check_type(record, format, type_name)
        if not format.keeps_fields:
            check_fields(record, format.fields, f"type {type_name}", DECISIVE, notes)
        try:
            return format.read(record, notes)
        except BadRecord as bad:
            unused = [name for name in record if name not in format.fields]
            if not unused or "missing" not in bad.reason:
                raise
            raise BadRecord(f"{bad.reason} (it has {', '.join(map(repr, unused[:5]))})", bad.hint) from None


def _check_type(record: dict[str, Any], format: Format, type_name: str) -> None:
    """Raise BadRecord if the fields of the record show that it is of another type, or for another stage."""
    if any(name in record for name in format.marks):
        return
    given = with_content(record, format.fields)
    if "text_info" in given or "image_info" in given:
        raise BadRecord(
            f"this looks like data with pictures (it has text_info), not type {type_name} of text alone",
            "set stage: VL-SFT, with a vision-language model",
        )
    likely = [likely_type for name, likely_type in _SIGNATURES.items() if name in given]
    _check_stage(given, type_name, likely[0] if likely else "")
    for name, likely_type in _SIGNATURES.items():
        if name in given and name not in format.fields:
            hint = _how_to_write(name, type_name, likely_type)
            raise BadRecord(f"field {name!r} does not belong to type {type_name}", hint)


def with_content(record: dict[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a record by which its type is recognised: those that have content, since tables have every column
    in every record; all of them where no `known` field has any.
    """
    given = {name: value for name, value in record.items() if has_content(value)}
    return given if any(name in known for name in given) else record


def _how_to_write(name: str, type_name: str, likely_type: str) -> str:
    """What to do about a record with the field `name`, which `likely_type` has, at this stage or at another one."""
    if ALIASES.get(type_name, type_name) in FORMATS and name in ("prompt", "problem"):
        return (
            "one question and its answer are 'instruction' and 'output' (type alpaca) or the list 'messages' (type "
            "messages); a prompt alone is read with stage: RL"
        )
    if type_name == "text":  # at stage PT, and of `erniekit tokenize`, no other type can be set
        return (
            f'pretraining reads {{"text": "the document"}}; this looks like {likely_type}, which is trained on with '
            f"stage: SFT and the dataset type {likely_type}"
        )
    stage_hint = " and stage: PT" if likely_type == "text" else ""
    return (
        f"this looks like {likely_type}; set the dataset type (train_dataset_type, eval_dataset_type or "
        f"text_dataset_type) to {likely_type}{stage_hint}"
    )


def _check_stage(record: dict[str, Any], type_name: str, likely: str) -> None:
    """Raise BadRecord for a single answer where pairs are trained on, and for a pair of answers at another stage."""
    is_pair = any(name in record for name in _PAIR_FIELDS if name != "response" or not _is_one_answer(record))
    wants_pair = type_name in PREFERENCE_FORMATS
    if wants_pair and not is_pair and likely:
        stage = "PT to train on plain text" if likely == "text" else "SFT to train on single answers"
        raise BadRecord(
            "one answer, but stages DPO and RM train on pairs of answers, a chosen and a rejected one "
            "(fields response, or chosen and rejected)",
            f"set stage: {stage}, or give preference data",
        )
    if is_pair and not wants_pair:
        raise BadRecord(
            "two answers, a chosen and a rejected one: this looks like preference data (stage DPO)",
            "set stage: DPO" + (f" and the dataset type to {likely}" if likely not in ("", type_name) else ""),
        )


def _is_one_answer(record: dict[str, Any]) -> bool:
    """Whether the field `response` is the answer to a prompt, as many data sets call it."""
    return isinstance(record.get("response"), str) and "sort" not in record


def _erniekit(record: dict[str, Any], notes: Notes) -> Sample:
    src, tgt = texts_of(record, "src"), texts_of(record, "tgt")
    if len(src) != len(tgt):
        raise BadRecord(
            f"'src' has {count_of(len(src), 'turn')} and 'tgt' has {len(tgt)}", "each user turn needs its answer"
        )
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
        if has_content(tgt[0]):
            notes.doubts.add("is_system: 1 makes src[0] the system text, and the answer beside it, tgt[0], is left out")
        src, tgt, label = src[1:], tgt[1:], label and label[1:]
    first = 1 if is_system else 0
    for i, (question, answer) in enumerate(zip(src, tgt, strict=True), first):
        messages.append({"role": "user", "content": text_of(question, f"src[{i}]")})
        messages.append({"role": "assistant", "content": text_of(answer, f"tgt[{i}]")})
    return Sample(messages, label=label)


def _alpaca(record: dict[str, Any], notes: Notes) -> Sample:
    for name in ("instruction", "output"):
        if name not in record:
            raise BadRecord(f"field {name!r} is missing", "every alpaca record needs 'instruction' and 'output'")
    answer = {"role": "assistant", "content": text_of(record["output"], "'output'")}
    return Sample([*alpaca_prompt(record, "instruction"), answer])


def _messages(record: dict[str, Any], notes: Notes) -> Sample:
    turns = turns_of(record, "messages", ("role", "content"), notes)
    return conversation(record, turns, "messages", notes)


def _sharegpt(record: dict[str, Any], notes: Notes) -> Sample:
    turns = turns_of(record, "conversations", sharegpt_keys(record.get("conversations")), notes)
    return conversation(record, system_messages(record) + turns, "conversations", notes)


def _pretraining(record: dict[str, Any], notes: Notes) -> Sample:
    """`text` or `tgt` is one document; several strings are its paragraphs and are joined by a newline. PaddleFormers
    writes it as a message of the assistant.
    """
    if has_content(record.get("messages")):
        return Sample(kind="text", text=_only_message(record, notes))
    name = one_of(record, "text", "tgt")
    if name is None:
        given = "text" in record or "tgt" in record
        what = "exactly one of 'text' and 'tgt' must be there" if given else "field 'text' is missing"
        raise BadRecord(what, 'write {"text": "the document"}')
    return Sample(
        kind="text", text="\n".join(text_of(part, f"{name}[{i}]") for i, part in enumerate(texts_of(record, name)))
    )


def _only_message(record: dict[str, Any], notes: Notes) -> str:
    messages = record["messages"]
    turn = messages[0] if isinstance(messages, list) and len(messages) == 1 else None
    if not isinstance(turn, dict) or turn.get("role") != "assistant":
        hint = 'write {"text": "the document"}; conversations are trained on with stage: SFT'
        raise BadRecord("'messages' is not a document, which is one message of the assistant", hint)
    if has_content(record.get("text")) or has_content(record.get("tgt")):
        raise BadRecord("exactly one of 'text', 'tgt' and 'messages' must be there", 'write {"text": "the document"}')
    message = turn_of(turn, "messages[0]", ("role", "content"), notes)
    if len(message) > 2:
        names = " and ".join(sorted(message.keys() - {"role", "content"}))
        raise BadRecord(f"a document has no {names}", "remove it, or train on conversations with stage: SFT")
    return message["content"]


FORMATS = {
    "erniekit": Format(_erniekit, ("src", "tgt", "system", "label", "is_system"), ("src",)),
    "alpaca": Format(_alpaca, ("instruction", "input", "output", "history", "system"), ("instruction",)),
    "messages": Format(_messages, ("messages", "tools", "label"), ("messages",)),
    "sharegpt": Format(_sharegpt, ("conversations", "system", "tools", "label"), ("conversations",)),
    "text": Format(_pretraining, ("text", "tgt", "messages"), ("text",)),
}


def _prompts(name: str) -> Format:
    format = FORMATS[name]

    def read(record: dict[str, Any], notes: Notes) -> Sample:
        return read_prompt(record, name, format.fields, lambda closed: format.read(closed, notes), notes)

    marks = PROMPT_NAMES if name == "messages" else format.marks
    return Format(read, (*format.fields, *marks), marks, keeps_fields=True)


def _judged(name: str) -> Format:
    format = FORMATS[name]

    def read(record: dict[str, Any], notes: Notes) -> Sample:
        return read_judged(record, lambda conversation: format.read(conversation, notes))

    marks = ("messages", "prompt") if name == "messages" else format.marks
    return Format(read, judged_fields(name, format.fields), marks)


PROMPT_FORMATS = {name + RL_SUFFIX: _prompts(name) for name in CLOSERS}
JUDGED_FORMATS = {name + KTO_SUFFIX: _judged(name) for name in JUDGED_TYPES}
_ALL = FORMATS | PREFERENCE_FORMATS | PROMPT_FORMATS | JUDGED_FORMATS
