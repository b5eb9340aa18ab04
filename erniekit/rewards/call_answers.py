"""Scores a model's calls of tools. Calls are {"name": str, "arguments": dict}; plain Python."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

Calls = Sequence[dict[str, Any]]


def same_calls(found: Calls, expected: Calls) -> bool:
    """Whether two answers make the same calls: name and arguments equal as JSON values. The order of keys does not
    count, nor that of parallel calls (all are made before any result is seen); how often a call is made does. 1 and 1.0
    are the same number; 1, "1" and true differ.
    """
    return Counter(map(_canonical, found)) == Counter(map(_canonical, expected))


def call_scores(found: Sequence[Calls], expected: Sequence[Calls]) -> dict[str, float]:
    """Scores of the answers to questions that came with tools.

    Over the answers that should call: `tool_call_exact_match`, the share with the same calls, and `tool_name_match`,
    the share that call the same functions, whatever the arguments. Over all: `tool_call_decision`, the share that call
    exactly if they should. `num_tool_calls_expected` is the number of answers that should call.
    """
    due = [(a, b) for a, b in zip(found, expected, strict=True) if b]
    decided = [bool(a) == bool(b) for a, b in zip(found, expected, strict=True)]
    return {
        "num_tool_calls_expected": len(due),
        "tool_call_exact_match": _mean([same_calls(a, b) for a, b in due]),
        "tool_name_match": _mean([Counter(c["name"] for c in a) == Counter(c["name"] for c in b) for a, b in due]),
        "tool_call_decision": _mean(decided),
    }


def _canonical(value: Any) -> str:
    return json.dumps(_numbers(value), sort_keys=True, ensure_ascii=False)


def _numbers(value: Any) -> Any:
    """The value with whole numbers as int."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else 0.0
