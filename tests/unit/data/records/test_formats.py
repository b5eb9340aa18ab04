import json

import pytest

from erniekit.config.methods import METHODS
from erniekit.data.records import formats
from erniekit.data.records.dataset import read_specs
from erniekit.data.records.fields import Notes
from erniekit.data.records.formats import FORMATS, parse_record
from erniekit.data.records.preference_formats import PREFERENCE_FORMATS
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


def test_an_answer_beside_a_system_text_is_left_out_with_a_note():
    notes = Notes()
    record = {"src": ["rules", "a"], "tgt": ["noted", "x"], "is_system": 1}
    assert parse_record(record, "erniekit", notes=notes).messages == [system("rules"), user("a"), assistant("x")]
    assert notes.doubts == {"is_system: 1 makes src[0] the system text, and the answer beside it, tgt[0], is left out"}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"src": ["a", "b"], "tgt": ["x"]}, "'src' has 2 turns and 'tgt' has 1"),
        ({"src": ["a"], "tgt": [" "]}, r"tgt\[0\] is empty"),
        ({"src": ["a"], "tgt": [3]}, r"tgt\[0\] must be a string, not a number"),
        ({"src": {"a": 1}, "tgt": ["x"]}, "'src' must be a string or a list of strings, not an object"),
        ({"src": [], "tgt": []}, "not an empty list"),
        ({"tgt": ["x"]}, "field 'src' is missing"),
        ({"src": ["a"], "tgt": ["x"], "label": [1, 1]}, "'label' has 2 entries for 1 answer"),
        ({"src": ["a"], "tgt": ["x"], "label": [2]}, "'label' must be a list of 0 and 1"),
        ({"src": ["a"], "tgt": ["x"], "label": [1.0]}, "'label' must be a list of 0 and 1"),
        ({"src": ["a"], "tgt": ["x"], "label": 1}, "'label' must be a list of 0 and 1"),
        ({"src": ["a"], "tgt": ["x"], "is_system": "yes"}, "'is_system' must be 0 or 1"),
        ({"src": ["a"], "tgt": ["x"], "is_system": 1}, "no turn after the system text"),
        ({"src": ["s", "a"], "tgt": ["", "x"], "is_system": 1, "system": "t"}, "both 'system' and 'is_system'"),
        ({"src": ["a"], "tgt": ["\ud83d"]}, r"tgt\[0\] holds half of a surrogate pair"),
        (
            {"src": ["a"], "tgt": ["x"], "scr": 1},
            "unknown field 'scr' of type erniekit; the nearest known one is 'src'",
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
        (
            [{"role": "user", "contents": "q"}],
            "unknown field 'contents' of a message; the nearest known one is 'content'",
        ),
        ([user("q"), assistant("")], r"messages\[1\].content is empty"),
        ([user(["q"]), assistant("a")], r"messages\[0\].content\[0\] is not a text part but a string"),
        ([user("q"), assistant("", tool_calls=[{"name": 1}])], "names no function"),
        ([user("q"), assistant("", tool_calls=[{"name": "f", "arguments": "{"}])], "arguments: not JSON"),
        ([user("q"), {"role": "function", "content": "f()"}], r"messages\[1\].content: not JSON"),
        ([user("q") | {"tool_calls": [call()]}, assistant("a")], "what only an assistant has"),
        ([], "at least one entry"),
        ([system("")], "'messages' has no turn but an empty system message"),
    ],
)
def test_messages_errors(messages, reason):
    with pytest.raises(DataError, match=reason):
        parse_record({"messages": messages}, "messages")


def test_label_counts_every_assistant_message():
    messages = [user("q"), assistant("", tool_calls=[call()]), {"role": "tool", "content": "r"}, assistant("a")]
    with pytest.raises(DataError, match="'label' has 1 entry for 2 answers"):
        parse_record({"messages": messages, "label": [1]}, "messages")


def test_pretraining_text_in_both_spellings():
    assert parse_record({"text": "abc"}, "text").text == "abc"
    sample = parse_record({"tgt": ["ab", "c"]}, "text")
    assert (sample.kind, sample.text) == ("text", "ab\nc")
    for record, reason in [
        ({"text": "a", "tgt": ["a"]}, "exactly one"),
        ({"text": ""}, "empty"),
        ({"content": "a"}, r"'text' is missing \(it has 'content'\)"),
    ]:
        with pytest.raises(DataError, match=reason):
            parse_record(record, "text")


