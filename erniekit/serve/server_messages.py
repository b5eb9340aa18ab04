"""The messages of a request in the form that chat templates take."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from erniekit.data.chat.template import Template
from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes
from erniekit.data.vision.encode import VisionSpec
from erniekit.data.vision.images import load_image
from erniekit.data.vision.media import MediaReader
from erniekit.serve.server_errors import ApiError
from erniekit.serve.server_fields import type_name
from erniekit.serve.server_video import uri_content, video_content
from erniekit.utils import log
from erniekit.utils.errors import DataError, UserError
from erniekit.utils.user_files import parse_json
from erniekit.utils.wording import count_of

MAX_MESSAGES = 10_000
MAX_IMAGE_PIXELS = 50_000_000
MAX_TOOLS = 256
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_FIELDS = {
    "system": ("role", "content", "name"),
    "user": ("role", "content", "name"),
    "assistant": (
        "role content name tool_calls reasoning_content reasoning thoughts refusal audio annotations function_call "
        "parsed"  # what OpenAI's client has read from `content`, and sends back with it
    ).split(),
    "tool": ("role", "content", "tool_call_id", "name"),
}
_CALL_FIELDS = ("id", "type", "function", "index")  # `index`: of a call that was put together from a stream
_FUNCTION_FIELDS = ("name", "arguments", "parsed_arguments")  # the last one as `parsed` above
_TEXT_FIELDS = ("type", "text", "id", "index", "annotations", "cache_control")  # the last four say nothing to the model
_UNSHOWN = ("name", "annotations")  # accepted, and not part of a prompt; the name of a tool is
_OPTIONS = frozenset(
    "detail min_pixels max_pixels fps video_fps min_frames max_frames target_frames num_frames time_stamps "
    "resized_width resized_height".split()
)
_THOUGHTS = ("reasoning_content", "reasoning", "thoughts")
_IMAGES = ("data:image/png", "data:image/jpeg", "data:image/jpg", "data:image/webp", "data:image/bmp")

_BEGINNINGS = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"RIFF", b"BM")  # of the files of these formats


class Messages:
    """Reads the messages of one request. `notes` collects what was decided about its pictures. `is_local`: they are of
    this process itself, which may name files and give pictures in memory. `places`: the field that each picture or
    video came from, by the id of its part.
    """

    def __init__(self, template: Template, vision: VisionSpec | None, max_images: int, is_local: bool = False) -> None:
        self.notes = Notes()
        self.num_images = 0
        self.places: dict[int, str] = {}
        self._is_local = is_local
        self._template, self._vision, self._max_images = template, vision, max_images
        self._takes_json_text = "arguments is string" in template.source

    def read(self, messages: list[Any]) -> list[dict[str, Any]]:
        """The messages, tool results in the order of their calls. Raises ApiError that names what is wrong."""
        if not messages:
            raise _wrong("messages", "expected at least one message")
        if len(messages) > MAX_MESSAGES:
            raise _wrong("messages", f"at most {MAX_MESSAGES} messages, got {len(messages)}")
        read = [self._message(message, f"messages[{i}]") for i, message in enumerate(messages)]
        return _in_order_of_calls(read)

    def _message(self, message: Any, name: str) -> dict[str, Any]:
        if not isinstance(message, dict):
            raise _wrong(name, f"expected an object, got {type_name(message)}")
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise _wrong(f"{name}.role", f"expected {', '.join(_ROLES)}, got {str(role)[:40]!r}")
        role = _ROLES[role]
        unknown = [field for field, value in message.items() if field not in _FIELDS[role] and value is not None]
        if unknown:
            raise _wrong(f"{name}.{unknown[0][:40]}", f"unknown field of a message with the role {role}")
        _report_unshown(message, role)
        if role == "assistant":
            return self._of_assistant(message, name)
        if message.get("content") is None:
            raise _wrong(f"{name}.content", "the field is missing")
        result: dict[str, Any] = {"role": role, "content": self._content(message["content"], name)}
        if role == "tool":
            call_id = message.get("tool_call_id")
            if call_id is not None and not isinstance(call_id, str):
                raise _wrong(f"{name}.tool_call_id", f"expected text, got {type_name(call_id)}")
            result |= {"tool_call_id": call_id or "", "name": _text(message.get("name"), f"{name}.name")}
        return result

    def _of_assistant(self, message: dict[str, Any], name: str) -> dict[str, Any]:
        for field in ("audio", "function_call", "refusal"):
            if message.get(field):
                raise _wrong(f"{name}.{field}", "such answers are not known; leave the field out")
        content = message.get("content")
        result: dict[str, Any] = {"role": "assistant", "content": self._content(content, name)}
        thought = next((message[field] for field in _THOUGHTS if message.get(field)), None)
        if thought is not None:
            if self._shows_thoughts():
                result["reasoning_content"] = _text(thought, f"{name}.reasoning_content")
            else:
                log.once(f"thoughts in earlier messages: no effect: chat template {self._template.name} shows none")
        calls = message.get("tool_calls")
        if calls:
            if not isinstance(calls, list):
                raise _wrong(f"{name}.tool_calls", f"expected a list, got {type_name(calls)}")
            result["tool_calls"] = [self._call(call, f"{name}.tool_calls[{i}]") for i, call in enumerate(calls)]
        elif content is None and thought is None:  # an answer that was cut off inside its thought has no text
            raise _wrong(f"{name}.content", "expected text where there are neither tool_calls nor a thought")
        return result

    def _shows_thoughts(self) -> bool:
        """Whether the template shows earlier thoughts; one that has no place for them refuses them."""
        answer = {"role": "assistant", "content": "a", "reasoning_content": "t"}
        try:
            self._template.render([{"role": "user", "content": "q"}, answer])
        except DataError:
            return False
        return self._template.shows("reasoning_content")

    def _call(self, call: Any, name: str) -> dict[str, Any]:
        """One call. Its arguments stay the text that the model wrote, where the template takes text."""
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise _wrong(name, 'expected {"id", "type": "function", "function": {"name", "arguments"}}')
        if call.get("type") not in (None, "function"):
            raise _wrong(f"{name}.type", f"expected function, got {str(call['type'])[:40]!r}")
        _refuse_unknown(call, _CALL_FIELDS, name)
        _refuse_unknown(function, _FUNCTION_FIELDS, f"{name}.function")
        arguments = function.get("arguments")
        parsed = arguments
        if isinstance(arguments, str):
            place = f"{name}.function.arguments"
            try:
                parsed = parse_json(arguments or "{}", place, UserError)
            except UserError as error:
                raise ApiError(400, str(error), place, "invalid_value") from None
        parsed = {} if parsed is None else parsed
        if not isinstance(parsed, dict):
            raise _wrong(f"{name}.function.arguments", f"expected an object as JSON text, got {type_name(parsed)}")
        keeps_text = self._takes_json_text and isinstance(arguments, str) and arguments
        shown = {"name": function["name"], "arguments": arguments if keeps_text else parsed}
        return {"id": _text(call.get("id"), f"{name}.id"), "type": "function", "function": shown}

    def _content(self, content: Any, name: str) -> Any:
        if content is None:
            return ""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise _wrong(f"{name}.content", f"expected text or a list of parts, got {type_name(content)}")
        parts = [self._part(part, f"{name}.content[{i}]") for i, part in enumerate(content)]
        if all(part["type"] == "text" for part in parts):
            return "".join(part["text"] for part in parts)
        return parts

    def _part(self, part: Any, name: str) -> dict[str, Any]:
        kind: Any = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            _refuse_unknown(part, _TEXT_FIELDS, name)
            return {"type": "text", "text": _text(part.get("text"), f"{name}.text", required=True)}
        kinds = ("image_url", "video_url", "image_pil") if self._is_local else ("image_url", "video_url")
        if kind not in kinds:
            raise _wrong(f"{name}.type", f"expected text, {' or '.join(kinds)}, got {str(kind)[:40]!r}")
        self._count_picture(name)
        result = self._medium(part, kind, name)
        _report_unread(part, kind)
        self.places[id(result)] = f"{name}.{kind}"
        return result

    def _medium(self, part: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
        if kind == "video_url":
            return {"type": "video", "video": video_content(part, name)}
        image = part.get(kind)
        if kind == "image_pil" or (self._is_local and isinstance(image, dict) and _is_file(image.get("url"))):
            return {"type": "image", "image": self._local_pixels(image, name)}
        url = image.get("url") if isinstance(image, dict) else image
        return {"type": "image", "image": self._pixels(url, name)}

    def _count_picture(self, name: str) -> None:
        if self._vision is None:
            raise _wrong(name, "this model reads text alone, so it cannot be shown a picture")
        self.num_images += 1
        if self.num_images > self._max_images:
            raise _wrong(
                name,
                f"at most {count_of(self._max_images, 'picture or video', 'pictures and videos')} in a request "
                "(max_request_images)",
            )

    def _pixels(self, url: Any, name: str) -> Any:
        """The pixels of a data URI; nothing else is opened."""
        assert self._vision is not None
        name = f"{name}.image_url"
        if not isinstance(url, str):
            raise _wrong(name, f'expected {{"url": "data:image/png;base64,..."}}, got {type_name(url)}')
        content = uri_content(url, _IMAGES, "pictures", "PNG, JPEG, WebP or BMP", name)
        if not content.startswith(_BEGINNINGS):
            raise _wrong(name, "the data URI holds no PNG, JPEG, WebP or BMP")
        return self._decoded(content, name)

    def _local_pixels(self, image: Any, name: str) -> Any:
        """The pixels of a picture of Pillow, or of a file that is named by file://."""
        if not isinstance(image, dict):
            if not isinstance(image, Image.Image):
                raise _wrong(f"{name}.image_pil", f"expected a PIL.Image.Image, got {type_name(image)}")
            return self._decoded(image, f"{name}.image_pil")
        path = Path(unquote(urlsplit(image["url"]).path))
        try:
            return self._decoded(path.read_bytes(), name)
        except OSError as error:
            raise _wrong(f"{name}.image_url", f"cannot read {path}: {error.strerror}") from None

    def _decoded(self, content: bytes | Image.Image, name: str) -> Any:
        assert self._vision is not None
        options = self._vision.images
        options = replace(options, max_pixels_decoded=min(options.max_pixels_decoded, MAX_IMAGE_PIXELS))
        try:
            return load_image(content, MediaReader(Path("/nonexistent")), options, self.notes)
        except BadRecord as error:
            raise _wrong(name, error.reason) from None


