"""Reads records of judged answers, for KTO: a conversation whose last answer is good or bad (`label`: true or false).

A record has the form of its type, read by that type's own reader; `label` (TRL, ms-swift) or `kto_tag` (LLaMA-Factory)
judges what the assistant says after the last question. In the type `messages` the conversation may also be given as
TRL's `prompt` and `completion`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import has_content
from erniekit.data.records.sample import Sample
from erniekit.data.records.values import kind_of, text_of

KTO_SUFFIX = " (KTO)"  # distinguishes these types from those of other answers
JUDGED_TYPES = ("erniekit", "messages", "sharegpt", "alpaca")
_JUDGEMENTS = ("label", "kto_tag")
_SPLIT = ("prompt", "completion")


def judged_fields(type_name: str, fields: tuple[str, ...]) -> tuple[str, ...]:
    """The fields of judged answers of a type whose conversations have `fields`."""
    return tuple(dict.fromkeys((*fields, *_JUDGEMENTS, *(_SPLIT if type_name == "messages" else ()))))


def read_judged(record: dict[str, Any], read: Callable[[dict[str, Any]], Sample]) -> Sample:
    """The Sample of a conversation whose last answer is judged; `label` is 1 for it, and 0 for earlier answers. `read`
    is the reader of the type's conversations. Raises BadRecord.
    """
    given = [name for name in _JUDGEMENTS if record.get(name) is not None]
    if len(given) != 1:
        what = "is missing" if not given else "is given twice ('label' and 'kto_tag')"
        raise BadRecord(f"field 'label' {what}", "give true for a good answer, or false for a bad one")
    judgement = record[given[0]]
    if not isinstance(judgement, bool | int) or judgement not in (0, 1):
        raise BadRecord(
            f"{given[0]!r} must be true or false, not {kind_of(judgement)}", "true is a good answer, false a bad one"
        )
    conversation = {name: value for name, value in record.items() if name not in _JUDGEMENTS}
    is_split = any(has_content(record.get(name)) for name in _SPLIT)
    sample = read(_joined(conversation) if is_split else conversation)
    roles = [message["role"] for message in sample.messages]
    last_question = len(roles) - 1 - roles[::-1].index("user")
    label = [int(i > last_question) for i, role in enumerate(roles) if role == "assistant"]
    return replace(sample, label=label, is_good=bool(judgement))


def _joined(record: dict[str, Any]) -> dict[str, Any]:
    """TRL's `prompt` and `completion`, each text or messages, as `messages`."""
    if has_content(record.get("messages")):
        raise BadRecord("both 'messages' and 'prompt' or 'completion' are given", "keep one form of the conversation")
    turns: list[Any] = []
    for name, role in zip(_SPLIT, ("user", "assistant"), strict=True):
        value = record.get(name)
        if isinstance(value, list) and value:
            turns += value
        else:
            turns.append({"role": role, "content": text_of(value, repr(name))})
    return {name: value for name, value in record.items() if name not in _SPLIT} | {"messages": turns}
