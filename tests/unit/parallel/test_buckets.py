"""Chunks and buckets: nothing is lost, nothing is sent twice, every rank plans the same, and the formulas add up."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from erniekit.parallel.buckets import (
    Entry,
    chunk_size,
    gradient_bytes,
    join_chunks,
    plan_buckets,
    state_bytes,
    step_traffic,
    take_chunk,
)
from erniekit.parallel.comm import Group
from erniekit.parallel.placement import Placement

ALONE = Group((0,), 0)


def group(size):
    return Group(tuple(range(size)), 0)


def placement(shard=1, replica=1, partial=1, ends=1, copies=1):
    return Placement(group(shard * replica), group(shard), group(replica), group(partial), group(ends), copies)


def entry(name, size, where, dtype="float32", part=0):
    return Entry(name, (size,), dtype, where, part)


@given(st.lists(st.integers(0, 5), max_size=3), st.integers(1, 9))
def test_chunks_are_equal_and_give_the_tensor_back(shape, ranks):
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1
    chunks = [take_chunk(whole, index, ranks) for index in range(ranks)]
    assert {chunk.shape for chunk in chunks} == {(chunk_size(whole.size, ranks),)}
    np.testing.assert_array_equal(join_chunks(np.concatenate(chunks), shape), whole)
    assert np.concatenate(chunks).sum() == whole.sum()  # the padding is zeros


SHARED = placement(shard=2)
PLACEMENTS = [SHARED, placement(), placement(replica=2), placement(partial=2), placement(ends=2, copies=2)]
ENTRIES = st.lists(
    st.tuples(
        st.integers(1, 40),
        st.sampled_from(PLACEMENTS),
        st.sampled_from(["float32", "bfloat16"]),
        st.integers(0, 1),
    ),
    max_size=12,
)


@given(ENTRIES, st.integers(1, 60))
def test_every_shared_parameter_travels_once_among_its_like(rows, limit):
    entries = [entry(f"p{i}", *row) for i, row in enumerate(rows)]
    buckets = plan_buckets(entries, limit)
    travelling = [e for bucket in buckets for e in bucket.entries]
    assert sorted(e.name for e in travelling) == sorted(e.name for e in entries if e.placement is not PLACEMENTS[1])
    for bucket in buckets:
        assert len({(id(e.placement), e.dtype, e.part) for e in bucket.entries}) == 1
        assert len(bucket.entries) == 1 or sum(e.size for e in bucket.entries) <= limit
        assert bucket.width == sum(bucket.sections)
    last = [min(entries.index(e) for e in bucket.entries) for bucket in buckets]
    assert last == sorted(last, reverse=True)  # in the order in which a backward pass completes them


def test_a_bucket_is_filled_from_the_last_parameter_to_the_first():
    entries = [entry(name, size, SHARED) for name, size in (("a", 4), ("b", 4), ("c", 9), ("d", 4), ("e", 4))]
    names = [[e.name for e in bucket.entries] for bucket in plan_buckets(entries, limit=8)]
    assert names == [["e", "d"], ["c"], ["b", "a"]]


def test_state_is_divided_and_its_powers_are_not():
    """Over 4 ranks: 10 elements are chunks of 3; moments 2 * 4 bytes, a master copy 4, two powers 8 a parameter."""
    entries = [
        entry("a", 10, placement(shard=4)),
        entry("b", 10, placement(shard=4), "bfloat16"),
        entry("c", 10, placement()),
    ]
    assert state_bytes(entries) == (3 * 8 + 8) + (3 * 12 + 8) + (10 * 8 + 8)
    assert state_bytes(entries, divided=False) == (10 * 8 + 8) + (10 * 12 + 8) + (10 * 8 + 8)


@pytest.mark.parametrize(
    ("stage", "master_grad", "expected"), [(1, True, 120), (1, False, 100), (2, True, 72), (2, False, 64)]
)
def test_gradients_between_microbatches(stage, master_grad, expected):
    """Stage 2 keeps a chunk of 3 and a flag of what is divided: (3 + 1) * 4 instead of 10 * 4 bytes."""
    entries = [
        entry("a", 10, placement(shard=4)),
        entry("b", 10, placement(shard=4), "bfloat16"),
        entry("c", 10, placement()),
    ]
    assert gradient_bytes(entries, stage, master_grad) == expected


def test_traffic_of_a_step():
    """A row holds 3 elements and a flag. Sent over 4 ranks: 3 rows; gathered: 3 chunks; over 2 replicas 2 * 1/2 row."""
    buckets = plan_buckets([entry("a", 10, placement(shard=4, replica=2, copies=8))])
    once = {"reduce_scatter": 3 * 4 * 4, "all_reduce": 4 * 4, "all_gather": 3 * 3 * 4, "host": 7 * 8}
    assert step_traffic(buckets, 1, 5, True, num_ranks=8) == once
    assert step_traffic(buckets, 2, 5, True, num_ranks=8) == once | {"reduce_scatter": 5 * 3 * 4 * 4}
    whole = plan_buckets([entry("a", 10, placement(replica=4, copies=4), "bfloat16")])
    assert step_traffic(whole, 2, 5, False, num_ranks=4) == {
        "reduce_scatter": 0, "all_reduce": 2 * 3 * 11 * 2 // 4, "all_gather": 0, "host": 3 * 8,
    }  # fmt: skip
