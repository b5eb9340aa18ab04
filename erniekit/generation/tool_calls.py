"""Function calls in what a model writes: <tool_call> {"name": ..., "arguments": {...}} </tool_call>, as ERNIE's chat
templates show them.
"""

import json
import re
from typing import Any, NamedTuple, NoReturn

from erniekit.generation.thinking import num_unsure
from erniekit.utils.user_files import unique_keys

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


class WrittenCall(NamedTuple):
    """A call as the model wrote it: `arguments` is its own JSON text, byte for byte."""

    name: str
    arguments: str


class CallSplitter:
    """Separates the text of a streamed answer from its calls. A call is returned whole, once its closing tag has come.

    A block that is no call stays text, tags included. Blank space beside a call is left out, except between two texts.
    The result does not depend on how the answer is cut into pieces. num_unreadable: blocks that were no calls so far.
    """

    def __init__(self) -> None:
        self.num_unreadable = 0
        self._buffer = ""
        self._space = ""  # blank space behind a call, which is text if more text comes
        self._has_text, self._is_behind_call = False, False

    def push(self, text: str) -> list[str | WrittenCall]:
        """Add text and return what is certain."""
        self._buffer += text
        found: list[str | WrittenCall] = []
        while self._step(found):
            pass
        return found

    def flush(self) -> list[str | WrittenCall]:
        """The rest. An open block is text."""
        found: list[str | WrittenCall] = []
        while OPEN in self._buffer:
            self._refuse_block(found)
            found += self.push("")
        if self._buffer:
            self._text(found, self._buffer)
        self._buffer = ""
        return found

    def _step(self, found: list[str | WrittenCall]) -> bool:
        """Process the beginning of the buffer. Returns whether there may be more to process."""
        place = self._buffer.find(OPEN)
        if place < 0:
            certain = len(self._buffer) - num_unsure(self._buffer, (OPEN,))
            self._text(found, self._buffer[:certain])
            self._buffer = self._buffer[certain:]
            return False
        before = self._buffer[:place].rstrip()
        self._text(found, before)
        self._buffer, place = self._buffer[len(before) :], place - len(before)
        begin = place + len(OPEN)
        block = _read(self._buffer, begin)
        if block:
            call, end = block
            found.append(WrittenCall(call["name"], _arguments_text(self._buffer, begin)))
            self._buffer, self._space, self._is_behind_call = self._buffer[end:], "", True
            return True
        if not _may_become_call(self._buffer[begin:]):
            self._refuse_block(found)
            return True
        return False

    def _refuse_block(self, found: list[str | WrittenCall]) -> None:
        """The opening tag at the beginning of the buffer, behind blank space, is text."""
        self.num_unreadable += 1
        end = self._buffer.index(OPEN) + len(OPEN)
        self._text(found, self._buffer[:end])
        self._buffer = self._buffer[end:]

    def _text(self, found: list[str | WrittenCall], text: str) -> None:
        if self._is_behind_call:
            text = self._space + text
            self._space = ""
            if not text.strip():
                self._space = text
                return
            text = text if self._has_text else text.lstrip()
            self._is_behind_call = False
        if text:
            found.append(text)
            self._has_text = self._has_text or bool(text.strip())


def _may_become_call(block: str) -> bool:
    """Whether an open block, of which all text so far is given, may still become a call."""
    text = block.lstrip()
    if text and not text.startswith("{"):
        return False
    closing = block.find(CLOSE)
    while closing >= 0:
        # a closing tag inside a JSON text is part of that text
        if '"' not in _STRINGS.sub("", block[:closing]):
            return False
        closing = block.find(CLOSE, closing + 1)
    return True


def _arguments_text(answer: str, begin: int) -> str:
    """The text of the value of "arguments" in the call whose opening tag ends at `begin`, as the model wrote it."""
    at = answer.index("{", begin) + 1
    while True:
        at = _behind_space(answer, at)
        name, at = _DECODER.raw_decode(answer, at)
        at = _behind_space(answer, _behind_space(answer, at) + 1)  # behind the colon
        _, end = _DECODER.raw_decode(answer, at)
        if name == "arguments":
            return answer[at:end]
        at = _behind_space(answer, end) + 1  # behind the comma


def _behind_space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def format_call(call: dict[str, Any]) -> str:
    """A call as people write one: convert(value=3, unit="km")."""
    arguments = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call["arguments"].items())
    return f"{call['name']}({', '.join(arguments)})"


def _read(answer: str, begin: int) -> tuple[dict[str, Any], int] | None:
    """(call, where its closing tag ends) of the block whose opening tag ends at `begin`; None if it is not a call."""
    try:
        call, end = _DECODER.raw_decode(answer, _behind_space(answer, begin))
        # Half of a surrogate pair (\ud83d) or 1e999 is in no JSON that others could read: files and servers refuse it.
        json.dumps(call, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    end = _behind_space(answer, end)
    if not answer.startswith(CLOSE, end) or not isinstance(call, dict) or set(call) != {"name", "arguments"}:
        return None
    if not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
        return None
    return call, end + len(CLOSE)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


_STRINGS = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=_refuse)