def _report_unshown(message: dict[str, Any], role: str) -> None:
    """A line about fields that are accepted and not part of the prompt."""
    for field in _UNSHOWN:
        if message.get(field) and not (field == "name" and role == "tool"):
            log.once(f"{field} in messages: no effect: chat templates are not given it, so the model does not see it")


def _report_unread(part: dict[str, Any], kind: str) -> None:
    """A line about fields of a picture or video that change nothing. A client's own words are not logged: each would
    be a line.
    """
    inner = part[kind] if isinstance(part[kind], dict) else {}
    given = {key for fields in (part, inner) for key, value in fields.items() if value is not None}
    unread = given - {"type", kind, "url", "uuid", "cache_control"}
    if inner.get("detail") == "auto":
        unread.discard("detail")
    if unread:
        names = ", ".join(sorted(unread & _OPTIONS)) or "fields that are not known"
        log.once(f"{names} of {kind} in messages: no effect: pictures and videos are read as the server's keys say")


def _is_file(url: Any) -> bool:
    return isinstance(url, str) and url.startswith("file://")


def read_tools(tools: list[Any], choice: Any) -> list[dict[str, Any]] | None:
    """The tools that are offered to the model; None: none. Raises ApiError."""
    if not isinstance(choice, dict) and choice not in (None, "auto", "none", "required"):
        message = f"tool_choice: expected auto, none, required or a function, got {choice[:40]!r}."
        raise ApiError(400, message, "tool_choice", "invalid_value")
    if not tools and choice not in (None, "none"):
        raise ApiError(400, "tool_choice: there are no tools to choose from.", "tool_choice", "invalid_value")
    if len(tools) > MAX_TOOLS:
        raise _wrong("tools", f"at most {MAX_TOOLS}, got {len(tools)}")
    for i, tool in enumerate(tools):
        is_function = isinstance(tool, dict) and tool.get("type", "function") == "function"
        function = tool.get("function") if is_function else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise _wrong(f"tools[{i}]", 'expected {"type": "function", "function": {"name", "parameters"}}')
        _check_parameters(function.get("parameters"), f"tools[{i}].function.parameters")
    if not tools or choice == "none":
        return None
    return tools


