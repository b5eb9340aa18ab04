"""Function calls in records: what is read, what is put in order, and what is refused with its place."""

import json

import pytest

from erniekit.data.records.fields import Notes
from erniekit.data.records.formats import parse_record
from erniekit.utils.errors import DataError

TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},
]
Q = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}


def call(name="add", arguments=None, **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments or {}}, **more}


def calls(*each):
    return {"role": "assistant", "content": None, "tool_calls": list(each)}


def result(content="r", **more):
    return {"role": "tool", "content": content, **more}


def read(*messages, tools=TOOLS, **more):
    return parse_record({"messages": list(messages), "tools": tools, **more}, "chatml", "calls.jsonl:7")


def test_arguments_may_be_an_object_or_its_text():
    arguments = {"城市": "北京", "days": [1, 2.5, None, True], "nested": {"b": 1, "a": "<tool_call>"}}
    as_text = read(Q, calls(call("weather", json.dumps(arguments))))
    as_object = read(Q, calls(call("weather", arguments)))
    bare = read(Q, calls({"name": "weather", "arguments": arguments}))
    assert as_text == as_object == bare
    found = as_text.messages[1]["tool_calls"][0]["function"]["arguments"]
    assert found == arguments and list(found) == list(arguments), "the order of keys is what the model learns to write"


def test_rounds_of_parallel_calls_in_several_turns():
    turns = [
        Q,
        calls(call(), call("weather")),
        result("1"),
        result("2"),
        calls(call()),
        result("3"),
        A,
        Q,
        calls(call()),
    ]
    sample = read(*turns, label=[0, 1, 1, 1])
    assert [m["role"][0] for m in sample.messages] == list("uattatau") + ["a"]
    assert [m["content"] for m in sample.messages if m["role"] == "tool"] == ["1", "2", "3"]
    assert sample.label == [0, 1, 1, 1]


def test_results_come_in_the_order_of_their_calls():
    two = calls(call("add", id="x"), call("weather", id="y"))
    mixed = read(Q, two, result("of y", tool_call_id="y"), result("of x", tool_call_id="x"), A)
    ordered = read(Q, two, result("of x", tool_call_id="x"), result("of y", tool_call_id="y"), A)
    assert mixed == ordered
    assert [m["content"] for m in mixed.messages[2:4]] == ["of x", "of y"]
    assert [c["id"] for c in mixed.messages[1]["tool_calls"]] == ["x", "y"], "a checkpoint's template may show ids"


def test_results_without_ids_come_in_the_order_of_the_functions_that_they_name():
    three = calls(call("add", {"a": 1}), call("weather"), call("add", {"a": 2}))
    named = [result("1", name="add"), result("2", name="add"), result("sun", name="weather")]
    for given in ([named[2], *named[:2]], [named[0], named[2], named[1]], named):
        contents = [message["content"] for message in read(Q, three, *given, A).messages[2:5]]
        assert contents == ["1", "sun", "2"]
    fewer = read(Q, three, result("sun", name="weather"), result("1", name="add"), A)
    assert [message["content"] for message in fewer.messages[2:4]] == ["1", "sun"]
    partly = read(Q, three, result("x", name="weather"), result("y"), A)
    assert [message["content"] for message in partly.messages[2:4]] == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"news": [{"title": "标题"}]}], '[{"news": [{"title": "标题"}]}]'),
        ({"result": 4}, '{"result": 4}'),
        (4.5, "4.5"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ("", ""),
    ],
)
def test_a_result_may_be_any_json(content, text):
    assert read(Q, calls(call()), result(content), A).messages[2]["content"] == text


def test_thoughts_stand_beside_calls():
    thinking = {**calls(call()), "reasoning_content": "needs a sum"}
    assert read(Q, thinking).messages[1]["reasoning_content"] == "needs a sum"
    inside = {**calls(call()), "content": "<think>needs a sum</think>"}
    assert read(Q, inside).messages[1]["content"] == "<think>needs a sum</think>"


