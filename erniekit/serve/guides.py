"""The form that a request demands of its answers, as a grammar. Shared by the server and `erniekit.LLM`."""

from collections.abc import Sequence
from typing import Any

from erniekit.generation.guided import Compiled, Guide, Kind
from erniekit.serve.served_model import ServedModel
from erniekit.serve.server_errors import ApiError
from erniekit.serve.server_fields import type_name
from erniekit.serve.server_messages import called_tools
from erniekit.utils.errors import UserError
from erniekit.utils.user_files import parse_json

MAX_CHOICES = 1024
_KINDS: tuple[Kind, ...] = ("json", "regex", "choice", "grammar")


def compiled_guide(
    values: dict[str, Any], served: ServedModel, tools: Sequence[dict[str, Any]] | None = None, opened: bool = False
) -> Compiled | None:
    """The grammar that the fields of a request demand; None: none. `tools`: those that are offered to the model.
    `opened`: the prompt ends inside a thought, behind which the grammar begins. Raises ApiError, with the library's
    reason for a grammar that it does not take.
    """
    wanted = _wanted(values)
    called = called_tools(tools, values.get("tool_choice"))
    if called:
        wanted["tool_choice"] = Guide.calls(called, values.get("parallel_tool_calls") is False or len(called) == 1)
    if not wanted:
        return None
    if len(wanted) > 1:
        raise _wrong(next(iter(wanted)), f"{' and '.join(wanted)} cannot both decide the form of an answer")
    ((name, guide),) = wanted.items()
    if tools and not called:
        raise _wrong(name, "with tools that the model may call, its answer has no fixed form; set tool_choice: none")
    for other in ("ignore_eos", "min_tokens"):
        if values.get(other):
            raise _wrong(other, f"an answer with {name} ends where its form does")
    try:
        return served.grammars.compiled(guide, opened)
    except UserError as error:
        raise ApiError(400, f"{name}: {error}", name, "invalid_grammar") from None


def _wanted(values: dict[str, Any]) -> dict[str, Guide]:
    """The forms that the fields demand, by the field."""
    wanted: dict[str, Guide] = {}
    for kind in _KINDS:
        if f"guided_{kind}" in values:
            wanted[f"guided_{kind}"] = _guide(f"guided_{kind}", kind, values[f"guided_{kind}"])
    if "structured_outputs" in values:
        given = {name: value for name, value in values["structured_outputs"].items() if value not in (None, False)}
        unknown = [name for name in given if name not in (*_KINDS, "json_object")]
        if unknown or len(given) != 1:
            raise _wrong(
                "structured_outputs",
                f"expected one of json, json_object, regex, choice and grammar, got {_shown(given)}",
            )
        ((kind, what),) = given.items()
        name = f"structured_outputs.{kind}"
        wanted["structured_outputs"] = Guide.any_object() if kind == "json_object" else _guide(name, kind, what)
    if "response_format" in values and (guide := _response_format(values["response_format"])) is not None:
        wanted["response_format"] = guide
    return wanted


def _response_format(given: dict[str, Any]) -> Guide | None:
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Guide.any_object()
    if kind != "json_schema":
        raise _wrong("response_format.type", f"expected text, json_object or json_schema, got {str(kind)[:40]!r}")
    described = given.get("json_schema")
    if not isinstance(described, dict) or described.get("schema") is None:
        raise _wrong("response_format.json_schema", 'expected {"name", "schema"}')
    return _guide("response_format.json_schema.schema", "json", described["schema"])


def _guide(name: str, kind: Kind, what: Any) -> Guide:
    if kind == "json":
        if isinstance(what, str):
            try:
                what = parse_json(what, name, UserError)
            except UserError as error:
                raise ApiError(400, str(error), name, "invalid_grammar") from None
        if not isinstance(what, dict):
            raise _wrong(name, f"expected a JSON schema, got {type_name(what)}")
        return Guide("json", what)
    if kind == "choice":
        if not isinstance(what, list) or not 0 < len(what) <= MAX_CHOICES:
            raise _wrong(name, f"expected a list of 1 to {MAX_CHOICES} texts")
        if not all(isinstance(text, str) and text for text in what):
            raise _wrong(name, "expected texts that are not empty")
        return Guide("choice", what)
    if not isinstance(what, str) or not what:
        raise _wrong(name, f"expected a text, got {'an empty one' if what == '' else type_name(what)}")
    return Guide(kind, what)


def _shown(given: dict[str, Any]) -> str:
    return ", ".join(map(repr, given))[:80] or "nothing"


def _wrong(name: str, what: str) -> ApiError:
    return ApiError(400, f"{name}: {what}.", name, "invalid_value")
