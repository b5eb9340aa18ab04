"""Declares keys, and converts values from YAML, JSON or the command line to the type of their key."""

import dataclasses
import difflib
import operator
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from erniekit.config import value_synonyms
from erniekit.config.paths import expand
from erniekit.config.values import Scalar, shown, split_list, split_numbers, to_bool, to_float, to_gigabytes, to_int

_NULL = {"none", "null", ""}
_CLOSE = 0.8  # from this difflib ratio on, a value counts as a typo; sapo and gspo, two methods, have 0.75
_FLAT_LIST = "a flat list"


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
    path: bool = False,
    size: bool = False,
    words: Mapping[str, str] | None = None,
) -> Any:
    """One key of the configuration: its default, its one-line documentation and the values it takes.

    choices: the words that are allowed, in upper or lower case. ge, gt, le, lt: bounds of a number.
    off: a number outside the bounds that is allowed because it switches the key off (ERNIEKit's -1).
    path: the key is a path (see config.paths). size: the number is of GB, and may have a unit (500MB). words: other
    words for a value ({"true": "auto"}), in lower case.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {
        "doc": doc,
        "choices": tuple(choices),
        "bounds": {name: value for name, value in bounds.items() if value is not None},
        "off": off,
        "path": path,
        "size": size,
        "words": dict(words or {}),
    }
    return dataclasses.field(default=default, metadata=metadata)


def list_of(
    kind: type,
    doc: str,
    default: tuple[Any, ...] | str = (),
    *,
    split: Callable[[str], list[str]] | None = None,
    or_word: bool = False,
    path: bool = False,
    choices: Sequence[str] = (),
    ge: float | None = None,
    gt: float | None = None,
) -> Any:
    """A key whose value is a list, of the type `tuple[kind, ...]`; kind is int, float or str.

    The user gives it as a YAML list, or as text, which `split` divides into items (by default at commas).
    or_word: the value may also be one word that begins with neither a digit nor a bracket (`str | tuple[kind, ...]`).
    path: every item is a path. choices: the words allowed as items. ge, gt: bounds of each number.
    """
    split = split or (split_list if kind is str else split_numbers)
    field = key(default, doc, path=path, choices=choices, ge=ge, gt=gt)
    metadata = {**field.metadata, "item": kind, "split": split, "or_word": or_word}
    return dataclasses.field(default=default, metadata=metadata)


def is_null(field: "dataclasses.Field[Any]", value: Any) -> bool:
    """Whether a value means that the key is not given: null, empty text, or the word None or null, unless that word is
    a valid value of the key.
    """
    if value is None:
        return True
    if not isinstance(value, str) or value.strip().lower() not in _NULL:
        return False
    kind, optional = _kind(field.type)
    choices = (*field.metadata["choices"], *field.metadata["words"])
    return optional or kind is not str or not (choices and value.strip().lower() in choices)


def coerce(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """Converts `value`, which is not null, to the field's type.

    Raises ValueError with a text to put after "key: ", such as "expected an integer, got 'abc'".
    """
    if "item" in field.metadata:
        return _list(field, value)
    kind, _ = _kind(field.type)
    if kind is bool:
        return to_bool(value)
    if kind is int:
        return _within(field, to_int(value))
    if kind is float:
        return _within(field, to_gigabytes(value) if field.metadata["size"] else to_float(value))
    return _text(field, value)


def from_saved(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """Converts a value that a run saved as JSON to the field's type: JSON has no tuples, and earlier versions saved
    lists as text.
    """
    if "item" not in field.metadata:
        return value
    return () if value is None else coerce(field, value)


def _list(field: "dataclasses.Field[Any]", value: Any) -> str | tuple[Any, ...]:
    if isinstance(value, list | tuple):
        items = [item for item in value if not isinstance(item, str) or item.strip()]
    else:
        text = _scalar(value, _FLAT_LIST).strip()
        if field.metadata["or_word"] and not (text[:1] == "[" or text[:1].isdigit()):
            return text
        items = field.metadata["split"](text)
    return tuple(_item(field, item) for item in items)


def _item(field: "dataclasses.Field[Any]", value: Any) -> Any:
    kind = field.metadata["item"]
    if kind is int:
        return _within(field, to_int(value))
    if kind is float:
        return _within(field, to_float(value))
    text = _scalar(value, _FLAT_LIST).strip()
    return _chosen(field, expand(text) if field.metadata["path"] else text)


def _text(field: "dataclasses.Field[Any]", value: Any) -> str:
    words, path = field.metadata["words"], field.metadata["path"]
    if isinstance(value, bool) and str(value).lower() in words:  # from JSON or Python
        value = str(value)
    choices = field.metadata["choices"]
    text = _scalar(_only(value), f"one of {_named(choices)}" if choices else "text")
    text = words.get(text.lower(), text)
    # ERNIEKit's vision-language files end names of models in a slash (baidu/.../), which no Hub has.
    return _chosen(field, expand(text).rstrip("/") or text if path else text)


def _named(choices: Sequence[str]) -> str:
    return ", ".join(choice or "'' (nothing)" for choice in choices)


def _chosen(field: "dataclasses.Field[Any]", text: str) -> str:
    choices = field.metadata["choices"]
    for choice in choices:
        if text.lower() == choice.lower():
            return choice
    if not choices:
        return text
    raise ValueError(f"expected one of {_named(choices)}, got {shown(text)}{hint(field.name, text, choices)}")


def hint(key: str, text: str, choices: Sequence[str]) -> str:
    """What was probably meant by a wrong value, for the end of a message: "; did you mean cosine?", or ""."""
    meant = value_synonyms.hint(key, text)
    if not meant:
        near = difflib.get_close_matches(text.lower(), [choice.lower() for choice in choices], n=1, cutoff=_CLOSE)
        meant = "".join(f"did you mean {choice}?" for choice in choices if choice.lower() in near)
    return meant and f"; {meant}"


def _only(value: Any) -> Any:
    """Unwraps a list with a single item (ERNIEKit's report_to is a list)."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def _scalar(value: Any, wanted: str) -> str:
    if isinstance(value, os.PathLike):  # from a caller in Python
        value = os.fspath(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float | Scalar):
        raise ValueError(f"expected {wanted}, got {shown(value)}")
    text = str(value)
    if "\0" in text:
        raise ValueError("expected text without NUL characters")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"expected text, got bytes that are not UTF-8 ({text!a}). Rename the file or key")
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
    """The limits of a number as text, such as "at least 1 (or -1)"; empty if there are none."""
    off = field.metadata["off"]
    bounds = " and ".join(f"{_BOUNDS[name][1]} {_shown(bound)}" for name, bound in field.metadata["bounds"].items())
    return bounds + (f" (or {off:g})" if bounds and off is not None else "")


def _shown(bound: float) -> str:
    """A bound; a whole number with all of its digits, of which "g" keeps six."""
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def type_name(field: "dataclasses.Field[Any]") -> str:
    """The type of a key's values as users read it, such as "list of numbers"."""
    if "item" in field.metadata:
        items = "paths" if field.metadata["path"] else _ITEMS[field.metadata["item"]]
        return f"list of {items}" + (" or word" if field.metadata["or_word"] else "")
    kind, _ = _kind(field.type)
    if kind is str:
        return "path" if field.metadata["path"] else "text"
    return {bool: "switch", int: "whole number", float: "number"}[kind]


_ITEMS = {int: "whole numbers", float: "numbers", str: "texts"}


def _kind(annotation: Any) -> tuple[type, bool]:
    """The plain type behind an annotation, and whether None is allowed: `int | None` -> (int, True). A list,
    `tuple[int, ...]`, is a tuple.
    """
    if typing.get_origin(annotation) is tuple or annotation == str | tuple[int, ...]:
        return tuple, False
    if isinstance(annotation, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
        assert len(kinds) == 1, annotation
        return kinds[0], True
    return annotation, False
