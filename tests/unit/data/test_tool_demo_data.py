"""The demo's tool data: right results, calls of offered tools only, nothing of the test in the training set."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from erniekit.data.records.formats import parse_record

ROOT = Path(__file__).parents[3]
SPEC = importlib.util.spec_from_file_location("make_tool_demo_data", ROOT / "tools/make_tool_demo_data.py")
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)

FILES = (
    "data/demo/tools-train.jsonl",
    "data/demo/tools-test.jsonl",
    "examples/data/function-call-train.jsonl",
    "examples/data/function-call-eval.jsonl",
)
FACTORS = {("km", "m"): 1000, ("kg", "g"): 1000, ("h", "min"): 60, ("min", "s"): 60}


@pytest.fixture(scope="module")
def samples():
    """Every line, read as training reads it."""
    return {
        path: [parse_record(json.loads(line), "chatml", path) for line in (ROOT / path).read_text("utf-8").splitlines()]
        for path in FILES
    }


def rounds(sample):
    """(question, calls, results, answer) of each; the calls may be none."""
    found = []
    for message in sample.messages:
        if message["role"] == "user":
            found.append((message["content"], [], [], []))
        elif message["role"] == "tool":
            found[-1][2].append(json.loads(message["content"]))
        elif "tool_calls" in message:
            found[-1][1].extend(call["function"] for call in message["tool_calls"])
        else:
            found[-1][3].append(message["content"])
    return found


def fact(call):
    """What a call asks for, in one form whatever the order of the terms."""
    name, arguments = call["name"], call["arguments"]
    if name == "calculate" and arguments["op"] != "-":
        return (name, arguments["op"], *sorted((arguments["a"], arguments["b"])))
    return (name, *arguments.values())


def test_results_are_right_and_answers_say_them(samples):
    for path in FILES:
        for sample in samples[path]:
            for question, calls, results, answer in rounds(sample):
                assert len(answer) == 1 and len(calls) == len(results)
                for call, result in zip(calls, results, strict=True):
                    (value,) = result.values()
                    given = call["arguments"]
                    if call["name"] == "calculate":
                        a, b = given["a"], given["b"]
                        assert value == {"+": a + b, "-": a - b, "*": a * b}[given["op"]]
                    elif call["name"] == "convert":
                        assert value == given["value"] * FACTORS[given["unit"], given["to"]]
                    assert str(value) in answer[0]
                    asked = [given["item"]] if "item" in given else [str(v) for v in given.values() if type(v) is int]
                    assert all(text in question for text in asked)


def test_only_offered_tools_are_called_and_all_kinds_are_there(samples):
    for path in FILES[:2]:
        kinds = dict.fromkeys(("none", "one", "pair", "two rounds"), 0)
        for sample in samples[path]:
            offered = {each["function"]["name"] for each in sample.tools}
            asked = rounds(sample)
            assert {call["name"] for _, calls, _, _ in asked for call in calls} <= offered
            calls = [len(calls) for _, calls, _, _ in asked]
            kinds[{(0,): "none", (1,): "one", (2,): "pair", (1, 1): "two rounds"}[tuple(calls)]] += 1
            if not sum(calls) and re.search(r"\d", asked[0][0]):
                assert asked[0][3][0] in ("没有能用的工具。", "No tool can do that.")
        assert min(kinds.values()) > len(samples[path]) / 20


@pytest.mark.parametrize("pair", [FILES[:2], FILES[2:]])
def test_no_fact_is_on_both_sides(samples, pair):
    train, test = (
        {fact(call) for sample in samples[path] for _, calls, _, _ in rounds(sample) for call in calls} for path in pair
    )
    assert train and test and not train & test


def test_files_are_what_the_tool_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["", "--demo-dir", str(tmp_path / "data/demo"), "--examples-dir", str(tmp_path / "examples/data")]
    )
    tool.main()
    for path in FILES:
        assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes()
    assert (ROOT / FILES[0]).stat().st_size < 2_000_000
