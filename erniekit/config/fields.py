"""How one key is declared, and how a value from YAML, JSON or the command line becomes that key's type."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

_TRUE = {"true", "yes", "on", "y", "1"}
_FALSE = {"false", "no", "off", "n", "0"}
_NULL = {"none", "null", "~", ""}


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
) -> Any:
    """One key of the configuration: its default, its one-line documentation and the values it takes.

    choices: the words allowed (upper and lower case are the same). ge, gt, le, lt: bounds of a number.
    off: one number outside the bounds that is allowed all the same, because it switches the key off (ERNIEKit's -1).
    many: a text key that also takes a list or a number, kept as text joined by commas ("a.jsonl,b.jsonl", "0.8,0.2") as
    join_list does it.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {
        "doc": doc,
        "choices": tuple(choices),
        "bounds": {name: value for name, value in bounds.items() if value is not None},
        "off": off,
        "many": many,
    }
    return dataclasses.field(default=default, metadata=metadata)


def coerce(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """`value` as the field's type.

    Raises ValueError whose text goes on after "key: " ("expected an integer, got 'abc'").
    """
    kind, optional = _kind(field.type)
    if optional and (value is None or (isinstance(value, str) and value.strip().lower() in _NULL)):
        return None
    if value is None:
        raise ValueError(f"expected {_NAMES[kind]}, got nothing (null)")
    if kind is bool:
        return to_bool(value)
    if kind is int:
        return _within(field, to_int(value))
    if kind is float:
        return _within(field, to_float(value))
    return _text(field, value)


def to_bool(value: Any) -> bool:
    """True, 1, "True", "yes", "on" and their opposites; anything else raises ValueError."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in _TRUE | _FALSE:
        return value.strip().lower() in _TRUE
    raise ValueError(f"expected True or False, got {value!r}")


def to_int(value: Any) -> int:
    """An integer, also from "10" and from a float without fraction (1e5); anything else raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
    try:
        number = to_float(value)
    except ValueError:
        number = math.nan
    if number != number or number != int(number):
        raise ValueError(f"expected an integer, got {value!r}")
    return int(number)


def to_float(value: Any) -> float:
    """A finite number, also from "1e-5" (which YAML 1.1 reads as text); anything else raises ValueError."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise ValueError(f"expected a number, got {value!r}")


def _text(field: "dataclasses.Field[Any]", value: Any) -> str:
    choices = field.metadata["choices"]
    if isinstance(value, bool) and "no" in choices and not value:
        return "no"  # YAML 1.1 reads the bare word no as false
    if field.metadata["many"]:
        if isinstance(value, list | tuple):
            return join_list([_scalar(item) for item in value])
        value = _scalar(value)
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"expected text, got {value!r}")
    text = str(value)
    if not choices:
        return text
    for choice in choices:
        if text.lower() == choice.lower():
            return str(choice)
    raise ValueError(f"expected one of {', '.join(choices)}, got {value!r}")


def join_list(items: Sequence[str]) -> str:
    """Texts joined by commas; one that holds a comma itself, or begins with a quote, stands in double quotes, inside
    which quotes are doubled.
    """

    def quoted(item: str) -> str:
        return '"' + item.replace('"', '""') + '"' if "," in item or item.lstrip().startswith('"') else item

    return ",".join(map(quoted, items))


def split_list(text: str | None) -> list[str]:
    """The texts that join_list joined, or that a user separated by commas, without blank ones."""
    found = re.findall(r'\s*"((?:[^"]|"")*)"\s*(?:,|$)|([^,]*)(?:,|$)', text or "")
    items = (quoted.replace('""', '"') if quoted else plain for quoted, plain in found)
    return [item.strip() for item in items if item.strip()]


def _scalar(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"expected text or a flat list, got {value!r}")
    return str(value)


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


_NAMES: dict[type, str] = {bool: "True or False", int: "an integer", float: "a number", str: "text"}


def _kind(annotation: Any) -> tuple[type, bool]:
    """The plain type behind an annotation, and whether None is allowed: `int | None` -> (int, True)."""
    if isinstance(annotation, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
        assert len(kinds) == 1, annotation
        return kinds[0], True
    return annotation, False
