"""Calls read from what a model wrote."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erniekit.generation.tool_calls import CallFilter, CallSplitter, WrittenCall, format_call, read_calls

ADD, MAP = (
    {"name": "add", "arguments": {"a": 1, "b": 2}},
    {"name": "地图", "arguments": {"市": "北京", "at": [1.5, None]}},
)


def block(call):
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>\n"


def test_calls_and_the_text_around_them():
    assert read_calls("no call") == ("no call", [], 0)
    assert read_calls(f"好\n{block(ADD)}{block(MAP)}") == ("好", [ADD, MAP], 0)
    assert read_calls(f"<tool_call>{json.dumps(ADD)}</tool_call> and {block(ADD)}then") == ("and \nthen", [ADD, ADD], 0)


@pytest.mark.parametrize(
    "body",
    [
        "{",
        "add(1, 2)",
        '{"name": "add"}',
        '{"name": "add", "arguments": [1]}',
        '{"name": "add", "arguments": "{}"}',
        '{"name": 1, "arguments": {}}',
        '{"name": "add", "arguments": {}, "more": 1}',
        '{"name": "add", "arguments": {"a": NaN}}',
        '{"name": "add", "arguments": {}} {}',
        '{"name": "add", "arguments": {"a": "\\ud83d"}}',
        '{"name": "add", "arguments": {"a": [1e999]}}',
        '{"name": "add", "arguments": {"a": 1, "a": 2}}',
        '{"name": "add", "arguments": {"a": 1}, "arguments": {"a": 2}}',
        "",
    ],
)
def test_what_is_no_call_is_counted(body):
    assert read_calls(f"<tool_call>\n{body}\n</tool_call>\n{block(ADD)}") == ("", [ADD], 1)
    assert read_calls(f"<tool_call>{body}") == ("", [], 1)
    assert read_calls(f"{block(ADD)}<tool_call>\n{body}") == ("", [ADD], 1), "cut before its end"


def test_tags_inside_arguments_belong_to_them():
    hostile = {"name": "write", "arguments": {"text": "<tool_call></tool_call> <tool_call> x </tool_call>"}}
    assert read_calls(block(hostile) + block(ADD)) == ("", [hostile, ADD], 0)


NAMES = st.text(min_size=1, max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.builds(dict, name=NAMES, arguments=st.dictionaries(NAMES, VALUES, max_size=3)), max_size=3)


@settings(max_examples=100, deadline=None)
@given(calls=CALLS)
def test_what_the_templates_write_is_read_back(calls):
    assert read_calls("text\n" + "".join(map(block, calls))) == ("text", calls, 0)


def test_a_call_as_people_write_it():
    assert format_call(MAP) == '地图(市="北京", at=[1.5, null])'


@pytest.mark.parametrize("step", [1, 3, 100])
def test_a_stream_shows_what_stands_before_the_first_call(step: int):
    def shown(text: str, hides: bool = True) -> str:
        calls = CallFilter(hides)
        return "".join(calls.push(text[i : i + step]) for i in range(0, len(text), step)) + calls.flush()

    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n'
    assert shown(f"I look. \n{call}{call}") == "I look."
    assert shown(call) == ""
    assert shown("a <b> tool_call <tool_") == "a <b> tool_call <tool_"
    assert shown("two\nlines\n") == "two\nlines\n"
    assert shown(f"a\n{call}", hides=False) == f"a\n{call}"


WRITTEN = '{"a":  1, "t": "</tool_call> \\" <tool_call>"}'
AS_WRITTEN = f'<tool_call>\n{{"name": "f", "arguments": {WRITTEN}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "found", "unreadable"),
    [
        ("plain \n", ["plain \n"], 0),
        (AS_WRITTEN, [WRITTEN], 0),
        (f"A \n{AS_WRITTEN}\n{AS_WRITTEN}\nB\n{AS_WRITTEN} \n", ["A", WRITTEN, WRITTEN, "\nB", WRITTEN], 0),
        (f"a <tool_call> x </tool_call> {AS_WRITTEN}", ["a <tool_call> x </tool_call>", WRITTEN], 1),
        (f'<tool_call>{{"name": 1}}</tool_call>\n{AS_WRITTEN}', ['<tool_call>{"name": 1}</tool_call>', WRITTEN], 1),
        ('a\n\n<tool_call>\n{"name": ', ['a\n\n<tool_call>\n{"name": '], 1),
        ("a <tool_c", ["a <tool_c"], 0),
    ],
)
def test_streamed_calls_do_not_depend_on_how_the_text_is_cut(text, found, unreadable):
    for parts in [list(text), *([text[:at], text[at:]] for at in range(len(text) + 1))]:
        splitter, said = CallSplitter(), []
        for piece in [*(piece for part in parts for piece in splitter.push(part)), *splitter.flush()]:
            if isinstance(piece, str) and said and isinstance(said[-1], str):
                said[-1] += piece
            else:
                said.append(piece)
        assert [piece.arguments if isinstance(piece, WrittenCall) else piece for piece in said] == found
        assert splitter.num_unreadable == unreadable
