"""Reads YAML into keys that record their line and scalars that keep their text, within limits.

It consumes PyYAML's parser events instead of using its constructors: no tag can create an object, and depth, aliases
and the number of values are limited. (A few hundred bytes of nested aliases can expand to more values than fit into
memory.)
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from erniekit.config.values import Scalar
from erniekit.utils.errors import ConfigError
from erniekit.utils.user_files import MAX_DEPTH

MAX_VALUES = 20_000  # in one file; each use of an alias counts all its values again
_TAG = "tag:yaml.org,2002:"
_TEXT = ("!", f"{_TAG}str")
# a key in front of a full-width colon, or of a colon and a full-width or non-breaking space
_OTHER_COLON = re.compile(r"\s*[\w.-]+[ \t]*(?:\uff1a|:[\u3000\u00a0])")
# parts of PyYAML's messages, and what to do
_CURES = {
    "could not find expected ':'": "Write `key: value`, with a space behind the colon",
    "'\\t'": "Indent and separate with spaces, not with tabs",
    "unexpected end of stream": "Close the quotes that begin there",
    "mapping values are not allowed": "Keys of one mapping begin in the same column; a value that has ': ' in it needs "
    "quotes",
    "cannot start any token": "A value that begins with this character needs quotes",
    "while scanning an alias": "A value that begins with * or & needs quotes",
}
# problems that PyYAML notices behind the key or the text that has them
_AT_BEGINNING = ("could not find expected ':'", "found unexpected end of stream")
_PLAIN = tuple(_TAG + name for name in ("int", "float", "bool"))


class _Loader(yaml.SafeLoader):
    """A YAML loader without dates: in `output_dir: 2025-11-21` the value is text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as the class above declares it)
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_RESOLVER = _Loader("")


@dataclass(frozen=True)
class Pairs:
    """A mapping as a list of (key, value, place). Nested mappings are Pairs too."""

    items: list[tuple[str, Any, str]]


def read_mapping(text: str, path: str) -> Pairs:
    """The keys and values of a YAML file. Raises ConfigError with path and line."""
    reader = _Reader(text, path)
    tree = reader.document()
    if not isinstance(tree, Pairs):
        what = "a list" if isinstance(tree, list) else "plain text"
        raise ConfigError(f"{path}: expected `key: value` lines, got {what}.")
    return tree


def read_value(text: str) -> Any:
    """The value of `key=TEXT`: a number, True or null; a 'quoted' text; a [list] or {mapping}; else the text itself."""
    text = text.strip()
    if text[:1] in ("'", '"', "[", "{"):
        try:
            return _Reader(text, "command line").document()
        except ConfigError:
            return text
    tag = _resolved(text)
    return None if tag == f"{_TAG}null" else Scalar(text) if tag in _PLAIN else text


def _resolved(text: str) -> str:
    """The tag that YAML 1.1 gives a scalar without quotes."""
    return str(_RESOLVER.resolve(yaml.ScalarNode, text, (True, False)))


