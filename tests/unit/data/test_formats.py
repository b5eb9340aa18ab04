import json

import pytest

from erniekit.data.formats import FORMATS, METADATA, parse_record
from erniekit.utils.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def call(name="f", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def test_erniekit_turns_system_and_label():
    sample = parse_record({"system": "s", "src": ["a", "b"], "tgt": ["x", "y"], "label": [0, 1]}, "erniekit")
    assert sample.messages == [system("s"), user("a"), assistant("x"), user("b"), assistant("y")]
    assert sample.label == [0, 1]


def test_erniekit_accepts_plain_strings_and_an_empty_system():
    sample = parse_record({"src": "a", "tgt": "x", "system": ""}, "erniekit")
    assert sample.messages == [user("a"), assistant("x")]
    assert sample.label is None and sample.tools is None


def test_erniekit_is_system_takes_the_first_pair_away_with_its_label():
    record = {"src": ["rules", "a"], "tgt": ["", "x"], "is_system": 1, "label": [0, 1]}
    sample = parse_record(record, "erniekit")
    assert sample.messages == [system("rules"), user("a"), assistant("x")]
    assert sample.label == [1]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"src": ["a", "b"], "tgt": ["x"]}, "'src' has 2 turns and 'tgt' has 1"),
        ({"src": ["a"], "tgt": [" "]}, r"tgt\[0\] is empty"),
        ({"src": ["a"], "tgt": [3]}, r"tgt\[0\] must be a string, not a number"),
        ({"src": {"a": 1}, "tgt": ["x"]}, "'src' must be a string or a list of strings, not an object"),
        ({"src": [], "tgt": []}, "not an empty list"),
        ({"tgt": ["x"]}, "field 'src' is missing"),
        ({"src": ["a"], "tgt": ["x"], "label": [1, 1]}, "'label' has 2 entries for 1 answers"),
        ({"src": ["a"], "tgt": ["x"], "label": [2]}, "'label' must be a list of 0 and 1"),
        ({"src": ["a"], "tgt": ["x"], "label": [1.0]}, "'label' must be a list of 0 and 1"),
        ({"src": ["a"], "tgt": ["x"], "label": 1}, "'label' must be a list of 0 and 1"),
        ({"src": ["a"], "tgt": ["x"], "is_system": "yes"}, "'is_system' must be 0 or 1"),
        ({"src": ["a"], "tgt": ["x"], "is_system": 1}, "no turn after the system text"),
        ({"src": ["s", "a"], "tgt": ["", "x"], "is_system": 1, "system": "t"}, "both 'system' and 'is_system'"),
        ({"src": ["a"], "tgt": ["\ud83d"]}, r"tgt\[0\] holds half of a surrogate pair"),
        (
            {"src": ["a"], "tgt": ["x"], "scr": 1},
            "unknown field 'scr' for type erniekit; the nearest known one is 'src'",
        ),
        (["a"], "a record must be an object with named fields, not a list"),
    ],
)
def test_erniekit_errors_say_where_what_and_give_a_hint(record, reason):
    with pytest.raises(DataError, match=reason) as error:
        parse_record(record, "erniekit", "train.jsonl:7")
    assert str(error.value).startswith("train.jsonl:7: ")
    assert "Hint: " in str(error.value)


def test_alpaca_joins_instruction_and_input_and_keeps_history():
    record = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["q", "a"]], "system": "s"}
    messages = parse_record(record, "alpaca").messages
    assert messages == [system("s"), user("q"), assistant("a"), user("Add.\n1 2"), assistant("3")]
    assert parse_record({"instruction": "q", "input": "", "output": "a"}, "alpaca").messages[0] == user("q")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "q"}, "'output' is missing"),
        ({"instruction": "q", "output": ""}, "'output' is empty"),
        ({"instruction": "q", "output": "a", "input": 5}, "'input' must be a string"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, r"history\[0\] must be a pair"),
        ({"instruction": "q", "output": "a", "history": "q"}, "'history' must be a list"),
        ({"instruction": "q", "output": "a", "outptu": "b"}, "nearest known one is 'output'"),
    ],
)
def test_alpaca_errors(record, reason):
    with pytest.raises(DataError, match=reason):
        parse_record(record, "alpaca")


