"""Reads small files that come from a user: regular files of limited size, and JSON by strict rules.

Python's JSON parser keeps the last of two equal keys, accepts NaN and Infinity, and raises five kinds of exception.
Here each of these raises the caller's error class (a subclass of UserError) with the file, the place and a remedy.
"""

import contextlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from erniekit.utils.errors import UserError

MAX_BYTES = 64 << 20  # for configuration files; data files have a separate reader
LFS_POINTER = b"version https://git-lfs"  # how a file begins that stands for one that was not downloaded
MAX_DEPTH = 100  # of nested lists and objects

T = TypeVar("T")


def read_bytes(path: Path, error: type[UserError], limit: int = MAX_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes. Pipes, devices and directories are refused unread.

    FileNotFoundError is raised as it is, since only the caller knows what a missing file means.
    """
    with open_regular(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise error(f"{path}: {size:,} bytes; such a file has at most {limit:,}. Is it the right file?")
        return file.read()


@contextlib.contextmanager
def open_regular(path: Path, error: type[UserError]) -> Iterator[BinaryIO]:
    """Opens a regular file for reading; pipes, devices, directories and pointers of Git LFS are refused. OSErrors of
    opening and reading are raised as `error`, except for FileNotFoundError, which is raised as it is.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe without a writer would wait forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise error(f"{path}: not a regular file. Replace it by one.")
            if os.pread(descriptor, len(LFS_POINTER), 0) == LFS_POINTER:
                raise error(
                    f"{path}: a pointer of Git LFS in place of the file. Run `git lfs pull` where it was cloned, or "
                    "download it again."
                )
            yield file
    except FileNotFoundError:
        raise
    except IsADirectoryError:
        raise error(f"{path}: a directory, not a file. Remove or rename it.") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}. Check the path and its permissions.") from None


