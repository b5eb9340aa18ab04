"""What decides the rows of token files, by itself: the mixing of sources, and split."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erniekit.data.tokens import rows
from erniekit.data.tokens.feed import split_documents
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


@settings(max_examples=60)
@given(st.integers(0, 5000), st.lists(st.floats(0, 1000), min_size=1, max_size=3).filter(lambda w: sum(w) > 0.01))
def test_a_split_is_disjoint_and_complete(count, shares):
    parts = split_documents(shares, count)
    assert list(parts) == ["train", "eval", "test"]
    assert [first for first, _ in parts.values()] == [0, parts["train"][1], parts["eval"][1]]
    assert parts["test"][1] == count
    for (first, last), share in zip(parts.values(), [*shares, 0, 0], strict=False):
        assert abs((last - first) - share / sum(shares) * count) <= 1.5


def test_known_splits():
    assert split_documents((998, 1, 1), 2000) == {"train": (0, 1996), "eval": (1996, 1998), "test": (1998, 2000)}
    assert split_documents((998, 1, 1), 662) == {"train": (0, 660), "eval": (660, 661), "test": (661, 662)}
    assert split_documents((0, 1, 1), 3) == {"train": (0, 0), "eval": (0, 1), "test": (1, 3)}
    assert split_documents((9, 1), 30)["eval"] == (27, 30) and split_documents((100,), 7)["train"] == (0, 7)
