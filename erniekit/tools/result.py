"""What a tool gives back. Whatever is wrong with a call becomes text for the model, which may then call again."""

from dataclasses import dataclass
from typing import Any


class BadCall(Exception):
    """What is wrong with a call, for the model."""


@dataclass(frozen=True)
class ToolResult:
    """`content`: text or parts, as a tool message has it. `note`: the same for people, in a few words."""

    content: str | list[dict[str, Any]]
    note: str


def failure(reason: str) -> ToolResult:
    """The result of a call that cannot be executed."""
    return ToolResult(f"Error: {reason.rstrip('.')}.", reason)
