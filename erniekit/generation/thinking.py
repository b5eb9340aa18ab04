"""Thought and answer in what a thinking model writes: `thought </think> <response> answer </response>`, the tags of the
answer optional. The prompt may have opened the thought already.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

Part = Literal["thought", "answer"]
State = Literal["start", "thought", "after", "framed", "bare", "plain"]
OPEN, CLOSE = "<think>", "</think>"
_ANSWER_OPEN, _ANSWER_CLOSE = "<response>", "</response>"
_CALL = "<tool_call>"
_TAIL = 16  # tokens that the end of a prompt takes where it opens a thought


class ThoughtParser:
    """Sorts streamed text into thought and answer. Text without a thought is an answer, unchanged.

    In a text with a thought the tags, and blank space beside them, are left out. Only the framing counts as tags:
    `<response>` directly behind the thought, and the `</response>` that belongs to it where nothing but a tool call or
    the end comes behind it. Anywhere else, in a code sample for instance, these words are text of the answer.
    """

    def __init__(self, opened: bool = False) -> None:
        """`opened`: the prompt ends inside a thought."""
        self._state: State = "thought" if opened else "start"
        self._buffer = ""
        self._fresh = True  # no text of the current part has been returned yet

    @property
    def is_in_thought(self) -> bool:
        """Whether the text so far ends inside a thought."""
        return self._state == "thought"

    def push(self, text: str) -> list[tuple[Part, str]]:
        """Add text and return the pieces that are certain; text that may become a tag is kept back."""
        self._buffer += text
        pieces: list[tuple[Part, str]] = []
        while self._STEPS[self._state](self, pieces):
            pass
        return pieces

    def flush(self) -> list[tuple[Part, str]]:
        """The rest."""
        text, self._buffer = self._buffer, ""
        if self._state == "framed" and text.rstrip().endswith(_ANSWER_CLOSE):
            text = text.rstrip().removesuffix(_ANSWER_CLOSE)
        if self._state not in ("start", "plain"):
            text = text.strip() if self._fresh else text.rstrip()
        part: Part = "thought" if self._state == "thought" else "answer"
        return [(part, text)] if text else []

    def _start(self, pieces: list[tuple[Part, str]]) -> bool:
        """Nothing but blank space has come."""
        stripped = self._buffer.lstrip()
        if OPEN.startswith(stripped) and stripped != OPEN:
            return False
        if stripped.startswith(OPEN):
            self._state, self._buffer = "thought", stripped[len(OPEN) :]
        else:
            self._state = "plain"
        return True

    def _plain(self, pieces: list[tuple[Part, str]]) -> bool:
        """An answer without a thought, or behind its closing tag."""
        self._give(pieces, "answer", self._buffer)
        self._buffer = ""
        return False

    def _thought(self, pieces: list[tuple[Part, str]]) -> bool:
        place = self._buffer.find(CLOSE)
        if place < 0:
            self._emit(pieces, "thought", len(self._buffer) - num_unsure(self._buffer, (CLOSE,)))
            return False
        self._give(pieces, "thought", self._buffer[:place].strip() if self._fresh else self._buffer[:place].rstrip())
        self._state, self._buffer, self._fresh = "after", self._buffer[place + len(CLOSE) :], True
        return True

    def _after(self, pieces: list[tuple[Part, str]]) -> bool:
        """Behind a thought, before any text of the answer."""
        stripped = self._buffer.lstrip()
        if _ANSWER_OPEN.startswith(stripped) and stripped != _ANSWER_OPEN:
            return False
        is_framed = stripped.startswith(_ANSWER_OPEN)
        self._state, self._buffer = ("framed", stripped[len(_ANSWER_OPEN) :]) if is_framed else ("bare", stripped)
        return True

    def _bare(self, pieces: list[tuple[Part, str]]) -> bool:
        """An answer behind a thought, without tags of its own; blank space at its end is left out."""
        self._emit(pieces, "answer", len(self._buffer.rstrip()))
        return False

    def _framed(self, pieces: list[tuple[Part, str]]) -> bool:
        """An answer that began with its tag."""
        place = self._buffer.find(_ANSWER_CLOSE)
        if place < 0:
            self._emit(pieces, "answer", len(self._buffer) - num_unsure(self._buffer, (_ANSWER_CLOSE,)))
            return False
        behind = self._buffer[place + len(_ANSWER_CLOSE) :].lstrip()
        if _CALL.startswith(behind) and behind != _CALL:  # what comes next decides
            self._emit(pieces, "answer", len(self._buffer[:place].rstrip()))
            return False
        if behind.startswith(_CALL):  # what follows the answer stays apart from it
            self._emit(pieces, "answer", len(self._buffer[:place].rstrip()))
            space = self._buffer.index(_ANSWER_CLOSE) + len(_ANSWER_CLOSE)
            self._state, self._buffer = "bare", self._buffer[space:]
            self._fresh = False
        else:
            self._emit(pieces, "answer", place + len(_ANSWER_CLOSE))
        return True

    def _emit(self, pieces: list[tuple[Part, str]], part: Part, count: int) -> None:
        """Return the first `count` characters of the buffer."""
        text, self._buffer = self._buffer[:count], self._buffer[count:]
        self._give(pieces, part, text.lstrip() if self._fresh else text)

    def _give(self, pieces: list[tuple[Part, str]], part: Part, text: str) -> None:
        if text:
            pieces.append((part, text))
            self._fresh = False

    _STEPS: ClassVar[dict[State, Callable[["ThoughtParser", list[tuple[Part, str]]], bool]]] = {
        "start": _start,
        "plain": _plain,
        "thought": _thought,
        "after": _after,
        "bare": _bare,
        "framed": _framed,
    }


def split_thought(text: str, opened: bool = False) -> tuple[str, str]:
    """(thought, answer) of a whole text; the thought is "" where there is none. `opened` as in ThoughtParser."""
    parser = ThoughtParser(opened)
    pieces = parser.push(text) + parser.flush()
    thought, answer = ("".join(piece for part, piece in pieces if part == wanted) for wanted in ("thought", "answer"))
    return thought, answer


def opens_thought(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a thought, which the answer continues."""
    return prompt.rstrip().endswith(OPEN)


def ids_open_thought(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> bool:
    """The same of a prompt's token ids, of which `decode` makes text."""
    return opens_thought(decode(ids[-_TAIL:]))


def num_unsure(text: str, tags: Sequence[str]) -> int:
    """Length of the end of `text` that may be blank space before a tag, or the beginning of one."""
    for start in range(max(0, len(text) - max(map(len, tags)) + 1), len(text)):
        if any(tag.startswith(text[start:]) for tag in tags):
            return len(text) - len(text[:start].rstrip())
    return len(text) - len(text.rstrip())
