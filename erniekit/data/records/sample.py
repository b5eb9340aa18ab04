"""The Sample, and what all formats share in reading a record. Every check raises BadRecord, which parse_record
(formats) turns into a DataError with the record's place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import (
    DECISIVE_IN_MESSAGES,
    MESSAGE,
    Notes,
    check_fields,
    check_text_parts,
    has_content,
)
from erniekit.data.records.tool_calls import match_calls, result_text, tool_calls_of, tools_of
from erniekit.data.records.values import content_of, json_of, kind_of, list_of, text_of
from erniekit.utils.wording import count_of

ROLES = {  # role as written -> its usual name
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "tool_response", "observation", "function_response"), "tool"),
    **dict.fromkeys(("function", "function_call", "function_calls", "tool_call", "tool_calls"), "function"),
}
_FIELDS = ("tool_calls", "reasoning_content", "name", "tool_call_id")  # of a message, besides role and content
_WEIGHTS = ("weight", "loss", "loss_weight", "train")
_FOLLOWS = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "calls": ("tool",),
    "tool": ("tool", "assistant"),
}


@dataclass(frozen=True)
class Sample:
    """One training sample.

    kind "chat": `messages` is a list of {"role": system|user|assistant|tool, "content": str} that begins with an
    optional system message, then a user, and ends with an assistant; an assistant message may carry "tool_calls"
    [{"type": "function", "function": {"name", "arguments": dict}}], with an "id" where the record has one, and the
    messages "tool" that follow are their results in the same order. `tools` are the function descriptions, `label` has
    a 0 or 1 for each assistant message (None: all 1); 0 means no loss on it. kind "text": `text` is one pretraining
    document. kind "pair": `messages` end with a user (or a tool) and `answers` are what may follow, the chosen one
    first, each as messages that begin and end with an assistant; `score_delta` >= 0 is how much better the chosen one
    is (None where the data do not say). kind "prompt": `messages` end with a user (or a tool), and `fields` has the
    record's other fields, for rewards (see prompt_formats). `is_good`: whether the last answer is good, where it is
    judged.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    label: list[int] | None = None
    kind: str = "chat"
    text: str = ""
    answers: tuple[list[dict[str, Any]], list[dict[str, Any]]] | None = None
    score_delta: float | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    is_good: bool | None = None


class Format(NamedTuple):
    """A record type: its reader, the fields that it knows, and the fields that mark a record as being of this type.
    `keeps_fields`: it keeps fields that it does not know, so its reader checks them itself.
    """

    read: Callable[[dict[str, Any], Notes], Sample]
    fields: tuple[str, ...]
    marks: tuple[str, ...]
    keeps_fields: bool = False


def sharegpt_keys(turns: Any) -> tuple[str, str]:
    """The names of role and content in a conversation of type sharegpt: `from` and `value`, or `role` and `content` as
    in type messages where its first turn has those (many data sets have `conversations` of them).
    """
    first = turns[0] if isinstance(turns, list) and turns else None
    openai = isinstance(first, dict) and "role" in first and "from" not in first
    return ("role", "content") if openai else ("from", "value")


TurnReader = Callable[[Any, str, tuple[str, str], Notes], dict[str, Any]]  # as turn_of


