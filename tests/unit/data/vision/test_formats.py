"""Records with pictures in every form that people have become one form of sample; wrong ones are placed and counted."""

import json

import numpy as np
import pytest
from support.pictures import blocks, encoded, write_picture

from erniekit.data.records.errors import BadLine
from erniekit.data.records.fields import Notes
from erniekit.data.records.readers import load_record, open_file
from erniekit.data.vision.formats import parse_vision_record
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.tags import FormatOptions


@pytest.fixture
def options(tmp_path):
    write_picture(tmp_path / "a.png", 200, 100)
    write_picture(tmp_path / "b.png", 50, 400)
    return FormatOptions(MediaReader(tmp_path))


def parse(kind, record, options, **changes):
    notes = Notes()
    sample = parse_vision_record(record, kind, "f.jsonl:7", FormatOptions(**{**vars(options), **changes}), notes)
    return sample, notes


def image(source):
    return {"type": "image", "image": source}


def video(source, **rest):
    return {"type": "video", "video": source, **rest}


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def answer(words):
    return {"role": "assistant", "content": words}


CUPS = [user(image("a.png"), text("Count the cups.")), answer("Three.")]
TALK = [{"role": "user", "content": "<image>Count the cups."}, answer("Three.")]
SAME = {
    "erniekit": [
        {
            "image_info": [{"image_url": "a.png", "matched_text_index": 0, "image_width": 9, "image_height": 9}],
            "text_info": [{"text": " Count the cups.\n", "tag": "mask"}, {"text": "Three.", "tag": "no_mask"}],
        },
        {
            "image_info": [{"image_url": "a.png"}],
            "text_info": [{"text": "Count the cups.", "tag": "mask"}, {"text": "Three.", "tag": "no_mask"}],
            "order": {"type": ["image", "text", "text"], "index": [0, 0, 1]},
        },
    ],
    "messages": [
        {"messages": TALK, "images": ["a.png"]},
        {"messages": TALK, "images": "a.png"},
        {"messages": TALK, "images": '["a.png"]'},
        {"messages": TALK, "image": "a.png", "videos": [], "id": 5},
        {"messages": [user(image("a.png"), text("Count the cups.")), answer("Three.")]},
        {
            "messages": [user({"type": "image"}, text("Count "), text("the cups.")), answer("Three.")],
            "images": ["a.png"],
        },
        {
            "messages": [
                user({"type": "image_url", "image_url": "a.png"}, text("Count the cups.")),
                {"role": "assistant", "content": [text("Three.")]},
            ]
        },
    ],
    "chatml": [{"messages": TALK, "images": ["a.png"]}],
    "sharegpt": [
        {
            "conversations": [
                {"from": "human", "value": "<image>Count the cups."},
                {"from": "gpt", "value": "Three."},
            ],
            "images": ["a.png"],
        }
    ],
    "alpaca": [{"instruction": "<image>Count the cups.", "input": "", "output": "Three.", "images": ["a.png"]}],
}


@pytest.mark.parametrize(("kind", "number"), [(kind, i) for kind, records in SAME.items() for i in range(len(records))])
def test_one_conversation_in_every_form(options, kind, number):
    sample, _ = parse(kind, SAME[kind][number], options)
    assert sample.messages == CUPS and sample.kind == "chat"


def test_text_without_pictures_stays_text(options):
    sample, _ = parse("messages", {"messages": [{"role": "user", "content": "2 + 2?"}, answer("4")]}, options)
    assert sample.messages == [{"role": "user", "content": "2 + 2?"}, answer("4")]


