"""Tokenises a long text chunk by chunk, with the same tokens as tokenising it as a whole.

A tokenizer's memory grows with the length of the text in one call: sentencepiece and `tokenizers` need one to two
hundred bytes per character. A text is therefore divided into chunks of at most PIECE characters. A chunk ends where no
token crosses the border: before a space or after a line break. This is checked by encoding the surroundings once as a
whole and once in two halves.
"""

import re
from collections.abc import Callable, Iterator

from erniekit.utils import log

PIECE = 1 << 16  # characters
_CONTEXT = 256  # characters encoded on either side of a border to check it; more than the longest usual word
_TRIES = 20  # candidate borders per chunk
_BORDER = re.compile(r"(?<=[^\s])(?=[ \u2581])|(?<=\n)(?=[^\s])")

Encode = Callable[[str], list[int]]


def encode_long(encode: Encode, text: str) -> Iterator[list[int]]:
    """Yields the ids of `text`, one list per chunk; concatenated they equal encode(text).

    A text without any border (a megabyte of one letter, say) is divided after PIECE characters with a warning, since a
    token or two there may differ from those of the whole text.
    """
    start = 0
    while len(text) - start > PIECE:
        end = _find_border(encode, text, start)
        yield encode(text[start:end])
        start = end
    yield encode(text[start:])


def _find_border(encode: Encode, text: str, start: int) -> int:
    """The last border in text[start : start + PIECE], searched from the end."""
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
        f"a text of {len(text):,} characters has no word boundary near character {at:,}; it is tokenised in pieces of "
        f"{PIECE:,}, and a token at that place may differ"
    )
    return start + PIECE


def _is_border(encode: Encode, text: str, at: int) -> bool:
    before, behind = text[max(0, at - _CONTEXT) : at], text[at : at + _CONTEXT]
    return encode(before + behind) == encode(before) + encode(behind)
