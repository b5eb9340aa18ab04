"""A batch as the model takes it: real tokens only, one flat stretch, padding left behind on the host."""

from dataclasses import dataclass

import numpy as np
import paddle

from erniekit.data.batch import IGNORE, Batch, FlatPairs, flat_pairs


@dataclass(frozen=True)
class FlatBatch:
    """The real tokens of a Batch in row order (legend: T tokens).

    Host arrays, all [T] int64: `input_ids`, `labels` (IGNORE = no loss), `position_ids`, `segment_ids` (documents
    numbered 1.. through the whole batch).
    `row_lengths` are the rows' numbers of tokens, and sum to `num_tokens`; where ranks share the tokens, T may be a
    little more: the last document is then filling, without loss, that no router sees. `sources` names the documents'
    places. `pairs`: the pairs of answers, in preference data; document d has segment id d + 1.
    `reference`: the reference's log-probabilities of the N pairs' chosen and rejected answers, once they are known, on
    the device: fp32 [2, N].
    Of a vision-language model: `modality` int8 [T] (0 text, 1 image, 2 video, start and end tokens included),
    `position_ids` [T, 3], and the pictures' `patches` and `grid` as in models.inputs.pictures_of.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    row_lengths: list[int]
    sources: list[str]
    pairs: FlatPairs | None = None
    reference: paddle.Tensor | None = None
    modality: np.ndarray | None = None
    patches: np.ndarray | None = None
    grid: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return sum(self.row_lengths)

    @property
    def size(self) -> int:
        """T: all tokens, filling included."""
        return len(self.input_ids)

    @property
    def prefixes(self) -> np.ndarray | None:
        """For each document, the one whose tokens it also sees, or -1 (nn.attention_plan.make_plan); None: none do."""
        return None if self.pairs is None else self.pairs.prefixes

    @property
    def supervised(self) -> np.ndarray:
        """Token numbers that carry loss."""
        return np.flatnonzero(self.labels != IGNORE)

    def document_lengths(self) -> np.ndarray:
        """Length of each token's document [T]."""
        return np.bincount(self.segment_ids)[self.segment_ids]


def flatten(batch: Batch, multiple: int = 1) -> FlatBatch:
    """Drop padding and join the rows; fill up to a `multiple` of tokens. A batch of nothing but padding is filled, too,
    so that every rank runs the same graph.
    """
    rows, columns = np.nonzero(batch.segment_ids != 0)
    segments = batch.segment_ids[rows, columns]
    new_document = np.ones(len(rows), dtype=bool)
    new_document[1:] = (segments[1:] != segments[:-1]) | (rows[1:] != rows[:-1])
    filling = -len(rows) % multiple if len(rows) else multiple
    documents = np.cumsum(new_document)

    def joined(values: np.ndarray, fill: int) -> np.ndarray:
        return np.pad(values.astype(np.int64), (0, filling), constant_values=fill)

    return FlatBatch(
        input_ids=joined(batch.input_ids[rows, columns], 0),
        labels=joined(batch.labels[rows, columns], IGNORE),
        position_ids=joined(batch.position_ids[rows, columns], 0),
        segment_ids=joined(documents, int(new_document.sum()) + 1),
        row_lengths=[int(n) for n in np.bincount(rows) if n],
        sources=[source for row in batch.sources for source in row],
        pairs=flat_pairs(batch),
    )
