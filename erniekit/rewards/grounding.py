"""Rewards for boxes and points in pictures."""

import json
import math
import re

from erniekit.config.schema_rewards import RewardArgs
from erniekit.rewards.picture_answers import SCALE, Boxes, f1_of_boxes, matches, read_boxes
from erniekit.rewards.sample import Sample

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_POINT = re.compile(rf"[\[(（]\s*{_NUMBER}\s*[,，]\s*{_NUMBER}\s*[\])）]")


def box_iou(sample: Sample, cfg: RewardArgs) -> float:
    """The mean overlap (intersection over union) of the record's boxes and the answer's, each box paired once. A box
    too many, or with swapped corners, counts as a pair without overlap.
    """
    expected, found = right_boxes(sample, cfg), _read(sample.answer, cfg)
    pairs = max(len(expected.boxes), len(found.boxes) + found.refused)
    return sum(matches(found, expected, threshold=0.0)) / pairs


def box_f1(sample: Sample, cfg: RewardArgs) -> float:
    """F1 of the boxes at an overlap of 0.5: with one box on each side 1 or 0."""
    return f1_of_boxes(_read(sample.answer, cfg), right_boxes(sample, cfg))


def point_in_box(sample: Sample, cfg: RewardArgs) -> float:
    """F1 of the points in the answer, each of which may hit one of the record's boxes: with one of each 1 or 0. A point
    is written [x, y] or (x, y); in an answer without points the centre of a box is one.
    """
    expected = list(right_boxes(sample, cfg).boxes)
    points = [(float(x), float(y)) for x, y in _POINT.findall(sample.answer)]
    points = points or [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in _read(sample.answer, cfg).boxes]
    total, hits = len(points) + len(expected), 0
    for x, y in points:
        hit = next((box for box in expected if box[0] <= x <= box[2] and box[1] <= y <= box[3]), None)
        if hit is not None:
            expected.remove(hit)
            hits += 1
    return 2 * hits / total


def _read(text: str, cfg: RewardArgs) -> Boxes:
    return read_boxes(text, SCALE if cfg.reward_coordinates == "relative" else math.inf)


def right_boxes(sample: Sample, cfg: RewardArgs) -> Boxes:
    """The boxes of the record. Raises ValueError if it has none, or one with swapped corners."""
    value = sample.fields.get(cfg.answer_key)
    boxes = _read(value if isinstance(value, str) else json.dumps(value), cfg)
    if not boxes.boxes or boxes.refused or boxes.overshoots:
        raise ValueError(
            f"{cfg.answer_key!r} of the record must be boxes [x1, y1, x2, y2] with x1 <= x2 and y1 <= y2, in "
            f"coordinates as reward_coordinates: {cfg.reward_coordinates} says, not {str(value)[:60]!r}"
        )
    return boxes