def test_erniekits_form_for_text_is_read_beside_its_form_for_pictures(options):
    sample, _ = parse("erniekit", {"src": ["How many?"], "tgt": ["Three."]}, options)
    assert [message["content"] for message in sample.messages] == ["How many?", "Three."]


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("erniekit", {"src": ["<image>x"], "tgt": ["y"], "images": ["a.png"]}, "type erniekit has image_info"),
        (
            "erniekit",
            {"src": ["x"], "response": [["a"], ["b"]], "sort": [1, 0]},
            "set stage: DPO, with pictures VL-DPO",
        ),
        ("messages", {"src": ["x"], "tgt": ["y"]}, "is of type erniekit, not messages. Hint: set the dataset type to"),
        ("messages", {"text": "x"}, "is of type text, not messages. Hint: set stage: VL-PT"),
        ("text", {"messages": TALK}, "is of type messages, not text. Hint: .* type to messages and stage: VL-SFT"),
        ("alpaca", {"instruction": "x", "chosen": "a"}, "does not belong to type alpaca. Hint"),
    ],
)
def test_a_record_of_another_type_or_stage(options, kind, record, message):
    with pytest.raises(BadLine, match=message):
        parse(f"{kind} (VL)", record, options)


@pytest.mark.parametrize("record", [{"text": ["one <image>", "two"]}, {"tgt": ["one <image>", "two"]}])
def test_pretraining_text_has_the_same_forms_with_pictures_as_without(options, record):
    sample, _ = parse("text", {"text": "one"}, options)
    assert (sample.kind, sample.messages[0]["content"]) == ("text", "one")
    sample, _ = parse("text", record | {"images": ["a.png"]}, options)
    assert sample.messages[0]["content"] == [text("one "), image("a.png"), text("\ntwo")]


def test_a_column_that_belongs_to_another_type_is_no_other_type(options):
    """As the parquet files of Alpaca have one called text."""
    record = {"instruction": "2 + 2?", "output": "4", "text": "2 + 2? 4"}
    assert parse("alpaca", record, options)[0].messages[-1]["content"] == "4"
    assert parse("text", record, options)[0].messages[0]["content"] == "2 + 2? 4"


def test_order_over_messages_and_kinds(options):
    record = {
        "messages": [
            {"role": "user", "content": "<image> and <video> and <image>"},
            answer("<image> is a tag"),
            {"role": "user", "content": "<video>?"},
            answer("yes"),
        ],
        "images": ["a.png", "b.png"],
        "videos": ["c.mp4", ["1.png", "2.png"]],
    }
    sample, _ = parse("messages", record, options)
    assert sample.messages[0]["content"] == [
        image("a.png"), text(" and "), video("c.mp4"), text(" and "), image("b.png")
    ]  # fmt: skip
    assert sample.messages[1]["content"] == "<image> is a tag"
    assert sample.messages[2]["content"] == [video(["1.png", "2.png"]), text("?")]


def test_bytes_of_parquet_files(options):
    source = {"bytes": encoded(blocks(30, 20)), "path": None}
    sample, _ = parse("messages", {"messages": TALK, "images": [source]}, options)
    assert sample.messages[0]["content"][0]["image"] is source


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": TALK}, "1 <image> tag for 0 images"),
        ({"messages": TALK, "images": ["a.png", "b.png"]}, "1 <image> tag for 2 images"),
        ({"messages": TALK, "images": ["a.png"], "videos": ["c.mp4"]}, "0 <video> tags for 1 video"),
        ({"messages": TALK, "images": ["a.png"], "image": "b.png"}, "both 'images' and 'image'"),
        ({"messages": TALK, "images": ["a.png"], "audios": ["a.wav"]}, "sound is not known"),
        ({"messages": [{"role": "user", "content": "<audio>?"}, answer("x")]}, "<audio> tag"),
        ({"messages": [user(text("q")), {"role": "assistant", "content": [image("a.png")]}]}, "model writes text only"),
        ({"messages": [user({"type": "zoom"}), answer("x")]}, "a part of type 'zoom'"),
        ({"messages": [user({"type": "image"}), answer("x")]}, "1 <image> tag for 0 images"),
        ({"messages": [{"role": "user", "content": "q", "images": ["a.png"]}, answer("x")]}, "'images' of its own"),
        ({"messages": [{"role": "user", "content": "q", "image": "a.png"}, answer("x")]}, "into the record's 'images'"),
        ({"messages": [user(image("a.png"))]}, "ends with the role 'user'"),
        ({"messages": TALK, "images": ["a.png"], "imags": ["b.png"]}, "the nearest known one is 'images'"),
        ({"text_info": []}, "this record is of type erniekit"),
        (
            {"messages": TALK, "images": ["a.png"], "image_info": [{"image_url": "a"}]},
            "type messages has images and videos",
        ),
        ([], "must be an object"),
    ],
)
def test_wrong_messages(options, record, message):
    with pytest.raises(BadLine, match=message) as caught:
        parse("messages", record, options)
    assert str(caught.value).startswith("f.jsonl:7: ") and "Hint: " in str(caught.value)


