"""How context ranks divide the tokens of rows, and which pairs of queries and keys each computes."""

from itertools import product

import numpy as np
import pytest

from erniekit.nn.attention_mask import make_plan
from erniekit.parallel.context import ContextShard, RingPlan, ring_plan, zigzag
from erniekit.parallel.process_group import Group

ROWS = [[], [1], [7], [64], [3, 50, 1, 2], [16, 40]]


def shards(row_lengths: list[int], num_ranks: int) -> list[ContextShard]:
    tokens = zigzag(row_lengths, num_ranks)
    return [ContextShard(Group(tuple(range(num_ranks)), i), row_lengths, tokens) for i in range(num_ranks)]


@pytest.mark.parametrize(("rows", "num_ranks"), list(product(ROWS, (1, 2, 3, 4))))
def test_the_ranks_have_every_token_once_in_order(rows: list[int], num_ranks: int):
    divided = shards(rows, num_ranks)
    assert np.array_equal(np.sort(np.concatenate([each.tokens for each in divided])), np.arange(sum(rows)))
    assert all(np.array_equal(each.tokens, np.sort(each.tokens)) for each in divided)
    row_of = np.repeat(np.arange(len(rows)), rows)
    for each in divided:
        assert each.own_row_lengths == np.bincount(row_of[each.tokens], minlength=len(rows)).tolist()


def test_a_rank_has_an_early_and_a_late_chunk():
    assert [tokens.tolist() for tokens in zigzag([8, 4], 2)] == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]


def test_places_in_the_batch_become_rows_of_the_rank():
    for shard in shards([9, 30], 3):
        places = np.array([0, 3, 8, 9, 20, 38])
        mask, rows = shard.select(places)
        assert np.array_equal(mask, np.isin(places, shard.tokens))
        assert np.array_equal(shard.tokens[rows], places[mask])
    nothing = shards([1], 2)[1]
    assert not len(nothing.tokens) and not nothing.select(np.array([0]))[0].any()


def computed(plan: RingPlan, shard: ContextShard) -> np.ndarray:
    """How often a rank's plan has each pair (query, key) of the batch [T, T]."""
    total = sum(shard.row_lengths)
    counts = np.zeros((total, total), int)
    for source, tiles in enumerate(plan.tiles):
        own = source == shard.group.index
        keys = shard.by_rank[source] if own else shard.by_rank[source][plan.sent[source]]
        for tile in tiles:
            queries = shard.tokens[tile.query : tile.query + tile.queries]
            seen = keys[tile.key : tile.key + tile.keys]
            pairs = np.ones((len(queries), len(seen)), int)
            counts[np.ix_(queries, seen)] += np.tril(pairs) if tile.causal else pairs
    return counts


PACKED = {
    "one document": ([50], [[50]], None),
    "many documents": ([40, 9], [[3, 21, 16], [1, 1, 7]], None),
    "shared prefixes": ([60], [[20, 9, 11, 1, 19]], [-1, 0, 0, -1, 3]),
}


@pytest.mark.parametrize(("case", "num_ranks"), list(product(PACKED, (1, 2, 3, 4))))
def test_the_ranks_compute_every_visible_pair_once(case: str, num_ranks: int):
    rows, documents, prefix = PACKED[case]
    lengths = [length for row in documents for length in row]
    document = np.repeat(np.arange(len(lengths)), lengths)
    prefix_of = np.full(len(lengths), -1) if prefix is None else np.array(prefix)
    token = np.arange(sum(rows))
    same, branch = document[:, None] == document, prefix_of[document][:, None] == document
    visible = (same & (token[:, None] >= token)) | branch
    plans = [ring_plan(shard, document, prefix_of) for shard in shards(rows, num_ranks)]
    assert np.array_equal(
        sum(computed(plan, shard) for plan, shard in zip(plans, shards(rows, num_ranks), strict=True)), visible
    )
    for plan in plans:  # both ends of a link expect the same number of tokens
        assert all(np.array_equal(a, b) for a, b in zip(plan.sent, plans[0].sent, strict=True))


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_one_long_document_is_as_much_work_for_every_rank(num_ranks: int):
    length = 1000
    document = make_plan(np.ones((1, length), int)).document_of_token
    work = [computed(ring_plan(shard, document), shard).sum() for shard in shards([length], num_ranks)]
    assert max(work) / min(work) < 1.02


def test_documents_within_a_rank_do_not_travel():
    document = np.repeat(np.arange(4), 10)  # as many as there are chunks
    assert [len(rows) for rows in ring_plan(shards([40], 2)[0], document).sent] == [0, 0]
    # The last chunk of one long document is seen by nobody else.
    assert [len(rows) for rows in ring_plan(shards([40], 2)[0], np.zeros(40, int)).sent] == [10, 20]
