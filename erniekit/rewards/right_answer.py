"""The right answer in a record, and the final answer in a completion's text."""

import re
import unicodedata
from typing import Any

from erniekit.config.schema_rewards import RewardArgs
from erniekit.rewards.sample import Sample

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACKET = re.compile(r"[{}]")
_ANNOUNCED = re.compile(
    r"(?:####|(?i:\banswers?\b)\**\s*(?:(?i:is|are)|[:：=])|答案\s*(?:是|为|[:：=]))\s*\**[:：]?\s*"
)
# What math-verify reads in LaTeX alone.
_COMMANDS = {"×": "\\times ", "÷": "\\div ", "·": "\\cdot ", "π": "\\pi ", "∞": "\\infty ", "√": "\\sqrt "}
_SIGNS = str.maketrans("\u2212\u2044", "-/")  # the minus sign and the slash of fractions
AT_END = " \t\n.,;:!?。，；：！？\"'`“”‘’*$"
_MINUS = re.compile(r"(?:负|零下|\b(?:minus|negative)\s|(?<!\d)(?<!\d\s)\u2013)\s*(?=[\d.\\])", re.IGNORECASE)
_SUPERSCRIPTS = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207a\u207b]+")
_FRACTIONS = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_AT_BEGINNING = " \t\n\"'`“”‘’*$"


def right_answers(sample: Sample, cfg: RewardArgs) -> list[str]:
    """The texts that are right: the record's `answer_key`, a text, a number or a list of them. Raises ValueError for
    anything else.
    """
    value = sample.fields.get(cfg.answer_key)
    found = [_text(item) for item in (value if isinstance(value, list | tuple) else [value])]
    answers = [text for text in found if text is not None and text.strip()]
    if not answers or len(answers) < len(found):
        raise ValueError(f"{cfg.answer_key!r} of the record is neither text nor a number: {str(value)[:60]!r}")
    return answers


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) else None


def final_answer(text: str) -> str:
    """The answer at the end of a text: the content of the last \\boxed{}, what stands behind the last "answer is",
    "answer:", "答案是" or "####" in its line, or the whole text.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    lines = (text[match.end() :].split("\n", 1)[0].strip() for match in reversed(list(_ANNOUNCED.finditer(text))))
    return next(filter(None, lines), text.strip())


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{} whose bracket is closed."""
    starts = {match.end() for match in _BOXED.finditer(text)}
    opened: list[int] = []  # where the content of each open bracket begins
    last: tuple[int, int] | None = None
    for bracket in _BRACKET.finditer(text):
        if bracket.group() == "{":
            opened.append(bracket.end())
        elif opened:
            start = opened.pop()
            if start in starts and (last is None or start > last[0]):
                last = start, bracket.start()
    return None if last is None else text[slice(*last)].strip()


def normalised(text: str) -> str:
    """A text for comparison: in its compatible form, without case, quotes, marks of emphasis, punctuation at its end or
    repeated blank space; a text of punctuation alone keeps it.
    """
    text = compatible(text).casefold()
    return " ".join((text.rstrip(AT_END).lstrip(_AT_BEGINNING) or text).split())


def compatible(text: str) -> str:
    """A text in Unicode's compatible form (NFKC) with the signs of formulas in LaTeX: 10³, of which NFKC makes 103, is
    10^{3}, ½ is \\frac{1}{2}, × is \\times, and the minus sign (U+2212) is a hyphen.
    """
    text = _SUPERSCRIPTS.sub(lambda match: f"^{{{match.group()}}}", text)
    text = _FRACTIONS.sub(lambda match: "\\frac{{{}}}{{{}}}".format(*_nfkc(match.group()).split("\u2044")), text)
    text = _nfkc(text).translate(_SIGNS)
    for sign, command in _COMMANDS.items():
        text = text.replace(sign, command)
    return text


def with_minus_signs(text: str) -> str:
    """A text with a hyphen for 负, 零下, minus and negative before a number, and for a dash that is not between two."""
    return _MINUS.sub("-", text)


def _nfkc(text: str) -> str:
    return unicodedata.normalize("NFKC", text)
