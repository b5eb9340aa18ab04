"""Boxes in the texts of data sets."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from erniekit.data.records.errors import BadRecord
from erniekit.data.records.fields import Notes
from erniekit.data.vision.boxes import boxes_in, convert_text
from erniekit.data.vision.formats import parse_vision_record
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.tags import FormatOptions


@pytest.mark.parametrize("quote", ['"', "'"])
def test_either_kind_of_quotes(quote):
    """Answers are JSON, or Python's text of a dict."""
    text = f"[{{{quote}bbox_2d{quote}: [20, 10, 200, 100], {quote}label{quote}: {quote}cup{quote}}}]"
    converted = convert_text(text, "pixels", lambda: (200, 100), "an answer")
    assert converted == text.replace("[20, 10, 200, 100]", "[100, 100, 1000, 1000]")
    assert boxes_in(converted) == [[100, 100, 1000, 1000]]
    with pytest.raises(BadRecord, match="outside the picture"):
        convert_text(text, "fraction", lambda: (200, 100), "an answer")


def answered(text, convention, **fields):
    """The answer of a record with a picture of 200 x 100 pixels, and what was doubtful about it."""
    messages = [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": text}]
    record = {"messages": messages, "images": [np.zeros((100, 200, 3), np.uint8)], **fields}
    notes = Notes()
    sample = parse_vision_record(record, "messages", "f:1", FormatOptions(MediaReader(Path()), convention), notes)
    return sample.messages[1]["content"], " ".join(notes.doubts)


def test_boxes_of_objects_are_converted_once():
    """ms-swift's form for Qwen3-VL, where the numbers of other records are in pixels, too."""
    objects = {"bbox": [[20, 10, 200, 100]]}
    for given in (objects, json.dumps(objects)):
        converted = answered('[{"bbox_2d": <bbox>}]', "pixels", objects=given)
        assert converted == ('[{"bbox_2d": [100, 100, 1000, 1000]}]', "")


@pytest.mark.parametrize(
    ("text", "convention", "doubt"),
    [
        ('{"bbox": [0.1, 0.2, 0.5, 0.9]}', "relative", "look like fractions.*box_coordinates: fraction"),
        ('{"bbox_2d": [0.1, 0.2, 0.5, 1]}', "relative", "look like fractions"),
        ("It is at [0.133, 0.234, 0.453, 0.732].", "relative", "look like fractions"),
        ('{"bbox": [120, 40, 1480, 260]}', "relative", "look like pixels.*box_coordinates: pixels"),
        ('{"bbox": [12, 4, 148, 60]}', "pixels", 'converts the boxes after "bbox_2d" alone'),
        ('{"bbox_2d": [12, 4, 148, 60], "point_2d": [3, 4]}', "pixels", "other coordinates stay"),
        ("<|box_start|>(12,4),(148,60)<|box_end|>", "pixels", "other coordinates stay"),
        ('{"bbox_2d": [12, 4, 148, 60]}', "pixels", None),
        ('{"bbox_2d": [12, 4, 148, 60]}', "relative", None),
        ('{"bbox": [12, 4, 148, 60]} [1, 2, 3]', "relative", None),
        ("[0, 0, 1, 1]", "relative", None),
    ],
)
def test_coordinates_that_look_as_if_nothing_converts_them(text, convention, doubt):
    doubts = answered(text, convention)[1]
    assert re.search(doubt, doubts) if doubt else not doubts
