"""Scores of calls, and the way from a data file to them."""

import json
import logging
from pathlib import Path

import pytest
from support.tiny_directories import model_directory, write_lines

from erniekit.config import load
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.evaluate import answers, evaluate
from erniekit.generation.request import Answer
from erniekit.rewards.call_answers import call_scores, same_calls


def call(name="f", **arguments):
    return {"name": name, "arguments": arguments}


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ([], [], True),
        ([call(a=1, b={"x": 1, "y": 2})], [call(b={"y": 2, "x": 1}, a=1)], True),
        ([call(a=1), call(a=2)], [call(a=2), call(a=1)], True),
        ([call(a=1.0)], [call(a=1)], True),
        ([call(a=1e400)], [call(a=1)], False),
        ([call(a="1")], [call(a=1)], False),
        ([call(a=True)], [call(a=1)], False),
        ([call(a=None)], [call()], False),
        ([call(a=[1, 2])], [call(a=[2, 1])], False),
        ([call(a=1)], [call(a=1), call(a=1)], False),
        ([call("g")], [call("f")], False),
    ],
)
def test_same_calls(found, expected, same):
    assert same_calls(found, expected) is same_calls(expected, found) is same


def test_scores_by_hand():
    expected = [[call(a=1)], [call(a=1), call("g")], [call("g")], [call()], [], [], []]
    found = [[call(a=1)], [call("g"), call(a=2)], [call("f")], [], [], [call()], []]
    assert call_scores(found, expected) == {
        "num_tool_calls_expected": 4,
        "tool_call_exact_match": 1 / 4,
        "tool_name_match": 2 / 4,
        "tool_call_decision": 5 / 7,
    }
    assert call_scores([], []) == {
        "num_tool_calls_expected": 0,
        "tool_call_exact_match": 0.0,
        "tool_name_match": 0.0,
        "tool_call_decision": 0.0,
    }


# ---------------------------------------------------------------- through evaluate

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
PLUS = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
RECORDS = [
    {
        "messages": [
            {"role": "user", "content": "1+2, 1+2?"},
            {"role": "assistant", "content": "", "tool_calls": [PLUS, PLUS]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "3"},
            {"role": "user", "content": "1+2?"},
            {"role": "assistant", "content": "again:", "tool_calls": [PLUS]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "3"},
        ],
        "tools": TOOLS,
    },
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}], "tools": TOOLS},
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]},
]
TEXT = '<tool_call>\n{"name": "add", "arguments": {"b": 2, "a": 1}}\n</tool_call>\n'


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return model_directory(tmp_path_factory.mktemp("model"))


def settings(model_dir: Path, tmp_path: Path, **keys):
    values = {
        "model_name_or_path": str(model_dir),
        "eval_dataset_path": str(write_lines(tmp_path / "eval.jsonl", RECORDS)),
        "eval_dataset_type": "chatml",
        "output_dir": str(tmp_path / "output"),
        "max_seq_len": 1024,
        "compute_type": "fp32",
        "predict_with_generate": True,
    }
    return load(None, values | keys, command="eval")


def fake_decode(model_dir, texts):
    """A model that says these texts in turn."""
    tokenizer = load_tokenizer(model_dir)

    def decode(model, prompts, limits, sampling, batch_size, on_answer, pictures=None):
        assert len(prompts) == len(texts)
        return [Answer(tokenizer.encode(text), "end", None) for text in texts]

    return decode


def test_every_call_of_a_conversation_is_asked_for(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "decode", fake_decode(model_dir, [TEXT * 2, TEXT, "3", TEXT, TEXT + "<tool_call>"]))
    results = evaluate(settings(model_dir, tmp_path))
    lines = [json.loads(x) for x in (tmp_path / "output/eval_predictions.jsonl").read_text("utf-8").splitlines()]
    assert [line["reference"].split("<")[0] for line in lines] == ["", "again:\n", "3", "hi", "hi"]
    assert lines[1]["prompt"].endswith("User: 1+2?\nAssistant: ") and "3<|end_of_sentence|>" in lines[1]["prompt"]
    assert [line.get("tool_call_match") for line in lines] == [True, True, True, False, None]
    assert lines[0]["tool_calls"] == [PLUS["function"]] * 2
    scores = {key: results[key] for key in results if "call" in key or "name" in key}
    assert scores == {
        "num_tool_calls_expected": 2,
        "tool_call_exact_match": 1.0,
        "tool_name_match": 1.0,
        "tool_call_decision": 3 / 4,
        "num_unreadable_calls": 0,
    }, "the third conversation has no tools and does not count"
    assert results["num_answers"] == 5


def test_wrong_and_unreadable_calls(model_dir, tmp_path, monkeypatch, capsys):
    wrong = TEXT.replace("2", "3")
    monkeypatch.setattr(answers, "decode", fake_decode(model_dir, [TEXT, wrong, "<tool_call>\n{", "hi", "hi"]))
    results = evaluate(settings(model_dir, tmp_path))
    assert results["tool_call_exact_match"] == 0.0 and results["tool_name_match"] == 1 / 2
    assert results["num_unreadable_calls"] == 1 and results["tool_call_decision"] == 1.0
    assert "calls: exact match" in capsys.readouterr().out


def test_calls_in_another_form_are_said_not_to_be_scored(model_dir, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("erniekit"), "propagate", True)
    monkeypatch.setattr(answers, "decode", fake_decode(model_dir, ["x"] * 5))
    own = tmp_path / "own.jinja"
    own.write_text(
        "{{ tools | tojson if tools }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }}{% endfor %}"
        "{{ '<|end_of_sentence|>' if m.role == 'assistant' }}{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt }}",
        encoding="utf-8",
    )
    results = evaluate(settings(model_dir, tmp_path, chat_template=str(own)))
    assert "tool_call_exact_match" not in results and results["num_answers"] == 5
    assert "compared as text only" in caplog.text and f"{tmp_path / 'eval.jsonl'}:1" in caplog.text
