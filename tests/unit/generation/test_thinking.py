"""Thought and answer come apart however the text is cut into pieces."""

import pytest

from erniekit.generation.thinking import ThoughtParser, opens_thought, split_thought

CASES = [
    ("plain text\n", False, "", "plain text\n"),
    ("<response>1 < 2</response>", False, "", "<response>1 < 2</response>"),
    ("why so\n</think>\n\n<response>\n42 < 43\n</response>\n", True, "why so", "42 < 43"),
    ("\n why\n\nso\n</think>\n\nanswer: <b>\n", True, "why\n\nso", "answer: <b>"),
    ("<think>\nwhy\n</think>\n\nyes\n\nno", False, "why", "yes\n\nno"),
    (
        "a</think><response>\nuse `</response>` and <response>, not </think>\n</response>\n",
        True,
        "a",
        "use `</response>` and <response>, not </think>",
    ),
    ("a</think>\n\n```\n<response>x</response>\n```\n", True, "a", "```\n<response>x</response>\n```"),
    ("a</think><response>b </response>", True, "a", "b"),
    ("a</think><response>b </respo", True, "a", "b </respo"),
    ("never ends </thin", True, "never ends </thin", ""),
    (
        "\n</think>\n<response>\na\n</response>\n\n<tool_call>\n{}\n</tool_call>\n",
        True,
        "",
        "a\n\n<tool_call>\n{}\n</tool_call>",
    ),
    (" \n ok", False, "", " \n ok"),
    ("<thin", False, "", "<thin"),
    ("", True, "", ""),
]


@pytest.mark.parametrize(("text", "opened", "thought", "answer"), CASES)
def test_whole_text(text: str, opened: bool, thought: str, answer: str):
    assert split_thought(text, opened) == (thought, answer)


@pytest.mark.parametrize(("text", "opened", "thought", "answer"), CASES)
def test_pieces(text: str, opened: bool, thought: str, answer: str):
    """At every split position, and character by character."""
    for parts in [list(text), *([text[:at], text[at:]] for at in range(len(text) + 1))]:
        parser = ThoughtParser(opened)
        pieces = [piece for part in parts for piece in parser.push(part)]
        pieces += parser.flush()
        found = {part: "".join(piece for name, piece in pieces if name == part) for part in ("thought", "answer")}
        assert found == {"thought": thought, "answer": answer}
        assert all(piece for _, piece in pieces)


def test_text_is_given_as_soon_as_it_cannot_be_a_tag():
    parser = ThoughtParser(opened=True)
    assert parser.push("I think ") == [("thought", "I think")]
    assert parser.push("that a<") == [("thought", " that a")]
    assert parser.push("b") == [("thought", "<b")]


def test_prompts_that_open_a_thought():
    assert opens_thought("<|im_start|>assistant\n<think>\n")
    assert not opens_thought("Assistant: <think>\n\n</think>\n\n")
