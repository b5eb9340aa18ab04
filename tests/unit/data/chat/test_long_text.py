"""A long text is tokenised in pieces, with the tokens of the whole and memory that does not grow with it."""

import random
import tracemalloc

import pytest

from erniekit.data.chat import long_text
from erniekit.data.chat.long_text import PIECE, encode_long
from erniekit.data.chat.tokenizer import load_tokenizer

MODEL = "examples/models/tiny-dense"
WORDS = ["three", "plus", "三加二", "等于", "numbers,", "x1", "\n", "\n\n", "  ", "https://a.b/c", "!", "你好。", "\t"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


def ids(encode, text):
    return [i for piece in encode_long(encode, text) for i in piece]


@pytest.mark.parametrize("seed", range(5))
def test_pieces_have_the_tokens_of_the_whole(tokenizer, monkeypatch, seed):
    monkeypatch.setattr(long_text, "PIECE", 5000)
    rng = random.Random(seed)
    text = "".join(rng.choice(WORDS) + rng.choice(["", " "]) for _ in range(8000))
    whole = tokenizer.encode(text[:5000])
    assert ids(tokenizer.encode, text[:5000]) == whole  # no border is needed
    assert ids(tokenizer.encode, text) == tokenizer._engine.encode(text)


def test_a_tokenizer_is_never_given_more_than_a_piece():
    given = []

    def encode(text):
        given.append(len(text))
        return [ord(c) for c in text]

    text = "ab " * PIECE
    assert ids(encode, text) == [ord(c) for c in text]
    assert max(given) <= PIECE


def test_a_text_without_a_border_is_split_with_a_warning(caplog):
    def encode(text):  # pairs of letters: no place in a run of one letter is a border
        return [len(text[at : at + 2]) for at in range(0, len(text), 2)] + [len(text)]

    found = ids(encode, "a" * (PIECE + 10))
    assert found[-1] == 10 and "no word boundary" in caplog.text


def test_memory_does_not_grow_with_the_text(tokenizer):
    def peak(characters):
        text = "three plus four " * (characters // 16)
        tracemalloc.start()
        for _ in encode_long(tokenizer.encode, text):
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(16 * PIECE) < 1.5 * peak(4 * PIECE)
