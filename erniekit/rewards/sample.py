"""What reward functions get and give: one completion with its record, and the table of the rewards of many."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from erniekit.generation.thinking import split_thought
from erniekit.generation.tool_calls import Answer, read_calls


@dataclass(frozen=True)
class Sample:
    """One completion that is to be scored.

    prompt: the messages before it. completion: its text with thinking tags, without the end token; completion_ids: its
    tokens. fields: the record's other fields, such as the right answer. place: "file:line" of the record.
    opened_thought: whether the prompt ends with <think>, so that the completion begins inside a thought.
    is_truncated: whether it ended at the limit of tokens. turns: the completion as messages, with calls of tools and
    their results, where it has more than one; completion is then the text of the last turn alone.
    """

    prompt: list[dict[str, Any]]
    completion: str
    completion_ids: tuple[int, ...]
    fields: Mapping[str, Any]
    place: str
    opened_thought: bool = False
    is_truncated: bool = False
    turns: tuple[dict[str, Any], ...] = ()

    @cached_property
    def answer(self) -> str:
        """The text behind the thought, without tags; "" if a thought never ends."""
        return split_thought(self.completion, self.opened_thought)[1]

    @cached_property
    def calls(self) -> Answer:
        """The calls of tools in all turns, how many could not be read, and the last turn's text without them."""
        last = read_calls(self.answer)
        before = [
            {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
            for turn in self.turns[:-1]
            for call in turn.get("tool_calls") or ()
        ]
        return Answer(last.text, before + last.calls, last.unreadable)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The completion as messages."""
        return list(self.turns) or [{"role": "assistant", "content": self.completion}]


@dataclass(frozen=True)
class ScoreTable:
    """The rewards of N completions.

    values: float64 [N] of each function by its name, NaN where it gave none. total: float64 [N], the weighted sum of
    those that are given, scaled by domain if that is asked for; NaN where none is. accuracy: the values of the function
    that says what is right, if there is one. failures: how often each function failed. metrics:
    means of what the user's functions logged (`log_metric`) since Scorer.begin_rollout. extras: lists of N values, for
    the table of completions (`log_extra`).
    """

    values: dict[str, np.ndarray]
    total: np.ndarray
    accuracy: np.ndarray | None
    failures: dict[str, int]
    metrics: dict[str, float] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)


def text_of(content: Any) -> str:
    """The text of a message's content, which is a text or, with pictures, a list of parts."""
    if isinstance(content, list):
        return " ".join(part.get("text") or "" if isinstance(part, Mapping) else str(part) for part in content)
    return str(content or "")
