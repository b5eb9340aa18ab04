"""Batches written as rows [B, S], as fixtures and small tests have them."""

from collections.abc import Sequence

import numpy as np

from erniekit.data.packed_batch import PackedBatch, join_rows


def packed(
    input_ids: np.ndarray,
    labels: np.ndarray,
    position_ids: np.ndarray,
    segment_ids: np.ndarray,
    sources: Sequence[Sequence[str]] | None = None,
) -> PackedBatch:
    """The batch of rows [B, S] in which segment 0 is padding and 1, 2, ... are a row's documents."""
    rows = []
    for row, segments in enumerate(segment_ids):
        columns = (column[row, segments > 0] for column in (input_ids, labels, position_ids))
        if segments.any():
            rows.append(PackedBatch.text_row(*columns, segments[segments > 0] - 1, sources[row] if sources else []))
    return join_rows(rows)
