"""What the trainer is given: rows of packed documents, stacked into batches. Plain numpy; nothing here knows of paddle
or of ranks.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

IGNORE = -100  # a label with no loss


class PairLayout(NamedTuple):
    """How a pair of answers lies in a document: `prompt` tokens of the prompt but its last, then `chosen` tokens, then
    `rejected` tokens. Both answers begin with the prompt's last token, which predicts the first of their own: it is
    there twice, so that every token has one label. `score_delta` > 0: how much better the chosen answer is.
    """

    prompt: int
    chosen: int
    rejected: int
    score_delta: float


class Document(NamedTuple):
    """What is packed: `ids` and `labels` int32 [n], labels[t] the target of position t or -100; for a pair of answers
    its layout.
    """

    ids: np.ndarray
    labels: np.ndarray
    pair: PairLayout | None = None


@dataclass(frozen=True)
class Pairs:
    """The N pairs of a row, all [N]: the segments of the shared prompts (0: none), of the chosen and of the rejected
    answers, int32, and score_deltas float32. An answer sees its prompt's segment and its own. The row's segments are
    numbered 1, 2, ... without a gap.
    """

    prompts: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    score_deltas: np.ndarray


@dataclass(frozen=True)
class Row:
    """One packed sequence of L tokens that holds whole documents one after another, without padding.

    `input_ids` and `labels` int64 [L]: labels[t] is the target of position t, or -100. `position_ids` int64 [L] restart
    at 0 in each document. `segment_ids` int32 [L] number the documents 1, 2, ... `sources` names each document's place,
    "file:line". With `pairs` a document has up to three segments: prompt, chosen, rejected; the positions of both
    answers continue the prompt's.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    sources: list[str] = field(default_factory=list)
    pairs: Pairs | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Batch:
    """B rows of S tokens, padded on the right.

    `input_ids`, `labels`, `position_ids` int64 [B, S]; `segment_ids` int32 [B, S]. Padding is the pad token with label
    -100, position 0 and segment 0. `num_samples` counts the documents; `sources` names them row by row ("file:line"),
    for messages about a step that went wrong. `pairs` are the pairs of answers row by row, None for other data.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    num_samples: int
    sources: list[list[str]] = field(default_factory=list)
    pairs: list[Pairs] | None = None


@dataclass(frozen=True)
class FlatPairs:
    """The N pairs of a batch, whose documents (segments) are numbered 0, 1, ... row by row. `prefixes` [documents]: the
    document that each also sees, or -1. `chosen`, `rejected` int64 [N]: the answers' documents. `score_deltas`
    float32 [N].
    """

    prefixes: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    score_deltas: np.ndarray

    @property
    def answers(self) -> np.ndarray:
        """Chosen, then rejected [2N]."""
        return np.concatenate([self.chosen, self.rejected])


def flat_pairs(batch: Batch) -> FlatPairs | None:
    """The pairs of a whole batch; None where it has none."""
    if batch.pairs is None:
        return None
    counts = batch.segment_ids.max(axis=1)
    first = np.cumsum(counts) - counts
    prefixes = np.full(int(counts.sum()), -1)
    sides = []
    for offset, pairs in zip(first.tolist(), batch.pairs, strict=True):
        documents = np.stack([pairs.prompts, pairs.chosen, pairs.rejected]).astype(np.int64) + (offset - 1)
        shared = pairs.prompts > 0
        for side in documents[1:]:
            prefixes[side[shared]] = documents[0][shared]
        sides.append(documents[1:])
    chosen, rejected = np.concatenate(sides, axis=1)
    return FlatPairs(prefixes, chosen, rejected, np.concatenate([pairs.score_deltas for pairs in batch.pairs]))