def test_missing_tags_may_be_put_in_front(options):
    record = {"messages": [{"role": "user", "content": "Count."}, answer("3")], "images": ["a.png", "b.png"]}
    sample, notes = parse("messages", record, options, missing_tags="front")
    assert sample.messages[0]["content"] == [image("a.png"), image("b.png"), text("Count.")]
    assert any("put in front" in doubt for doubt in notes.doubts)
    with pytest.raises(BadLine, match="1 <image> tag for 2 images"):  # some tags are there: which one is missing?
        parse("messages", {"messages": TALK, "images": ["a.png", "b.png"]}, options, missing_tags="front")


def test_agent_roles_and_pictures_of_tools(options):
    record = {
        "messages": [
            {"role": "user", "content": "<image>Read the sign."},
            {"role": "tool_call", "content": '{"name": "zoom", "arguments": {"bbox_2d": [1, 2, 3, 4]}}'},
            {"role": "tool_response", "content": "<image>"},
            answer("EXIT"),
        ],
        "images": ["a.png", "b.png"],
        "tools": '[{"type": "function", "function": {"name": "zoom", "parameters": {}}}]',
    }
    sample, _ = parse("messages", record, options)
    call, result = sample.messages[1:3]
    assert call["tool_calls"][0]["function"] == {"name": "zoom", "arguments": {"bbox_2d": [1, 2, 3, 4]}}
    assert result == {"role": "tool", "content": [image("b.png")]}
    assert sample.tools and sample.tools[0]["function"]["name"] == "zoom"
    record["messages"][2] = {"role": "tool", "content": [text("Here:"), image("b.png")]}
    record["images"] = ["a.png"]
    sample, _ = parse("messages", record, options)
    assert sample.messages[2]["content"] == [text("Here:"), image("b.png")]


def test_labels_come_along(options):
    record = {"messages": [*TALK, {"role": "user", "content": "Sure?"}, answer("Yes")], "images": ["a.png"]}
    assert parse("messages", {**record, "label": [0, 1]}, options)[0].label == [0, 1]
    assert parse("messages", record, options)[0].label is None


