"""Chunks and buckets: nothing is lost, nothing is sent twice, and every rank plans the same."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.placements import entry, placement

from erniekit.parallel.buckets import chunk_size, plan_buckets, take_chunk


@given(st.lists(st.integers(0, 5), max_size=3), st.integers(1, 9))
def test_chunks_are_equal_and_give_the_tensor_back(shape, ranks):
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1
    chunks = [take_chunk(whole, index, ranks) for index in range(ranks)]
    assert {chunk.shape for chunk in chunks} == {(chunk_size(whole.size, ranks),)}
    joined = np.concatenate(chunks)
    np.testing.assert_array_equal(joined[: whole.size], whole.reshape(-1))
    assert not joined[whole.size :].any()  # the padding is zeros


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
def test_every_shared_parameter_is_in_one_bucket_of_its_placement_and_type(rows, limit):
    entries = [entry(f"p{i}", *row) for i, row in enumerate(rows)]
    buckets = plan_buckets(entries, limit)
    in_buckets = [e for bucket in buckets for e in bucket.entries]
    assert sorted(e.name for e in in_buckets) == sorted(e.name for e in entries if e.placement is not PLACEMENTS[1])
    for bucket in buckets:
        assert len({(id(e.placement), e.dtype, e.model_chunk) for e in bucket.entries}) == 1
        assert len(bucket.entries) == 1 or sum(e.size for e in bucket.entries) <= limit
        assert bucket.width == sum(bucket.sections)
    last = [min(entries.index(e) for e in bucket.entries) for bucket in buckets]
    assert last == sorted(last, reverse=True)  # in the order in which a backward pass completes them


def test_blocks_have_buckets_of_their_own():
    entries = [replace(entry(name, 4, SHARED), unit=unit) for name, unit in (("a", ""), ("b", "0"), ("c", "1"))]
    assert [bucket.unit for bucket in plan_buckets(entries)] == ["1", "0", ""]


def test_a_bucket_is_filled_from_the_last_parameter_to_the_first():
    entries = [entry(name, size, SHARED) for name, size in (("a", 4), ("b", 4), ("c", 9), ("d", 4), ("e", 4))]
    names = [[e.name for e in bucket.entries] for bucket in plan_buckets(entries, limit=8)]
    assert names == [["e", "d"], ["c"], ["b", "a"]]
