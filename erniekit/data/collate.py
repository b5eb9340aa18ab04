"""Documents -> rows -> batches."""

from collections.abc import Sequence

import numpy as np

from erniekit.data.batch import IGNORE, Batch, Document, Pairs, Row

PAD_MULTIPLE = 8  # row lengths are rounded up to this, so that few distinct shapes occur


def make_row(documents: Sequence[Document], sources: Sequence[str]) -> Row:
    """Lay documents one after another. Positions restart and the segment number rises at each; the answers of a pair
    are segments of their own, whose positions go on from their prompt's.
    """
    spans: list[tuple[int, int]] = []  # of each segment: its first position, its length
    pairs: list[tuple[int, int, int, float]] = []
    for document in documents:
        if document.pair is None:
            spans.append((0, len(document.ids)))
            continue
        prompt, chosen, rejected, score_delta = document.pair
        if prompt:
            spans.append((0, prompt))
        spans += [(prompt, chosen), (prompt, rejected)]
        pairs.append((len(spans) - 2 if prompt else 0, len(spans) - 1, len(spans), score_delta))
    return Row(
        input_ids=np.concatenate([document.ids for document in documents]).astype(np.int64),
        labels=np.concatenate([document.labels for document in documents]).astype(np.int64),
        position_ids=np.concatenate([np.arange(first, first + n, dtype=np.int64) for first, n in spans]),
        segment_ids=np.repeat(np.arange(1, len(spans) + 1, dtype=np.int32), [n for _, n in spans]),
        sources=list(sources),
        pairs=_table(pairs) if pairs else None,
    )


def _table(pairs: list[tuple[int, int, int, float]]) -> Pairs:
    prompts, chosen, rejected, score_deltas = zip(*pairs, strict=True)
    segments = (np.array(numbers, np.int32) for numbers in (prompts, chosen, rejected))
    return Pairs(*segments, np.array(score_deltas, np.float32))


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Stack rows into a Batch [B, S]; S is the longest row rounded up to a multiple of 8.

    No row at all gives one row of padding without a single label: it lets a rank that has no data in a short last step
    take part in it with a loss of zero.
    """
    longest = max((len(row) for row in rows), default=1)
    shape = (max(len(rows), 1), -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE)
    input_ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, IGNORE, np.int64)
    position_ids = np.zeros(shape, np.int64)
    segment_ids = np.zeros(shape, np.int32)
    for i, row in enumerate(rows):
        end = len(row)
        input_ids[i, :end] = row.input_ids
        labels[i, :end] = row.labels
        position_ids[i, :end] = row.position_ids
        segment_ids[i, :end] = row.segment_ids
    num_samples = sum(len(row.sources) for row in rows)
    pairs = [row.pairs for row in rows if row.pairs is not None]
    assert len(pairs) in (0, len(rows)), "a batch holds pairs of answers or none"
    sources = [row.sources for row in rows]
    return Batch(input_ids, labels, position_ids, segment_ids, num_samples, sources, pairs or None)
