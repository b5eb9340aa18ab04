"""How well answers about pictures agree with reference answers; plain Python.

The form of the reference says how an answer is measured: boxes by their overlap, the letter of an option by the letter
that the answer chooses, any other text by its edit distance (ANLS).
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

Kind = Literal["boxes", "option", "text"]
Box = tuple[float, float, float, float]
SCALE = 1000  # boxes are relative to the full picture, from 0 to this
IOU_THRESHOLD = 0.5
ANLS_THRESHOLD = 0.5
_LARGEST = 1e9  # of a coordinate; beyond it a number is none

_NUMBER = r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
_FOUR = re.compile(rf"\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]")
_FENCE = re.compile(r"^\s*```[a-z]*\s*|\s*```\s*$")
_KEYS = ("bbox_2d", "bbox", "box")
_OPTION = re.compile(r"[(（]?\s*([A-H])\s*[)）]?\s*[.．:：、,，]?")
_OPTION_ALONE = re.compile(_OPTION.pattern, re.IGNORECASE)  # of an answer, which may be a small letter
# Small letters that stand as the mark of an option: "(b) a cup", "b. a cup", "option (b)", "\\boxed{b}".
_SMALL = re.compile(
    r"^\s*\**(?:\([a-h]\)|[a-h][).:、](?=\s))|(?i:\b(?:option|choice))\s+\([a-h]\)|(?<=\\boxed\{)\(?[a-h]\)?(?=\})"
)
# Tried in this order; of the first pattern that is found the last match counts, since reasoning comes before a choice.
_SAID = (
    re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-H])\)?\s*\}"),
    re.compile(r"(?i:answer)\s*(?i:is|:|：)?\s*\**\s*[(（]?([A-H])(?![A-Za-z'])"),
    re.compile(r"(?:答案|应选|选择|选)\s*(?:是|为|:|：)?\s*\**\s*[(（]?([A-H])(?![A-Za-z])"),
    re.compile(r"(?i:answer)\s*(?i:is|:|：)\s*\**\s*[(（]?([a-h])[)）]?[.。*\s]*$"),
)
_LETTER = "[(（]?[A-H][)）]?"
# Letters that an answer rules out; they are taken out of it first.
_NOT = re.compile(
    r"(?i:\b(?:not|isn't|neither|nor)\s+(?:(?:option|choice)\s+)?)[(（]?[A-H][)）]?(?![A-Za-z'])"
    r"|(?:不是|不为|不选|不应选|而非|并非|排除)\s*[(（]?[A-H][)）]?(?![A-Za-z])"
    rf"|(?i:\b(?:option|choice)s?\s+)?(?<![A-Za-z]){_LETTER}(?:\s*(?:(?i:and|or)\s|[、和与])\s*{_LETTER}){{0,6}}\s*"
    r"(?:\*\*)?(?:选?项)?\s*(?:(?i:(?:is|are)\s+(?:\w+ly\s+)?(?:wrong|incorrect|false|not)\b|(?:isn|aren)'t\b)"
    "|[都均也]?(?:是?错|不正确|不对|不符|有误))"
)
_LEADING = re.compile(r"\s*\**[(（]?([A-H])(?:[)）.．:：、,，]|\s*$|\s*\n)")
_STANDING = re.compile(
    r"(?<![A-Za-z'])([B-H])(?![A-Za-z'\d])|[(（]([A-H])[)）]|(?i:option|choice)\s+(A)\b"
    r"|(?<![A-Za-z'])(A)(?=[.．:：、)）]|\s*$|\s+or\s+[B-H]\b)"
)


@dataclass(frozen=True)
class Boxes:
    """The boxes of a text, in its order, within 0 to SCALE. `labels`: what each is called, None where it has no name.
    `overshoots`: boxes that reached beyond that and were clamped. `refused`: boxes with swapped corners, which
    are not among `boxes`.
    """

    boxes: tuple[Box, ...] = ()
    labels: tuple[str | None, ...] = ()
    overshoots: int = 0
    refused: int = 0


def kind_of_reference(reference: str) -> Kind:
    """How answers are measured against a reference answer."""
    text = reference.strip()
    if _OPTION.fullmatch(text):
        return "option"
    return "boxes" if _is_boxes(text) and read_boxes(text).boxes else "text"


def read_boxes(text: str, largest: float = SCALE) -> Boxes:
    """The boxes in a text: JSON objects with `bbox_2d`, one or a list, or plain [x1, y1, x2, y2], whole numbers or not,
    also in a code block and between other words. Coordinates are clamped to 0 ... largest.
    """
    found = _in_json(text)
    if found is None:
        fours = [[float(value) for value in match.groups()] for match in _FOUR.finditer(text)]
        found = [(four, None) for four in fours if _is_four(four)]
    boxes: list[Box] = []
    labels: list[str | None] = []
    overshoots = refused = 0
    for values, label in found:
        if values[0] > values[2] or values[1] > values[3]:
            refused += 1
            continue
        x1, y1, x2, y2 = (min(max(value, 0.0), float(largest)) for value in values)
        overshoots += [x1, y1, x2, y2] != values
        boxes.append((x1, y1, x2, y2))
        labels.append(label)
    return Boxes(tuple(boxes), tuple(labels), overshoots, refused)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 where neither has an area."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0.0) * max(height, 0.0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - common
    return common / union if union > 0 else 0.0


def matches(found: Boxes, expected: Boxes, threshold: float = IOU_THRESHOLD) -> list[float]:
    """The IoU of each expected box with the found box that is taken for it, 0.0 where there is none.

    Pairs are taken by their IoU, the largest first, each box once, and only from `threshold` on. Boxes that both have a
    label are no pair unless the labels agree, whatever their case.
    """
    pairs = [
        (iou(a, b), i, j)
        for i, (a, name) in enumerate(zip(expected.boxes, expected.labels, strict=True))
        for j, (b, other) in enumerate(zip(found.boxes, found.labels, strict=True))
        if name is None or other is None or name == other
    ]
    result = [0.0] * len(expected.boxes)
    used: set[int] = set()
    for overlap, i, j in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
        if overlap > 0 and overlap >= threshold and not result[i] and j not in used:
            result[i] = overlap
            used.add(j)
    return result


def box_score(prediction: str, reference: str) -> float:
    """F1 of the boxes of an answer at IoU 0.5: twice the pairs over the boxes of both sides. With one box on each side
    that is 1 or 0. A box with swapped corners is one that is wrong.
    """
    return f1_of_boxes(read_boxes(prediction), read_boxes(reference))


def f1_of_boxes(found: Boxes, expected: Boxes) -> float:
    """The box_score of boxes that have been read."""
    pairs = sum(overlap > 0 for overlap in matches(found, expected))
    total = len(found.boxes) + found.refused + len(expected.boxes)
    return 2 * pairs / total if total else 0.0


def option_of(text: str) -> str | None:
    """The letter, A to H, that an answer chooses; None if it names none or it is not clear which.

    An answer may be the letter alone, also a small one or one of full width, begin with it ("B. a cup", "(b) a cup"),
    or say "the answer is B" or "答案是 B" somewhere; else the one letter that stands by itself counts, unless there are
    several different ones. "A" before another word is the article. A letter behind a "not", or that is said to be
    wrong, does not count.
    """
    text = unicodedata.normalize("NFKC", text)
    whole = _OPTION_ALONE.fullmatch(text.strip().strip("*"))
    if whole:
        return whole[1].upper()
    text = _NOT.sub(" ", _SMALL.sub(lambda match: match[0].upper(), text))
    for pattern in _SAID:
        found = pattern.findall(text)
        if found:
            return found[-1].upper()
    leading = _LEADING.match(text)
    if leading:
        return leading[1]
    letters = {next(letter for letter in match if letter) for match in _STANDING.findall(text)}
    return letters.pop() if len(letters) == 1 else None


def anls(prediction: str, reference: str) -> float:
    """Similarity by edit distance, 0 to 1 (average normalised Levenshtein similarity, Biten et al. 2019, "Scene text
    visual question answering"): 1 - distance / length of the longer text, or 0 where the distance is half of it or
    more. Case does not count, nor does blank space at the ends, or how long it is within.
    """
    a, b = (" ".join(text.casefold().split()) for text in (prediction, reference))
    longer = max(len(a), len(b))
    if not longer:
        return 1.0
    distance = edit_distance(a, b) / longer
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def answer_score(prediction: str, reference: str) -> tuple[Kind, float]:
    """How an answer is measured against a reference, and its score from 0 to 1."""
    kind = kind_of_reference(reference)
    if kind == "boxes":
        return kind, box_score(prediction, reference)
    if kind == "option":
        return kind, float(option_of(prediction) == option_of(reference))
    return kind, anls(prediction, reference)


def picture_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """The metrics of answers about pictures, each over the references of its kind: `box_iou50` (mean of box_score),
    `box_mean_iou` (over all expected boxes), `num_boxes_overshooting` and `num_boxes_refused`; `option_accuracy`;
    `anls`. `num_*_answers` says over how many; a kind that no reference has is left out.
    """
    by_kind: dict[Kind, list[tuple[str, str]]] = {"boxes": [], "option": [], "text": []}
    for prediction, reference in zip(predictions, references, strict=True):
        by_kind[kind_of_reference(reference)].append((prediction, reference))
    scores: dict[str, Any] = {}
    if by_kind["boxes"]:
        pairs = [(read_boxes(a), read_boxes(b)) for a, b in by_kind["boxes"]]
        overlaps = [overlap for a, b in pairs for overlap in matches(a, b, threshold=0.0)]
        scores |= {
            "num_box_answers": len(pairs),
            "box_iou50": _mean([box_score(a, b) for a, b in by_kind["boxes"]]),
            "box_mean_iou": _mean(overlaps),
            "num_boxes_overshooting": sum(found.overshoots for found, _ in pairs),
            "num_boxes_refused": sum(found.refused for found, _ in pairs),
        }
    if by_kind["option"]:
        right = [float(option_of(a) == option_of(b)) for a, b in by_kind["option"]]
        scores |= {"num_option_answers": len(right), "option_accuracy": _mean(right)}
    if by_kind["text"]:
        scores |= {
            "num_text_answers": len(by_kind["text"]),
            "anls": _mean([anls(a, b) for a, b in by_kind["text"]]),
        }
    return scores


def _is_boxes(text: str) -> bool:
    """Whether a reference consists of boxes: JSON of them, or nothing beside the numbers."""
    if _in_json(text) is not None:
        return True
    return bool(_FOUR.search(text)) and not re.search(r"\w", _FOUR.sub("", text))


def _in_json(text: str) -> list[tuple[list[float], str | None]] | None:
    """The boxes, each with its label, of a text that is JSON, or Python's text of a dict, which data sets have, too;
    None for another text, or for one without boxes.
    """
    text = _FENCE.sub("", text.strip())
    for candidate in (text, text.replace("'", '"')):
        try:
            value = json.loads(candidate)  # NaN and numbers too large are no coordinates, see _is_four
            break
        except (ValueError, RecursionError):
            continue
    else:
        return None
    items = value if isinstance(value, list) and not _is_four(value) else [value]
    found = [box for item in items for box in _of_item(item)]
    return found or None


def _of_item(item: Any) -> list[tuple[list[float], str | None]]:
    """The boxes of one item of a JSON list, each with its label."""
    label, values = None, item
    if isinstance(item, dict):
        label, values = item.get("label"), next((item[key] for key in _KEYS if key in item), None)
    name = label.strip().casefold() if isinstance(label, str) else None
    several = values if isinstance(values, list) and not _is_four(values) else [values]
    return [([float(number) for number in four], name) for four in several if _is_four(four)]


def _is_four(value: Any) -> TypeGuard[list[float]]:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_coordinate, value))


def _is_coordinate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def edit_distance(a: str, b: str) -> int:
    """The smallest number of characters that are inserted, removed or replaced to make one text the other, a machine
    word of `a` at a time (Hyyrö 2003, "A bit-vector algorithm for computing Levenshtein and Damerau edit distances").
    """
    if not a:
        return len(b)
    places: dict[str, int] = {}
    for i, character in enumerate(a):
        places[character] = places.get(character, 0) | 1 << i
    full, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    more, less, distance = full, 0, len(a)  # where the column of the table grows, and where it falls
    for character in b:
        match = places.get(character, 0)
        diagonal = (((match & more) + more) ^ more) | match | less
        grows, falls = less | (~(diagonal | more) & full), more & diagonal
        distance += bool(grows & last) - bool(falls & last)
        grows, falls = ((grows << 1) | 1) & full, (falls << 1) & full
        more, less = falls | (~(diagonal | grows) & full), grows & diagonal
    return distance


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
