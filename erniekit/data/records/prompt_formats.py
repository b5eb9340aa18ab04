"""Reads records of prompts for reinforcement learning: a conversation whose last turn is open, and the fields that the
rewards compare answers with.

A record has the form of its type, without the last answer. It is read by that type's own reader, with a stand-in answer
that is removed afterwards, so that every rule about turns, tools and pictures is the same as for training. An answer
that a record does have is left out of the prompt; it is kept as the field `answer` where the record names no other.

All other fields are kept as they are (`Sample.fields`). `answer` is also taken from the fields that other toolkits
use: `solution` (ms-swift, TRL), `ground_truth`, and `reward_model.ground_truth` (verl); `domain` from verl's `ability`
or `data_source`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import DECISIVE, Notes, has_content, misspelt
from erniekit.data.records.sample import ROLES, Sample, sharegpt_keys
from erniekit.data.records.values import content_of, is_text_parts, kind_of, list_of, text_of, texts_of
from erniekit.utils.wording import count_of

RL_SUFFIX = " (RL)"  # distinguishes these types from those of whole conversations
ANSWER, DOMAIN = "answer", "domain"
_ANSWERS = ("solution", "ground_truth")
_DOMAINS = ("ability", "data_source")
_STAND_IN = "-"
_LEFT_OUT = (
    "the conversation ends with an answer, which is left out of the prompt; it is the record's `answer` where the "
    "record names no other"
)
# fields that change what the prompt is, and are refused where the type does not have them
_REFUSED = {
    name: hint
    for name, hint in DECISIVE.items()
    if name in ("system", "system_prompt", "history", "tools", "functions", "is_system", "audio", "audios")
} | dict.fromkeys(
    ("image", "images", "video", "videos", "text_info", "image_info", "video_info"),
    "prompts with pictures are read with stage: VL-RL and a vision-language model: set that stage, or remove it",
)


class Closed(NamedTuple):
    """A record whose conversation ends with the stand-in answer, and the answer that it had (None: it was open)."""

    record: dict[str, Any]
    answer: Any


Closer = Callable[[dict[str, Any]], Closed]


def _erniekit(record: dict[str, Any]) -> Closed:
    if "text_info" in record:
        return _text_info(record)
    questions = texts_of(record, "src")
    answers = texts_of(record, "tgt") if has_content(record.get("tgt")) else []
    if len(answers) not in (len(questions) - 1, len(questions)):
        raise BadRecord(
            f"'src' has {count_of(len(questions), 'turn')} and 'tgt' has {len(answers)}",
            "tgt holds the earlier answers, one less than src, or also the last one",
        )
    last = answers[len(questions) - 1 :]
    return Closed(
        record | {"tgt": [*answers[: len(questions) - 1], _STAND_IN]},
        last[0] if last and has_content(last[0]) else None,
    )


def _text_info(record: dict[str, Any]) -> Closed:
    """ERNIEKit's form for pictures, which a text with the tag no_mask answers."""
    items = list_of(record, "text_info")
    prompts = [i for i, item in enumerate(items) if isinstance(item, dict) and item.get("tag") == "mask"]
    if not prompts:
        raise BadRecord("'text_info' has no prompt (tag mask)", "a record needs a prompt that is to be answered")
    kept, answers = items[: prompts[-1] + 1], items[prompts[-1] + 1 :]
    closed = record | {"text_info": [*kept, {"text": _STAND_IN, "tag": "no_mask"}]}
    if isinstance(record.get("order"), dict):
        closed["order"] = _order_of(record["order"], len(kept))
    answer = answers[-1].get("text") if answers and isinstance(answers[-1], dict) else None
    return Closed(closed, answer)


def _order_of(order: dict[str, Any], num_texts: int) -> dict[str, Any]:
    """The order of the media and the first `num_texts` texts, and then of the stand-in answer. An order that is no two
    lists is left to its reader.
    """
    kinds, indices = order.get("type"), order.get("index")
    if not isinstance(kinds, list) or not isinstance(indices, list) or len(kinds) != len(indices):
        return order
    kept = [
        (kind, index)
        for kind, index in zip(kinds, indices, strict=True)
        if kind != "text" or index in range(num_texts) or not isinstance(index, int)
    ]
    return {"type": [kind for kind, _ in kept] + ["text"], "index": [index for _, index in kept] + [num_texts]}


def _alpaca(record: dict[str, Any]) -> Closed:
    if "instruction" not in record:
        raise BadRecord("field 'instruction' is missing", "every alpaca record needs it")
    answer = record.get("output")
    return Closed(record | {"output": _STAND_IN}, answer if has_content(answer) else None)


