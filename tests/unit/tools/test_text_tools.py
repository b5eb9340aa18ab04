"""Tools for text: what they compute, what they refuse, and how the user's own are described, run and stopped."""

import time
from dataclasses import replace

import pytest

from erniekit.config.schema_rollout_tools import RolloutToolArgs
from erniekit.tools import documents
from erniekit.tools.calculator import calculate
from erniekit.tools.documents import DocumentSearch
from erniekit.tools.result import BadCall
from erniekit.tools.toolbox import Toolbox
from erniekit.utils.errors import ConfigError


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 * (3 + 4)", "14"),
        ("1/8", "0.125"),
        ("0.1 + 0.2", "0.3"),
        ("1 / 3 * 3", "1"),
        ("10 ÷ 4 × 2", "5"),
        ("2^10", "1024"),
        ("-3 ** 2", "-9"),
        ("7 // 2 + 7 % 2", "4"),
        ("2 ** 0.5", "1.4142135623731"),
        ("sqrt(16) + max(1, 2)", "6"),
        ("2 ** 200", str(2**200)),
        (" 1e3 ", "1000"),
    ],
)
def test_arithmetic(expression, value):
    assert calculate(expression) == value or float(calculate(expression)) == pytest.approx(float(value), rel=1e-12)


@pytest.mark.parametrize(
    "expression",
    [
        "9 ** 9 ** 9",
        "2 ** 100000",
        "1 / 0",
        "__import__('os')",
        "x + 1",
        "'a' * 3",
        "True",
        "[1]",
        "1 +",
        "",
        "(" * 300 + ")" * 300,
        "1" * 600,
        "sqrt(-1)",
        "(-8) ** 0.5",
        "exp(1e9)",
        "max()",
        "1e999",
        "lambda: 1",
        "+".join(["1"] * 249),
    ],
)
def test_what_is_no_bounded_arithmetic_is_refused_quickly(expression):
    started = time.process_time()
    try:
        assert calculate(expression) == "249"  # a long sum may also be computed
    except BadCall as error:
        assert str(error)
    assert time.process_time() - started < 5.0


def test_documents_are_found_by_their_rarest_words(tmp_path):
    (tmp_path / "a.txt").write_text("the river Rhine\nthe city of Cologne\n\nthe river Rhine in the city of Basel\n")
    (tmp_path / "b.md").write_text("长江 是 一条 河\n")
    search = DocumentSearch(tmp_path)
    assert search.find("Where is the RHINE?")[0] == "the river Rhine"
    assert search.find("Basel") == ["the river Rhine in the city of Basel"]
    assert search.find("长江在哪里")[0].startswith("长江")
    assert search.find("nothing") == []
    with pytest.raises(BadCall):
        search.find("?!")
    with pytest.raises(ConfigError, match="document_search_path"):
        DocumentSearch(tmp_path / "nowhere")


@pytest.mark.parametrize(("most", "warns"), [(3, False), (2, True)])
def test_lines_that_are_not_searched_are_said(tmp_path, monkeypatch, caplog, most: int, warns: bool):
    monkeypatch.setattr(documents, "_MAX_DOCUMENTS", most)
    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree\n")
    assert DocumentSearch(tmp_path).documents == ["one", "two", "three"][:most]
    assert ("only the first 2 lines" in caplog.text) == warns


OWN = '''
import time

def add(a: int, b: int = 1) -> int:
    """Adds two numbers.

    Args:
        a: The first one.
        b (int): The second one.
    """
    return a + b

def sleep(seconds: float) -> str:
    """Waits."""
    time.sleep(seconds)
    return "done"

def fail(what: list[str]) -> str:
    """Raises."""
    raise ValueError(what[0])

def leave() -> str:
    """Ends the process."""
    import os
    os._exit(3)

def undescribed(a: int):
    return a

def untyped(a):
    """Has no type."""
    return a
'''


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    box = Toolbox(
        RolloutToolArgs(
            tools=("calculator", "own.py:add", "own.py:sleep", "own.py:fail", "own.py:leave"), tool_timeout=0.5
        ),
        tmp_path,
    )
    yield box
    box.close()


def run(box, name, **arguments):
    return box.run({"name": name, "arguments": arguments}, []).content


def test_the_users_functions_are_described_run_and_stopped(own):
    by_name = {tool["function"]["name"]: tool["function"] for tool in own.descriptions}
    assert list(by_name) == ["calculator", "add", "sleep", "fail", "leave"]
    assert by_name["add"]["description"] == "Adds two numbers."
    assert by_name["add"]["parameters"]["properties"] == {
        "a": {"type": "integer", "description": "The first one."},
        "b": {"type": "integer", "description": "The second one."},
    }
    assert by_name["add"]["parameters"]["required"] == ["a"]
    assert by_name["fail"]["parameters"]["properties"]["what"] == {"type": "array", "items": {"type": "string"}}
    assert run(own, "add", a=2, b=3) == "5" and run(own, "calculator", expression="2*3") == "6"
    assert run(own, "fail", what=["oh no"]) == "Error: fail failed: ValueError: oh no."
    assert run(own, "sleep", seconds=60) == "Error: sleep took more than 0.5 s and was stopped."
    assert run(own, "add", a=2) == "3"  # in another process
    assert run(own, "leave") == "Error: the process of leave ended."
    assert run(own, "sleep", seconds=0) == "done"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"name": "paint", "arguments": {}}, "there is no tool 'paint'; the tools are calculator, add"),
        ({"name": "add", "arguments": {"c": 1}}, "add has no argument 'c'; its arguments are a, b"),
        ({"name": "add", "arguments": {}}, "add needs the argument a"),
        ({"name": "calculator", "arguments": {"x": "1"}}, "calculator has one argument, expression"),
        ({"name": "calculator", "arguments": {"expression": ["1"]}}, "expression must be text"),
    ],
)
def test_a_wrong_call_becomes_text(own, call, text):
    assert own.run(call, []).content.startswith(f"Error: {text}")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere.py:f", "there is no file"),
        ("own.py:nothing", "there is no such function"),
        ("own.py:undescribed", "has no docstring"),
        ("own.py:untyped", "has no type"),
        ("broken.py:f", "SyntaxError"),
    ],
)
def test_a_tool_that_cannot_be_used_is_an_error_at_the_start(tmp_path, name, reason):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(ConfigError, match=f"tools: .*{reason}"):
        Toolbox(replace(RolloutToolArgs(), tools=(name,)), tmp_path)
