"""Tools in the loop: the ids between two turns are those that training has there, and the limits hold."""

import json

import pytest
from support.pictures import DEMO_MODEL

from erniekit.config import Config
from erniekit.config.schema_rollout_tools import RolloutToolArgs, tool_problems
from erniekit.data.chat.template import load_template
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.data.prompts import Prompt
from erniekit.training.rl.tools import ToolLoop
from erniekit.utils.errors import ConfigError

QUESTION = [{"role": "user", "content": "37*58?"}]


def template_of(name):
    return load_template(load_tokenizer(DEMO_MODEL), name)


def loop_of(template, **keys):
    return ToolLoop(Config(stage="RL", **({"tools": ("calculator",)} | keys)), template)


def call_text(**arguments):
    call = json.dumps({"name": "calculator", "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>\n"


def prompt_of(template, loop):
    ids = template.prompt_ids(QUESTION, loop.descriptions)
    return Prompt(ids, QUESTION, loop.descriptions, {}, "a:1")


@pytest.mark.parametrize("name", ["text", "thinking"])
def test_prompt_turn_results_and_answer_are_the_ids_that_training_has(name):
    template = template_of(name)
    loop, tokenizer = loop_of(template), template.tokenizer
    prompt = prompt_of(template, loop)
    thought = {"reasoning_content": "I compute."} if name == "thinking" else {}
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "37*58"}}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]} | thought
    talk = [*QUESTION, said, {"role": "tool", "name": "calculator", "content": "2146"}]
    trained = template.encode([*talk, {"role": "assistant", "content": "2146"} | thought], loop.descriptions)
    [first, turn, between, last] = trained
    assert first.ids == prompt.ids and turn.is_target and last.is_target
    dialogue = loop.begin(prompt)
    continuation = loop.after_turn(dialogue, turn.ids[:-1], True)
    assert continuation.ids == between.ids and continuation.end_input == turn.ids[-1]
    assert loop.after_turn(dialogue, last.ids[:-1], True) is None
    assert [message["role"] for message in dialogue.turns] == ["assistant", "tool", "assistant"]
    assert dialogue.turns[1]["content"] == "2146" and dialogue.num_calls == 1 and dialogue.num_turns == 2
    assert tokenizer.decode(last.ids[:-1]) == dialogue.turns[-1]["content"]


def test_two_calls_and_three_turns_continue_as_training_has_them():
    template = template_of("text")
    loop = loop_of(template)
    calls = [
        {"type": "function", "function": {"name": "calculator", "arguments": {"expression": e}}} for e in ("1+1", "2+2")
    ]
    talk = [
        *QUESTION,
        {"role": "assistant", "content": "So:", "tool_calls": calls},
        *({"role": "tool", "name": "calculator", "content": text} for text in ("2", "4")),
        {"role": "assistant", "content": "", "tool_calls": calls[:1]},
        {"role": "tool", "name": "calculator", "content": "2"},
        {"role": "assistant", "content": "8"},
    ]
    segments = template.encode(talk, loop.descriptions)
    dialogue = loop.begin(prompt_of(template, loop))
    for turn, between in ((segments[1], segments[2]), (segments[3], segments[4])):
        assert loop.after_turn(dialogue, turn.ids[:-1], True).ids == between.ids
    assert dialogue.turns[0]["content"] == "So:" and len(dialogue.turns) == 5


def after(loop, text, has_ended=True, turns=1):
    template = template_of("text")
    dialogue = loop.begin(prompt_of(template, loop))
    for _ in range(turns):
        continuation = loop.after_turn(dialogue, template.tokenizer.encode_plain(text), has_ended)
    return dialogue, continuation


def test_a_turn_is_shown_without_its_calls_whatever_is_in_them():
    template = template_of("text")
    loop = loop_of(template)
    dialogue = loop.begin(prompt_of(template, loop))
    text = "<think>so</think>It is " + call_text(expression="1 </tool_call> 2") + call_text(expression="2")
    loop.after_turn(dialogue, template.tokenizer.encode(text), True)
    assert dialogue.turns[0]["content"] == "<think>so</think>It is"
    assert [call["function"]["arguments"]["expression"] for call in dialogue.turns[0]["tool_calls"]] == [
        "1 </tool_call> 2",
        "2",
    ]