class _Reader:
    """Reads one document."""

    def __init__(self, text: str, path: str):
        self._path = path
        self._text = text
        # &name -> (value, number of values, depth) of what it labels; None while that is being read.
        self._anchors: dict[str, tuple[Any, int, int] | None] = {}
        self._count = self._deepest = 0
        self._line = 0
        try:
            self._loader = _Loader(text)
        except yaml.reader.ReaderError as error:
            self._refuse_character(error)

    def document(self) -> Any:
        """The only document of the text."""
        self._next()  # the beginning of the stream
        event = self._next()
        if isinstance(event, yaml.StreamEndEvent):
            raise ConfigError(f"{self._path}: the file is empty.")
        event = self._next()
        if isinstance(event, yaml.ScalarEvent) and not event.value and event.implicit[0]:
            raise ConfigError(f"{self._path}: the file is empty.")
        tree = self._value(event, 0)
        self._next()  # the end of the document
        if not isinstance(self._next(), yaml.StreamEndEvent):
            self._refuse("a second document begins. Keep one in a file")
        return tree

    def _next(self) -> Any:
        try:
            event = self._loader.get_event()
        except yaml.reader.ReaderError as error:
            self._refuse_character(error)
        except yaml.MarkedYAMLError as error:
            marks = (error.problem_mark, error.context_mark)
            mark = next(filter(None, reversed(marks) if error.problem in _AT_BEGINNING else marks), None)
            line = self._line if mark is None else mark.line
            self._refuse(f"not valid YAML: {error.problem or error.context}{self._cure(error, line)}", line)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: \U00110000, or a version of 5000 digits
            self._refuse(f"not valid YAML: {str(error).splitlines()[0]}", self._loader.get_mark().line)
        self._line = event.start_mark.line
        return event

    def _cure(self, error: yaml.MarkedYAMLError, last: int) -> str:
        """What to do about the error; empty if that is not known. A key up to line `last` (from 0) may end in something
        that only looks like a colon and a space.
        """
        lines = self._text.split("\n")[: last + 1]
        found = [number for number, line in enumerate(lines, 1) if _OTHER_COLON.match(line)]
        if found:
            return f". Line {found[-1]} has a full-width colon or space behind its key: write ': '"
        what = f"{error.context} {error.problem}"
        return next((f". {cure}" for part, cure in _CURES.items() if part in what), "")

    def _refuse(self, what: str, line: int | None = None) -> NoReturn:
        number = (self._line if line is None else line) + 1
        raise ConfigError(f"{self._path}:{number}: {what}.") from None

    def _refuse_character(self, error: "yaml.reader.ReaderError") -> NoReturn:
        line = self._text[: error.position].count("\n")
        self._refuse(f"not valid YAML: the character #x{ord(self._text[error.position]):04x} is not allowed", line)

    def _value(self, event: Any, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event.anchor, depth)
        before, deepest, self._deepest = self._count, self._deepest, depth
        self._grow(1, depth)
        if event.anchor:
            self._anchors[event.anchor] = None
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            self._check_tag(event, "seq")
            value = [self._value(inner, depth + 1) for inner in self._until(yaml.SequenceEndEvent)]
        else:
            self._check_tag(event, "map")
            value = self._mapping(depth)
        if event.anchor:
            self._anchors[event.anchor] = (value, self._count - before, self._deepest - depth)
        self._deepest = max(deepest, self._deepest)
        return value

    def _until(self, end: type) -> Iterator[Any]:
        event = self._next()
        while not isinstance(event, end):
            yield event
            event = self._next()

    def _grow(self, count: int, depth: int) -> None:
        self._count += count
        self._deepest = max(self._deepest, depth)
        if depth >= MAX_DEPTH:
            self._refuse(f"nested more than {MAX_DEPTH} levels deep")
        if self._count > MAX_VALUES:
            self._refuse(f"more than {MAX_VALUES:,} values, each use of an alias counted again")

    def _alias(self, name: str | None, depth: int) -> Any:
        if name is None or name not in self._anchors:
            self._refuse(f"*{name} names nothing: there is no &{name} above it")
        anchored = self._anchors[name]
        if anchored is None:
            self._refuse(f"an alias (*{name}) stands inside what it names")
        value, size, levels = anchored
        self._grow(size, depth + levels)
        return value

    def _check_tag(self, event: Any, expected: str) -> None:
        if event.tag not in (None, "!", _TAG + expected):
            self._refuse(f"the tag {_short(event.tag)} is not taken here. Write the plain value")

    def _scalar(self, event: Any) -> Any:
        text: str = event.value
        if any("\ud800" <= character <= "\udfff" for character in text):
            self._refuse("half of a surrogate pair (\\ud800 to \\udfff), which no text can hold")
        tag = event.tag
        if tag is None or (tag == "!" and event.implicit[0]):
            tag = _resolved(text) if event.implicit[0] else _TEXT[0]
        if tag in _TEXT or tag in (f"{_TAG}merge", f"{_TAG}value"):  # << and = as values are text
            return text
        if tag == f"{_TAG}null":
            return None
        if tag in _PLAIN:
            return Scalar(text)
        return self._refuse(f"the tag {_short(tag)} is not taken here. Write the plain value")

    def _mapping(self, depth: int) -> Pairs:
        local_items: dict[str, tuple[str, Any, str]] = {}
        lines: dict[str | None, int] = {}
        merged: list[Pairs] = []
        for event in self._until(yaml.MappingEndEvent):
            line = self._line + 1
            name = self._key(event)
            shown = "<<" if name is None else name
            if name in lines:
                where = f"lines {lines[name]} and {line} of {self._path}"
                raise ConfigError(f"{shown}: given twice ({where}). Keep one of them.")
            lines[name] = line
            value = self._value(self._next(), depth + 1)
            if name is None:
                merged = self._to_merge(value, line)
            else:
                local_items[name] = (name, value, f"{self._path}:{line}")
        if not merged:
            return Pairs(list(local_items.values()))
        items: dict[str, tuple[str, Any, str]] = {}
        for pairs in reversed(merged):  # the first of several wins
            items |= {item[0]: item for item in pairs.items}
        return Pairs(list((items | local_items).values()))

    def _key(self, event: Any) -> str | None:
        """A key's text as the user wrote it; None for the merge key <<."""
        if isinstance(event, yaml.AliasEvent):
            value = self._alias(event.anchor, 0)
            if isinstance(value, str | Scalar):
                return str(value)
        elif isinstance(event, yaml.ScalarEvent):
            value = self._value(event, 0)
            is_merge = event.tag is None and event.implicit[0] and event.value == "<<"
            return None if is_merge else str(event.value)
        return self._refuse("a key must be a word, not a list or a mapping. Write `key: value`")

    def _to_merge(self, value: Any, line: int) -> list[Pairs]:
        several = value if isinstance(value, list) else [value]
        if not all(isinstance(item, Pairs) for item in several):
            self._refuse("<<: takes a mapping, or a list of mappings (<<: *name)", line - 1)
        return several


def _short(tag: str) -> str:
    tag = tag.replace(_TAG, "!!")
    return tag if len(tag) <= 60 else f"{tag[:60]}..."
