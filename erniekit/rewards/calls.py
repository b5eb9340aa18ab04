"""The reward for calls of tools."""

import json
from typing import Any

from erniekit.config.schema_rewards import RewardArgs
from erniekit.rewards.call_answers import same_calls
from erniekit.rewards.sample import Sample


def tool_calls(sample: Sample, cfg: RewardArgs) -> float:
    """How well the calls of a completion agree with the record's list of {"name", "arguments"}, from 0 to 1.

    The same calls are 1. Otherwise each expected call is compared with one of the completion's: a third for the name, a
    third for the share of arguments that both have, a third for the share that has the same value; the sum is divided
    by the larger number of calls, unreadable ones included. Where no call is due, 1 for none and 0 for any.
    """
    expected = right_calls(sample, cfg)
    found, unreadable = sample.calls.calls, sample.calls.unreadable
    if not expected:
        return float(not found and not unreadable)
    if not unreadable and same_calls(found, expected):
        return 1.0
    pairs = sorted(
        ((_agreement(a, b), -i, -j) for i, a in enumerate(expected) for j, b in enumerate(found)), reverse=True
    )
    total, used_i, used_j = 0.0, set[int](), set[int]()
    for score, i, j in pairs:
        if i not in used_i and j not in used_j:
            total += score
            used_i.add(i)
            used_j.add(j)
    return total / max(len(expected), len(found) + unreadable)


def _agreement(expected: dict[str, Any], found: dict[str, Any]) -> float:
    if expected["name"] != found["name"]:
        return 0.0
    a, b = expected["arguments"], found["arguments"]
    names = a.keys() | b.keys()
    if not names:
        return 1.0
    both = a.keys() & b.keys()
    # Compared as same_calls does: 1 and 1.0 are the same number; 1, "1" and true differ.
    equal = [name for name in both if same_calls([{"": a[name]}], [{"": b[name]}])]
    return (1 + len(both) / len(names) + len(equal) / len(names)) / 3


def right_calls(sample: Sample, cfg: RewardArgs) -> list[dict[str, Any]]:
    """The calls of the record; OpenAI's form {"function": {...}} with arguments as text is read, too."""
    value = sample.fields.get(cfg.answer_key)
    value = json.loads(value) if isinstance(value, str) else value
    calls = []
    for item in [value] if isinstance(value, dict) else value if isinstance(value, list) else [None]:
        call = item.get("function", item) if isinstance(item, dict) else {}
        call = call if isinstance(call, dict) else {}
        arguments = call.get("arguments", {})
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
            raise ValueError(
                f'{cfg.answer_key!r} of the record must be a list of {{"name": ..., "arguments": {{...}}}}'
            )
        calls.append({"name": call["name"], "arguments": arguments})
    return calls