def test_messages_with_tools_calls_label_and_thoughts():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    record = {
        "messages": [
            system("s"),
            user("q"),
            {"role": "assistant", "content": None, "tool_calls": [call(x=1)]},
            {"role": "tool", "content": "", "tool_call_id": "7", "name": "f"},
            assistant("a", reasoning_content="hm"),
        ],
        "tools": tools,
        "label": [1, 0],
    }
    sample = parse_record(record, "chatml")
    assert [message["role"] for message in sample.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert sample.messages[2] == assistant("", tool_calls=[call(x=1)])
    assert sample.messages[3] == {"role": "tool", "content": "", "tool_call_id": "7", "name": "f"}
    assert sample.messages[4]["reasoning_content"] == "hm"
    assert (sample.tools, sample.label) == (tools, [1, 0])


@pytest.mark.parametrize("alias", ["function", "function_call", "tool_calls"])
def test_function_turns_become_tool_calls_and_observations_tool_results(alias):
    turns = [
        ("human", "q"),
        (alias, json.dumps({"name": "f", "arguments": '{"x": 1}'})),
        ("observation", "42"),
        ("gpt", "a"),
    ]
    as_messages = parse_record({"messages": [{"role": r, "content": c} for r, c in turns]}, "messages")
    as_sharegpt = parse_record({"conversations": [{"from": r, "value": c} for r, c in turns]}, "sharegpt")
    assert as_messages == as_sharegpt
    calls = assistant("", tool_calls=[call(x=1)])
    assert as_messages.messages == [user("q"), calls, {"role": "tool", "content": "42"}, assistant("a")]


def test_sharegpt_has_a_system_field_and_tools_as_json_text():
    record = {
        "system": "s",
        "tools": '[{"name": "f"}]',
        "conversations": [{"from": "user", "value": "q"}, {"from": "gpt", "value": "a"}],
    }
    sample = parse_record(record, "sharegpt")
    assert sample.messages == [system("s"), user("q"), assistant("a")] and sample.tools == [{"name": "f"}]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user("q")], "ends with the role 'user'"),
        ([user("q"), user("q"), assistant("a")], "role 'user' of turn 1 follows user"),
        ([assistant("a")], "role 'assistant' of turn 0 comes first"),
        ([user("q"), system("s"), assistant("a")], "role 'system' of turn 1 follows user"),
        ([user("q"), {"role": "tool", "content": "r"}, assistant("a")], "role 'tool' of turn 1 follows user"),
        ([user("q"), assistant("", tool_calls=[call()]), user("q"), assistant("a")], "turn 2 follows a function call"),
        ([{"role": "owner", "content": "q"}], "the role 'owner'"),
        ([{"role": "user", "contents": "q"}], "unknown field 'contents'; the nearest known one is 'content'"),
        ([user("q"), assistant("")], r"messages\[1\].content is empty"),
        ([user(["q"]), assistant("a")], r"messages\[0\].content must be a string, not a list"),
        ([user("q"), assistant("", tool_calls=[{"name": 1}])], "names no function"),
        ([user("q"), assistant("", tool_calls=[{"name": "f", "arguments": "{"}])], "arguments must hold JSON"),
        ([user("q"), {"role": "function", "content": "f()"}], "must hold JSON"),
        ([user("q") | {"tool_calls": [call()]}, assistant("a")], "what only an assistant has"),
        ([], "at least one entry"),
    ],
)
def test_messages_errors(messages, reason):
    with pytest.raises(DataError, match=reason):
        parse_record({"messages": messages}, "messages")


def test_label_counts_every_assistant_message():
    messages = [user("q"), assistant("", tool_calls=[call()]), {"role": "tool", "content": "r"}, assistant("a")]
    with pytest.raises(DataError, match="'label' has 1 entries for 2 answers"):
        parse_record({"messages": messages, "label": [1]}, "messages")


def test_pretraining_text_in_both_spellings():
    assert parse_record({"text": "abc"}, "text").text == "abc"
    sample = parse_record({"tgt": ["ab", "c"]}, "text")
    assert (sample.kind, sample.text) == ("text", "ab\nc")
    for record, reason in [({"text": "a", "tgt": ["a"]}, "exactly one"), ({"text": ""}, "empty"), ({}, "exactly one")]:
        with pytest.raises(DataError, match=reason):
            parse_record(record, "text")


@pytest.mark.parametrize(
    ("record", "type_name", "meant"),
    [
        ({"messages": []}, "erniekit", "messages"),
        ({"conversations": []}, "alpaca", "sharegpt"),
        ({"src": "a", "tgt": "b"}, "text", "erniekit"),
        ({"text": "a"}, "erniekit", "text"),
        ({"src": ["a"], "tgt": [], "response": [["x"], ["y"]], "sort": [1, 0]}, "erniekit", "stage DPO"),
        ({"text_info": []}, "erniekit", "stage VL-SFT"),
    ],
)
def test_a_record_of_another_type_is_recognised(record, type_name, meant):
    with pytest.raises(DataError, match=f"this looks like .*{meant}"):
        parse_record(record, type_name)


def test_metadata_fields_are_allowed_everywhere_and_change_nothing():
    records = {
        "erniekit": {"src": "a", "tgt": "b"},
        "alpaca": {"instruction": "a", "output": "b"},
        "messages": {"messages": [user("a"), assistant("b")]},
        "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "text": {"text": "a"},
    }
    assert set(records) == set(FORMATS)
    for name, record in records.items():
        assert parse_record(record | dict.fromkeys(METADATA, 1), name) == parse_record(record, name)


SINGLE_ANSWERS = {
    "erniekit (DPO)": {"src": ["q"], "tgt": ["a"]},
    "alpaca (DPO)": {"instruction": "q", "output": "a"},
    "messages (DPO)": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "sharegpt (DPO)": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
}


@pytest.mark.parametrize("type_name", SINGLE_ANSWERS)
@pytest.mark.parametrize("record", SINGLE_ANSWERS.values(), ids=list(SINGLE_ANSWERS))
def test_single_answers_at_stage_dpo_are_sent_to_stage_sft(type_name: str, record: dict[str, object]):
    with pytest.raises(DataError, match=r"stage: DPO trains on pairs.*Hint: set stage: SFT"):
        parse_record(record, type_name)


@pytest.mark.parametrize("type_name", ["erniekit", "alpaca", "messages", "sharegpt"])
def test_pairs_at_another_stage_are_sent_to_stage_dpo(type_name: str):
    with pytest.raises(DataError, match=r"preference data.*Hint: set stage: DPO"):
        parse_record({"instruction": "q", "chosen": "a", "rejected": "b"}, type_name)
    with pytest.raises(DataError, match=r"Hint: set stage: DPO"):
        parse_record({"src": ["q"], "tgt": [], "response": [["a"], ["b"]], "sort": [1, 0]}, type_name)
