"""The attention plan: every token in exactly one slot of one document."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from erniekit.nn.attention_mask import document_starts, make_plan, next_in_document


def rows_of(lengths: list[list[int]], padding: int = 0) -> np.ndarray:
    """Segment ids [B, S] of documents 1.. by row, then `padding` zeros."""
    rows = [np.concatenate([np.repeat(np.arange(1, len(row) + 1), row), np.zeros(padding, int)]) for row in lengths]
    return np.stack(rows)


def check_plan(segments: np.ndarray) -> None:
    plan = make_plan(segments)
    assert plan.num_tokens == segments.size
    # Real slots hold every token once.
    every = np.concatenate([bucket.tokens[bucket.real] for bucket in plan.buckets])
    assert sorted(every.tolist()) == list(range(segments.size))
    starts = document_starts(segments)
    lengths = np.diff(np.append(starts, segments.size))
    for bucket in plan.buckets:
        for slot, is_real in zip(bucket.tokens, bucket.real, strict=True):
            # A document's tokens in order, and its padding behind them.
            count = is_real.sum()
            assert is_real[:count].all()
            np.testing.assert_array_equal(slot[:count], slot[0] + np.arange(count))
            assert lengths[starts.tolist().index(slot[0])] == count
            assert len(slot) <= 1.25 * count + 8  # padding stays little
    np.testing.assert_array_equal(plan.position_in_document, np.arange(segments.size) - starts[plan.document_of_token])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_any_packing_is_covered(lengths: list[int]):
    check_plan(rows_of([lengths]))


@pytest.mark.parametrize(
    "segments",
    [
        rows_of([[5, 3], [2, 6]]),
        rows_of([[8], [8], [8]]),
        rows_of([[5, 3], [1, 7]], padding=4),
        rows_of([[1] * 9]),
        np.zeros((2, 5), int),  # nothing but padding still has a plan
        np.array([[3, 3, 1, 1, 7]]),  # ids need not be 1, 2, 3
        np.array([[2, 2], [2, 2]]),  # one id in two rows is two documents
    ],
)
def test_rows_padding_and_odd_ids_are_covered(segments: np.ndarray):
    check_plan(segments)


def test_documents_of_one_length_share_a_bucket_without_padding():
    for segments in (np.ones((3, 8), int), rows_of([[4, 4], [4, 4]])):
        (bucket,) = make_plan(segments).buckets
        assert bucket.real.all()


def test_a_document_in_two_pieces_is_refused():
    with pytest.raises(ValueError, match="stand together"):
        make_plan(np.array([[1, 2, 1]]))
    make_plan(np.array([[1, 0, 0, 2, 0]]))  # stretches of padding are no document


def test_the_next_token_stays_inside_the_document():
    plan = make_plan(np.array([[1, 1, 1, 2, 2], [1, 1, 1, 1, 1]]))
    target, inside = next_in_document(plan.document_of_token, 1)
    assert inside.tolist() == [True, True, False, True, False, True, True, True, True, False]
    np.testing.assert_array_equal(target[inside], np.flatnonzero(inside) + 1)
    _, inside = next_in_document(plan.document_of_token, 2)
    assert inside.tolist() == [True, False, False, False, False, True, True, True, False, False]