def _check_parameters(parameters: Any, name: str) -> None:
    """Raises ApiError for a schema of the arguments of a call, which are an object, that is of anything else."""
    if parameters is None:
        return
    if not isinstance(parameters, dict):
        raise _wrong(name, f"expected a JSON schema of an object, got {type_name(parameters)}")
    if parameters.get("type") not in (None, "object"):
        raise _wrong(f"{name}.type", f"expected object, got {json.dumps(parameters['type'])[:40]}")


def called_tools(tools: Sequence[dict[str, Any]] | None, choice: Any) -> list[dict[str, Any]]:
    """The tools of which `tool_choice` demands a call; none where the model decides. Raises ApiError."""
    if not tools or choice in (None, "auto", "none"):
        return []
    if choice == "required":
        return list(tools)
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    called = [tool for tool in tools if tool["function"]["name"] == name]
    if choice.get("type") != "function" or not called:
        known = ", ".join(tool["function"]["name"] for tool in tools)[:200]
        message = f'tool_choice: expected {{"type": "function", "function": {{"name"}}}} with one of {known}.'
        raise ApiError(400, message, "tool_choice", "invalid_value")
    return called[:1]


def _in_order_of_calls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring results of tools, sorted as the calls before them; results without an id stay where they are. Raises
    ApiError for a result of no call, or of one that has a result: templates show no ids, so the model would take it for
    that of another call.
    """
    result: list[dict[str, Any]] = []
    order: dict[str, int] = {}
    start = 0
    for place, message in enumerate(messages):
        if message["role"] != "tool":
            start = len(result) + 1
            calls = message.get("tool_calls", ())
            order = {call["id"]: i for i, call in enumerate(calls)}
            order = order if len(order) == len(calls) else {}  # equal ids tell nothing
        elif message["tool_call_id"] and any(order):
            _check_id(message["tool_call_id"], order, result[start:], f"messages[{place}].tool_call_id")
        result.append(message)
        ids = [item["tool_call_id"] for item in result[start:]] if message["role"] == "tool" else []
        if len(ids) > 1 and all(item in order for item in ids):
            result[start:] = sorted(result[start:], key=lambda item: order[item["tool_call_id"]])
    return result


def _check_id(call_id: str, calls: Iterable[str], results: Sequence[dict[str, Any]], name: str) -> None:
    """Raises ApiError for the id of a result that none of the `calls` has, or one of the earlier `results`."""
    if call_id not in calls:
        raise _wrong(name, f"no call of the message before has the id {call_id[:40]!r}; {', '.join(calls)[:200]} have")
    if any(result["tool_call_id"] == call_id for result in results):
        raise _wrong(name, f"the call {call_id[:40]!r} has a result already")


def _text(value: Any, name: str, required: bool = False) -> str:
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise _wrong(name, f"expected text, got {type_name(value)}")
    return value


def _refuse_unknown(given: dict[str, Any], known: Sequence[str], name: str) -> None:
    """Raises ApiError for a field that would change nothing, such as `parameters` in the place of `arguments`."""
    for field, value in given.items():
        if field not in known and value is not None:
            raise _wrong(f"{name}.{field[:40]}", f"unknown field, expected {', '.join(known)}")


def _wrong(name: str, what: str) -> ApiError:
    return ApiError(400, f"{name}: {what}.", name, "invalid_value")
