"""How one key is declared, and how a value from YAML, JSON or the command line becomes that key's type."""

import dataclasses
import os
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from erniekit.config.paths import PathKind, expand
from erniekit.config.values import Scalar, join_list, shown, to_bool, to_float, to_int

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
    if kind is bool:
        return to_bool(value)
    if kind is int:
        return _within(field, to_int(value))
    if kind is float:
        return _within(field, to_float(value))
    return _text(field, value)


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
        raise ValueError(f"expected text, got bytes that are not UTF-8 ({ascii(text)}). Rename what is called so")
    return text


def _within(field: "dataclasses.Field[Any]", number: Any) -> Any:
    bounds, off = field.metadata["bounds"], field.metadata["off"]
    if off is not None and number == off:
        return number
    tests = {
        "ge": (lambda x, bound: x >= bound, "at least"),
        "gt": (lambda x, bound: x > bound, "more than"),
        "le": (lambda x, bound: x <= bound, "at most"),
        "lt": (lambda x, bound: x < bound, "less than"),
    }
    if all(tests[name][0](number, bound) for name, bound in bounds.items()):
        return number
    wanted = " and ".join(f"{tests[name][1]} {bound:g}" for name, bound in bounds.items())
    also = f" (or {off:g})" if off is not None else ""
    raise ValueError(f"must be {wanted}{also}, got {number!r}")


def _kind(annotation: Any) -> tuple[type, bool]:
    """The plain type behind an annotation, and whether None is allowed: `int | None` -> (int, True)."""
    if isinstance(annotation, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
        assert len(kinds) == 1, annotation
        return kinds[0], True
    return annotation, False
