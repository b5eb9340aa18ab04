"""Tokenising a long text piece by piece, with the tokens of the whole.

A tokenizer's memory grows with the text it is given at once: sentencepiece and `tokenizers` need one to two hundred
bytes a character. A text is therefore given to it in pieces of at most PIECE characters. A piece ends where the
tokenizer itself makes a border: before a space or after a line break, checked by encoding the surroundings whole and
in two.
"""

import re
from collections.abc import Callable, Iterator

from erniekit.utils import log

PIECE = 1 << 16  # characters
_CONTEXT = 256  # characters on either side of a border that are encoded to check it; longer than any word
_TRIES = 20  # borders tried for a piece
_BORDER = re.compile(r"(?<=[^\s])(?=[ \u2581])|(?<=\n)(?=[^\s])")

Encode = Callable[[str], list[int]]


def encode_long(encode: Encode, text: str) -> Iterator[list[int]]:
    """The ids of `text`, a list for each piece; together those that encode(text) gives.

    A text without any border (a megabyte of one letter, say) is split after PIECE characters with a warning: a token
    or two at that place may differ from those of the whole.
    """
    start = 0
    while len(text) - start > PIECE:
        end = _find_border(encode, text, start)
        yield encode(text[start:end])
        start = end
    yield encode(text[start:])


def _find_border(encode: Encode, text: str, start: int) -> int:
    """The last border in text[start : start + PIECE], looked for from its end."""
    stop = start + PIECE
    begin = stop - 16 * _CONTEXT
    while begin > start:
        candidates = [match.start() for match in _BORDER.finditer(text, begin, stop)]
        for at in candidates[: -_TRIES - 1 : -1]:
            if _is_border(encode, text, at):
                return at
        stop, begin = begin, begin - (start + PIECE - begin) * 3
    at = start + PIECE
    for at in range(start + PIECE, start + PIECE - _TRIES, -1):
        if _is_border(encode, text, at):
            return at
    log.warning(
        f"a text of {len(text):,} characters has no word border near character {at:,}; it is tokenised in pieces of "
        f"{PIECE:,}, and a token at that place may differ"
    )
    return start + PIECE


def _is_border(encode: Encode, text: str, at: int) -> bool:
    before, behind = text[max(0, at - _CONTEXT) : at], text[at : at + _CONTEXT]
    return encode(before + behind) == encode(before) + encode(behind)
