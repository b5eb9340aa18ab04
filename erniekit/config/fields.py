"""How one key is declared, and how a value from YAML, JSON or the command line becomes that key's type."""

import dataclasses
import operator
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from erniekit.config.paths import PathKind, expand
from erniekit.config.values import Scalar, join_list, shown, split_list, to_bool, to_float, to_int

_NULL = {"none", "null", ""}


def key(
    default: Any,
    doc: str,
    *,
    choices: Sequence[str] = (),
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    off: float | None = None,
    many: bool = False,
    path: PathKind = "",
    words: Mapping[str, str] | None = None,
) -> Any:
    """One key of the configuration: its default, its one-line documentation and the values it takes.

    choices: the words allowed (upper and lower case are the same). ge, gt, le, lt: bounds of a number.
    off: one number outside the bounds that is allowed all the same, because it switches the key off (ERNIEKit's -1).
    many: a text key that also takes a list, kept as text joined by commas ("a.jsonl,b.jsonl", "0.8,0.2") as join_list
    does it.
    path: the key is a path, or paths (see config.paths). words: other words for a value ({"true": "auto"}), in small
    letters.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {
        "doc": doc,
        "choices": tuple(choices),
        "bounds": {name: value for name, value in bounds.items() if value is not None},
        "off": off,
        "many": many,
        "path": path,
        "words": dict(words or {}),
    }
    return dataclasses.field(default=default, metadata=metadata)


def is_null(field: "dataclasses.Field[Any]", value: Any) -> bool:
    """Whether a value says that the key is not given: null, nothing, or the word None or null where that word is not a
    value of the key itself.
    """
    if value is None:
        return True
    if not isinstance(value, str) or value.strip().lower() not in _NULL:
        return False
    kind, optional = _kind(field.type)
    own = (*field.metadata["choices"], *field.metadata["words"])
    return optional or kind is not str or not (own and value.strip().lower() in own)


def coerce(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """`value`, which is not null, as the field's type.

    Raises ValueError whose text follows "key: " ("expected an integer, got 'abc'").
    """
    kind, _ = _kind(field.type)
    if kind is tuple:
        return tuple(_within(field, to_int(item)) for item in _items(value))
    if kind is bool:
        return to_bool(value)
    if kind is int:
        return _within(field, to_int(value))
    if kind is float:
        return _within(field, to_float(value))
    return _text(field, value)


def _items(value: Any) -> Sequence[Any]:
    """The items of a list, or of its text: "0,1,2" or "[0, 1, 2]"."""
    if isinstance(value, list | tuple):
        return value
    text = _scalar(value, "a flat list").strip()
    return split_list(text[1:-1] if text[:1] == "[" and text[-1:] == "]" else text)


def _text(field: "dataclasses.Field[Any]", value: Any) -> str:
    words, path = field.metadata["words"], field.metadata["path"]
    if isinstance(value, bool) and str(value).lower() in words:  # from JSON or Python
        value = str(value)
    text = _joined(value) if field.metadata["many"] else _scalar(_only(value), "text")
    text = words.get(text.lower(), text)
    return _chosen(field.metadata["choices"], expand(text, path) if path else text)


def _chosen(choices: Sequence[str], text: str) -> str:
    for choice in choices:
        if text.lower() == choice.lower():
            return choice
    if not choices:
        return text
    named = ", ".join(choice or "'' (nothing)" for choice in choices)
    raise ValueError(f"expected one of {named}, got {shown(text)}")


def _only(value: Any) -> Any:
    """The item of a list of one (ERNIEKit's report_to is a list)."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def _joined(value: Any) -> str:
    if not isinstance(value, list | tuple):
        return _scalar(value, "text or a flat list")
    return join_list([_scalar(item, "text or a flat list") for item in value])


def _scalar(value: Any, wanted: str) -> str:
    if isinstance(value, os.PathLike):  # of a caller in Python
        value = os.fspath(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float | Scalar):
        raise ValueError(f"expected {wanted}, got {shown(value)}")
    text = str(value)
    if "\0" in text:
        raise ValueError("expected text without NUL characters")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"expected text, got bytes that are not UTF-8 ({text!a}). Rename what is called so")
    return text


def _within(field: "dataclasses.Field[Any]", number: Any) -> Any:
    bounds, off = field.metadata["bounds"], field.metadata["off"]
    if off is not None and number == off:
        return number
    if all(_BOUNDS[name][0](number, bound) for name, bound in bounds.items()):
        return number
    raise ValueError(f"must be {limits(field)}, got {number!r}")


_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "more than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
}


def limits(field: "dataclasses.Field[Any]") -> str:
    """The values that a number may have, in words ("at least 1 (or -1)"); empty where any will do."""
    off = field.metadata["off"]
    wanted = " and ".join(f"{_BOUNDS[name][1]} {bound:g}" for name, bound in field.metadata["bounds"].items())
    return wanted + (f" (or {off:g})" if wanted and off is not None else "")


def type_name(field: "dataclasses.Field[Any]") -> str:
    """What a key takes, in a word or two."""
    kind, _ = _kind(field.type)
    if kind is str:
        return "path" if field.metadata["path"] == "one" else "list" if field.metadata["many"] else "text"
    return {bool: "switch", int: "whole number", float: "number", tuple: "list of whole numbers"}[kind]


def _kind(annotation: Any) -> tuple[type, bool]:
    """The plain type behind an annotation, and whether None is allowed: `int | None` -> (int, True). A list of whole
    numbers, `tuple[int, ...]`, is a tuple.
    """
    if typing.get_origin(annotation) is tuple:
        assert typing.get_args(annotation) == (int, ...), annotation
        return tuple, False
    if isinstance(annotation, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
        assert len(kinds) == 1, annotation
        return kinds[0], True
    return annotation, False
