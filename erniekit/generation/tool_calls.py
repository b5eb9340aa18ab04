"""Function calls in what a model writes: <tool_call> {"name": ..., "arguments": {...}} </tool_call>, as ERNIE's chat
templates show them.
"""

import json
from typing import Any, NamedTuple, NoReturn

from erniekit.generation.thinking import num_unsure

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Answer(NamedTuple):
    """An answer taken apart: its text without the calls, its calls as {"name": str, "arguments": dict} in order, and
    how many <tool_call> blocks could not be read.
    """

    text: str
    calls: list[dict[str, Any]]
    unreadable: int


def read_calls(answer: str) -> Answer:
    """The calls of an answer. A block that does not hold one JSON object of name and arguments, or that never ends, is
    unreadable; it ends after its closing tag, or where another begins.
    """
    texts, calls, unreadable, at = [], [], 0, 0
    while (start := answer.find(OPEN, at)) >= 0:
        texts.append(answer[at:start])
        begin = start + len(OPEN)
        block = _read(answer, begin)
        if block:
            calls.append(block[0])
            at = block[1]
        else:
            unreadable += 1
            closing, opening = answer.find(CLOSE, begin), answer.find(OPEN, begin)
            ends = [closing + len(CLOSE)] * (closing >= 0) + [opening] * (opening >= 0)
            at = min(ends, default=len(answer))
    return Answer("".join([*texts, answer[at:]]).strip(), calls, unreadable)


class CallFilter:
    """The text of a streamed answer before its first call. `hides`: whether calls are left out at all."""

    def __init__(self, hides: bool) -> None:
        self._hides, self._buffer, self._ended = hides, "", False

    def push(self, text: str) -> str:
        """What is certain to stand before a call; what may yet be the tag of one waits."""
        if not self._hides or self._ended:
            return "" if self._ended else text
        self._buffer += text
        before, tag, _ = self._buffer.partition(OPEN)
        if tag:
            self._buffer, self._ended = "", True
            return before.rstrip()
        certain = len(before) - num_unsure(before, (OPEN,))
        self._buffer = before[certain:]
        return before[:certain]

    def flush(self) -> str:
        """The rest."""
        text, self._buffer = self._buffer, ""
        return text


def format_call(call: dict[str, Any]) -> str:
    """A call as people write one: convert(value=3, unit="km")."""
    arguments = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call["arguments"].items())
    return f"{call['name']}({', '.join(arguments)})"


def _read(answer: str, begin: int) -> tuple[dict[str, Any], int] | None:
    """(call, where its closing tag ends) of the block whose opening tag ends at `begin`; None if it is not a call."""
    while answer[begin : begin + 1].isspace():
        begin += 1
    try:
        call, end = _DECODER.raw_decode(answer, begin)
    except (ValueError, RecursionError):
        return None
    while answer[end : end + 1].isspace():
        end += 1
    if not answer.startswith(CLOSE, end) or not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        return None
    if not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
        return None
    return call, end + len(CLOSE)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)