class TestErniekit:
    def test_system_and_several_turns(self, options):
        record = {
            "is_system": 1,
            "text_info": [
                {"text": "Be brief.", "tag": "mask"},
                {"text": "", "tag": "no_mask"},
                {"text": "One: ", "tag": "mask"},
                {"text": "and two", "tag": "mask"},
                {"text": "ok", "tag": "no_mask"},
                {"text": "more?", "tag": "mask"},
                {"text": "no", "tag": "no_mask"},
            ],
            "image_info": [
                {"image_url": "a.png", "matched_text_index": 2},
                {"image_url": "b.png", "matched_text_index": 3},
            ],
        }
        sample, _ = parse("erniekit", record, options)
        assert sample.messages == [
            {"role": "system", "content": "Be brief."},
            user(image("a.png"), text("One:"), image("b.png"), text("and two")),
            answer("ok"),
            {"role": "user", "content": "more?"},
            answer("no"),
        ]

    def test_tools(self, options):
        record = {
            "tools": [{"type": "function", "function": {"name": "zoom", "parameters": {}}}],
            "text_info": [
                {"text": "Read it.", "tag": "mask"},
                {
                    "text": "",
                    "tag": "no_mask",
                    "tool_calls": [{"name": "zoom", "arguments": '{"bbox_2d": [1, 2, 3, 4]}'}],
                },
                {"text": "", "tag": "mask", "tool_response": True},
                {"text": "EXIT", "tag": "no_mask"},
            ],
            "image_info": [
                {"image_url": "a.png", "matched_text_index": 0},
                {"image_url": "b.png", "matched_text_index": 2},
            ],
        }
        sample, _ = parse("erniekit", record, options)
        assert [message["role"] for message in sample.messages] == ["user", "assistant", "tool", "assistant"]
        assert sample.messages[1]["tool_calls"][0]["function"]["arguments"] == {"bbox_2d": [1, 2, 3, 4]}
        assert sample.messages[2]["content"] == [image("b.png")]

    def test_videos_and_frames(self, options):
        texts = [{"text": "What happens?", "tag": "mask"}, {"text": "It falls.", "tag": "no_mask"}]
        record = {"text_info": texts, "video_info": [{"image_url": "clip.mp4", "matched_text_index": 0}]}
        assert parse("erniekit", record, options)[0].messages[0]["content"][0] == video("clip.mp4")
        frames = [{"image_url": f"{i}.png", "matched_text_index": 0, "time_stamp": i / 2} for i in range(3)]
        expected = video(["0.png", "1.png", "2.png"], time_stamps=[0, 0.5, 1])
        for record in (
            {"text_info": texts, "video_info": frames},
            {"text_info": texts, "image_info": [{**frame, "is_video": True} for frame in frames]},
        ):
            assert parse("erniekit", record, options)[0].messages[0]["content"][0] == expected

    def test_order_of_pictures_and_videos(self, options):
        record = {
            "text_info": [
                {"text": "first", "tag": "mask"},
                {"text": "then", "tag": "mask"},
                {"text": "ok", "tag": "no_mask"},
            ],
            "image_info": [{"image_url": "a.png"}],
            "video_info": [{"image_url": "c.mp4"}],
        }
        order = {"type": ["video", "text", "image", "text", "text"], "index": [0, 0, 0, 1, 2]}
        sample, _ = parse("erniekit", {**record, "order": order}, options)
        assert sample.messages[0]["content"] == [video("c.mp4"), text("first"), image("a.png"), text("then")]
        with pytest.raises(BadLine, match="nothing says in which order"):
            parse("erniekit", record, options)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"image_info": [{"image_url": "a", "matched_text_index": 1}]}, r"text_info\[1\], which is an answer"),
            ({"image_info": [{"image_url": "a", "matched_text_index": 2}]}, "index 2, but text_info has 2 items"),
            ({"image_info": [{"matched_text_index": 0}]}, r"image_info\[0\] has no image_url"),
            ({"image_info": [{"image_url": "a", "is_valid": False}]}, "is_valid: false"),
            ({"image_info": {"image_url": "a"}}, "must be a list of objects"),
            ({"text_info": [{"text": "a", "tag": "no_mask"}]}, "first text must be a prompt"),
            ({"text_info": [{"text": "a", "tag": "prompt"}]}, "has the tag 'prompt'"),
            ({"text_info": [{"text": "a", "tag": "mask"}]}, "ends with the role 'user'"),
            (
                {"text_info": [{"text": " ", "tag": "mask"}, {"text": "a", "tag": "no_mask"}]},
                r"text_info\[0\] is empty",
            ),
            ({"is_system": 1}, "does not begin with the system text"),
            ({"order": {"type": ["text"], "index": [0]}}, "names the items .0. of text_info, which has 2"),
            ({"order": {"type": ["text", "text"], "index": [1, 0]}}, "puts the texts into the order"),
            ({"order": {"type": ["text", "text", "sound"], "index": [0, 1, 0]}}, "has the type 'sound'"),
            ({"order": [0]}, "two lists of one length"),
            ({"images": ["a"]}, "type erniekit has image_info"),
        ],
    )
    def test_wrong_records(self, options, changes, message):
        record = {"text_info": [{"text": "q", "tag": "mask"}, {"text": "a", "tag": "no_mask"}], **changes}
        with pytest.raises(BadLine, match=message):
            parse("erniekit", record, options)