def test_a_completion_without_calls_is_over():
    dialogue, continuation = after(loop_of(template_of("text")), "2146")
    assert continuation is None and dialogue.turns == ({"role": "assistant", "content": "2146"},)


def test_the_last_turn_and_one_that_was_cut_off_execute_nothing():
    loop = loop_of(template_of("text"), max_turns=2)
    dialogue, continuation = after(loop, call_text(expression="1+1"), turns=2)
    assert continuation is None and dialogue.num_calls == 1
    dialogue, continuation = after(loop, call_text(expression="1+1"), has_ended=False)
    assert continuation is None and dialogue.num_calls == 0


def test_errors_come_back_as_text():
    loop = loop_of(template_of("text"))
    for text, expected in (
        (call_text(expression="1/0"), "Error: division by zero."),
        ("<tool_call>\n{broken\n</tool_call>\n", "Error: the call cannot be read"),
        ('<tool_call>{"name": "f", "arguments": {}}</tool_call>', "Error: there is no tool 'f'"),
    ):
        dialogue, continuation = after(loop, text)
        assert dialogue.turns[1]["content"].startswith(expected)
        assert expected.split(":")[0] in template_of("text").tokenizer.decode(continuation.ids)


def test_calls_of_a_turn_and_tokens_of_a_result_are_limited(tmp_path):
    text = '"word " * 10_000_000'  # to encode all of it would take minutes
    (tmp_path / "long.py").write_text(f'def long() -> str:\n    """Says much."""\n    return {text}\n')
    loop = loop_of(template_of("text"), tools=(f"{tmp_path}/long.py:long",), max_tool_tokens=10, max_tool_calls=2)
    dialogue, _ = after(loop, '<tool_call>{"name": "long", "arguments": {}}</tool_call>' * 3)
    contents = [turn["content"] for turn in dialogue.turns[1:]]
    assert contents[0].endswith(" ... (cut)") and len(contents[0]) < 80
    assert contents[2].startswith("Error: only 2 calls a turn are executed")
    loop.close()


def test_a_result_that_is_no_unicode_text_does_not_end_the_run(tmp_path):
    """Names of files that are not in UTF-8 are such texts; an exception may quote one."""
    (tmp_path / "odd.py").write_text(
        'def odd(fails: bool) -> str:\n    """Says half of a pair."""\n    text = chr(0xD83D)\n'
        "    if fails:\n        raise ValueError(text)\n    return text\n"
    )
    loop = loop_of(template_of("text"), tools=(f"{tmp_path}/odd.py:odd",))
    for fails, shown in (("false", "\\ud83d"), ("true", "Error: odd failed: ValueError: \\ud83d.")):
        dialogue, continuation = after(
            loop, f'<tool_call>{{"name": "odd", "arguments": {{"fails": {fails}}}}}</tool_call>'
        )
        assert dialogue.turns[1]["content"] == shown
        assert shown in template_of("text").tokenizer.decode(continuation.ids)
    loop.close()


def test_a_template_that_shows_no_tools_is_refused(tmp_path):
    path = tmp_path / "bare.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}<|end_of_sentence|>{% endfor %}", "utf-8")
    with pytest.raises(ConfigError, match="does not show tools"):
        loop_of(template_of(str(path)))


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"tools": ("paint",)}, "there is no tool paint"),
        ({"tools": ("image_zoom_in_tool",)}, "set stage: VL-RL"),
        ({"tools": ("calculator", "calculator")}, "calculator: two tools have this name"),
        ({"tools": ("calculator", "my.py:calculator")}, "calculator: two tools have this name"),
        ({"tools": ("a.py:find", "b.py:find")}, "find: two tools have this name"),
        ({"tools": ("document_search",)}, "document_search_path: needed"),
    ],
)
def test_problems_are_named_with_their_key(keys, problem):
    assert problem in "\n".join(tool_problems(RolloutToolArgs(**keys), False, 1))
