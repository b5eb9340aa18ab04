"""Compares answers that are numbers by their exact value. math-verify (rewards/formulas.py) also reads formulas."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from erniekit.config.schema_rewards import RewardArgs
from erniekit.rewards.chinese_numbers import chinese_integer
from erniekit.rewards.right_answer import (
    compatible,
    final_answer,
    last_boxed,
    normalised,
    right_answers,
    with_minus_signs,
)
from erniekit.rewards.sample import Sample

_MAX_DIGITS = 400  # of a number; a longer one is none
_TOLERANCE = Fraction(1, 10**6)  # relative, where a number is not whole: 0.333333 is a third
# Digits in groups as they are written in English, Indian and Swiss or ISO style, and with two or more dots. The bound
# of the second one keeps the time of a search linear where 11,11,11 does not end.
_GROUPS = "|".join(
    (
        r"\d{1,3}(?:,\d{3})+",
        r"\d{1,2}(?:,\d{2}){1,9},\d{3}",
        r"\d{1,3}(?:[ '’]\d{3})+(?![\d/])",
        r"\d{1,3}(?:\.\d{3}){2,}(?![\d.])",
        r"\d+",
    )
)
_PLAIN = rf"(?:{_GROUPS})(?:\.\d*)?(?:[eE][-+]?\d{{1,3}})?|\.\d+(?:[eE][-+]?\d{{1,3}})?"


def _exponent(name: str) -> str:
    return rf"\s*\^\s*(?:\{{\s*(?P<{name}>[-+]?\d{{1,3}})\s*\}}|(?P<{name}_plain>[-+]?\d{{1,3}}))"


_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*(?:(?P<whole>\d+)(?:\s*(?=\\[dtc]?frac)|\s+(?=\d+\s*/\s*\d)))?"  # of 3 1/2
    rf"(?:\\[dtc]?frac\s*(?:\{{\s*(?P<over>[-+]?\s*(?:{_PLAIN}))\s*\}}|(?P<over_digit>\d))"
    rf"\s*(?:\{{\s*(?P<under>[-+]?\s*(?:{_PLAIN}))\s*\}}|(?P<under_digit>\d))"
    rf"|(?P<plain>{_PLAIN})(?:{_exponent('power')}|\s*/\s*(?P<divisor>{_PLAIN}))?)"
    rf"(?:\s*(?:[x*]|\\times|\\cdot)\s*10{_exponent('tens')})?"
    # 千克 and 千米 are units, 百分点 a percentage point
    r"(?:\s*(?P<scale>thousand|million|billion|trillion|[百千万]?[万亿]|千(?![克米瓦卡赫伏帕焦牛字])|百(?!分)))?"
    r"\s*(?P<percent>\\?%|per ?cent\b)?"
)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_CHINESE_SCALES = {"百": 10**2, "千": 10**3, "万": 10**4, "亿": 10**8}
# Letters that usually are variables, which are no units: 2x, 3i.
_VARIABLE = "(?:ab|ac|bc|xy|xz|yz|[a-cefi-kn-rv-z])"
# Words behind a number that make another one of it: 5 dozen, 5 squared, 5的平方, 5余2.
_CHANGES = (
    r"(?:squared|cubed|factorial|dozens?|plus|minus|times\s*[\d\\(]|divided|over\s+\d|(?:less|more|fewer)\s+than"
    r"|to\s+the\s+(?:power|\d)|mod|modulo|remainder)(?![A-Za-z])|的?(?:[平立]方(?![米分厘千公英毫尺寸单])|阶乘|倒数)"
    r"|的[一二两三四五六七八九十\d]*[倍次因约]|[余乘减除]|加(?!仑)|分之"
)
_WORD = rf"(?!(?:or|and|to|not|no|{_VARIABLE})\b|{_CHANGES})[A-Za-z°$€£¥\u4e00-\u9fff]+(?:\^\{{?\d\}}?)?"
_UNIT = re.compile(rf"{_WORD}(?:\s?/\s?{_WORD}|\s{_WORD})?")
_OPERATION = (
    r"\\(?:sqrt|pi|times|cdot|div|pm|log|ln|sin|cos|tan|[dtc]?frac|overline|dot|alpha|beta|gamma|theta|lambda|phi"
    r"|omega|[pb]?mod|choose)(?![A-Za-z])"
)
# A larger unit with a number of a smaller one behind it: 3 hours 20 minutes, 12元5角, 30° 15'.
_AND_SMALLER = (
    r"(?:hours?|hrs?|h|minutes?|mins?|years?|months?|weeks?|days?|feet|foot|ft|yards?|yd|pounds?|lbs?|dollars?"
    r"|met(?:er|re)s?|m|km|kg|degrees?|°|'|年|月|[天日]|小?时|点|分钟?|[元角米尺度]|千克|公斤)\s*(?:,|and\b)?\s*\d[\d.]*\s*"
    r"(?:(?:minutes?|mins?|m|seconds?|secs?|s|months?|days?|hours?|inch(?:es)?|in|feet|ounces?|oz|cents?|cm|g|grams?"
    r"|centimet(?:er|re)s?|met(?:er|re)s?)\b|[分秒月日号天时寸角厘克米'\"]|小时)"
)
_COMPOUND = re.compile(rf"\d\s*{_AND_SMALLER}")
# What makes the number before or behind it a part of a formula, a pair or a time, which has another value.
_GOES_ON = re.compile(
    rf"\s*{_OPERATION}|\s*[\^_‰]|\s*[+*]\s*[\w\\(]|\s*/\s*(?:[\d\\(]|{_VARIABLE}(?![A-Za-z]))|\s*-\s*\d|[:.,]\d"
    rf"|(?<!\s)-?{_VARIABLE}(?![A-Za-z])|[xyzi](?![A-Za-z])|\s*[)\]}}]\s*\^|\s*(?:{_CHANGES}|{_AND_SMALLER})|(?<!\s)\(\d"
    # of several numbers, or a range
    r"|\s*(?:\b(?:or|and|to)\b|[~或和至到])\s*-?\d|\s*[,;、]\s*-?\d|(?<=\s)(?::\s*)?\d"
)
# What a box holds beside a number and its unit: m^2 and s^{-1} are parts of units.
_IN_THE_BOX = re.compile(
    rf"(?<![\^_{{A-Za-z-])\d|[=<>≤≥≠+!|]|\\(?:leq?|geq?|lt|gt|neq?)(?![A-Za-z])|(?<=\s)(?!a\s){_VARIABLE}(?![A-Za-z])"
)
_BEGAN = re.compile(
    rf"(?:[\^_{{*/±≤≥≠]|{_OPERATION}|\\(?:leq?|geq?|neq?|lt|gt)|\w\s*[<>]|\bnot|不是|\d[百千万亿]"
    rf"|(?<![A-Za-z])[A-Za-z]\s+-|[\w)}}]\s*\+|[\d)}}]\s+-|分之|\d[余乘加减除]以?)\s*$|\d[,.:]$"
)
# What may stand before the only number of an announced answer: "therefore 5", "she has 5 apples".
_WORDS = re.compile(r"(?:[A-Za-z']{2,}|\b[AaI]\b|[\u4e00-\u9fff]|[\s,，:：])+[$€£¥]?")
_OTHER_VALUE = re.compile(
    r"\b(?:not|no|none|never|than|least|most|above|below|twice|times|half|double|square|root|cube|log|sqrt|sin|cos|tan"
    r"|plus|minus|between)\b|n't\b|[不非或]|[小大少多低高]于|超过|至[少多]|[根平立]方|根号"
)
_ADDED = re.compile(r"[A-Za-z](?:\s*\+|-)$")
_BRACKETED = re.compile(r"^[({\"'“‘]\s*([^(){}\"'“”‘’]*?)\s*[)}\"'”’]$")
_IN_A_LIST = re.compile(r"[(\[{][^()\[\]{}]*,\s*$")
_SEVERAL = re.compile(r"=[^=]*(?:[,;，；、或和]|\bor\b|\band\b|\d\s+[A-Za-z]\s*$)")
# A number that stands before its reason: "12, since 3 * 4 = 12".
_REASON = re.compile(r"\d[^=(]*(?:[;，；]|,\s|\b(?:because|since|as|for)\b|因为|由于)")
# What stands before the exponent of a unit: 25 cm^, 25 m/s^.
_EXPONENT = re.compile(rf"[\d}}]\s*(?:[A-Za-z]+\s*/\s*)?(?!{_VARIABLE}(?![A-Za-z]))[A-Za-z]+\s*\^\s*\{{?\s*$")
_LATEX = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|boldsymbol|mbox)\s*\{([^{}]*)\}|(?<!\\)\\[,;:!\s$]|\\(?:left|right|q?quad)(?![A-Za-z])"
    r"|</?[A-Za-z]+[1-6]?>"
    r"|\\\(|\\\)|\\\[|\\\]|[$`]|\*(?!(?:(?<=[\d)]\*)|(?<=[\d)] \*))\s?[\d(])"  # not 2*3
)
_BLANKS = re.compile(r"\s+")  # long runs would take the square of their length
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ|°)|\\degree")
# Words that count or measure. 分, 角 and 位 are none of them: 十分, 三角 and 三位数 are no numbers.
_MEASURES = re.compile(
    "(?:个[\u4e00-\u9fff]{0,4}|[元块岁天年月日人只次倍度克升页本条张辆棵颗件名秒]|[厘毫千]?米|公里|千克|公斤|小时|分钟)$"
)
_FACTORIAL = re.compile(r"(?:\d|\)|\b[A-Za-z])\s*![\s.$]*$")
# Ways to write the same formula, each replaced by one of them.
_SPELLINGS = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\s*([^\w\s])\s*", r"\1"),
        (r"(\\[a-z]+) (?=\d)", r"\1"),
        (r"([\^_]|\\sqrt)\{(\w)\}", r"\1\2"),
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (r"\\frac(\w)(?=[\w{])", r"\\frac{\1}"),
        (r"(\\frac\{[^{}]*\})(\w)", r"\1{\2}"),
        (r"^(-?)\\frac\{(\\?\w+)\}\{(\\?\w+)\}$", r"\1\2/\3"),
        (r"\\leq?(?![a-z])|<=", "≤"),
        (r"\\geq?(?![a-z])|>=", "≥"),
        (r"\\neq?(?![a-z])|!=", "≠"),
        (r"^\(([a-z])\)$", r"\1"),
    )
]


@dataclass(frozen=True)
class Number:
    """An exact value; `percent`: it was written with a percent sign, and the value is divided by 100 already."""

    value: Fraction
    percent: bool = False


def accuracy(sample: Sample, cfg: RewardArgs) -> float:
    """1.0 if the final answer is one of the record's, else 0.0.

    A right answer that is a number is compared by value with the final answer, or with the last number of a text
    that has no \\boxed{} and does not announce its answer. Another right answer is compared as text.
    """
    for right in right_answers(sample, cfg):
        value = number_of(right)
        if _same_text(final_answer(sample.answer), right) if value is None else states(sample.answer, value):
            return 1.0
    return 0.0


def states(text: str, value: Number) -> bool:
    """Whether a text answers with this number."""
    final, is_boxed = final_answer(text), last_boxed(text) is not None
    is_whole = not is_boxed and final == text.strip()
    return same_number(_stated(final, is_whole, is_boxed), value)


def _same_text(found: str, right: str) -> bool:
    if bool(_FACTORIAL.search(found)) != bool(_FACTORIAL.search(right)):
        return False
    return normalised(found) == normalised(right) or _compact(found) == _compact(right)


def _compact(formula: str) -> str:
    """A formula without the spaces and braces that mean nothing: (1, 2) and (1,2), 2 \\pi and 2\\pi, x^{2} and x^2."""
    text = normalised(as_typed(formula))
    for pattern, plain in _SPELLINGS:
        text = pattern.sub(plain, text)
    return text


def same_number(found: Number | None, right: Number) -> bool:
    """Whether two numbers are equal: whole numbers exactly, others to a millionth of the right one. A percent sign that
    only one of them has may as well be left out: "50%" is 0.5, and 50 where percentages are asked for.
    """
    if found is None:
        return False
    if _equal(found.value, right.value):
        return True
    if found.percent == right.percent:
        return False
    return _equal(found.value * (100 if found.percent else 1), right.value * (100 if right.percent else 1))


def _equal(found: Fraction, right: Fraction) -> bool:
    if found == right:
        return True
    if found.denominator == right.denominator == 1:
        return False
    return abs(found - right) <= _TOLERANCE * abs(right)


def number_of(text: str) -> Number | None:
    """The value of a text that is one number, with or without a unit: "1,234", "-0.5", "3/4", "\\frac{3}{4}", "3 1/2",
    "1.5×10^3", "12 %", "5 km", "三分之一". None for any other text.
    """
    text = as_typed(text[: 4 * _MAX_DIGITS]).strip().rstrip(" \t\n.。,，;；")
    if text.count("≈") == 1:
        exact, rounded = text.split("≈")
        return number_of(exact) or number_of(rounded)
    name, equals, rest = text.rpartition("=")
    if equals and len(name) <= 40 and not _SEVERAL.search(name) and not _REASON.search(name):  # x = 5
        text = rest.strip()
    text = _BRACKETED.sub(r"\1", text)
    match = _NUMBER.search(text)
    if match is None:
        return _in_chinese(text)
    around = (text[: match.start()].strip(), text[match.end() :].strip())
    if any(part and not _UNIT.fullmatch(part) for part in around) or len(around[0]) > 3:
        return None
    return None if _OTHER_VALUE.search(around[0]) or _is_term(text, match) else _value(match)


def last_number(text: str) -> Number | None:
    """The last number in a text. None where it is part of a formula, a pair or a time: 2\\pi, (1, 2), 5:30."""
    text = as_typed(text[-100 * _MAX_DIGITS :])
    matches = list(_NUMBER.finditer(text))
    if len(matches) > 1 and _EXPONENT.search(text[max(0, matches[-1].start() - 40) : matches[-1].start()]):
        exponent = matches.pop()
        matches = [] if _GOES_ON.match(text, exponent.end()) else matches
    if not matches or _is_part(text, matches[-1]):
        return None
    last = matches[-1]
    # In "10-5" and "a-5" the sign is a minus between two terms, or a hyphen; in "是-5" it is a sign.
    joined = last["sign"] and re.match(r"[A-Za-z\d)\]}%]", text[max(0, last.start() - 1) :]) and last.start()
    number = _value(last)
    return Number(abs(number.value), number.percent) if joined and number is not None else number


def as_typed(text: str) -> str:
    """A text as a keyboard has it (right_answer.compatible), without LaTeX's spaces and fonts, with 1{,}000 as 1,000
    degrees as ° and a minus sign in words as a sign.
    """
    text = _LATEX.sub(r"\1", _DEGREES.sub("°", compatible(text))).replace("{,}", ",").replace("\\approx", "≈")
    text = _BLANKS.sub(lambda match: "\n" if "\n" in match.group() else " ", text)
    return with_minus_signs(text)


def _stated(final: str, is_whole: bool, is_boxed: bool) -> Number | None:
    value = number_of(final)
    if value is not None:
        return value
    if is_whole:
        return last_number(final)
    # "The answer is 5 because ..." announces it at the beginning of what follows.
    text = as_typed(final[: 4 * _MAX_DIGITS]).lstrip("$€£¥ ")
    matches = list(_NUMBER.finditer(text))
    if not matches or _GOES_ON.match(text, matches[0].end()) or _is_term(text, matches[0]):
        return None
    if is_boxed and _IN_THE_BOX.search(text, matches[0].end()):
        return None
    before = text[: matches[0].start()]
    if before and (len(matches) > 1 or not _WORDS.fullmatch(before) or _OTHER_VALUE.search(before)):
        return None
    return _value(matches[0])


def _is_term(text: str, match: "re.Match[str]") -> bool:
    """Whether a letter is added before a number: a+5, h-5."""
    return bool(match["sign"] and _ADDED.search(text[: match.start() + 1]))


def _is_part(text: str, match: "re.Match[str]") -> bool:
    begin = max(0, match.start() - 200)
    before = text[begin : match.start() + len(match["sign"])]
    if any(found.start() < match.start() < found.end() for found in _COMPOUND.finditer(text, begin)):
        return True
    listed = _IN_A_LIST.search(before) and text[match.end() :].lstrip()[:1] in (")", "]", "}")
    return bool(_BEGAN.search(before) or listed or _GOES_ON.match(text, match.end()))


def _value(match: "re.Match[str]") -> Number | None:
    first, second = _first(match, "over", "over_digit", "plain"), _first(match, "under", "under_digit", "divisor")
    power = int(_first(match, "power", "power_plain") or 1)
    if len(match.group()) > _MAX_DIGITS or len(first) * abs(power) > 10 * _MAX_DIGITS:
        return None
    value, divisor = _plain(first), _plain(second or "1")
    if not divisor or (not value and power < 0):
        return None
    value = value**power / divisor + int(_first(match, "whole") or 0)
    value *= Fraction(10) ** int(_first(match, "tens", "tens_plain") or 0)
    value *= Fraction(_scale(match["scale"] or ""), 100 if match["percent"] else 1)
    return Number(-value if match["sign"] == "-" else value, bool(match["percent"]))


def _scale(name: str) -> int:
    """What a word behind a number multiplies it by; 1 without one. Chinese words of two characters are products."""
    return _SCALES.get(name) or math.prod(_CHINESE_SCALES[char] for char in name)


def _first(match: "re.Match[str]", *groups: str) -> str:
    return next((match[name] for name in groups if match[name]), "")


def _plain(text: str) -> Fraction:
    if text.count(".") > 1:
        text = text.replace(".", "")
    return Fraction(re.sub(r"[,\s'’]", "", text))


def _in_chinese(text: str) -> Number | None:
    """A number in Chinese characters: 十二, 负三, 三分之一, 百分之五十, 三点五, 十二个."""
    text = _MEASURES.sub("", "".join(text.split()))
    sign = -1 if text.startswith("负") else 1
    under, fraction, over = text.removeprefix("负").rpartition("分之")
    whole, point, decimals = over.partition("点")
    value = chinese_integer(whole)
    divisor = ({"百": 100, "千": 1000}.get(under) or chinese_integer(under)) if fraction else 1
    places = [chinese_integer(char) for char in decimals]
    if value is None or not divisor or bool(point) != bool(places) or any(p is None or p > 9 for p in places):
        return None
    exact = value + sum((Fraction(place or 0, 10 ** (i + 1)) for i, place in enumerate(places)), Fraction(0))
    return Number(sign * exact / divisor, bool(fraction) and divisor == 100)