def decode(data: bytes, where: str, error: type[UserError]) -> str:
    """Decodes UTF-8 text and removes a byte-order mark at the beginning."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data[: problem.start].count(b"\n") + 1
        raise error(f"{where}: not UTF-8 text (line {line}). Save the file as UTF-8.") from None


def read_text(path: Path, error: type[UserError], limit: int = MAX_BYTES) -> str:
    """The text of a file in UTF-8."""
    return decode(read_bytes(path, error, limit), str(path), error)


def read_json(path: Path, error: type[UserError], limit: int = MAX_BYTES) -> Any:
    """The content of a JSON file."""
    return parse_json(read_text(path, error, limit), str(path), error)


def read_json_object(path: Path, error: type[UserError], limit: int = MAX_BYTES) -> dict[str, Any]:
    """The content of a JSON file that holds one object."""
    content = read_json(path, error, limit)
    if not isinstance(content, dict):
        raise error(f"{path}: must hold one JSON object, found {kind(content)}.")
    return content


def parse_json(
    text: str,
    where: str,
    error: type[UserError],
    *,
    number: Callable[[str], Any] | None = None,
    strict: bool = True,
) -> Any:
    """Parses a JSON text. Refused with `where` in the message: syntax errors, duplicate keys in an object, NaN,
    Infinity and numbers too large for a float, more than MAX_DEPTH levels, integers too long for Python, half of a
    surrogate pair.

    number: converts the text of a number; by default to Python's int or float. strict: False allows raw control
    characters in strings.
    """
    try:
        content = (_DECODER if number is None and strict else _decoder(number, strict)).decode(text)
    except json.JSONDecodeError as problem:
        # A text that ends too early is wrong behind its last character, not behind the line break that follows.
        at = min(problem.pos, len(text.rstrip()))
        line = f"line {text.count(chr(10), 0, at) + 1}, " if "\n" in text.strip() else ""
        what = problem.msg.removesuffix(" at")  # "Invalid control character at"
        raise error(f"{where}: not JSON: {what} at {line}column {at - text.rfind(chr(10), 0, at)}.") from None
    except RecursionError:
        raise error(f"{where}: JSON nested more than {MAX_DEPTH} levels deep.") from None
    except ValueError as problem:  # _Refused, or Python's limit on the digits of an integer
        reason = str(problem) if isinstance(problem, _Refused) else "an integer with more than 4300 digits"
        raise error(f"{where}: {reason}.") from None
    _check_depth(content, text, where, error)
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(content, ensure_ascii=False, default=str).encode("utf-8")
        except UnicodeEncodeError:
            raise error(f"{where}: a \\ud800-\\udfff escape that is half of a pair; no text can hold it.") from None
    return content


class _Refused(ValueError):
    """A text that Python's parser accepts and this module refuses."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON parser's pairs (`object_pairs_hook`). Raises ValueError for a key that stands twice."""
    content = dict(pairs)
    if len(content) != len(pairs):
        keys: set[str] = set()
        twice = next(key for key, _ in pairs if key in keys or keys.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"the key {twice!r} stands twice in one object; keep one of them")
    return content


def _no_constant(name: str) -> Any:
    raise _Refused(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _Refused(f"the number {text[:40]} is too large to be held")
    return number


def _decoder(number: Callable[[str], Any] | None, strict: bool) -> json.JSONDecoder:
    return json.JSONDecoder(
        strict=strict,
        object_pairs_hook=unique_keys,
        parse_constant=_no_constant,
        parse_int=number,
        parse_float=number or _finite,
    )


_DECODER = _decoder(None, True)  # made once, since data files have millions of records


def _check_depth(content: Any, text: str, where: str, error: type[UserError]) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    level, depth = [content], 0
    while level:
        if depth >= MAX_DEPTH:
            raise error(f"{where}: JSON nested more than {MAX_DEPTH} levels deep.")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
        level, depth = [value for value in inner if isinstance(value, (dict, list))], depth + 1


def kind(value: Any) -> str:
    """The JSON type of a value for messages: "a list", "null" and so on."""
    if value is None:
        return "null"
    names: Mapping[type, str] = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


class JsonObject:
    """Typed access to one object of a user's JSON file. Every error names the file and the key.

    `get_*` return `default` if the key is absent or null. `where` is the file, or "file: key" for an inner object.
    """

    def __init__(self, values: Mapping[str, Any], where: str, error: type[UserError]) -> None:
        self.values, self.where, self.error = values, where, error

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get_text(self, key: str, default: T) -> str | T:
        return self._get(key, default, "text", lambda value: isinstance(value, str))

    def get_bool(self, key: str, default: T) -> bool | T:
        return self._get(key, default, "true or false", lambda value: isinstance(value, bool))

    def get_int(self, key: str, default: T, low: int | None = None, high: int | None = None) -> int | T:
        def fits(value: Any) -> bool:
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            return is_integer and (low is None or value >= low) and (high is None or value <= high)

        return self._get(key, default, "an integer" + _bounds(low, high), fits)

    def get_number(self, key: str, default: T, low: float | None = None, high: float | None = None) -> float | T:
        def fits(value: Any) -> bool:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            finite = is_number and abs(value) < 1e308  # 1e999 reads as infinity
            return finite and (low is None or value >= low) and (high is None or value <= high)

        return self._get(key, default, "a number" + _bounds(low, high), fits)

    def get_object(self, key: str) -> "JsonObject":
        """An inner object; an empty one if the key is absent or null."""
        values = self._get(key, {}, "an object", lambda value: isinstance(value, dict))
        return JsonObject(values, f"{self.where}: {key}", self.error)

    def get_list(self, key: str, default: T) -> list[Any] | T:
        return self._get(key, default, "a list", lambda value: isinstance(value, list))

    def get_choice(self, key: str, default: T, choices: Sequence[str]) -> str | T:
        return self._get(key, default, "one of " + ", ".join(choices), lambda value: value in choices)

    def _get(self, key: str, default: Any, expected: str, fits: Callable[[Any], bool]) -> Any:
        value = self.values.get(key)
        if value is None:
            return default
        if not fits(value):
            shown = repr(value) if len(repr(value)) <= 60 else kind(value)
            raise self.error(f"{self.where}: {key}: must be {expected}, found {shown}.")
        return value


def _bounds(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f" from {_number(low)} to {_number(high)}"
    if low is not None:
        return f" of at least {_number(low)}"
    return "" if high is None else f" of at most {_number(high)}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