def test_without_tools_any_function_may_be_called():
    assert read(Q, calls(call("unheard_of")), tools=None).messages[1]["tool_calls"][0] == call("unheard_of")


def test_sharegpt_calls_several_functions_in_one_turn():
    turns = [("human", "q"), ("function_call", json.dumps([{"name": "add"}, {"name": "weather"}]))]
    turns += [("observation", "1"), ("observation", "2"), ("gpt", "a")]
    record = {"conversations": [{"from": who, "value": what} for who, what in turns], "tools": json.dumps(TOOLS)}
    sample = parse_record(record, "sharegpt")
    assert sample.messages == read(Q, calls(call(), call("weather")), result("1"), result("2"), A).messages


def test_pairs_are_checked_and_ordered_too():
    two = calls(call("add", id="x"), call("weather", id="y"))
    prompt = [Q, two, result("of y", tool_call_id="y"), result("of x", tool_call_id="x")]
    record = {"messages": prompt, "chosen": [calls(call())], "rejected": "no", "tools": TOOLS}
    sample = parse_record(record, "messages (DPO)")
    assert [m["content"] for m in sample.messages[2:]] == ["of x", "of y"]
    assert sample.answers[0][0]["tool_calls"] == [call()]
    with pytest.raises(DataError, match="calls 'sum'"):
        parse_record(record | {"rejected": [calls(call("sum"))]}, "messages (DPO)")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([Q, calls(call("ad"))], r"messages\[1\] calls 'ad', which is not in 'tools'; the nearest there is 'add'"),
        ([Q, calls(call(arguments="{x: 1}"))], r"tool_calls\[0\].arguments: not JSON"),
        ([Q, calls(call(arguments="[1]"))], "arguments must be an object, not a list"),
        ([Q, calls(call(arguments='{"x": 1, "x": 2}'))], "arguments: the key 'x' stands twice"),
        ([Q, calls(call(arguments='{"x": NaN}'))], "arguments: NaN is not a JSON number"),
        ([Q, calls({"name": "add", "parameters": {"a": 1}})], "unknown field 'parameters'"),
        ([Q, calls({"function": {"name": "add", "argument": {}}})], "unknown field 'argument'; .* 'arguments'"),
        ([Q, calls(call() | {"type": "custom"})], "has the type 'custom'"),
        ([Q, {"role": "function", "content": "[]"}], "content is empty"),
        ([Q, calls(call()) | {"role": "function", "content": "{}"}], "as its content and as tool_calls"),
        ([Q, calls(call(id=3))], r"tool_calls\[0\].id must be a string"),
        ([Q, result(), A], "role 'tool' of turn 1 follows user"),
        ([Q, calls(call()), result(), result(), A], r"messages\[1\] has 1 call and 2 results"),
        ([Q, calls(call()), result(name="weather"), A], "a result of 'weather'"),
        ([Q, calls(call(id="x")), result(tool_call_id="y"), A], r"ids \['x'\] and results for \['y'\]"),
        ([Q, calls(call(id="x"), call(id="y")), result(tool_call_id="x"), A], r"results for \['x'\]"),
        (
            [Q, calls(call(), call("weather")), result(name="add"), result(name="add"), A],
            "calls add, weather and gets results of add, add",
        ),
        (
            [
                Q,
                calls(call(id="x"), call("weather", id="y")),
                result(tool_call_id="x", name="weather"),
                result(tool_call_id="y"),
                A,
            ],
            "calls 'add' with the id 'x', whose result is one of 'weather'",
        ),
        ([Q, calls(call(id="x"), call(id="x")), *[result(tool_call_id="x")] * 2, A], "its own id"),
        ([Q, calls(call()), A], "role 'assistant' of turn 2 follows a function call"),
        ([Q, calls(call()), result()], "ends with the role 'tool'"),
        ([Q, {"role": "tool_result", "content": "r"}, A], "the role 'tool_result'"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(messages, reason):
    with pytest.raises(DataError, match=reason) as caught:
        read(*messages)
    assert str(caught.value).startswith("calls.jsonl:7: ") and "Hint: " in str(caught.value)


ABSENT = object()


@pytest.mark.parametrize("nothing", [ABSENT, None, "", " ", "null", "[]", [], "{}", {}])
def test_no_tools_and_no_arguments_are_the_same_in_every_form(nothing):
    """Also where a call follows: of nothing the nearest name cannot be told."""
    record = {"messages": [Q, calls({"name": "add"}), result(), A]}
    plain = parse_record(record, "messages")
    assert plain.tools is None
    if nothing is not ABSENT:
        assert parse_record(record | {"tools": nothing}, "messages") == plain
    if nothing not in ("[]", []):
        function = {"name": "add"} | ({} if nothing is ABSENT else {"arguments": nothing})
        assert read(Q, calls({"function": function}), result(), A, tools=None) == plain


@pytest.mark.parametrize("nothing", [None, "", "null", "[]", [], {}])
def test_no_calls_are_the_same_in_every_form(nothing):
    assert read(Q, A | {"tool_calls": nothing, "function_call": None}) == read(Q, A)
    with pytest.raises(DataError, match="content must be a string, not null"):
        read(Q, {"role": "assistant", "content": None, "tool_calls": nothing})


def test_calls_and_tools_as_json_text_are_what_they_are_as_json():
    turns = [Q, calls(call(arguments={"x": 1}), call("weather")), result(), result(), A]
    as_text = [turns[0], turns[1] | {"tool_calls": json.dumps(turns[1]["tool_calls"])}, *turns[2:]]
    assert read(*as_text, tools=json.dumps(TOOLS)) == read(*turns)


def test_a_dump_of_openai_with_its_nulls_is_read():
    extra = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "name": None}
    called = {"id": "x", "type": "function", "index": 0, "function": {"name": "add", "arguments": "{}"}}
    turns = [Q, {"role": "assistant", "content": None, "tool_calls": [called]} | extra]
    turns += [result(tool_call_id="x"), {"role": "assistant", "content": "a", "tool_calls": None} | extra]
    assert read(*turns) == read(Q, calls(call(id="x")), result(tool_call_id="x"), A)


