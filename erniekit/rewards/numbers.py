"""Compares answers that are numbers by their exact value. math-verify (rewards/formulas.py) also reads formulas."""

import re
import unicodedata
from fractions import Fraction

from erniekit.config.schema_rewards import RewardArgs
from erniekit.rewards.right_answer import final_answer, normalised, right_answers
from erniekit.rewards.sample import Sample

_MAX_DIGITS = 400  # of a number; a longer one is none
_TOLERANCE = Fraction(1, 10**6)  # relative, where a number is not whole: 0.333333 is a third
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?(?:[eE][-+]?\d{1,3})?|\.\d+(?:[eE][-+]?\d{1,3})?"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:\\[dt]?frac\s*(?:\{{\s*(?P<over>{_PLAIN})\s*\}}|(?P<over_digit>\d))"
    rf"\s*(?:\{{\s*(?P<under>{_PLAIN})\s*\}}|(?P<under_digit>\d))"
    rf"|(?P<plain>{_PLAIN})(?:\s*/\s*(?P<divisor>{_PLAIN}))?)\s*(?P<percent>\\?%)?"
)
_WORD = r"(?!or\b|and\b|to\b)[A-Za-z°$€£¥\u4e00-\u9fff]+(?:\^\{?\d\}?|[²³])?"
_UNIT = re.compile(rf"{_WORD}(?:\s?/\s?{_WORD}|\s{_WORD})?")
_LATEX = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}|\\[,;! ]|\\left|\\right|\\\(|\\\)|\\\[|\\\]|[$*`]")


def accuracy(sample: Sample, cfg: RewardArgs) -> float:
    """1.0 if the final answer is one of the record's, else 0.0.

    A right answer that is a number is compared by value with the final answer, or with the last number of a text
    that has no \\boxed{} and does not announce its answer. Another right answer is compared as text.
    """
    final, whole = final_answer(sample.answer), sample.answer.strip()
    for right in right_answers(sample, cfg):
        value = number_of(right)
        if value is None:
            if normalised(final) == normalised(right):
                return 1.0
        elif same_number(_stated(final, final == whole), value):
            return 1.0
    return 0.0


def same_number(found: Fraction | None, right: Fraction) -> bool:
    """Whether two numbers are equal: whole numbers exactly, others to a millionth of the right one."""
    if found is None or found == right:
        return found is not None
    if found.denominator == right.denominator == 1:
        return False
    return abs(found - right) <= _TOLERANCE * abs(right)


def number_of(text: str) -> Fraction | None:
    """The value of a text that is one number, with or without a unit: "1,234", "-0.5", "3/4", "\\frac{3}{4}", "12 %",
    "5 km". None for any other text.
    """
    text = _as_typed(text[: 4 * _MAX_DIGITS]).strip(" \t\n.。,，;；")
    name, equals, rest = text.rpartition("=")
    if equals and len(name) <= 40:  # x = 5
        text = rest.strip()
    match = _NUMBER.search(text)
    if match is None:
        return None
    around = (text[: match.start()].strip(), text[match.end() :].strip())
    if any(part and not _UNIT.fullmatch(part) for part in around) or len(around[0]) > 3:
        return None
    return _value(match)


def last_number(text: str) -> Fraction | None:
    """The last number in a text."""
    text = _as_typed(text[-100 * _MAX_DIGITS :])
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    last = matches[-1]
    # In "10-5" and "a-5" the sign is a minus between two terms, or a hyphen.
    joined = (
        last["sign"] and last.start() and not text[last.start() - 1].isspace() and text[last.start() - 1] not in "=(:："
    )
    value = _value(last)
    return abs(value) if joined and value is not None else value


def _as_typed(text: str) -> str:
    """A text in Unicode's compatible form, with its numbers as a keyboard has them: without LaTeX's spaces and fonts,
    1{,}000 as 1,000, and the minus sign (U+2212) as the hyphen.
    """
    return _LATEX.sub(r"\1", unicodedata.normalize("NFKC", text)).replace("{,}", ",").replace("\u2212", "-")


def _stated(final: str, is_whole: bool) -> Fraction | None:
    value = number_of(final)
    if value is not None:
        return value
    if is_whole:
        return last_number(final)
    # "The answer is 5 because ..." announces it at the beginning of what follows.
    match = _NUMBER.match(_as_typed(final[: 4 * _MAX_DIGITS]).lstrip("$€£¥ "))
    return _value(match) if match else None


def _value(match: "re.Match[str]") -> Fraction | None:
    first = match["over"] or match["over_digit"] or match["plain"]
    second = match["under"] or match["under_digit"] or match["divisor"]
    if len(match.group()) > _MAX_DIGITS:
        return None
    value = Fraction(first.replace(",", ""))
    if second is not None:
        divisor = Fraction(second.replace(",", ""))
        if not divisor:
            return None
        value /= divisor
    if match["percent"]:
        value /= 100
    return -value if match["sign"] == "-" else value
