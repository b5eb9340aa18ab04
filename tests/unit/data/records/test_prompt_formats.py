"""Prompts for reinforcement learning: every form that people have becomes an open conversation and fields."""

import json

import pytest
from support.pictures import write_picture

from erniekit.data.records.fields import Notes
from erniekit.data.records.formats import FORMATS, PROMPT_FORMATS, parse_record
from erniekit.data.vision.formats import parse_vision_record
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.tags import FormatOptions
from erniekit.utils.errors import DataError

Q = {"role": "user", "content": "2+3="}


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("erniekit", {"src": ["2+3="], "answer": "5"}),
        ("erniekit", {"src": "2+3=", "tgt": [], "answer": "5"}),
        ("erniekit", {"src": ["2+3="], "tgt": ["5"]}),
        ("alpaca", {"instruction": "2+3=", "output": "5"}),
        ("alpaca", {"instruction": "2+3=", "answer": "5"}),
        ("messages", {"messages": [Q], "answer": "5"}),
        ("messages", {"messages": [Q, {"role": "assistant", "content": "5"}]}),
        ("messages", {"messages": [Q, {"role": "assistant", "content": [{"type": "text", "text": "5"}]}]}),
        ("messages", {"prompt": [Q], "answer": "5"}),  # TRL
        ("messages", {"prompt": "2+3=", "solution": "5"}),  # TRL, ms-swift
        ("messages", {"messages": [Q], "solution": "5"}),  # ms-swift
        ("messages", {"problem": "2+3=", "answer": "5"}),  # EasyR1
        ("messages", {"prompt": [Q], "reward_model": {"style": "rule", "ground_truth": "5"}}),  # verl
        ("sharegpt", {"conversations": [{"from": "human", "value": "2+3="}], "ground_truth": "5"}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "2+3="}, {"from": "gpt", "value": "5"}]}),
    ],
)
def test_every_form_becomes_the_same_prompt_with_its_answer(kind, record):
    sample = parse_record(record, f"{kind} (RL)")
    assert (sample.kind, sample.messages, sample.fields["answer"]) == ("prompt", [Q], "5")


def test_a_line_for_sft_is_a_prompt_and_says_so():
    notes = Notes()
    sample = parse_record({"src": ["a", "b"], "tgt": ["x", "y"], "label": [0, 1]}, "erniekit (RL)", notes=notes)
    assert [turn["content"] for turn in sample.messages] == ["a", "x", "b"]
    assert sample.fields == {"answer": "y", "label": [0, 1]} and sample.label is None
    assert any("left out of the prompt" in doubt for doubt in notes.doubts)


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("alpaca", {"instruction": "2+3=", "output": "", "answer": "5"}),
        ("erniekit", {"src": ["2+3="], "tgt": [""], "answer": "5"}),
    ],
)
def test_an_empty_answer_of_a_table_is_not_said_to_be_left_out(kind, record):
    notes = Notes()
    sample = parse_record(record, f"{kind} (RL)", notes=notes)
    assert (sample.messages, sample.fields, notes.doubts) == ([Q], {"answer": "5"}, set())


def test_a_call_of_tools_that_is_left_out_is_said():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    notes = Notes()
    record = {"messages": [Q, {"role": "assistant", "content": None, "tool_calls": [call]}], "answer": "5"}
    sample = parse_record(record, "messages (RL)", notes=notes)
    assert sample.messages == [Q] and sample.fields["answer"] == "5"
    assert any("left out of the prompt" in doubt for doubt in notes.doubts)


def test_all_other_fields_are_kept_for_the_rewards():
    extra = {"index": 7, "split": "train"}
    record = {
        "data_source": "gsm8k",
        "prompt": [Q],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "5"},
        "extra_info": extra,
        "pass_rate": 0.25,
    }
    fields = parse_record(record, "messages (RL)").fields
    assert fields["answer"] == "5" and fields["domain"] == "math" and fields["extra_info"] == extra
    assert {name for name in record if name != "prompt"} < set(fields)
    own = parse_record({"src": ["a"], "answer": 0, "domain": "d", "solution": "long"}, "erniekit (RL)").fields
    assert own == {"answer": 0, "domain": "d", "solution": "long"}


def test_calls_of_tools_before_the_question_are_kept_and_those_after_it_left_out():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    turns = [
        Q,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "5"},
    ]
    later = parse_record({"messages": [*turns, Q], "tools": tools}, "messages (RL)")
    assert [turn["role"] for turn in later.messages] == ["user", "assistant", "tool", "assistant", "user"]
    whole = parse_record({"messages": turns, "tools": tools}, "messages (RL)")
    assert whole.messages == [Q] and whole.tools == tools and whole.fields["answer"] == "5"
    after_a_result = parse_record({"messages": turns[:3], "tools": tools}, "messages (RL)")
    assert [turn["role"] for turn in after_a_result.messages] == ["user", "assistant", "tool"]