def system_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The optional system field as a list of messages, empty if the field is absent, null or ""."""
    value = record.get("system")
    if value is None or value == "":
        return []
    return [{"role": "system", "content": text_of(value, "'system'")}]


def label_of(record: dict[str, Any], count: int) -> list[int] | None:
    """The optional field `label`: a 0 or 1 for each of `count` answers."""
    label = record.get("label")
    if label is None:
        return None
    if not isinstance(label, list) or any(type(x) not in (int, bool) or x not in (0, 1) for x in label):
        raise BadRecord("'label' must be a list of 0 and 1", "1 = learn this answer, 0 = leave it out of the loss")
    if len(label) != count:
        raise BadRecord(
            f"'label' has {count_of(len(label), 'entry', 'entries')} for {count_of(count, 'answer')}",
            "give one 0 or 1 for each answer",
        )
    return [int(x) for x in label]


def turns_of(
    record: dict[str, Any], name: str, keys: tuple[str, str], notes: Notes, read_turn: "TurnReader | None" = None
) -> list[dict[str, Any]]:
    """The messages in a field that is a list; `keys` are the names of a message's role and content. `read_turn` reads
    each; None: turn_of.
    """
    read = read_turn or turn_of
    turns = [read(turn, f"{name}[{i}]", keys, notes) for i, turn in enumerate(list_of(record, name))]
    if turns[0]["role"] == "system" and not turns[0]["content"]:
        notes.doubts.add("an empty system message is left out")
        return turns[1:]
    return turns


def turn_of(turn: Any, name: str, keys: tuple[str, str], notes: Notes) -> dict[str, Any]:
    """One message with its role under the usual name. A function-call turn becomes an assistant message with
    tool_calls, and a tool result that is not text becomes JSON text. `name` and `tool_call_id` are kept for templates
    that render them (ERNIE's do not).
    """
    role = _role(turn, name, keys, notes)
    place = f"{name}.{keys[1]}"
    content, thought = turn.get(keys[1]), turn.get("reasoning_content")
    check_text_parts(content, notes)
    calls = json_of(turn.get("tool_calls"), f"{name}.tool_calls", notes)
    if role == "function":
        if has_content(calls):
            raise BadRecord(f"{name} gives calls as its content and as tool_calls", "keep one of them")
        role, content, calls = "assistant", "", json_of(content, place, notes)
    elif role != "assistant" and (has_content(calls) or has_content(thought)):
        raise BadRecord(f"{name} has what only an assistant has: tool_calls or reasoning_content", "check its role")
    is_call = has_content(calls)
    result: dict[str, Any] = {"role": role, "content": _content(content, role, is_call, place)}
    if has_content(thought):
        result["reasoning_content"] = text_of(thought, f"{name}.reasoning_content")
    for key in ("name", "tool_call_id"):
        if has_content(turn.get(key)):
            result[key] = text_of(turn[key], f"{name}.{key}")
    return result | ({"tool_calls": tool_calls_of(calls, name, notes)} if is_call else {})


def _content(content: Any, role: str, is_call: bool, place: str) -> str:
    """The text of a message. It may be blank in a message with calls and in a result, and empty in a system message."""
    text = result_text(content, place) if role == "tool" else content_of(content, place)
    if text is None and (is_call or role == "system"):
        text = ""
    return text_of(text, place, empty_ok=is_call or role == "tool" or (role == "system" and text == ""))


def _role(turn: Any, name: str, keys: tuple[str, str], notes: Notes) -> str:
    """A turn's role under its usual name, after a check of the turn's fields."""
    if not isinstance(turn, dict):
        raise BadRecord(
            f"{name} must be an object, not {kind_of(turn)}", f'write {{"{keys[0]}": ..., "{keys[1]}": ...}}'
        )
    given = turn.get(keys[0])
    role = ROLES.get(given) if isinstance(given, str) else None
    # a weight without effect: on a message without loss, or equal to the default
    idle = [key for key in _WEIGHTS if key in turn and (turn[key] == 1 or role not in (None, "assistant", "function"))]
    fields = {key: value for key, value in turn.items() if key not in idle} if idle else turn
    check_fields(fields, (*keys, *_FIELDS), MESSAGE, DECISIVE_IN_MESSAGES, notes)
    notes.unused.update(f"{key!r} of {MESSAGE}" for key in idle)
    if role is None:
        raise _no_role(turn, name, keys, given)
    return role


def _no_role(turn: dict[str, Any], name: str, keys: tuple[str, str], given: Any) -> BadRecord:
    other = ("role", "content") if keys[0] == "from" else ("from", "value")
    if given is None and other[0] in turn:
        return BadRecord(
            f"{name} has {other[0]!r} and {other[1]!r}, where {keys[0]!r} and {keys[1]!r} are expected",
            "give every turn of a record the same names: 'role' and 'content', or 'from' and 'value' (type sharegpt, "
            "field 'conversations')",
        )
    if given is None:
        return BadRecord(f"{name} has no {keys[0]!r}", f"say whose turn it is; the roles are {', '.join(ROLES)}")
    return BadRecord(f"{name} has the role {given!r}", f"the roles are {', '.join(ROLES)}")


def check_order(turns: list[dict[str, Any]], name: str) -> None:
    """Checks the order of roles: [system] user (assistant [tool ... assistant]) user ... assistant."""
    if not turns:
        raise BadRecord(f"{name!r} has no turn but an empty system message", "give a question and its answer")
    before = "start"
    for i, turn in enumerate(turns):
        role = turn["role"]
        if role not in _FOLLOWS[before]:
            position = (
                "comes first" if before == "start" else "follows " + {"calls": "a function call"}.get(before, before)
            )
            expected = "user" if before == "assistant" else " or ".join(_FOLLOWS[before])
            raise BadRecord(f"in {name!r} the role {role!r} of turn {i} {position}", f"expected {expected} there")
        before = "calls" if "tool_calls" in turn else role
    if before not in ("assistant", "calls"):
        raise BadRecord(
            f"{name!r} ends with the role {before!r}", "a sample ends with the assistant's answer; remove the open turn"
        )


def conversation(record: dict[str, Any], turns: list[dict[str, Any]], name: str, notes: Notes) -> Sample:
    """A Sample from the turns and the record's tools and label."""
    check_order(turns, name)
    tools = tools_of(record, notes)
    label = label_of(record, sum(turn["role"] == "assistant" for turn in turns))
    return Sample(match_calls(turns, tools, name, notes), tools=tools, label=label)


def alpaca_prompt(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The messages from system, history and the last user turn: the field `name`, then a newline and `input`
    if given.
    """
    messages = system_messages(record)
    history = record.get("history")
    if has_content(history) and not isinstance(history, list):
        raise BadRecord(
            f"'history' must be a list of [question, answer], not {kind_of(history)}", "remove it if there is none"
        )
    for i, pair in enumerate(history or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRecord(f"history[{i}] must be a pair [question, answer]", "each earlier question needs its answer")
        messages.append({"role": "user", "content": text_of(pair[0], f"history[{i}][0]")})
        messages.append({"role": "assistant", "content": text_of(pair[1], f"history[{i}][1]")})
    question = text_of(record[name], f"'{name}'")
    extra = record.get("input")
    if extra is not None and text_of(extra, "'input'", empty_ok=True).strip():
        question += "\n" + extra
    messages.append({"role": "user", "content": question})
    return messages
