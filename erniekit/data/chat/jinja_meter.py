"""Limits the work and memory of rendering a chat template: the allowance, and the cost of each operation.

A template is a program that comes with a model, so it is not trusted. An operation that Python implements in C (string
multiplication, a format width, a comparison of lists) cannot be interrupted while it runs, so its cost is estimated and
subtracted from an allowance before it begins. One unit is about a byte of memory or a nanosecond of work, whichever is
larger.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

ALLOWANCE = 1 << 26  # units for every rendering: a million short steps, or 64 million characters
PER_INPUT = 1 << 8  # additional units for each unit of the conversation's size
MAX_SECONDS = 60.0  # the time limit of one rendering, on a machine of any speed
MAX_DEPTH = 200  # of nested lists and objects
MAX_BITS = 1 << 15  # the largest size of an integer
STEP = 64  # units for a call, an iteration of a loop, or an element of a list

# Methods of text whose result is not longer than the text and the arguments together.
_LINEAR_METHODS = frozenset(
    "lower upper title capitalize casefold swapcase startswith endswith find index count partition removeprefix "
    "removesuffix isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle "
    "isupper".split()
)
_LOOKUPS = frozenset(("get", "items", "keys", "values"))
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # at which str.splitlines divides
_WIDTHS = re.compile(r"[%)][-#0 +]*(\d+|\*)?(?:\.(\d+|\*))?")  # of "%10.2f" and "%(name)10.2f"
_SPECIFICATION = re.compile(r":([^{}]*)([{}])")  # of "{name:>10}"
_MAX_FORMAT = 10_000  # the longest format string


class LimitExceeded(Exception):
    """The template exceeded a limit, which the message names."""


class Meter:
    """The allowance of one rendering. `conversation` is measured only if the first allowance is used up."""

    def __init__(self, conversation: Any) -> None:
        self._left = ALLOWANCE
        self._check_below = ALLOWANCE - (1 << 20)
        self._conversation = conversation
        self._deadline = time.monotonic() + MAX_SECONDS

    def spend(self, units: int) -> None:
        """Subtract `units` from the allowance. Raises LimitExceeded if fewer are left."""
        self._left -= units
        if self._left < self._check_below:
            self._check()

    def _check(self) -> None:
        if self._left < 0:
            self._extend()
        if self._left < 0:
            raise LimitExceeded("it takes too many steps or writes too much text for one conversation")
        if time.monotonic() > self._deadline:
            raise LimitExceeded(f"it is not done after {MAX_SECONDS:g} seconds")
        self._check_below = max(0, self._left - (1 << 20))

    def _extend(self) -> None:
        """Add the units for the size of the conversation; this happens once."""
        if self._conversation is not None:
            self._left += PER_INPUT * _size(self._conversation, None)
            self._conversation = None

    def size(self, value: Any) -> int:
        """The cost of visiting everything in `value`. A list that occurs in it twice counts twice, as it does when
        values are compared or written as text. Raises LimitExceeded if the cost is more than the allowance.
        """
        kind = type(value)
        if kind is str:
            return len(value)
        if kind is int or kind is bool or value is None:
            return STEP
        size = _size(value, self._left)
        if size > self._left:
            self._extend()
            size = _size(value, self._left)
        return size

    def spend_walk(self, *values: Any) -> None:
        """Spend the cost of visiting everything in the values."""
        for value in values:
            self.spend(self.size(value))

    def spend_method(self, owner: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Spend the cost of calling a method of a text, a list, an object or a number."""
        if isinstance(owner, dict) and name in _LOOKUPS:
            self.spend_walk(STEP, *args)
        elif not isinstance(owner, str):
            if name in ("index", "count"):
                self.spend_walk(owner, *args)
            else:
                self.spend_growth(owner, args, kwargs)
        elif name in _LINEAR_METHODS:
            self.spend(STEP + len(owner))
            self.spend_walk(*args)
        elif name in ("split", "rsplit", "splitlines"):
            self.spend_growth(owner, args[:1], {})
            self.spend(STEP * _count_split_items(owner, name, args, kwargs))
        elif name == "join" and args:
            self.spend_join(owner, args[0])
        elif name == "replace":
            self.spend_replace(owner, args, kwargs)
        elif name in ("format", "format_map"):
            self._spend_braces(owner, args, kwargs)
        else:
            self.spend_growth(owner, args, kwargs)

    def spend_growth(self, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any], factor: int = 1) -> None:
        """Spend the cost of an operation whose result may be as long as `value`, once for each character or unit of its
        arguments, such as text.center(100) or list * 3.
        """
        times = 1
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, float):
                times += int(min(abs(argument), 1e12)) if argument == argument else 0
            else:
                times += abs(argument) if isinstance(argument, int) else self.size(argument)
        self.spend(STEP + self.size(value) * times * factor)

    def spend_join(self, separator: str, items: Any) -> None:
        """Spend the cost of joining `items`, which must not be an iterator, since this reads them."""
        count = len(items) if isinstance(items, Sized) else 0
        cost_per_item = STEP if isinstance(items, str) else 0  # the characters of a text become a list
        self.spend(STEP + (self.size(separator) + cost_per_item) * count)
        self.spend_walk(items)

    def spend_replace(self, text: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Spend the cost of text.replace(old, new, count)."""
        if kwargs or len(args) < 2 or not all(isinstance(value, str) for value in (text, *args[:2])):
            self.spend_growth(text, args, kwargs)
            return
        old, new = args[:2]
        self.spend(STEP + 2 * len(text))
        count = text.count(old)
        if len(args) > 2 and isinstance(args[2], int) and args[2] >= 0:
            count = min(count, args[2])
        self.spend(count * max(0, len(new) - len(old)))

    def spend_percent(self, text: str, values: Any) -> None:
        """Spend the cost of text % values."""
        _check_format(text)
        widths = [width for match in _WIDTHS.finditer(text) for width in match.groups() if width]
        if "*" in widths:
            raise LimitExceeded("a width of * in a format is not supported: write the number")
        self.spend(len(text) + _total(widths) + text.count("%") * self.size(values))

    def _spend_braces(self, text: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        _check_format(text)
        widths: list[str] = []
        for match in _SPECIFICATION.finditer(text):
            if match.group(2) == "{":
                raise LimitExceeded("a format inside a format, {:{}}, is not supported: write the number")
            widths += re.findall(r"\d+", match.group(1))
        self.spend(STEP + len(text) + _total(widths) + text.count("{") * self.size([*args, *kwargs.values()]))

    def result(self, value: Any) -> Any:
        """Spend the cost of storing a new value; an iterator costs a step for each item that is taken from it."""
        kind = type(value)
        if kind is str:
            self.spend(len(value))
        elif kind is int:
            check_integer(value.bit_length())
        elif isinstance(value, Iterator):
            return self.draw(value)
        elif isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, Sized):
            self.spend(STEP * len(value))
        return value

    def draw(self, items: Iterator[Any], item_cost: int = STEP) -> Iterator[Any]:
        """Yields the items, and spends `item_cost` units before each."""
        self.spend(item_cost)
        for item in items:
            yield item
            self.spend(item_cost)


def check_integer(bits: int) -> None:
    """Raise LimitExceeded if an integer of this many bits is too large."""
    if bits > MAX_BITS:
        raise LimitExceeded(f"an integer of more than {MAX_BITS:,} bits")


def _size(value: Any, limit: int | None) -> int:
    """As Meter.size, but it stops as soon as `limit` is exceeded."""
    total, level = 0, [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for item in level:
            kind = type(item)
            if kind is str:
                total += len(item)
                continue
            total += STEP
            if kind is dict:
                total += 16 * len(item)
                inner.extend(item)
                inner.extend(item.values())
            elif kind is list or kind is tuple:
                total += 8 * len(item)
                inner.extend(item)
            elif kind is int:
                total += item.bit_length() >> 3
            elif isinstance(item, str | bytes | range):
                total += STEP * len(item)
            elif isinstance(item, Sized) and isinstance(item, Iterable):  # dict.items() and the like
                total += 8 * len(item)
                inner.extend(item)
            if limit is not None and total > limit:
                return total
        if not inner:
            return total
        level = inner
    raise LimitExceeded(f"lists or objects nested more than {MAX_DEPTH} levels deep")


def _count_split_items(text: str, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """An upper bound of the number of items that text.split(...) returns."""
    if name == "splitlines":
        return 1 + sum(text.count(end) for end in _LINE_ENDS)
    separator = args[0] if args else kwargs.get("sep")
    max_splits = args[1] if len(args) > 1 else kwargs.get("maxsplit", -1)
    bound = 1 + (text.count(separator) if isinstance(separator, str) and separator else len(text) // 2)
    return min(bound, max_splits + 1) if isinstance(max_splits, int) and max_splits >= 0 else bound


def _check_format(text: str) -> None:
    if len(text) > _MAX_FORMAT:
        raise LimitExceeded(f"a format of more than {_MAX_FORMAT:,} characters")


def _total(widths: list[str]) -> int:
    """The sum of the numbers; a number with too many digits counts as too large."""
    return sum(int(width) if len(width) < 12 else 10**12 for width in widths)
