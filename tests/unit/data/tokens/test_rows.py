"""What decides the rows of token files, by itself: the mixing of sources, the values of input_dir and split."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erniekit.data.tokens import rows
from erniekit.data.tokens.feed import read_input_dir, split_documents
from erniekit.data.tokens.rows import Mix
from erniekit.utils.errors import ConfigError


@pytest.mark.parametrize("weights", [[1.0], [0.4, 0.6], [1, 2, 3, 1e-9], [1.0] * 7])
def test_every_block_holds_the_weights_and_every_row_of_a_source_comes_once(weights):
    mix = Mix(weights, seed=3)
    block = 65536
    shares = np.asarray(weights) / sum(weights) * block
    assert mix.quotas.sum() == block and (abs(mix.quotas - shares) <= 1 + 1e-9).all() and mix.quotas.min() >= 1
    places = [mix.place(n) for n in range(2 * block)] if len(weights) > 1 else []
    for source, quota in enumerate(mix.quotas.tolist()):
        if places:
            assert [row for s, row in places if s == source] == list(range(2 * quota))  # in order, none left out
            assert sum(s == source for s, _ in places[:block]) == quota
    assert mix.before(block) == mix.quotas.tolist() or len(weights) == 1
    for n in (0, 1, 4711, block, block + 1, 2 * block - 1) if places else ():
        assert mix.before(n) == [sum(s == source for s, _ in places[:n]) for source in range(len(weights))]
        assert Mix(weights, seed=3).place(n) == places[n]
    if len(weights) == 2:
        assert [s for s, _ in places[:block]] != [s for s, _ in places[block:]]
        assert abs(sum(s for s, _ in places[:5000]) / 5000 - 0.6) < 0.03  # mixed, not one after another


def test_many_sources_of_tiny_weight_share_a_block():
    quotas = rows._quotas([1e9] + [1.0] * 60000)
    assert quotas.sum() == 65536 and quotas.min() == 1 and quotas[0] == 5536
    with pytest.raises(ConfigError, match="at most 65536"):
        Mix([1.0] * 65537, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.4 ./a.bin 0.6 ~/b", [("a", 0.4), (str(Path("~/b").expanduser()), 0.6)]),
        ("data/a_text_document", [("data/a_text_document", None)]),
        ("a.idx\n b c", [("a", None), ("b", None), ("c", None)]),
        ("1 '/my data/a' 2e-1 b", [("/my data/a", 1.0), ("b", 0.2)]),
    ],
)
def test_input_dir(text, expected):
    assert [(str(entry.prefix), entry.weight) for entry in read_input_dir(text)] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "needed with dataset_type: pretrain"),
        ("0.4 a 0.6", "expected .weight prefix"),
        ("a 0.6 b", "the weight of 0.6 must be a number more than 0, got 'a'"),
        ("0.4 a b c", "the weight of c must be a number more than 0, got 'b'"),
        ("0 a 1 b", "the weight of a must be"),
        ("-1 a 1 b", "the weight of a must be"),
        ("nan a 1 b", "the weight of a must be"),
        ("1 a 1 b::CPT", "::CPT marks data for self_constraint_cpt"),
        ("1 'a 1 b", "No closing quotation"),
    ],
)
def test_an_input_dir_that_cannot_be_read_says_so(text, expected):
    with pytest.raises(ConfigError, match=expected):
        read_input_dir(text)


@settings(max_examples=60)
@given(st.integers(0, 5000), st.lists(st.floats(0, 1000), min_size=1, max_size=3).filter(lambda w: sum(w) > 0.01))
def test_a_split_is_disjoint_and_complete(count, shares):
    parts = split_documents(",".join(map(str, shares)), count)
    assert list(parts) == ["train", "eval", "test"]
    assert [first for first, _ in parts.values()] == [0, parts["train"][1], parts["eval"][1]]
    assert parts["test"][1] == count
    for (first, last), share in zip(parts.values(), [*shares, 0, 0], strict=False):
        assert abs((last - first) - share / sum(shares) * count) <= 1.5


def test_known_splits():
    assert split_documents("998,1,1", 2000) == {"train": (0, 1996), "eval": (1996, 1998), "test": (1998, 2000)}
    assert split_documents("998,1,1", 662) == {"train": (0, 660), "eval": (660, 661), "test": (661, 662)}
    assert split_documents("0,1,1", 3) == {"train": (0, 0), "eval": (0, 1), "test": (1, 3)}
    assert split_documents("9/1", 30)["eval"] == (27, 30) and split_documents("100", 7)["train"] == (0, 7)
    for wrong in ("", "1,2,3,4", "a,b", "1,-1", "0,0,0", "nan,1"):
        with pytest.raises(ConfigError, match="split: "):
            split_documents(wrong, 10)
