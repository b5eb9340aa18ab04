"""Prompts with answers to other prompts, from which KTO estimates how far the policy is from its reference.

The estimate is the mean of log p(y'|x) - log p_ref(y'|x) over prompts x with the answer y' of the document before
(Ethayarajh et al. 2024, arXiv 2402.01306, section 4.1; TRL pairs within each rank's batch). Here it is the document
before in the whole global batch, so that the estimate depends neither on microbatches nor on ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from erniekit.data.packed_batch import IGNORE, Document, PackedBatch, join_rows, make_row
from erniekit.parallel import comm
from erniekit.parallel.mesh import Mesh


class _Split(NamedTuple):
    """A document's prompt, and its answer: the ids after the prompt, and their labels from the prompt's last token on
    (one more than ids).
    """

    prompt: list[int]
    answer: list[int]
    labels: list[int]


def mismatched_batches(microbatches: Sequence[PackedBatch], mesh: Mesh, max_seq_len: int) -> list[PackedBatch]:
    """For each microbatch the batch of its prompts with the answers of the documents before them in the global
    batch, for the first one of the last, cut to `max_seq_len` tokens. Each is a judged answer of its own row; a
    global batch of one document gives none. All ranks call it at the same time.
    """
    own = [_documents(batch) for batch in microbatches]
    ranks = comm.gather_objects(own, mesh.data_group)[:: mesh.degrees.context]  # of each group of the same rows
    # the global order of rows (data/loader.py): microbatch, then rank
    order = [(m, rank, i) for m in range(len(own)) for rank, of in enumerate(ranks) for i in range(len(of[m]))]
    if len(order) < 2:
        return [join_rows([]) for _ in microbatches]
    before = dict(zip(order, order[-1:] + order[:-1], strict=True))
    result = []
    for m, splits in enumerate(own):
        rows = []
        for i, split in enumerate(splits):
            number, rank, place = before[m, mesh.batch, i]
            other = _Split(*ranks[rank][number][place])  # a list where it came from another rank
            rows.append(make_row([_joined(split, other, max_seq_len)], [microbatches[m].sources[i]]))
        result.append(join_rows(rows))
    return result


def _documents(batch: PackedBatch) -> list[_Split]:
    """The judged documents of a batch, in their order."""
    bounds = np.concatenate([[0], np.cumsum(batch.segment_lengths)])
    found = []
    for segment in batch.judged.segments.tolist():
        ids, labels = (column[bounds[segment] : bounds[segment + 1]] for column in (batch.input_ids, batch.labels))
        first = int(np.flatnonzero(labels != IGNORE)[0])
        found.append(_Split(ids[: first + 1].tolist(), ids[first + 1 :].tolist(), labels[first:].tolist()))
    return found


def _joined(split: _Split, other: _Split, max_seq_len: int) -> Document:
    """The prompt of one document with the answer of another. A prompt that fills the row keeps one label."""
    ids = np.array(split.prompt + other.answer, np.int32)
    labels = np.array([IGNORE] * (len(split.prompt) - 1) + other.labels, np.int32)
    length = max(max_seq_len, len(split.prompt))
    return Document(ids[:length], labels[:length], is_good=True)