@pytest.mark.parametrize(
    ("record", "type_name", "meant"),
    [
        ({"messages": []}, "erniekit", "messages"),
        ({"conversations": []}, "alpaca", "sharegpt"),
        ({"src": "a", "tgt": "b"}, "text", "erniekit, which is trained on with stage: SFT"),
        ({"instruction": "a"}, "text", "alpaca, which is trained on with stage: SFT"),
        ({"text": "a"}, "erniekit", "text"),
        ({"src": ["a"], "tgt": [], "response": [["x"], ["y"]], "sort": [1, 0]}, "erniekit", "stage DPO"),
        ({"text_info": []}, "erniekit", "stage: VL-SFT"),
    ],
)
def test_a_record_of_another_type_is_recognised(record, type_name, meant):
    with pytest.raises(DataError, match=f"this looks like .*{meant}"):
        parse_record(record, type_name)


SINGLE_ANSWERS = {
    "erniekit (DPO)": {"src": ["q"], "tgt": ["a"]},
    "alpaca (DPO)": {"instruction": "q", "output": "a"},
    "messages (DPO)": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "sharegpt (DPO)": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
}


@pytest.mark.parametrize("type_name", SINGLE_ANSWERS)
@pytest.mark.parametrize("record", SINGLE_ANSWERS.values(), ids=list(SINGLE_ANSWERS))
def test_single_answers_at_stage_dpo_are_sent_to_stage_sft(type_name: str, record: dict[str, object]):
    with pytest.raises(DataError, match=r"DPO and RM train on pairs.*Hint: set stage: SFT"):
        parse_record(record, type_name)


@pytest.mark.parametrize("type_name", ["erniekit", "alpaca", "messages", "sharegpt"])
def test_pairs_at_another_stage_are_sent_to_stage_dpo(type_name: str):
    with pytest.raises(DataError, match=r"preference data.*set stage: DPO"):
        parse_record({"instruction": "q", "chosen": "a", "rejected": "b"}, type_name)
    with pytest.raises(DataError, match=r"set stage: DPO"):
        parse_record({"src": ["q"], "tgt": [], "response": [["a"], ["b"]], "sort": [1, 0]}, type_name)


RECORDS = {
    "erniekit": {"src": "a", "tgt": "b"},
    "alpaca": {"instruction": "a", "output": "b"},
    "messages": {"messages": [user("a"), assistant("b")]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "text": {"text": "a"},
    "erniekit (DPO)": {"src": ["q"], "tgt": [], "response": [["a"], ["b"]], "sort": [1, 0]},
    "alpaca (DPO)": {"question": "q", "chosen": "a", "rejected": "b"},
    "messages (DPO)": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "sharegpt (DPO)": {"conversations": [{"from": "human", "value": "a"}], "chosen": "a", "rejected": "b"},
}
EXTRA = {
    "id": 7,
    "source": "web",
    "metadata": {"score": 0.5},
    "conversation_id": "x",
    "prompt_id": "y",
    "topic": "sums",
    "images": [],
    "weight": None,
    "text_length": 3,
}


def test_fields_that_change_nothing_are_passed_over_and_named():
    assert set(RECORDS) == set(FORMATS) | set(PREFERENCE_FORMATS)
    for name, record in RECORDS.items():
        notes = Notes()
        assert parse_record(record | EXTRA, name, notes=notes) == parse_record(record, name)
        assert notes.unused == {repr(field) for field in EXTRA if field not in ("images", "weight")}


@pytest.mark.parametrize(
    ("name", "misspelt", "meant"),
    [
        ("erniekit", "tgts", "tgt"),
        ("erniekit", "scr", "src"),
        ("erniekit", "SRC", "src"),
        ("erniekit", "reponse", "response"),
        ("erniekit", "is_sytem", "is_system"),
        ("erniekit", "lable", "label"),
        ("alpaca", "out_put", "output"),
        ("alpaca", "inputs", "input"),
        ("messages", "message", "messages"),
        ("messages", "tool", "tools"),
        ("sharegpt", "sytem", "system"),
        ("text", "texts", "text"),
        ("erniekit (DPO)", "responses", "response"),
        ("messages (DPO)", "choosen", "chosen"),
    ],
)
def test_a_misspelt_field_is_refused_also_when_it_is_empty(name, misspelt, meant):
    for value in ("x", None):
        with pytest.raises(DataError, match=f"unknown field {misspelt!r} of type .*nearest known one is {meant!r}"):
            parse_record(RECORDS[name] | {misspelt: value}, name)


@pytest.mark.parametrize("field", ["redacted", "story", "stem", "test", "next", "ext", "sec", "short", "sport"])
def test_columns_of_public_data_sets_are_no_misspelling(field: str):
    """WildChat and LMSYS-Chat-1M have `redacted`, which is near to `rejected`."""
    for name, record in RECORDS.items():
        assert parse_record(record | {field: False}, name) == parse_record(record, name)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("alpaca", "response", "an answer"),
        ("alpaca", "label", True),
        ("alpaca", "tools", [{"name": "f"}]),
        ("messages", "system", "be brief"),
        ("messages", "images", ["a.png"]),
        ("messages", "chosen", "x"),
        ("erniekit", "loss_weight", 0.5),
        ("sharegpt", "history", [["a", "b"]]),
    ],
)
def test_a_field_that_decides_what_is_learnt_is_refused_with_a_type_that_does_not_know_it(name, field, value):
    with pytest.raises(DataError, match=f"field {field!r} does not belong to type {name}"):
        parse_record(RECORDS[name] | {field: value}, name)


