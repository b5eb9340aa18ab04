"""Thought and answer in what a thinking model writes: `thought </think> <response> answer </response>`, the tags of the
answer optional. The prompt may have opened the thought already.
"""

from collections.abc import Sequence
from typing import Literal

Part = Literal["thought", "answer"]
OPEN, CLOSE = "<think>", "</think>"
_ANSWER_TAGS = ("<response>", "</response>")


class ThoughtParser:
    """Sorts streamed text into thought and answer. Text without a thought is an answer, unchanged.

    In a text with a thought the tags, and blank space beside them, are left out.
    """

    def __init__(self, opened: bool = False) -> None:
        """`opened`: the prompt ends inside a thought."""
        self._state: Literal["start", "thought", "after", "plain"] = "thought" if opened else "start"
        self._buffer = ""
        self._fresh = True  # no text of the current part has been returned yet

    def push(self, text: str) -> list[tuple[Part, str]]:
        """Add text and return the pieces that are certain; text that may become a tag is kept back."""
        self._buffer += text
        pieces: list[tuple[Part, str]] = []
        while self._step(pieces):
            pass
        return pieces

    def flush(self) -> list[tuple[Part, str]]:
        """The rest."""
        part: Part = "thought" if self._state == "thought" else "answer"
        text, self._buffer = self._buffer, ""
        if self._state in ("thought", "after"):
            text = text.strip() if self._fresh else text.rstrip()
        return [(part, text)] if text else []

    def _step(self, pieces: list[tuple[Part, str]]) -> bool:
        """Process the beginning of the buffer. Returns whether there may be more to process."""
        if self._state == "start":
            stripped = self._buffer.lstrip()
            if OPEN.startswith(stripped) and stripped != OPEN:
                return False
            if stripped.startswith(OPEN):
                self._state, self._buffer = "thought", stripped[len(OPEN) :]
            else:
                self._state = "plain"
            return True
        if self._state == "plain":
            self._give(pieces, "answer", self._buffer)
            self._buffer = ""
            return False
        tags: Sequence[str] = (CLOSE,) if self._state == "thought" else _ANSWER_TAGS
        part: Part = "thought" if self._state == "thought" else "answer"
        place, tag = min(((self._buffer.find(tag), tag) for tag in tags if tag in self._buffer), default=(-1, ""))
        if not tag:
            certain = len(self._buffer) - num_unsure(self._buffer, tags)
            self._give(pieces, part, self._buffer[:certain].lstrip() if self._fresh else self._buffer[:certain])
            self._buffer = self._buffer[certain:]
            return False
        text = self._buffer[:place]
        self._give(pieces, part, text.strip() if self._fresh else text.rstrip())
        self._buffer = self._buffer[place + len(tag) :]
        if tag == CLOSE:
            self._state = "after"
        self._fresh = tag != _ANSWER_TAGS[1]  # what follows the answer (a tool call) stays apart from it
        return True

    def _give(self, pieces: list[tuple[Part, str]], part: Part, text: str) -> None:
        if text:
            pieces.append((part, text))
            self._fresh = False


def split_thought(text: str, opened: bool = False) -> tuple[str, str]:
    """(thought, answer) of a whole text; the thought is "" where there is none. `opened` as in ThoughtParser."""
    parser = ThoughtParser(opened)
    pieces = parser.push(text) + parser.flush()
    thought, answer = ("".join(piece for part, piece in pieces if part == wanted) for wanted in ("thought", "answer"))
    return thought, answer


def opens_thought(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a thought, which the answer continues."""
    return prompt.rstrip().endswith(OPEN)


def num_unsure(text: str, tags: Sequence[str]) -> int:
    """Length of the end of `text` that may be blank space before a tag, or the beginning of one."""
    for start in range(max(0, len(text) - max(map(len, tags)) + 1), len(text)):
        if any(tag.startswith(text[start:]) for tag in tags):
            return len(text) - len(text[:start].rstrip())
    return len(text) - len(text.rstrip())
