"""All tools of a run by name: built-in ones, those for pictures, and the user's."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from erniekit.config.schema_rollout_tools import CALCULATOR, DOCUMENTS, ZOOM, RolloutToolArgs
from erniekit.data.records.errors import BadRecord
from erniekit.data.vision.encode import VisionSpec
from erniekit.tools.calculator import calculate
from erniekit.tools.documents import DocumentSearch
from erniekit.tools.image_tools import ImageTools
from erniekit.tools.result import BadCall, ToolResult, failure
from erniekit.tools.user_tool import UserTools

_TEXT_TOOLS = {
    CALCULATOR: ("Computes the value of an arithmetic expression.", "expression", "Such as 2 * (3 + 4)."),
    DOCUMENTS: ("Finds passages of a collection of texts that have the words of a query.", "query", "The words."),
}


class Toolbox:
    """Executes calls of the tools that `args.tools` names. Close it to end the process of the user's own tools.

    Raises ConfigError for what a tool needs and does not find.
    """

    def __init__(self, args: RolloutToolArgs, base: Path, vision: VisionSpec | None = None) -> None:
        """`base`: paths of the user's files are relative to it. `vision`: how pictures are prepared; None: the model
        reads text alone.
        """
        self._text: dict[str, Callable[[str], str]] = {}
        if CALCULATOR in args.tools:
            self._text[CALCULATOR] = calculate
        if DOCUMENTS in args.tools:
            assert args.document_search_path is not None, "config/checks.py requires it"
            self._search = DocumentSearch(base / args.document_search_path)
            self._text[DOCUMENTS] = self._documents
        self._pictures: ImageTools | None = None
        if ZOOM in args.tools:
            assert vision is not None, "config/checks.py requires it"
            self._pictures = ImageTools([ZOOM], vision)
        self._users = UserTools([name for name in args.tools if ".py:" in name], base, args.tool_timeout)
        self._of_user = {tool["function"]["name"]: tool["function"] for tool in self._users.descriptions}

    @property
    def descriptions(self) -> list[dict[str, Any]]:
        """The tools as chat templates show them to the model."""
        texts = [_described(name, *_TEXT_TOOLS[name]) for name in self._text]
        pictures = [] if self._pictures is None else self._pictures.descriptions
        return [*texts, *pictures, *self._users.descriptions]

    def run(self, call: dict[str, Any], messages: Sequence[dict[str, Any]]) -> ToolResult:
        """Execute a call, {"name": str, "arguments": dict}, about the pictures of `messages`. Whatever is wrong with it
        is the text of the result.
        """
        name, arguments = call["name"], call["arguments"]
        try:
            if name in self._text:
                text = self._text[name](_argument(name, arguments))
            elif name in self._of_user:
                _check(self._of_user[name], arguments)
                text = self._users.run(name, arguments)
            elif self._pictures is not None:
                return self._pictures.run(call, messages)
            else:
                names = [tool["function"]["name"] for tool in self.descriptions]
                raise BadCall(f"there is no tool {name!r:.80}; the tools are {', '.join(names)}")
        except (BadCall, BadRecord) as error:  # a picture that cannot be read is a BadRecord
            return failure(str(error))
        return ToolResult(text, text[:80])

    def close(self) -> None:
        """End the process of the user's tools."""
        self._users.close()

    def _documents(self, query: str) -> str:
        found = self._search.find(query)
        if not found:
            raise BadCall("no text has any of these words")
        return "\n".join(found)


def _argument(name: str, arguments: dict[str, Any]) -> str:
    """The only argument of a tool that takes text."""
    wanted = _TEXT_TOOLS[name][1]
    if set(arguments) != {wanted}:
        raise BadCall(f"{name} has one argument, {wanted}")
    value = arguments[wanted]
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise BadCall(f"{wanted} must be text")
    return str(value)


def _check(function: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Raise BadCall for arguments that a function does not have, or lacks."""
    parameters = function["parameters"]
    if unknown := sorted(set(arguments) - set(parameters["properties"])):
        known = ", ".join(parameters["properties"]) or "none"
        raise BadCall(f"{function['name']} has no argument {unknown[0]!r:.80}; its arguments are {known}")
    if missing := [name for name in parameters["required"] if name not in arguments]:
        raise BadCall(f"{function['name']} needs the argument {missing[0]}")


def _described(name: str, description: str, argument: str, meaning: str) -> dict[str, Any]:
    properties = {argument: {"type": "string", "description": meaning}}
    parameters = {"type": "object", "properties": properties, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