def test_fields_of_messages_are_passed_over_or_refused_by_the_same_rule():
    dump = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "timestamp": 3, "weight": 1}
    notes = Notes()
    record = {"messages": [user("q") | {"weight": 0}, assistant("a") | dump]}
    assert parse_record(record, "messages", notes=notes).messages == [user("q"), assistant("a")]
    assert notes.unused == {"'timestamp' of a message", "'weight' of a message"}
    for field, value in (("refusal", "no"), ("weight", 0), ("function_call", {"name": "f"}), ("reasoning", "hm")):
        with pytest.raises(DataError, match=f"field {field!r} does not belong to a message"):
            parse_record({"messages": [user("q"), assistant("a") | {field: value}]}, "messages")


def test_fields_of_text_parts_are_passed_over_or_refused_too():
    def read(part):
        notes = Notes()
        content = [{"type": "text", "text": "q"} | part]
        messages = parse_record({"messages": [user(content), assistant("a")]}, "messages", notes=notes).messages
        assert messages == [user("q"), assistant("a")]
        return notes.unused

    assert read({"annotations": [], "image": None}) == set()
    assert read({"citations": [1]}) == {"'citations' of a text part"}
    for field, value in (("weight", 0), ("image_url", {"url": "a.png"})):
        with pytest.raises(DataError, match=f"field {field!r} does not belong to a text part"):
            read({field: value})


def test_fields_of_sharegpt_messages_that_are_read_are_not_said_to_be_unused():
    notes = Notes()
    answer = {"from": "gpt", "value": "a", "reasoning_content": "hm", "tool_calls": [call(x=1)]}
    result = {"from": "observation", "value": "1", "tool_call_id": "7", "name": "f"}
    turns = [{"from": "human", "value": "q"}, answer, result, {"from": "gpt", "value": "b"}]
    messages = parse_record({"conversations": turns}, "sharegpt", notes=notes).messages
    assert messages[1] == assistant("a", reasoning_content="hm", tool_calls=[call(x=1)])
    assert messages[2] == {"role": "tool", "content": "1", "tool_call_id": "7", "name": "f"}
    assert not notes.unused


def test_a_missing_field_is_named_with_what_stands_there_instead():
    with pytest.raises(DataError, match=r"'tgt' is missing \(it has 'target'\)"):
        parse_record({"src": ["a"], "target": ["b"]}, "erniekit")


def test_text_parts_and_empty_system_messages_are_read():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for empty in ("", None):
        record = {"messages": [system(empty), user(parts), assistant(parts)]}
        assert parse_record(record, "messages").messages == [user("ab"), assistant("ab")]
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(DataError, match=r"messages\[0\].content\[0\] is not a text part but 'image_url'"):
        parse_record({"messages": [user(image), assistant("a")]}, "messages")


def test_what_no_check_foresaw_is_still_an_error_with_its_place(monkeypatch):
    def broken(record, notes):
        return record["src"][7]

    monkeypatch.setitem(formats._ALL, "erniekit", FORMATS["erniekit"]._replace(read=broken))
    with pytest.raises(DataError, match=r"^a.jsonl:3: this record cannot be read \(IndexError: .*test_formats.py:\d+"):
        parse_record({"src": [], "tgt": []}, "erniekit", "a.jsonl:3")


