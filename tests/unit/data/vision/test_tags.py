"""What tags in texts become, with what the record lists beside them."""

import pytest
from support.pictures import write_picture

from erniekit.data.records.errors import BadLine
from erniekit.data.records.fields import Notes
from erniekit.data.vision.formats import parse_vision_record
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.tags import FormatOptions


def parts_of(record, tmp_path):
    notes = Notes()
    record["messages"].append({"role": "assistant", "content": "Both."})
    sample = parse_vision_record(record, "messages", "f.jsonl:7", FormatOptions(MediaReader(tmp_path)), notes)
    return sample.messages[0]["content"], notes


def test_options_beside_the_source_of_a_listed_medium_are_those_of_its_part(tmp_path):
    record = {
        "messages": [{"role": "user", "content": "<image><video>Which?"}],
        "images": [{"path": "a.png", "bytes": None, "max_pixels": 1568, "caption": "cups"}],
        "videos": [{"frames": ["a.png", "a.png"], "fps": 4}],
    }
    (picture, clip, _), notes = parts_of(record, tmp_path)
    assert picture["max_pixels"] == 1568 and clip["fps"] == 4
    assert notes.unused == {"'caption' of images"}


def test_options_in_the_object_of_an_address_are_those_of_the_part(tmp_path):
    part = {"type": "image_url", "image_url": {"url": "a.png", "max_pixels": 1568}}
    record = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "Which?"}]}]}
    (picture, _), _ = parts_of(record, tmp_path)
    assert picture["max_pixels"] == 1568


def test_a_picture_in_a_text_part_is_refused(tmp_path):
    write_picture(tmp_path / "a.png")
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "And this?", "image": "a.png"}]
    with pytest.raises(BadLine, match="field 'image' does not belong to a text part"):
        parts_of({"messages": [{"role": "user", "content": parts}]}, tmp_path)


def test_unknown_fields_of_objects_and_boxes_that_look_like_fractions_are_named(tmp_path):
    write_picture(tmp_path / "a.png")

    def notes_of(objects):
        content = "<image>Where is <bbox>?"
        return parts_of(
            {"messages": [{"role": "user", "content": content}], "images": ["a.png"], "objects": objects}, tmp_path
        )[1]

    notes = notes_of({"bbox": [[0.1, 0.25, 1, 1]], "width": [64], "height": []})
    assert notes.unused == {"'width' of 'objects'"}
    assert notes.doubts == {"boxes of objects look like fractions of the picture: set their bbox_type to norm1"}
    assert not notes_of({"bbox": [[0, 0, 1, 1]]}).doubts  # one pixel
    with pytest.raises(BadLine, match="unknown field 'box_type' of 'objects'; the nearest known one is 'bbox_type'"):
        notes_of({"bbox": [[0.1, 0.25, 1, 1]], "box_type": "norm1"})