class TestBoxes:
    def test_ms_swift_grounding(self, options):
        record = {
            "messages": [
                {"role": "user", "content": "<image>Find <ref-object>."},
                answer("<bbox> and <bbox>"),
            ],
            "images": ["a.png"],  # 200 x 100
            "objects": {"ref": ["the cup"], "bbox": [[20, 10, 200, 100], [0, 50, 100, 75]]},
        }
        sample, _ = parse("messages", record, options)
        assert sample.messages[0]["content"][1]["text"] == "Find the cup."
        assert sample.messages[1]["content"] == "[100, 100, 1000, 1000] and [0, 500, 500, 750]"
        record["objects"] |= {"bbox_type": "norm1", "bbox": [[0.1, 0.25, 1, 1], [0, 0, 0.5, 0.5]]}
        sample, _ = parse("messages", record, options)
        assert sample.messages[1]["content"] == "[100, 250, 1000, 1000] and [0, 0, 500, 500]"

    def test_which_picture_a_box_is_in(self, options):
        record = {
            "messages": [{"role": "user", "content": "<image><image>Where?"}, answer("<bbox>")],
            "images": ["a.png", "b.png"],  # the second has 50 x 400
            "objects": {"bbox": [[25, 100, 50, 200]], "image_id": [1]},
        }
        assert parse("messages", record, options)[0].messages[1]["content"] == "[500, 250, 1000, 500]"
        del record["objects"]["image_id"]
        with pytest.raises(BadLine, match="boxes in pixels and 2 pictures"):
            parse("messages", record, options)

    @pytest.mark.parametrize(
        ("objects", "message"),
        [
            ({"bbox": [[0, 0, 201, 50]]}, "outside the picture: x is 201, the range is 0 to 200"),
            ({"bbox": [[10, 10, 5, 20]]}, "corners swapped"),
            ({"bbox": [[1, 2, 3]]}, "must be .x, y. or"),
            ({"bbox": [[1, 2, 3, 4], [1, 2, 3, 4]]}, "1 <bbox> tag for 2 entries"),
            ({"bbox": [["a", 2, 3, 4]]}, "must hold numbers"),
            ({"bbox": [[1, 2, 3, 4]], "bbox_type": "cm"}, "bbox_type is 'cm'"),
            ({"bbox": [[1, 2, 3, 4]], "image_id": [4]}, "image_id.0. is 4 and the record has 1 picture"),
        ],
    )
    def test_wrong_objects(self, options, objects, message):
        record = {
            "messages": [{"role": "user", "content": "<image>Where?"}, answer("<bbox>")],
            "images": ["a.png"],
            "objects": objects,
        }
        with pytest.raises(BadLine, match=message):
            parse("messages", record, options)

    def test_boxes_in_answers(self, options):
        def record(box):
            return {
                "messages": [*TALK[:1], answer('[{"bbox_2d": ' + box + ', "label": "cup"}]')],
                "images": ["a.png"],
            }

        def converted(box, **changes):
            return json.loads(parse("messages", record(box), options, **changes)[0].messages[1]["content"])[0][
                "bbox_2d"
            ]

        assert converted("[1, 2, 1000, 4.5]") == [1, 2, 1000, 4.5]
        assert converted("[20, 10, 200, 100]", boxes="pixels") == [100, 100, 1000, 1000]
        assert converted("[[20, 10, 200, 100], [0, 0, 1, 1]]", boxes="pixels")[1] == [0, 0, 5, 10]
        assert converted("[0.5, 0, 1, 0.25]", boxes="fraction") == [500, 0, 1000, 250]
        for wrong in ("[1, 2, 1001, 4]", "[-1, 0, 3, 4]"):
            with pytest.raises(BadLine, match="outside the picture"):
                converted(wrong)
        with pytest.raises(BadLine, match="corners swapped"):
            converted("[5, 2, 4, 4]")

    def test_boxes_in_calls(self, options):
        record = {
            "messages": [
                {"role": "user", "content": "<image><image>Read it."},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"name": "zoom", "arguments": {"bbox_2d": [20, 10, 200, 100], "img_idx": 0}}],
                },
                {"role": "tool", "content": "ok"},
                answer("x"),
            ],
            "images": ["a.png", "b.png"],
        }
        sample, _ = parse("messages", record, options, boxes="pixels")
        arguments = sample.messages[1]["tool_calls"][0]["function"]["arguments"]
        assert arguments == {"bbox_2d": [100, 100, 1000, 1000], "img_idx": 0}

    @pytest.mark.parametrize(("index", "x"), [({}, 500), ({"img_idx": 1}, 1000), ({"img_idx": 2.0}, 1000)])
    def test_a_box_after_a_zoom_is_in_the_user_s_picture(self, options, index, x):
        """As the tool of `chat` takes it (tools/image_tools.py): b.png is the crop, which is 50 pixels wide."""

        def zoom(**arguments):
            calls = [{"name": "zoom", "arguments": arguments}]
            return [{"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "<image>"}]

        box = [0, 0, 50 if index else 100, 50]
        record = {
            "messages": [
                {"role": "user", "content": "<image>Read it."},
                *zoom(bbox_2d=[0, 0, 200, 100]),
                *zoom(bbox_2d=[0, 0, 20, 100], img_idx=0),
                *zoom(bbox_2d=box, **index),
                answer('{"bbox_2d": [0, 0, 100, 100]}'),
            ],
            "images": ["a.png", *["b.png"] * 3],
        }
        messages = parse("messages", record, options, boxes="pixels")[0].messages
        first, second, third = (m["tool_calls"][0]["function"]["arguments"] for m in messages if "tool_calls" in m)
        assert (first["bbox_2d"][2], second["bbox_2d"][2], third["bbox_2d"][2]) == (1000, 100, x)
        assert messages[-1]["content"] == '{"bbox_2d": [0, 0, 500, 1000]}'

    @pytest.mark.parametrize("index", [1, -1, "0", True, 0.5])
    def test_a_call_about_a_picture_that_is_not_there(self, options, index):
        call = {"name": "zoom", "arguments": {"bbox_2d": [0, 0, 1, 1], "img_idx": index}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        record = {"messages": [TALK[0], turn, {"role": "tool", "content": "ok"}, answer("x")], "images": ["a.png"]}
        with pytest.raises(BadLine, match=r"answer 1 has the img_idx .*, and 1 picture is"):
            parse("messages", record, options, boxes="pixels")

    def test_boxes_in_pairs(self, options):
        record = {
            "messages": [{"role": "user", "content": "<image>Where?"}],
            "images": ["a.png"],
            "chosen": '{"bbox_2d": [20, 10, 200, 100]}',
            "rejected": '{"bbox_2d": [0, 0, 1, 1]}',
        }
        chosen, rejected = parse("messages (DPO)", record, options, boxes="pixels")[0].answers
        assert chosen[0]["content"] == '{"bbox_2d": [100, 100, 1000, 1000]}'
        assert rejected[0]["content"] == '{"bbox_2d": [0, 0, 5, 10]}'
        with pytest.raises(BadLine, match=r"bbox_2d of the rejected answer 0 .* outside the picture"):
            parse("messages (DPO)", record | {"rejected": '{"bbox_2d": [0, 0, 1, 101]}'}, options, boxes="pixels")


def test_a_jsonl_file_may_be_one_list(tmp_path, options):
    """As ERNIEKit's own demo data is."""
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps([SAME["erniekit"][0], SAME["erniekit"][1]], indent=1), "utf-8")
    places = []

    def check(raw, where):
        places.append(where)
        assert parse_vision_record(load_record(raw, where), "erniekit", where, options).messages == CUPS

    file = open_file(path, check, lambda error: pytest.fail(str(error)))
    assert len(file) == 2 and places[0] == f"{path}:2"
    assert np.all(file.record_bytes() > 0)