def _messages(record: dict[str, Any]) -> Closed:
    """The conversation is in `messages`, in TRL's and verl's `prompt`, or in EasyR1's `problem`; the last two may be
    text.
    """
    given = [name for name in PROMPT_NAMES if has_content(record.get(name))]
    if len(given) != 1:
        what = "is missing" if not given else f"is given {len(given)} times ({', '.join(given)})"
        raise BadRecord(f"the prompt {what}", f"give one of {', '.join(PROMPT_NAMES)}")
    value = record[given[0]]
    if isinstance(value, str) and given[0] != "messages":
        value = [{"role": "user", "content": text_of(value, repr(given[0]))}]
    turns = list_of({given[0]: value}, given[0])
    others = {key: content for key, content in record.items() if key not in PROMPT_NAMES}
    return _of_turns(others, "messages", turns, ("role", "content"))


def _sharegpt(record: dict[str, Any]) -> Closed:
    turns = list_of(record, "conversations")
    return _of_turns(record, "conversations", turns, sharegpt_keys(turns))


def _of_turns(record: dict[str, Any], name: str, turns: Sequence[Any], keys: tuple[str, str]) -> Closed:
    roles = [ROLES.get(str(turn.get(keys[0]))) if isinstance(turn, dict) else None for turn in turns]
    answer = None
    if roles[-1] in ("assistant", "function"):
        if "user" not in roles:
            raise BadRecord(f"{name!r} has no turn of the user", "a prompt needs a question")
        last = len(roles) - roles[::-1].index("user")
        # a call of tools may have no text; "" says that there was an answer, and is none for the rewards
        answer, turns, roles = turns[-1].get(keys[1]) or "", turns[:last], roles[:last]
        if is_text_parts(answer):
            answer = content_of(answer, f"the answer of {name!r}")
    if roles[-1] == "system":
        raise BadRecord(f"{name!r} ends with the role 'system'", "a prompt ends with the user's turn: add it")
    return Closed(record | {name: [*turns, {keys[0]: "assistant", keys[1]: _STAND_IN}]}, answer)


PROMPT_NAMES = ("messages", "prompt", "problem")
# type -> how its records are closed, and the fields of its prompts beside those that its ordinary records have
CLOSERS: dict[str, tuple[Closer, tuple[str, ...]]] = {
    "erniekit": (_erniekit, ()),
    "messages": (_messages, PROMPT_NAMES),
    "sharegpt": (_sharegpt, ()),
    "alpaca": (_alpaca, ()),
}


def read_prompt(
    record: dict[str, Any],
    type_name: str,
    fields: tuple[str, ...],
    read: Callable[[dict[str, Any]], Sample],
    notes: Notes,
) -> Sample:
    """The Sample of kind "prompt" of a record: `messages` end with a user or a tool, `fields` has all that does not
    belong to the conversation.

    `read` is the reader of the type's ordinary records, and `fields` are those that it knows. Raises BadRecord.
    """
    close, names = CLOSERS[type_name]
    known = tuple(name for name in dict.fromkeys((*fields, *names)) if name != "label")
    _check_fields(record, known, type_name)
    closed, answer = close(record)
    sample = read({name: value for name, value in closed.items() if name in known})
    if answer is not None:
        notes.doubts.add(_LEFT_OUT)
    return replace(
        sample,
        kind="prompt",
        messages=sample.messages[:-1],
        label=None,
        fields=_fields_of(record, known, answer),
    )


def _check_fields(record: dict[str, Any], known: tuple[str, ...], type_name: str) -> None:
    for name, value in record.items():
        if name in known:
            continue
        if name in _REFUSED and has_content(value):
            raise BadRecord(f"field {name!r} does not belong to prompts of type {type_name}", _REFUSED[name])
        if name != ANSWER and (similar := misspelt(str(name), known)):
            raise BadRecord(
                f"unknown field {name!r}; the nearest one of a prompt of type {type_name} is {similar!r}",
                f"rename it (known: {', '.join(known)}; a field for the rewards needs a name less like these)",
            )


def _fields_of(record: dict[str, Any], known: tuple[str, ...], answer: Any) -> Mapping[str, Any]:
    fields = {str(name): value for name, value in record.items() if name not in known}
    reward_model = fields.get("reward_model")
    nested = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    for name, candidates in (
        (ANSWER, [*(fields.get(other) for other in _ANSWERS), nested, answer]),
        (DOMAIN, [fields.get(other) for other in _DOMAINS]),
    ):
        if has_content(fields.get(name)):
            continue
        fields.pop(name, None)
        if (found := next(filter(has_content, candidates), None)) is not None:
            fields[name] = found
    if not isinstance(fields.get(DOMAIN, ""), str):
        raise BadRecord(f"'domain' must be text, not {kind_of(fields[DOMAIN])}", "name the subject, such as algebra")
    return fields