def test_a_result_after_an_answer_that_calls_nothing_stays_and_is_counted():
    """ERNIEKit's own function-call-eval.jsonl holds two such records."""
    notes = Notes()
    record = {"messages": [Q, A, result("r"), A], "tools": TOOLS}
    sample = parse_record(record, "messages", notes=notes)
    assert sample.messages == [Q, A, result("r"), A]
    assert notes.doubts == {"a tool result follows an answer that calls nothing; both are trained on as they stand"}
    with pytest.raises(DataError, match="role 'tool' of turn 1 follows user"):
        read(Q, result(), A)


def test_raw_line_breaks_in_json_text_are_read_and_counted():
    """One record of ERNIEKit's preference data for function calls holds such arguments."""
    notes = Notes()
    record = {"messages": [Q, calls({"name": "add", "arguments": '{"x": "a\nb\tc"}'})]}
    (found,) = parse_record(record, "messages", notes=notes).messages[1]["tool_calls"]
    assert found["function"]["arguments"] == {"x": "a\nb\tc"} and "raw line breaks" in notes.doubts.pop()
    with pytest.raises(DataError, match="Invalid control character"):
        read(Q, calls({"name": "add", "arguments": '{"x": "a\x00b"}'}))


def test_ids_that_only_look_alike_are_no_match():
    with pytest.raises(DataError, match="its own id"):
        read(Q, calls(call(id="None"), call(id="x")), result(), result(tool_call_id="x"), A)


@pytest.mark.parametrize(
    "tools", [[{}], [{"type": "function", "function": {"description": "?"}}], ["add"], '{"name": 1}']
)
def test_tools_without_names_are_refused(tools):
    with pytest.raises(DataError, match="tools"):
        read(Q, A, tools=tools)
