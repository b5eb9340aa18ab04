"""Boxes in data: checked, and brought to ERNIE's convention, whole numbers from 0 to 1000 relative to the full picture.

A data set says what its numbers are: "relative" (already so), "pixels" of the file, or "fraction" (0 to 1).
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.values import kind_of

SCALE = 1000
_KEY = "bbox_2d"
_NUMBER = r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
_FOUR = re.compile(rf"\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]")
# Either kind of quotes: answers of data sets are JSON, or Python's text of a dict.
_IN_TEXT = re.compile(rf"""(["']{_KEY}["']\s*:\s*)({_FOUR.pattern}|\[(?:\s*{_FOUR.pattern}\s*,?)+\s*\])""")
# Points, Qwen2-VL's boxes, and those of InternVL and others.
_OTHER_FORMS = re.compile(r"""["']\w*point\w*["']\s*:\s*\[|<\|box_start\|>|<box>|<bbox>""")
_ADVICE = f'write them after "{_KEY}", and set box_coordinates:'

Size = Callable[[], tuple[int, int]]  # of the picture that a box is in: width and height, read when needed


def relative_box(values: Sequence[Any], convention: str, size: Size, name: str) -> list[int | float]:
    """Points of a picture [x, y, x, y, ...] in the relative convention; a box has its upper left and its lower right
    corner. BadRecord for corners outside the picture or in the wrong order.
    """
    for value in values:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise BadRecord(f"{name} must hold numbers, not {kind_of(value)}", "write [x1, y1, x2, y2]")
    if convention == "relative":
        width = height = SCALE
    else:
        width, height = size() if convention == "pixels" else (1, 1)
    for i, value in enumerate(values):
        limit = (width, height)[i % 2]
        if not 0 <= value <= limit:
            raise BadRecord(
                f"{name} {list(values)} lies outside the picture: {'xy'[i % 2]} is {value}, the range is 0 to {limit} "
                f"({convention})",
                "check the box, or say what its numbers are (box_coordinates: relative, pixels or fraction)",
            )
    if len(values) == 4 and (values[0] > values[2] or values[1] > values[3]):
        raise BadRecord(f"{name} {list(values)} has its corners swapped", "write [left, top, right, bottom]")
    if convention == "relative":
        return list(values)
    return [round(value / (width, height)[i % 2] * SCALE) for i, value in enumerate(values)]


def convert_text(text: str, convention: str, size: Size, name: str) -> str:
    """A text in which the boxes after `"bbox_2d":` are in the relative convention."""
    if _KEY not in text:
        return text

    def one(match: re.Match[str]) -> str:
        values = [float(value) if re.search(r"[.eE]", value) else int(value) for value in match.groups()]
        converted = relative_box(values, convention, size, f"{_KEY} of {name}")
        return match[0] if convention == "relative" else str(converted)

    return _IN_TEXT.sub(lambda match: match[1] + _FOUR.sub(one, match[2]), text)


def doubt_about(text: str, convention: str) -> str | None:
    """What is doubtful about the coordinates in an answer as it stands in the data; None if nothing is."""
    others = [[float(value) for value in four.groups()] for four in _FOUR.finditer(_IN_TEXT.sub("", text))]
    if convention != "relative":
        if not others and not _OTHER_FORMS.search(text):
            return None
        return (
            f'box_coordinates: {convention} converts the boxes after "{_KEY}" alone: other coordinates stay as they are'
        )
    if any(max(box) > SCALE for box in others):
        return f"boxes in answers look like pixels, and ERNIE's are from 0 to {SCALE}: {_ADVICE} pixels"
    if any(min(box) >= 0 and max(box) <= 1 and any(value % 1 for value in box) for box in others + boxes_in(text)):
        return f"boxes in answers look like fractions, and ERNIE's are from 0 to {SCALE}: {_ADVICE} fraction"
    return None


def convert_arguments(arguments: dict[str, Any], convention: str, size: Size, name: str) -> dict[str, Any]:
    """The arguments of a call whose `bbox_2d`, if it has one, is in the relative convention."""
    box = arguments.get(_KEY)
    if not isinstance(box, list) or len(box) != 4:
        return arguments
    return {**arguments, _KEY: relative_box(box, convention, size, f"{_KEY} of {name}")}


def boxes_in(text: str) -> list[list[float]]:
    """The boxes after `"bbox_2d":` in a text, as they stand there."""
    return [
        [float(value) for value in four.groups()]
        for found in _IN_TEXT.finditer(text)
        for four in _FOUR.finditer(found[2])
    ]