def test_a_document_may_be_one_message_of_the_assistant():
    """As PaddleFormers' guide to pretraining ERNIE 4.5 writes it; the type of its data set is messages."""
    [spec] = read_specs(["a.jsonl"], ["messages"], [], "train", METHODS["PT"])
    assert parse_record({"messages": [assistant("a\nb")]}, spec.type) == parse_record({"text": "a\nb"}, "text")
    for messages in ([user("q"), assistant("a")], [user("q")], "a", [assistant("a"), assistant("b")]):
        with pytest.raises(DataError, match=r"'messages' is not a document.*conversations are .*stage: SFT"):
            parse_record({"messages": messages}, "text")
    with pytest.raises(DataError, match="exactly one of 'text', 'tgt' and 'messages'"):
        parse_record({"messages": [assistant("a")], "text": "b"}, "text")
    for dropped in ({"reasoning_content": "t"}, {"name": "n"}, {"loss": 0}):
        with pytest.raises(DataError, match=next(iter(dropped))):
            parse_record({"messages": [assistant("a") | dropped]}, "text")
    parse_record({"messages": [assistant("a") | {"id": 3}]}, "text", notes=(notes := Notes()))
    assert notes.unused == {"'id' of a message"}


def test_a_null_beside_a_field_is_no_second_field():
    for record, kind in (
        ({"text": "a", "tgt": None}, "text"),
        ({"tgt": ["a"], "text": ""}, "text"),
        ({"tgt": ["a"], "src": []}, "text"),
        ({"tgt": ["a"], "messages": None, "response": [], "text_info": []}, "text"),
        ({"question": None, "instruction": "q", "chosen": "a", "rejected": "b"}, "alpaca (DPO)"),
        ({"question": "q", "instruction": "", "chosen": "a", "rejected": "b"}, "alpaca (DPO)"),
        ({"messages": [user("q"), assistant("a")], "prompt": None, "completion": "", "label": True}, "messages (KTO)"),
    ):
        sample = parse_record(record, kind)
        assert sample.text == "a" or sample.messages[0] == user("q")
    with pytest.raises(DataError, match="exactly one of 'text' and 'tgt'"):
        parse_record({"text": "a", "tgt": ["b"]}, "text")
    with pytest.raises(DataError, match="both 'question' and 'instruction'"):
        parse_record({"question": "q", "instruction": "p", "chosen": "a", "rejected": "b"}, "alpaca (DPO)")


@pytest.mark.parametrize("kind", ["erniekit", "alpaca", "messages", "sharegpt"])
@pytest.mark.parametrize("answer", ["completion", "response", "answer"])
def test_a_prompt_with_one_answer_is_told_where_they_belong(kind, answer):
    with pytest.raises(DataError, match=r"field 'prompt' does not belong.* are 'instruction' and 'output'.*'messages'"):
        parse_record({"prompt": "q", answer: "a"}, kind)


@pytest.mark.parametrize("type_name", ["sharegpt", "sharegpt (RL)", "sharegpt (KTO)", "sharegpt (DPO)"])
def test_a_conversation_of_sharegpt_may_have_the_names_of_openai(type_name: str):
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    more = {"sharegpt (RL)": {"answer": "1"}, "sharegpt (KTO)": {"label": True}}.get(type_name, {})
    record = {"system": "s", "conversations": [question, answer], **more}
    other = {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], **more}
    if type_name == "sharegpt (DPO)":
        record |= {"conversations": [question], "chosen": answer, "rejected": {"role": "assistant", "content": "b"}}
        other = {"system": "s", "conversations": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": "b"}
    assert parse_record(record, type_name) == parse_record(other, type_name)


@pytest.mark.parametrize(
    ("record", "type_name", "reason"),
    [
        (
            {"messages": [{"from": "human", "value": "q"}]},
            "messages",
            r"messages\[0\] has 'from' and 'value', where 'role'",
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"role": "assistant", "content": "a"}]},
            "sharegpt",
            r"conversations\[1\] has 'role' and 'content', where 'from' and 'value' are expected",
        ),
        (
            {"conversations": [{"role": "user", "content": "q"}, {"from": "gpt", "value": "a"}]},
            "sharegpt",
            r"conversations\[1\] has 'from' and 'value', where 'role' and 'content' are expected",
        ),
        ({"messages": [{"content": "q"}]}, "messages", r"messages\[0\] has no 'role'"),
    ],
)
def test_a_turn_with_the_names_of_another_type_is_named(record: dict[str, object], type_name: str, reason: str):
    with pytest.raises(DataError, match=reason):
        parse_record(record, type_name)
