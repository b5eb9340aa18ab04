"""Reads values of a record's fields: text, lists, and JSON that may be given as text. Wrong values raise BadRecord."""

import json
import re
from typing import Any

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes, has_content
from erniekit.utils.errors import DataError
from erniekit.utils.user_files import parse_json


def kind_of(value: Any) -> str:
    """JSON's name for the type of a value, with an article."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
        bytes: "bytes that are not declared as text, or not UTF-8",
    }
    return names.get(type(value), type(value).__name__)


def text_of(value: Any, name: str, empty_ok: bool = False) -> str:
    """Checks that `value` is a string that is not blank and can be encoded as UTF-8, and returns it."""
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


def one_of(record: dict[str, Any], first: str, second: str) -> str | None:
    """Which of two fields a record has; None if it has neither, or both. A field without content counts as absent
    where the other one is there: tables have every column in every record.
    """
    given = [name for name in (first, second) if name in record]
    if len(given) == 2:
        given = [name for name in given if has_content(record[name])]
    return given[0] if len(given) == 1 else None


def texts_of(record: dict[str, Any], name: str) -> list[Any]:
    """A field that is a string or a list of strings, as a list (whose items are not checked yet)."""
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
    """A field that is a list with at least one item."""
    value = record.get(name)
    if not isinstance(value, list) or not value:
        raise BadRecord(
            f"{name!r} must be a list with at least one entry" + ("" if name in record else ", but it is missing"),
            "check the field and the dataset type",
        )
    return value


def is_text_parts(value: Any) -> bool:
    """Whether the content of a message is text parts in OpenAI's form."""
    return (
        isinstance(value, list) and bool(value) and all(isinstance(p, dict) and p.get("type") == "text" for p in value)
    )


def content_of(value: Any, name: str) -> Any:
    """The content of a message, with text parts in OpenAI's form joined; any other value is returned unchanged."""
    if not isinstance(value, list) or not value:
        return value
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            what = repr(part["type"]) if isinstance(part, dict) and "type" in part else kind_of(part)
            raise BadRecord(f"{name}[{i}] is not a text part but {what}", "put the text itself there, as a string")
        texts.append(text_of(part.get("text"), f"{name}[{i}].text", empty_ok=True))
    return "".join(texts)


def json_of(value: Any, name: str, notes: Notes) -> Any:
    """A JSON value, which may also be given as JSON text; blank text means null.

    Raw line breaks and tabs inside strings of the text are accepted with a note: JSON requires them to be escaped, but
    their meaning is clear.
    """
    if not isinstance(value, str):
        return value if value is None else checked_json(value, name)
    if not value.strip():
        return None
    try:
        return parse_json(value, name, DataError)
    except DataError as error:
        wrong = error
    if not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", value):
        try:
            content = parse_json(value, name, DataError, strict=False)
            notes.doubts.add("JSON text with raw line breaks or tabs in its strings is read as if they were escaped")
            return content
        except DataError:
            pass
    raise BadRecord(str(wrong).removesuffix("."), "write valid JSON: check quotes and brackets") from None


def checked_json(value: Any, name: str) -> Any:
    """Checks that JSON can represent `value`, and returns it: parquet columns may contain dates, bytes or NaN."""
    json_text(value, name)
    return value


def json_text(value: Any, name: str) -> str:
    """Converts `value` to JSON text."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRecord(f"{name} holds what JSON cannot hold ({error})", "write it as text or as a number") from None
