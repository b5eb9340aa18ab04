"""Reading one record of a data file: what all formats share. Every check raises BadRecord, which parse_record (formats)
turns into a DataError with the record's place.
"""

import difflib
import json
from dataclasses import dataclass, field
from typing import Any

_ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "tool_response", "observation", "function_response"), "tool"),
    **dict.fromkeys(("function", "function_call", "function_calls", "tool_call", "tool_calls"), "function"),
}
_FOLLOWS = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
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
    first, each as messages that begin and end with an assistant; `score_delta` > 0 is how much better the chosen one is
    (1 where the data do not say).
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    label: list[int] | None = None
    kind: str = "chat"
    text: str = ""
    answers: tuple[list[dict[str, Any]], list[dict[str, Any]]] | None = None
    score_delta: float = 1.0


class BadRecord(Exception):
    """A record is wrong: the reason, and what to do about it."""

    def __init__(self, reason: str, hint: str):
        super().__init__(reason)
        self.reason, self.hint = reason, hint


def kind_of(value: Any) -> str:
    """What JSON calls a value, with its article."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def text_of(value: Any, name: str, empty_ok: bool = False) -> str:
    """`value` as a string that is not blank and can be written as UTF-8."""
    if not isinstance(value, str):
        raise BadRecord(f"{name} must be a string, not {kind_of(value)}", "put the text itself there")
    if not empty_ok and not value.strip():
        raise BadRecord(f"{name} is empty", "give it text, or remove the record")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRecord(
                f"{name} holds half of a surrogate pair, which is not valid text", "repair the \\ud... escape in it"
            ) from None
    return value


def texts_of(record: dict[str, Any], name: str) -> list[Any]:
    """A field that is a string or a list of strings, as a list (its items are not yet checked)."""
    if name not in record:
        raise BadRecord(f"field {name!r} is missing", "every record needs it; check the dataset type too")
    value = record[name]
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise BadRecord(
            f"{name!r} must be a string or a list of strings, not {'an empty list' if value == [] else kind_of(value)}",
            "give one string per turn",
        )
    return value


def list_of(record: dict[str, Any], name: str) -> list[Any]:
    """A field that is a list with something in it."""
    value = record.get(name)
    if not isinstance(value, list) or not value:
        raise BadRecord(
            f"{name!r} must be a list with at least one entry" + ("" if name in record else ", but it is missing"),
            "check the field and the dataset type",
        )
    return value


def system_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The optional system field as messages; absent, null and "" all mean that there is none."""
    value = record.get("system")
    if value is None or value == "":
        return []
    return [{"role": "system", "content": text_of(value, "'system'")}]


def label_of(record: dict[str, Any], count: int) -> list[int] | None:
    """The optional field label: a 0 or 1 for each of `count` answers."""
    label = record.get("label")
    if label is None:
        return None
    if not isinstance(label, list) or any(type(x) not in (int, bool) or x not in (0, 1) for x in label):
        raise BadRecord("'label' must be a list of 0 and 1", "1 = learn this answer, 0 = leave it out of the loss")
    if len(label) != count:
        raise BadRecord(f"'label' has {len(label)} entries for {count} answers", "give one 0 or 1 for each answer")
    return [int(x) for x in label]


def turn_of(turn: Any, name: str, role_key: str, content_key: str) -> dict[str, Any]:
    """One message with its role by its usual name; a function-call turn becomes an assistant message with tool_calls,
    a tool result that is not text the JSON text of it. `name` and `tool_call_id` are kept for the templates that
    show them (ERNIE's do not).
    """
    role = _role(turn, name, role_key, content_key)
    content, calls, thought = turn.get(content_key), turn.get("tool_calls"), turn.get("reasoning_content")
    if role == "function":
        if calls:
            raise BadRecord(f"{name} gives calls as its content and as tool_calls", "keep one of them")
        role, content, calls = "assistant", "", _json(content, name)
    elif role != "assistant" and (calls or thought):
        raise BadRecord(f"{name} has what only an assistant has: tool_calls or reasoning_content", "check its role")
    text = "" if calls and content is None else content
    if role == "tool":
        text = _result_text(content)
    result: dict[str, Any] = {
        "role": role,
        "content": text_of(text, f"{name}.{content_key}", empty_ok=bool(calls) or role == "tool"),
    }
    if thought:
        result["reasoning_content"] = text_of(thought, f"{name}.reasoning_content")
    result |= {key: text_of(turn[key], f"{name}.{key}") for key in ("name", "tool_call_id") if turn.get(key)}
    return result | ({"tool_calls": _tool_calls(calls, name)} if calls else {})


