"""From the tokens of one answer to what a client is sent: its thought, its text, its calls, and where it ends.

A whole answer is the joined pieces of a streamed one: there is one way to read tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from erniekit.data.chat.tokenizer import StreamDecoder, Tokenizer
from erniekit.generation import thinking, tool_calls
from erniekit.generation.request import Event, TokenScore
from erniekit.generation.thinking import ThoughtParser
from erniekit.generation.tool_calls import CallSplitter, WrittenCall

FRAMING = (thinking.OPEN, thinking.CLOSE, "<response>", "</response>", tool_calls.OPEN, tool_calls.CLOSE)


class Piece(NamedTuple):
    """A piece of an answer: a part of its thought or its text, or one call."""

    kind: Literal["thought", "text", "call"]
    text: str = ""
    call: WrittenCall | None = None


class StopTexts:
    """Finds the texts that end an answer, which may come in pieces. What may yet become one is kept back."""

    def __init__(self, texts: Sequence[str], is_included: bool = False) -> None:
        self.found = ""  # the text that has ended the answer
        self._texts, self._is_included, self._buffer = texts, is_included, ""

    def push(self, text: str, may_stop: bool = True) -> str:
        """Add text and return what is certain. may_stop: whether a text that is complete now ends the answer."""
        if not self._texts:
            return text
        self._buffer += text
        places = [(place, stop) for stop in self._texts if (place := self._buffer.find(stop)) >= 0]
        if places and may_stop:
            place, self.found = min(places, key=lambda pair: (pair[0], -len(pair[1])))
            text = self._buffer[: place + (len(self.found) if self._is_included else 0)]
            self._buffer = ""
            return text
        if places:  # too early to end: this text may not end the answer later either
            end = max(place + len(stop) for place, stop in places)
            text, self._buffer = self._buffer[:end], self._buffer[end:]
            return text + self.push("", may_stop)
        certain = len(self._buffer) - self._num_unsure()
        text, self._buffer = self._buffer[:certain], self._buffer[certain:]
        return text

    def flush(self) -> str:
        """The rest."""
        text, self._buffer = self._buffer, ""
        return text

    def _num_unsure(self) -> int:
        """Length of the end of the buffer that may be the beginning of a stop text."""
        longest = max(map(len, self._texts)) - 1
        for start in range(max(0, len(self._buffer) - longest), len(self._buffer)):
            if any(stop.startswith(self._buffer[start:]) for stop in self._texts):
                return len(self._buffer) - start
        return 0


@dataclass(frozen=True)
class Reading:
    """How the tokens of an answer are read.

    opened: whether the prompt ends inside a thought. has_thoughts, has_calls: whether thoughts and calls are taken out
    of the text. min_tokens: stop texts in the first N tokens do not end an answer. hidden: ids of which no text
    is shown. scores_end: the end token is among the tokens that have a score.
    """

    opened: bool = False
    has_thoughts: bool = True
    has_calls: bool = False
    stops: tuple[str, ...] = ()
    includes_stop: bool = False
    min_tokens: int = 0
    hidden: frozenset[int] = frozenset()
    scores_end: bool = False


@dataclass
class AnswerReader:
    """Reads the events of one answer. After its end `finish_reason` and `stop_reason` (the stop text or id) are set.

    num_tokens: tokens so far, the end token included; num_thought_tokens: those of the thought. ids: the tokens, with
    the end token. num_calls: calls so far. tokens: those that have a score; ends: characters of the answer that are
    certain behind each of them.
    """

    tokenizer: Tokenizer
    reading: Reading
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_tokens: int = 0
    num_thought_tokens: int = 0
    num_calls: int = 0
    tokens: list[tuple[int, TokenScore]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._decoder = StreamDecoder(self.tokenizer)
        self._num_characters = 0
        self._thoughts = ThoughtParser(self.reading.opened)
        self._stops = StopTexts(self.reading.stops, self.reading.includes_stop)
        self._calls = CallSplitter()

    @property
    def is_over(self) -> bool:
        """Whether the answer has ended."""
        return self.finish_reason is not None

    @property
    def num_unreadable(self) -> int:
        """Calls that could not be read."""
        return self._calls.num_unreadable

    def push(self, event: Event) -> list[Piece]:
        """The pieces that an event makes certain; after an end there is nothing to push."""
        text = ""
        if event.token is not None:
            self.num_tokens += 1
            self.ids.append(event.token)
            text = "" if event.token in self.reading.hidden else self._decoder.push(event.token)
            if event.score is not None:
                self.tokens.append((event.token, event.score))
        elif event.stop_id is not None:
            self.num_tokens += 1
            self.ids.append(event.stop_id)
            if event.score is not None and self.reading.scores_end:
                self.tokens.append((event.stop_id, event.score))
        self._num_characters += len(text)
        self.ends += [self._num_characters] * (len(self.tokens) - len(self.ends))
        if event.stop:
            text += self._decoder.flush()
        pieces = self._parted(text, is_last=bool(event.stop))
        if self._thoughts.is_in_thought:
            self.num_thought_tokens += event.token is not None
        if self._stops.found:
            self._end("stop", self._stops.found)
        elif event.stop:
            self._end(event.stop if event.stop in ("stop", "error") else "length", event.stop_id)
        return pieces

    def _end(self, reason: str, why: str | int | None) -> None:
        self.finish_reason = "tool_calls" if self.num_calls and reason == "stop" else reason
        self.stop_reason = why

    def _parted(self, text: str, is_last: bool) -> list[Piece]:
        """Thought, text and calls of the next part of an answer."""
        if self.reading.has_thoughts:
            parts = self._thoughts.push(text) + (self._thoughts.flush() if is_last else [])
        else:
            parts = [("answer", text)] if text else []
        pieces = [Piece("thought", part) for kind, part in parts if kind == "thought"]
        said = "".join(part for kind, part in parts if kind == "answer")
        shown = self._stops.push(said, may_stop=self.num_tokens > self.reading.min_tokens)
        if is_last and not self._stops.found:
            shown += self._stops.flush()
        if self.reading.has_calls:
            return pieces + self._without_calls(shown, is_last or bool(self._stops.found))
        return pieces + ([Piece("text", shown)] if shown else [])

    def _without_calls(self, text: str, is_last: bool) -> list[Piece]:
        """Text and calls of the next part of an answer."""
        pieces = []
        for found in self._calls.push(text) + (self._calls.flush() if is_last else []):
            if isinstance(found, WrittenCall):
                self.num_calls += 1
                pieces.append(Piece("call", call=found))
            else:
                pieces.append(Piece("text", found))
        return pieces


def hidden_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Special tokens that skip_special_tokens leaves out: all but those that frame thoughts, answers and calls."""
    return frozenset(
        number
        for text, number in tokenizer.special_tokens.items()
        if text not in FRAMING and not tokenizer.decode([number], skip_special_tokens=True)
    )
