"""Whole numbers in Chinese characters."""

import re

_VALUES = {**{char: value for value, char in enumerate("零一二三四五六七八九")}, "〇": 0, "两": 2}
_FINANCIAL = str.maketrans("壹贰叁肆伍陆柒捌玖拾佰仟萬億", "一二三四五六七八九十百千万亿")  # as cheques have them
_DIGITS = f"[{''.join(_VALUES)}]"
_UP_TO_9999 = re.compile(
    rf"(?:(?P<thousands>{_DIGITS})千)?零?(?:(?P<hundreds>{_DIGITS})百)?零?(?:(?P<tens>{_DIGITS})?(?P<ten>十))?零?"
    rf"(?P<ones>{_DIGITS})?"
)
_SIZES = {"百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
# A last digit without its unit is of the next smaller one: 一百二 is 120, and 102 is 一百零二.
_COLLOQUIAL = re.compile("(?P<before>.+[百千万亿])(?P<last>[一二三四五六七八九])")


def chinese_integer(text: str) -> int | None:
    """The value of 十二, 一百零五, 一百二 (120), 三万两千, 壹佰零伍 or 二〇二五 (digits one by one); None for a text
    that is no such number.
    """
    text = text.translate(_FINANCIAL)
    if re.fullmatch(f"{_DIGITS}+", text):
        return int("".join(str(_digit(char)) for char in text))
    colloquial = _COLLOQUIAL.fullmatch(text)
    if colloquial is not None:
        before = chinese_integer(colloquial["before"])
        return None if before is None else before + _digit(colloquial["last"]) * _SIZES[colloquial["before"][-1]] // 10
    total = 0
    for unit, size in (("亿", 10**8), ("万", 10**4), ("", 1)):
        section, found, rest = text.rpartition(unit) if unit else (text, "", "")
        if unit and not found:
            continue
        value = chinese_integer(section) if unit == "亿" and "亿" not in section else _section(section)
        if value is None or (found and not value):
            return None
        total, text = total + value * size, rest
    return total if total else None


def _section(text: str) -> int | None:
    match = _UP_TO_9999.fullmatch(text)
    if match is None:
        return None
    tens = _digit(match["tens"] or "一") if match["ten"] else 0
    return 1000 * _digit(match["thousands"]) + 100 * _digit(match["hundreds"]) + 10 * tens + _digit(match["ones"])


def _digit(char: str | None) -> int:
    return _VALUES[char] if char else 0