def _result_text(content: Any) -> Any:
    """A tool result as text: of text parts (OpenAI's form) their text, of what is no string its JSON. Null stays."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        return "".join(text_of(part.get("text"), "a text part", empty_ok=True) for part in content)
    return json.dumps(content, ensure_ascii=False)


def _check_fields(value: dict[str, Any], name: str, allowed: tuple[str, ...]) -> None:
    unknown = next((key for key in value if key not in allowed), None)
    if unknown is not None:
        nearest = difflib.get_close_matches(str(unknown), allowed, n=1, cutoff=0.0)[0]
        raise BadRecord(
            f"{name} has the unknown field {unknown!r}; the nearest known one is {nearest!r}",
            f"rename or remove it (known: {', '.join(allowed)})",
        )


def _role(turn: Any, name: str, role_key: str, content_key: str) -> str:
    """A turn's role by its usual name, after a look at which fields the turn has."""
    if not isinstance(turn, dict):
        raise BadRecord(
            f"{name} must be an object, not {kind_of(turn)}", f'write {{"{role_key}": ..., "{content_key}": ...}}'
        )
    openai = ("tool_calls", "reasoning_content", "name", "tool_call_id") if role_key == "role" else ()
    _check_fields(turn, name, (role_key, content_key, *openai))
    given = turn.get(role_key)
    if not isinstance(given, str) or given not in _ROLES:
        raise BadRecord(f"{name} has the role {given!r}", f"the roles are {', '.join(_ROLES)}")
    return _ROLES[given]


