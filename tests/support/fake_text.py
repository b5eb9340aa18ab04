"""A tokenizer and a chat template that need no files: one token per character.

In a module of their own because data workers are sent them by pickle and import them by name.
"""

from typing import Any

from erniekit.utils.errors import DataError

EOS, PAD, USER, ASSISTANT, SYSTEM, TOOL = range(1, 7)
FIRST = 10  # id of chr(0)


class FakeTokenizer:
    eos_id = EOS
    vocab_size = FIRST + 0x110000
    fingerprint = "fake"

    def encode_plain(self, text: str) -> list[int]:
        return [FIRST + ord(char) for char in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i - FIRST) for i in ids if i >= FIRST)


class FakeTemplate:
    """A message is its role's token and its characters; an answer ends with eos and is a target unless labelled 0."""

    source = "fake"

    def encode_all(self, messages: list[dict[str, Any]], tools: Any, label: list[int] | None) -> list[Any]:
        roles = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM, "tool": TOOL}
        wanted = iter(label or [1] * len(messages))
        segments = []
        for message in messages:
            if "refuse" in message["content"]:
                raise DataError("the template refuses")
            segments.append(([roles[message["role"]]], False))
            text = [FIRST + ord(char) for char in message["content"]]
            answer = message["role"] == "assistant"
            segments.append((text + [EOS] * answer, answer and bool(next(wanted))))
        return [segments]

    def labels(self, segments: Any) -> tuple[list[int], list[int]]:
        ids = [i for part, _ in segments for i in part]
        targets = [i if is_target else -100 for part, is_target in segments for i in part]
        return ids, [*targets[1:], -100]
