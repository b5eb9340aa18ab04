"""Replaces ${...} in values, in OmegaConf's syntax.

`${oc.env:NAME}` and `${env:NAME}` are the environment variable NAME; `${oc.env:NAME,text}` is `text` if it is not set.
`${key}` is the value of another key that is given, otherwise the environment variable of that name. `$${` is a literal
`${`. Anything else is an error that names the key and its place, since nobody names a directory ${NAME} on purpose.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from erniekit.config.read import Entry
from erniekit.config.values import Scalar
from erniekit.utils import runtime
from erniekit.utils.errors import ConfigError

_MAX_LENGTH = 100_000  # characters of a resolved value; keys that repeat one another grow exponentially
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_RESOLVER = re.compile(r"(?P<resolver>[A-Za-z_][\w.]*):(?P<rest>.*)", re.ASCII | re.DOTALL)
_LITERAL = "For a literal ${ write $${"


def escape(text: str) -> str:
    """Escapes a text for a YAML file that this module reads again."""
    return text.replace("${", "$${")


def resolve(layers: Sequence[Sequence[Entry]]) -> list[list[Entry]]:
    """The entries with every ${...} replaced. ${key} refers to the value in the last layer that gives the key."""
    given: dict[str, Entry] = {entry.name: entry for entries in layers for entry in entries}
    resolver = _Resolver(given)
    return [[replace(entry, value=resolver.value(entry)) for entry in entries] for entries in layers]


def variables(entries: Sequence[Entry]) -> list[str]:
    """The environment variables that values refer to. None of them is read."""
    finder = _Finder({entry.name: entry for entry in entries})
    for entry in entries:
        with contextlib.suppress(ConfigError):  # `resolve` reports what is wrong with a reference
            finder.value(entry)
    return finder.names


class _Resolver:
    """Replaces the references of one configuration."""

    def __init__(self, given: Mapping[str, Entry]):
        self._given = given
        self._done: dict[str, Any] = {}
        self._open: list[str] = []  # the chain of keys being resolved, to detect cycles
        self._entry = Entry("", None, "")  # the entry being resolved, for messages

    def value(self, entry: Entry) -> Any:
        """The entry's value with all references replaced."""
        outer, self._entry = self._entry, entry
        self._open.append(entry.name)
        try:
            return self._tree(entry.value)
        finally:
            self._open.pop()
            self._entry = outer

    def _tree(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._text(value) if "${" in value else value
        if isinstance(value, list | tuple):
            return [self._tree(inner) for inner in value]
        return {name: self._tree(inner) for name, inner in value.items()} if isinstance(value, dict) else value

    def _text(self, text: str) -> Any:
        """The text with its references replaced; if the text is just ${key}, that key's value with its type."""
        resolved: list[Any] = []
        position = 0
        while (start := text.find("${", position)) >= 0:
            if start > position and text[start - 1] == "$":
                resolved += [text[position : start - 1], "${"]
                position = start + 2
                continue
            if start > position and text[start - 1] == "\\":
                self._refuse(text, f"a backslash does not escape it here. {_LITERAL}")
            end = self._closing(text, start)
            value = self._reference(text[start : end + 1], text[start + 2 : end])
            if start == 0 and end == len(text) - 1:
                return value
            if not isinstance(value, str | int | float | Scalar) or isinstance(value, bool):
                self._refuse(
                    text[start : end + 1], "its value is not a text or number, so it cannot be put into another text"
                )
            resolved += [text[position:start], str(value)]
            position = end + 1
        whole = "".join([*resolved, text[position:]])
        if len(whole) > _MAX_LENGTH:
            self._refuse(text[:60], f"more than {_MAX_LENGTH:,} characters once it is replaced")
        return whole

    def _closing(self, text: str, start: int) -> int:
        depth, position = 0, start
        while position < len(text):
            if text.startswith("${", position):
                depth, position = depth + 1, position + 2
                continue
            if text[position] == "}":
                depth -= 1
                if depth == 0:
                    return position
            position += 1
        self._refuse(text, f"the closing }} is missing. {_LITERAL}")

    def _reference(self, whole: str, inner: str) -> Any:
        """The value of one ${...}."""
        if len(self._open) > 50 or inner.count("${") > 50:
            self._refuse(whole[:60], "more than 50 references inside one another")
        if "${" in inner:
            inner = str(self._text(inner))
        match = _RESOLVER.fullmatch(inner.strip())
        if match:
            if match["resolver"] not in ("oc.env", "env"):
                self._refuse(whole, f"unknown resolver {match['resolver']}: only oc.env is known. {_LITERAL}")
            name, comma, default = match["rest"].partition(",")
            return self._variable(whole, name.strip(), default.strip() if comma else None)
        name = inner.strip().rpartition(".")[2]  # a key has the same name inside and outside its block
        if not _NAME.fullmatch(name):
            self._refuse(whole, f"neither a key nor ${{oc.env:NAME}}. {_LITERAL}")
        if name not in self._given:
            return self._variable(whole, name, None)
        if name in self._open:
            self._refuse(whole, f"it refers to itself ({' -> '.join([*self._open, name])})")
        if name not in self._done:
            self._done[name] = self.value(self._given[name])
        return self._done[name]

    def _variable(self, whole: str, name: str, default: str | None) -> str:
        if not _NAME.fullmatch(name):
            self._refuse(whole, f"{name!r} is not a valid name of an environment variable. {_LITERAL}")
        value = runtime.environment_variable(name)
        if value is None:
            value = default
        if value is None:
            self._refuse(
                whole,
                f"no key that is given and no environment variable is called {name}. Set it, or write "
                f"${{oc.env:{name},VALUE}} for a value without it. {_LITERAL}",
            )
        return value

    def _refuse(self, whole: str, why: str) -> NoReturn:
        raise ConfigError(f"{self._entry.name}: {whole}: {why} ({self._entry.place}).")


class _Finder(_Resolver):
    """Notes the names of environment variables, without their values."""

    def __init__(self, given: Mapping[str, Entry]):
        super().__init__(given)
        self.names: list[str] = []

    def _variable(self, whole: str, name: str, default: str | None) -> str:
        self.names.append(name)
        return ""