def _json(value: Any, name: str) -> Any:
    """A value that may be given as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=_object, parse_constant=_no_constant)
    except BadRecord as bad:
        raise BadRecord(f"{name} {bad.reason}", bad.hint) from None
    except (ValueError, RecursionError):
        raise BadRecord(f"{name} must hold JSON, but it cannot be read as JSON", "check quotes and brackets") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise BadRecord(f"has {twice!r} twice", "keep one of them")
    return found


def _no_constant(text: str) -> Any:
    raise BadRecord(f"holds {text}, which JSON does not have", "write null, or a number")


def _tool_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Calls in OpenAI's form, or as bare {"name", "arguments"}, with arguments as an object; none means {}."""
    result = []
    for i, call in enumerate(calls if isinstance(calls, list) else [calls]):
        what = f"{name}.tool_calls[{i}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRecord(
                f"{what} names no function", 'write {"type": "function", "function": {"name": ..., "arguments": {...}}}'
            )
        around = ("id", "type", "index")
        if function is call:
            _check_fields(call, what, ("name", "arguments", *around))
        else:
            _check_fields(call, what, ("function", *around))
            _check_fields(function, f"{what}.function", ("name", "arguments"))
        if call.get("type", "function") != "function":
            raise BadRecord(f"{what} has the type {call['type']!r}", "only calls of type function are known")
        arguments = _json(function.get("arguments", {}), f"{what}.arguments")
        if not isinstance(arguments, dict):
            raise BadRecord(
                f"{what}.arguments must be an object, not {kind_of(arguments)}", "give the arguments by name"
            )
        whose = {"id": text_of(call["id"], f"{what}.id")} if call.get("id") else {}
        result.append(whose | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    if not result:
        raise BadRecord(f"{name} is a function call without a call", "give at least one call")
    return result


def tools_of(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The optional field tools, which may be JSON text; absent, "" and [] all mean that there are none."""
    tools = record.get("tools")
    if tools is None or tools == "" or tools == []:
        return None
    tools = _json(tools, "'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecord(
            "'tools' must be a list of objects",
            'write [{"type": "function", "function": {"name": ..., "parameters": ...}}]',
        )
    for i, tool in enumerate(tools):
        if not _tool_name(tool):
            raise BadRecord(f"tools[{i}] has no name", 'write {"type": "function", "function": {"name": ...}}')
    return tools


def _tool_name(tool: dict[str, Any]) -> str:
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def match_calls(turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None, name: str) -> list[dict[str, Any]]:
    """The turns, their calls checked against `tools` and against their results. Results with ids are put into the order
    of their calls, because a template that does not show ids tells them apart by nothing else.

    Without `tools` any function may be called (its description may be in the system text). Of calls without ids the
    results may be fewer, as some data sets give several in one message.
    """
    known = None if tools is None else [_tool_name(tool) for tool in tools]
    matched: list[dict[str, Any]] = []
    for i, turn in enumerate(turns):
        if turn["role"] == "tool":
            continue  # taken together with the calls before it
        matched.append(turn)
        if "tool_calls" in turn:
            end = next((k for k in range(i + 1, len(turns)) if turns[k]["role"] != "tool"), len(turns))
            matched += _results(turn["tool_calls"], turns[i + 1 : end], known, f"{name}[{i}]")
    return matched


def _results(
    calls: list[dict[str, Any]], results: list[dict[str, Any]], known: list[str] | None, name: str
) -> list[dict[str, Any]]:
    """The results of an assistant's calls in the order of the calls; `known` are the names of the tools."""
    names = [call["function"]["name"] for call in calls]
    for called in names:
        if known is not None and called not in known:
            nearest = difflib.get_close_matches(called, known, n=1, cutoff=0.0)[0]
            raise BadRecord(
                f"{name} calls {called!r}, which is not in 'tools'; the nearest there is {nearest!r}",
                "describe it in 'tools', or mend the call",
            )
    if len(results) > len(calls):
        raise BadRecord(f"{name} has {len(calls)} calls and {len(results)} results", "give one result for each call")
    for result in results:
        if result.get("name", names[0]) not in names:
            raise BadRecord(
                f"{name} calls {', '.join(names)} and gets a result of {result['name']!r}", "mend the result's name"
            )
    ids, given = [call.get("id") for call in calls], [result.get("tool_call_id") for result in results]
    if not any(ids) or not any(given):
        return results
    if sorted(map(str, ids)) != sorted(map(str, given)) or len(set(ids)) < len(ids):
        raise BadRecord(
            f"{name} has calls with the ids {ids} and results for {given}", "give each call its own id and one result"
        )
    return sorted(results, key=lambda result: ids.index(result.get("tool_call_id")))


def check_order(turns: list[dict[str, Any]], name: str) -> None:
    """The order of roles: [system] user (assistant [tool ... assistant]) user ... assistant."""
    before = "start"
    for i, turn in enumerate(turns):
        role = turn["role"]
        if role not in _FOLLOWS[before]:
            place = (
                "comes first" if before == "start" else "follows " + {"calls": "a function call"}.get(before, before)
            )
            raise BadRecord(
                f"in {name!r} the role {role!r} of turn {i} {place}", f"expected {' or '.join(_FOLLOWS[before])} there"
            )
        before = "calls" if "tool_calls" in turn else role
    if before not in ("assistant", "calls"):
        raise BadRecord(
            f"{name!r} ends with the role {before!r}", "a sample ends with the assistant's answer; remove the open turn"
        )


def conversation(record: dict[str, Any], turns: list[dict[str, Any]], name: str) -> Sample:
    """A Sample of the turns, with the record's tools and label."""
    check_order(turns, name)
    tools = tools_of(record)
    label = label_of(record, sum(turn["role"] == "assistant" for turn in turns))
    return Sample(match_calls(turns, tools, name), tools=tools, label=label)


def alpaca_prompt(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """system, history, and the last user turn: the field `name`, then a newline and `input` where there is one."""
    messages = system_messages(record)
    history = record.get("history")
    if history is not None and not isinstance(history, list):
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
