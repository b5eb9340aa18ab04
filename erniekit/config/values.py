"""Parses numbers, truth values and lists from the text that the user wrote.

YAML 1.1 reads 2024_06_01 as 20240601, 010 as 8, 1:30 as 90 and 0x10 as 16. Here a value without quotes keeps its text.
Text keys use that text unchanged. Number keys parse it by one rule in YAML, in JSON and on the command line: decimal
digits, which underscores may group (1_000), without a leading zero, with an optional fraction and exponent.
"""

import math
import re
import shlex
from dataclasses import dataclass
from typing import Any

_TRUE = {"true", "yes", "on", "y", "1"}
_FALSE = {"false", "no", "off", "n", "0"}
_NUMBER = re.compile(r"[-+]?(?P<whole>\d+(_\d+)*)?(?P<fraction>\.(\d+(_\d+)*)?)?(?P<exponent>[eE][-+]?\d+)?", re.ASCII)
_OTHER_NOTATION = re.compile(r"[-+]?(0[xX][0-9a-fA-F_]+|0[bB][01_]+|0[oO]?[0-9_]+|\d[\d_]*(:[0-5]?\d)+)", re.ASCII)
_MAX_DIGITS = 400  # more than any real value needs; Python refuses integers of more than 4300 digits
_LARGEST_INT = 2**63 - 1  # the largest int64, the integer type of NumPy and Paddle
# The bytes of each unit of a size: powers of 1000 or, with an i, of 1024.
BYTES_OF = {"B": 1} | {letter + "B": 1000**power for power, letter in enumerate("KMGT", 1)}
BYTES_OF |= {letter + "IB": 1024**power for power, letter in enumerate("KMGT", 1)}


@dataclass(frozen=True)
class Scalar:
    """A number or truth value written without quotes. It keeps the text as written, for keys that are text."""

    text: str

    @property
    def value(self) -> Any:
        """The number or truth value; the text if it is neither by the rule above."""
        word = self.text.lower()
        if word in _TRUE | _FALSE and not word.isdigit():
            return word in _TRUE
        try:
            number = parse_number(self.text)
        except ValueError:
            return self.text
        return self.text if isinstance(number, float) and not math.isfinite(number) else number

    def __str__(self) -> str:
        return self.text


def plain(value: Any) -> Any:
    """The value with every Scalar converted, for keys that have no declared type."""
    if isinstance(value, Scalar):
        return value.value
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def shown(value: Any) -> str:
    """A value for a message: its Python notation, shortened if it is long."""
    return shortened(repr(plain(value)) if not isinstance(value, Scalar) else value.text)


def shortened(text: str) -> str:
    """A user's text for a message, shortened if it is long."""
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def parse_number(text: str) -> int | float:
    """Parses a decimal number. The ValueError says what is wrong, as a text to put after "a number", or nothing."""
    text = text.strip()
    match = _NUMBER.fullmatch(text)
    whole, fraction = (match["whole"] or "", match["fraction"] or "") if match else ("", "")
    if match is None or not (whole or len(fraction) > 1) or len(text) > _MAX_DIGITS:
        hint = " in decimal digits (2, not 0b10 or 0:02)" if _OTHER_NOTATION.fullmatch(text) else ""
        raise ValueError(hint)
    if len(whole) > 1 and whole[0] == "0":
        raise ValueError(" without a leading 0, which means octal to some readers of YAML and decimal to others")
    if not (fraction or match["exponent"]):
        return int(text)
    number = float(text)
    if not number and re.search("[1-9]", whole + fraction):
        raise ValueError(" that is 0 or at least 5e-324 in size")
    return number


def to_bool(value: Any) -> bool:
    """Converts True, 1, "True", "yes", "on" and their opposites; raises ValueError for anything else."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str | Scalar) and str(value).strip().lower() in _TRUE | _FALSE:
        return str(value).strip().lower() in _TRUE
    raise ValueError(f"expected True or False, got {shown(value)}")


def to_int(value: Any) -> int:
    """Converts to an integer, also "10" and numbers without fraction (1e5); raises ValueError for anything else."""
    number = _number(value, "an integer")
    if isinstance(number, float) and number != math.floor(number):
        raise ValueError(f"expected an integer, got {shown(value)}")
    if abs(number) > _LARGEST_INT:
        raise ValueError(f"expected an integer of at most {_LARGEST_INT}, got {shown(value)}")
    return int(number)


def to_float(value: Any) -> float:
    """Converts to a finite float, also "1e-5" (text in YAML 1.1); raises ValueError for anything else."""
    return float(_number(value, "a number"))


def to_gigabytes(value: Any) -> float:
    """Converts a number of GB, or a size with its unit ("500MB", "2GiB"), to GB; raises ValueError for anything
    else.
    """
    match = re.fullmatch(r"(.*?)\s*([A-Za-z]+)\s*", str(value)) if isinstance(value, str | Scalar) else None
    number, unit = (match[1], match[2].upper()) if match and match[2].upper() in BYTES_OF else (value, "GB")
    try:
        return to_float(number) * BYTES_OF[unit] / BYTES_OF["GB"]
    except ValueError:
        raise ValueError(f"expected a number of GB or a size such as 5GB, 500MB or 2GiB, got {shown(value)}") from None


def _number(value: Any, wanted: str) -> int | float:
    hint = ""
    number: int | float = math.nan
    if isinstance(value, str | Scalar):
        try:
            number = parse_number(str(value))
        except ValueError as error:
            hint = str(error)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = value
    try:
        if math.isfinite(number):
            return number
    except OverflowError:  # an integer that is too large for a float
        pass
    raise ValueError(f"expected {wanted}{hint}, got {shown(value)}")


def split_list(text: str) -> list[str]:
    """The texts between commas, without empty ones. A text that contains a comma must be in double quotes, within which
    a quote is written twice.
    """
    match = re.findall(r'\s*"((?:[^"]|"")*)"\s*(?:,|$)|([^,]*)(?:,|$)', text)
    items = (quoted.replace('""', '"') if quoted else plain for quoted, plain in match)
    return [item.strip() for item in items if item.strip()]


def split_patterns(text: str) -> list[str]:
    """The entries of a comma-separated list of names and regular expressions; a comma inside brackets of an expression
    belongs to the expression.
    """
    return [entry.strip() for entry in re.split(r",(?![^\[{(]*[\]})])", text) if entry.strip()]


def split_numbers(text: str) -> list[str]:
    """The numbers of "0,1,2" or "[0, 1, 2]", as text."""
    text = text.strip()
    return split_list(text[1:-1] if text[:1] == "[" and text[-1:] == "]" else text)


def split_shares(text: str) -> list[str]:
    """The numbers of "998,1,1" or "9/1" (Megatron-LM accepts both), as text."""
    return split_numbers(text.replace("/", ","))


def split_words(text: str) -> list[str]:
    """The words of a text, separated by white space or commas; a word that contains either must be quoted."""
    words = shlex.shlex(text, posix=True)
    words.whitespace += ","
    words.whitespace_split = True
    words.commenters = ""
    try:
        return list(words)
    except ValueError as error:
        raise ValueError(f"{str(error).lower()}: {shown(text)}. Close the quotes") from None
