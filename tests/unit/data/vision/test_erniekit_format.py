"""Fields of the items of ERNIEKit's records: read, counted as unused, or refused."""

from pathlib import Path
from typing import Any

import pytest

from erniekit.data.records.errors import BadLine
from erniekit.data.records.fields import Notes
from erniekit.data.records.sample import Sample
from erniekit.data.vision.formats import parse_vision_record
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.tags import FormatOptions

TEXTS = [{"text": "q", "tag": "mask"}, {"text": "a", "tag": "no_mask"}]


def parse(**record: Any) -> tuple[Sample, Notes]:
    notes = Notes()
    options = FormatOptions(MediaReader(Path()))
    return parse_vision_record({"text_info": TEXTS, **record}, "erniekit", "f.jsonl:7", options, notes), notes


def test_options_of_a_picture_or_video_are_those_of_its_part():
    picture = {"image_url": "a.png", "matched_text_index": 0, "max_pixels": 784, "image_width": 9, "image_id": "x"}
    sample, notes = parse(image_info=[picture])
    assert sample.messages[0]["content"][0] == {"type": "image", "image": "a.png", "max_pixels": 784}
    assert notes.unused == {"'image_id' of image_info"}
    sample, notes = parse(video_info=[{"image_url": ["0.png", "1.png"], "fps": 4}])
    assert sample.messages[0]["content"][0] == {"type": "video", "video": ["0.png", "1.png"], "fps": 4}
    assert not notes.unused
    frames = [{"image_url": f"{i}.png", "time_stamp": i, "max_pixels": 784} for i in range(2)]
    expected = {"type": "video", "video": ["0.png", "1.png"], "time_stamps": [0, 1], "max_pixels": 784}
    assert parse(video_info=frames)[0].messages[0]["content"][0] == expected


def test_the_time_of_a_directory_of_frames_reaches_its_part():
    sample, _ = parse(video_info=[{"image_url": "frames", "time_stamp": [0, 1]}])
    assert sample.messages[0]["content"][0] == {"type": "video", "video": "frames", "time_stamps": [0, 1]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text_info": [TEXTS[0], TEXTS[1] | {"reasoning_content": "so"}]}, "between <think> and </think>"),
        ({"text_info": [TEXTS[0], TEXTS[1] | {"loss": 0.5}]}, "use type messages, whose records have a 'label'"),
        ({"text_info": [TEXTS[0] | {"images": ["a.png"]}, TEXTS[1]]}, "media stand in the record's image_info"),
        ({"text_info": [TEXTS[0], TEXTS[1] | {"tool_call": [1]}]}, "the nearest known one is 'tool_calls'"),
        ({"image_info": [{"image_url": "a.png", "matched_text_indx": 1}]}, "the nearest known one is 'matched"),
        ({"video_info": [{"image_url": "a.mp4", "extracted_frame_indices": [3]}]}, "give the frames as a list"),
        ({"label": [1]}, "use type messages or sharegpt"),
    ],
)
def test_fields_that_would_change_what_is_trained_are_refused(record: dict[str, Any], message: str):
    with pytest.raises(BadLine, match=message):
        parse(**record)