@pytest.mark.parametrize(
    ("kind", "record", "reason"),
    [
        ("erniekit", {"src": ["a", "b", "c"], "tgt": ["x"]}, "'src' has 3 turns and 'tgt' has 1"),
        ("erniekit", {"src": [" "], "answer": "1"}, r"src\[0\] is empty"),
        ("erniekit", {"answer": "1"}, "field 'src' is missing"),
        ("erniekit", {"prompt": "a"}, "looks like messages"),
        ("erniekit", {"src": ["a"], "images": ["a.png"]}, "stage: VL-RL"),
        ("erniekit", {"src": ["a"], "history": [["q", "a"]]}, "'history' does not belong"),
        ("erniekit", {"src": ["a"], "sytem": "s"}, "the nearest one of a prompt of type erniekit is 'system'"),
        ("erniekit", {"src": ["a"], "domain": 3}, "'domain' must be text"),
        ("alpaca", {"input": "a"}, "field 'instruction' is missing"),
        ("messages", {"messages": [Q], "prompt": "a"}, "is given 2 times"),
        ("messages", {"prompt": []}, "the prompt is missing"),
        ("messages", {"prompt": 3}, "'prompt' must be a list"),
        ("messages", {"messages": "a"}, "'messages' must be a list"),
        ("messages", {"messages": [{"role": "system", "content": "s"}]}, "ends with the role 'system'"),
        ("messages", {"messages": [{"role": "assistant", "content": "s"}]}, "has no turn of the user"),
        ("messages", {"messages": [{"role": "usr", "content": "s"}]}, "has the role 'usr'"),
        ("messages", {"messages": [3]}, "must be an object"),
        ("sharegpt", {"conversations": []}, "at least one entry"),
    ],
)
def test_a_wrong_prompt_is_placed_with_a_hint(kind, record, reason):
    with pytest.raises(DataError, match=reason) as error:
        parse_record(record, f"{kind} (RL)", "train.jsonl:7")
    assert str(error.value).startswith("train.jsonl:7: ") and "Hint: " in str(error.value)


def test_every_type_of_conversations_has_one_of_prompts():
    assert {name.removesuffix(" (RL)") for name in PROMPT_FORMATS} == set(FORMATS) - {"text"}


PICTURE = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Count."}]


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("messages", {"messages": [{"role": "user", "content": "<image>Count."}], "images": ["a.png"], "answer": "3"}),
        ("messages", {"problem": "<image>Count.", "answer": "3", "images": ["a.png"]}),  # EasyR1
        ("messages", {"prompt": [{"role": "user", "content": PICTURE}], "answer": "3"}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "<image>Count."}], "image": "a.png", "answer": "3"}),
        ("alpaca", {"instruction": "<image>Count.", "images": ["a.png"], "output": "3"}),
        (
            "erniekit",
            {
                "image_info": [{"image_url": "a.png", "matched_text_index": 0}],
                "text_info": [{"text": "Count.", "tag": "mask"}],
                "answer": "3",
            },
        ),
        (
            "erniekit",
            {
                "image_info": [{"image_url": "a.png"}],
                "text_info": [{"text": "Count.", "tag": "mask"}, {"text": "3", "tag": "no_mask"}],
                "order": {"type": ["image", "text", "text"], "index": [0, 0, 1]},
            },
        ),
    ],
)
def test_prompts_with_pictures(kind, record, tmp_path):
    write_picture(tmp_path / "a.png")
    sample = parse_vision_record(record, f"{kind} (RL) (VL)", "f:1", FormatOptions(MediaReader(tmp_path)))
    assert [turn["role"] for turn in sample.messages] == ["user"]
    assert sample.messages[0]["content"] == PICTURE and sample.fields["answer"] == "3"
    assert json.dumps(dict(sample.fields)) == '{"answer": "3"}'


def test_a_prompt_of_text_alone_may_stand_among_prompts_with_pictures(tmp_path):
    options = FormatOptions(MediaReader(tmp_path))
    sample = parse_vision_record({"src": ["2+3="], "answer": "5"}, "erniekit (RL) (VL)", "f:1", options)
    assert sample.messages == [Q] and sample.fields == {"answer": "5"}
    with pytest.raises(DataError, match="0 <image> tags for 1 image"):
        parse_vision_record({"prompt": "a", "images": ["a.png"]}, "messages (RL) (VL)", "f:1", options)
