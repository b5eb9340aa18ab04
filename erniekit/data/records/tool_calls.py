"""Reads function calls in records: tools, calls and results, in the forms that data sets use."""

from typing import Any

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes, has_content, misspelt, nearest
from erniekit.data.records.values import content_of, is_text_parts, json_of, json_text, kind_of, text_of
from erniekit.utils.wording import count_of


def tool_calls_of(calls: Any, name: str, notes: Notes) -> list[dict[str, Any]]:
    """Reads calls in OpenAI's form, or as bare {"name", "arguments"}, and parses arguments to an object; absent, null
    and blank arguments mean {}.
    """
    result = []
    for i, call in enumerate(calls if isinstance(calls, list) else [calls]):
        what = f"{name}.tool_calls[{i}]"
        function = (call.get("function") or call) if isinstance(call, dict) else None
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
        if call.get("type") not in (None, "", "function"):
            raise BadRecord(f"{what} has the type {call['type']!r}", "only calls of type function are known")
        arguments = json_of(function.get("arguments"), f"{what}.arguments", notes)
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise BadRecord(
                f"{what}.arguments must be an object, not {kind_of(arguments)}", "give the arguments by name"
            )
        whose = {"id": text_of(call["id"], f"{what}.id")} if call.get("id") else {}
        result.append(whose | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    if not result:
        raise BadRecord(f"{name} is a function call without a call", "give at least one call")
    return result


def _check_fields(value: dict[str, Any], name: str, known: tuple[str, ...]) -> None:
    """Raise BadRecord for an unknown field of a call that has content, since the model would not be trained on it."""
    others = [str(key) for key in value if key not in known]
    unknown = next((key for key in others if has_content(value[key]) or misspelt(key, known)), None)
    if unknown is not None:
        raise BadRecord(
            f"{name} has the unknown field {unknown!r}; the nearest known one is {nearest(unknown, known)!r}",
            f"rename or remove it (known: {', '.join(known)})",
        )


def tools_of(record: dict[str, Any], notes: Notes) -> list[dict[str, Any]] | None:
    """The optional field `tools`, which may be JSON text. Absent, null, [] and {} mean that there are no tools, also as
    text.
    """
    tools = json_of(record.get("tools"), "'tools'", notes)
    if not has_content(tools):
        return None
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


def match_calls(
    turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None, name: str, notes: Notes
) -> list[dict[str, Any]]:
    """The turns, after checking calls against `tools` and against their results. Results with ids, or else with names,
    are put into the order of their calls, because templates that do not render these distinguish them only by order.

    Without `tools` any function may be called (its description may be in the system text). Calls without ids may have
    fewer results, since some data sets put several results into one message. Results after an answer without a call
    are kept, with a note, since some data sets have answers that only contain a thought before a result.
    """
    known = None if tools is None else [_tool_name(tool) for tool in tools]
    matched: list[dict[str, Any]] = []
    after_call = False
    for i, turn in enumerate(turns):
        if turn["role"] == "tool":
            if not after_call:
                notes.doubts.add(
                    "a tool result follows an answer that calls nothing; both are trained on as they stand"
                )
                matched.append(turn)
            continue  # otherwise handled together with the calls before it
        matched.append(turn)
        after_call = "tool_calls" in turn
        if after_call:
            end = next((k for k in range(i + 1, len(turns)) if turns[k]["role"] != "tool"), len(turns))
            matched += _results(turn["tool_calls"], turns[i + 1 : end], known, f"{name}[{i}]")
    return matched


def _results(
    calls: list[dict[str, Any]], results: list[dict[str, Any]], known: list[str] | None, name: str
) -> list[dict[str, Any]]:
    """The results of an assistant's calls in the order of the calls; `known` has the names of the tools."""
    names = [call["function"]["name"] for call in calls]
    for called in names:
        if known is not None and called not in known:
            raise BadRecord(
                f"{name} calls {called!r}, which is not in 'tools'; the nearest there is {nearest(called, known)!r}",
                "describe it in 'tools', or fix the call",
            )
    if len(results) > len(calls):
        raise BadRecord(
            f"{name} has {count_of(len(calls), 'call')} and {count_of(len(results), 'result')}",
            "give one result for each call",
        )
    for result in results:
        if result.get("name", names[0]) not in names:
            raise BadRecord(
                f"{name} calls {', '.join(names)} and gets a result of {result['name']!r}", "fix the result's name"
            )
    if any("id" in call for call in calls) and any("tool_call_id" in result for result in results):
        return _by_ids(calls, results, name)
    return _by_names(names, results, name)


def _by_ids(calls: list[dict[str, Any]], results: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The results in the order of the calls, by their ids."""
    ids, result_ids = [call.get("id") for call in calls], [result.get("tool_call_id") for result in results]
    if set(ids) != set(result_ids) or len(result_ids) != len(ids) or len(set(ids)) < len(ids):
        raise BadRecord(
            f"{name} has calls with the ids {ids} and results for {result_ids}",
            "give each call its own id and one result",
        )
    ordered = sorted(results, key=lambda result: ids.index(result.get("tool_call_id")))
    for call, result in zip(calls, ordered, strict=True):
        called = call["function"]["name"]
        if result.get("name", called) != called:
            raise BadRecord(
                f"{name} calls {called!r} with the id {call.get('id')!r}, whose result is one of {result['name']!r}",
                "fix the result's name or its id",
            )
    return ordered


def _by_names(names: list[str], results: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The results of calls without ids in the order of the calls, by the `names` of their functions; results of which
    one names no function are left in their order.
    """
    if not all("name" in result for result in results):
        return results
    open_calls = list(names)
    places = []
    for result in results:
        if result["name"] not in open_calls:
            given = ", ".join(other["name"] for other in results)
            raise BadRecord(f"{name} calls {', '.join(names)} and gets results of {given}", "give each call one result")
        places.append(open_calls.index(result["name"]))
        open_calls[places[-1]] = ""
    return [results[i] for i in sorted(range(len(results)), key=places.__getitem__)]


def result_text(content: Any, name: str) -> Any:
    """A tool result as text: text parts (OpenAI's form) are joined, other values become JSON text. Null stays null."""
    if content is None or isinstance(content, str):
        return content
    if is_text_parts(content):
        return content_of(content, name)
    return json_text(content, name)
