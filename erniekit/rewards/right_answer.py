"""The right answer in a record, and the final answer in a completion's text."""

import re
import unicodedata
from typing import Any

from erniekit.config.schema_rewards import RewardArgs
from erniekit.rewards.sample import Sample

_BOXED = re.compile(r"\\boxed\s*\{")
_ANNOUNCED = re.compile(
    r"(?:####|(?i:\banswer\b)\**\s*(?:(?i:is)|[:：=])|答案\s*(?:是|为|[:：=]))\s*\**[:：]?\s*(?P<rest>[^\n]*)"
)
_AT_END = " \t\n.,;:!?。，；：！？\"'`“”‘’*$"
_AT_BEGINNING = " \t\n\"'`“”‘’*$"


def right_answers(sample: Sample, cfg: RewardArgs) -> list[str]:
    """The texts that are right: the record's `answer_key`, a text, a number or a list of them. Raises ValueError for
    anything else.
    """
    value = sample.fields.get(cfg.answer_key)
    found = [_text(item) for item in (value if isinstance(value, list | tuple) else [value])]
    answers = [text for text in found if text is not None and text.strip()]
    if not answers or len(answers) < len(found):
        raise ValueError(f"{cfg.answer_key!r} of the record is no text or number: {str(value)[:60]!r}")
    return answers


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) else None


def final_answer(text: str) -> str:
    """The answer at the end of a text: the content of the last \\boxed{}, what stands behind the last "answer is",
    "answer:", "答案是" or "####" in its line, or the whole text.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    announced = [match["rest"] for match in _ANNOUNCED.finditer(text) if match["rest"].strip()]
    return (announced[-1] if announced else text).strip()


def _last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{} whose bracket is closed."""
    for match in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for place in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[match.end() : place].strip()
    return None


def normalised(text: str) -> str:
    """A text for comparison: Unicode's compatible form (NFKC) with the minus sign as a hyphen, without case, quotes,
    marks of emphasis, punctuation at its end or repeated blank space.
    """
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").casefold()
    return " ".join(text.rstrip(_AT_END).lstrip(_AT_BEGINNING).split())
