"""Rows, and the batches that are joined of them: one numbering, no padding."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erniekit.data.packed_batch import (
    IGNORE,
    NO_SEGMENT,
    Document,
    Modality,
    PackedBatch,
    PairLayout,
    PairTable,
    join_rows,
    make_row,
)


def document(*ids: int) -> Document:
    return Document(np.array(ids, np.int32), np.array([*ids[1:], IGNORE], np.int32))


def pair(prompt: int, chosen: int, rejected: int, score_delta: float = 1.0) -> Document:
    """Token numbers say the part: 1 prompt, 2 chosen, 3 rejected. All but the last token of an answer have a label."""
    ids = np.repeat(np.array([1, 2, 3], np.int32), [prompt, chosen, rejected])
    labels = np.full(len(ids), IGNORE, np.int32)
    labels[prompt : prompt + chosen - 1] = 2
    labels[prompt + chosen : -1] = 3
    return Document(ids, labels, PairLayout(prompt, chosen, rejected, score_delta))


COLUMNS = ("input_ids", "labels", "position_ids", "segment_ids", "modality")


def test_a_row_restarts_positions_and_numbers_its_documents():
    row = make_row([document(5, 6, 7), document(8, 9)], ["a:1", "a:2"])
    assert row.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert row.labels.tolist() == [6, 7, IGNORE, 9, IGNORE]
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert row.segment_ids.tolist() == [0, 0, 0, 1, 1]
    assert row.modality.tolist() == [Modality.TEXT] * 5
    assert (row.num_tokens, row.row_lengths, row.sources) == (5, [5], ["a:1", "a:2"])
    assert len(row.pairs) == 0 and row.prefixes is None


def test_the_answers_of_a_pair_are_segments_that_continue_its_prompt():
    row = make_row([pair(2, 3, 2, 0.5)], ["a:1"])
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 3]
    assert row.segment_ids.tolist() == [0, 0, 1, 1, 1, 2, 2]
    pairs = row.pairs
    assert (pairs.prompts.tolist(), pairs.chosen.tolist(), pairs.rejected.tolist()) == ([0], [1], [2])
    assert pairs.score_deltas.tolist() == [0.5] and row.num_samples == 1 and row.num_segments == 3
    assert row.prefixes.tolist() == [NO_SEGMENT, 0, 0]


def test_a_prompt_of_one_token_has_no_segment():
    row = make_row([pair(0, 2, 3)], ["a:1"])
    assert row.position_ids.tolist() == [0, 1, 0, 1, 2]
    assert (row.pairs.prompts.tolist(), row.pairs.answers.tolist()) == ([NO_SEGMENT], [0, 1])
    assert row.prefixes.tolist() == [NO_SEGMENT, NO_SEGMENT]


def test_rows_are_joined_without_padding_and_keep_documents_apart():
    rows = [make_row([document(5, 6, 7)], ["a:1"]), make_row([document(*range(10, 19)), document(1)], ["a:2", "a:3"])]
    batch = join_rows(rows)
    assert batch.input_ids.tolist() == [5, 6, 7, *range(10, 19), 1]
    assert batch.labels.tolist() == [6, 7, IGNORE, *range(11, 19), IGNORE, IGNORE]
    assert batch.position_ids.tolist() == [0, 1, 2, *range(9), 0]
    assert batch.segment_ids.tolist() == [0] * 3 + [1] * 9 + [2]
    assert batch.row_lengths == [3, 10] and batch.num_tokens == 13
    assert batch.num_samples == 3 and batch.sources == ["a:1", "a:2", "a:3"]
    assert batch.segment_lengths.tolist() == [3, 9, 1]
    assert batch.supervised.tolist() == [0, 1, *range(3, 11)]
    assert {name: getattr(batch, name).dtype for name in COLUMNS} == dict.fromkeys(COLUMNS[:4], np.int64) | {
        "modality": np.int8
    }


def test_pairs_are_numbered_through_the_whole_batch():
    rows = [
        make_row([pair(2, 3, 2, 0.5)], ["a:1"]),
        make_row([pair(0, 2, 4, 1.0), pair(1, 4, 2, 2.0)], ["a:2", "a:3"]),
    ]
    batch = join_rows(rows)
    pairs = batch.pairs
    assert pairs.prompts.tolist() == [0, NO_SEGMENT, 5]
    assert pairs.chosen.tolist() == [1, 3, 6] and pairs.rejected.tolist() == [2, 4, 7]
    assert pairs.answers.tolist() == [1, 3, 6, 2, 4, 7]
    assert pairs.score_deltas.tolist() == [0.5, 1.0, 2.0] and pairs.score_deltas.dtype == np.float32
    assert batch.prefixes.tolist() == [-1, 0, 0, -1, -1, -1, 5, 5]
    assert batch.answer_labels.tolist() == [2, 1, 3, 1, 3, 1] and batch.answer_labels.dtype == np.float32


DOCUMENTS = st.one_of(
    st.builds(lambda n: document(*range(n)), st.integers(1, 5)),
    st.builds(pair, st.integers(0, 3), st.integers(2, 4), st.integers(2, 4)),
)


@settings(max_examples=60)
@given(rows=st.lists(st.lists(DOCUMENTS, min_size=1, max_size=4), max_size=4))
def test_joined_rows_hold_what_the_rows_hold(rows: list[list[Document]]):
    made = [make_row(documents, [f"a:{i}" for i in range(len(documents))]) for documents in rows]
    batch = join_rows(made)
    assert batch.num_tokens == sum(batch.row_lengths) == sum(row.num_tokens for row in made)
    assert np.array_equal(np.unique(batch.segment_ids), np.arange(batch.num_segments)), "no two rows share a segment"
    assert (np.diff(batch.segment_ids) >= 0).all() and batch.segment_lengths.sum() == batch.num_tokens
    layouts = [document for documents in rows for document in documents if document.pair is not None]
    assert len(batch.pairs) == len(layouts)
    parts = (batch.pairs.prompts, batch.pairs.chosen, batch.pairs.rejected)
    for layout, *segments in zip(layouts, *parts, strict=True):
        lengths = [0 if s == NO_SEGMENT else int(batch.segment_lengths[s]) for s in segments]
        assert lengths == list(layout.pair[:3])
        joined = [batch.input_ids[batch.segment_ids == segment] for segment in segments]
        assert np.concatenate(joined).tolist() == layout.ids.tolist()


def test_joining_is_the_same_row_by_row_and_at_once():
    """A batch is its own kind of row: a rank may join batches again."""
    rows = [make_row([pair(2, 3, 2), document(7, 8)], ["a:1", "a:2"]), make_row([pair(0, 2, 2)], ["a:3"])]
    once, twice = join_rows([*rows, rows[0]]), join_rows([join_rows(rows), rows[0]])
    for name in COLUMNS:
        assert np.array_equal(getattr(once, name), getattr(twice, name))
    assert once.row_lengths == twice.row_lengths and once.sources == twice.sources
    assert np.array_equal(once.prefixes, twice.prefixes) and np.array_equal(once.pairs.answers, twice.pairs.answers)


def test_modality_stays_with_its_tokens():
    row = make_row([document(5, 6, 7)], ["a:1"])
    image = PackedBatch(*(getattr(row, name) for name in COLUMNS[:4]), np.array([0, 1, 2], np.int8), [3], ["a:2"])
    assert join_rows([row, image]).modality.tolist() == [0, 0, 0, Modality.TEXT, Modality.IMAGE, Modality.VIDEO]


def test_no_row_gives_a_batch_without_tokens():
    batch = join_rows([])
    assert all(getattr(batch, name).shape == (0,) for name in COLUMNS)
    assert batch.num_samples == batch.num_segments == batch.num_tokens == 0
    assert batch.row_lengths == [] and len(batch.pairs) == 0
    assert batch.supervised.tolist() == batch.answer_labels.tolist() == batch.segment_lengths.tolist() == []


def test_a_batch_can_be_sent_to_another_process():
    batch = join_rows([make_row([pair(2, 3, 2)], ["a:1"])])
    other = pickle.loads(pickle.dumps(batch))
    assert np.array_equal(other.segment_ids, batch.segment_ids) and other.pairs.answers.tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_columns_of_token_files_become_int64(dtype: type):
    column = np.arange(3, dtype=dtype)
    row = PackedBatch.text_row(column, column, column, np.zeros(3, dtype), ["a:1"])
    assert {getattr(row, name).dtype for name in COLUMNS[:4]} == {np.dtype(np.int64)}


def test_a_table_of_nothing_has_columns():
    assert [column.shape for column in (PairTable.of([]).prompts, PairTable.of([]).score_deltas)] == [(0,), (0,)]
