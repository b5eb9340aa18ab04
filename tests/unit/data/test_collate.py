import numpy as np

from erniekit.data.batch import IGNORE, Document
from erniekit.data.collate import collate, make_row


def document(*ids):
    return Document(np.array(ids, np.int32), np.array([*ids[1:], IGNORE], np.int32))


def test_a_row_restarts_positions_and_numbers_its_documents():
    row = make_row([document(5, 6, 7), document(8, 9)], ["a:1", "a:2"])
    assert row.input_ids.tolist() == [5, 6, 7, 8, 9] and row.input_ids.dtype == np.int64
    assert row.labels.tolist() == [6, 7, IGNORE, 9, IGNORE] and row.labels.dtype == np.int64
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1] and row.position_ids.dtype == np.int64
    assert row.segment_ids.tolist() == [1, 1, 1, 2, 2] and row.segment_ids.dtype == np.int32
    assert (len(row), row.sources) == (5, ["a:1", "a:2"])


def test_rows_are_padded_on_the_right_to_the_longest_rounded_up_to_eight():
    rows = [make_row([document(5, 6, 7)], ["a:1"]), make_row([document(*range(10, 19)), document(1)], ["a:2", "a:3"])]
    batch = collate(rows, pad_id=99)
    assert batch.input_ids.shape == (2, 16)
    assert batch.input_ids[0].tolist() == [5, 6, 7] + [99] * 13
    assert batch.labels[0].tolist() == [6, 7] + [IGNORE] * 14
    assert batch.segment_ids[1].tolist() == [1] * 9 + [2] + [0] * 6
    assert batch.position_ids[1].tolist() == [*range(9), 0] + [0] * 6
    assert batch.num_samples == 3 and batch.sources == [["a:1"], ["a:2", "a:3"]]
    assert collate(rows[:1] * 2, 0).input_ids.shape == (2, 8)


def test_no_row_gives_padding_without_a_label():
    batch = collate([], pad_id=7)
    assert batch.input_ids.tolist() == [[7] * 8]
    assert (batch.labels == IGNORE).all() and (batch.segment_ids == 0).all() and batch.num_samples == 0
