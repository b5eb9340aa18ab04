"""PackedBatch, the one form of a batch between the packer and the model. It is plain numpy, without Paddle or ranks.

The packer makes rows, which are batches of one row (`make_row`), and the loader joins the rows of a microbatch
(`join_rows`). There is no padding here: if a device needs more tokens, models.inputs.batch_inputs appends them when it
makes the tensors.

Legend: T tokens, R rows, N entries of a side table.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

IGNORE = -100  # a label without loss
NO_SEGMENT = -1  # "none" in a column of segment numbers


class Modality(IntEnum):
    """The modality of a token."""

    TEXT = 0
    IMAGE = 1
    VIDEO = 2


class PairLayout(NamedTuple):
    """The layout of a pair of answers in a document: `prompt` tokens of the prompt without its last token, then
    `chosen` tokens, then `rejected` tokens. Both answers begin with the prompt's last token, which predicts their first
    token; it occurs twice so that every token has one label. `score_delta` >= 0: how much better the chosen answer is.
    """

    prompt: int
    chosen: int
    rejected: int
    score_delta: float


class DocumentPictures(NamedTuple):
    """The N images and videos of a document of n tokens, in the order of their placeholders.

    `modality` int8 [n]; `positions` int64 [n, 3] (time, height, width); `grid` int64 [N, 3]; `first_tokens` int64 [N];
    `sources` [N]: the objects that decode them (vision.plan.MediaPlan).
    """

    modality: np.ndarray
    positions: np.ndarray
    grid: np.ndarray
    first_tokens: np.ndarray
    sources: tuple[Any, ...]


class Document(NamedTuple):
    """A tokenised document: `ids` and `labels` int32 [n], with labels[t] the target of position t or -100; the layout
    of a pair of answers; images and videos; whether its answer is good, where it is judged.
    """

    ids: np.ndarray
    labels: np.ndarray
    pair: PairLayout | None = None
    pictures: DocumentPictures | None = None
    is_good: bool | None = None

    @property
    def num_patches(self) -> int:
        """Patches of its images and videos."""
        return 0 if self.pictures is None else int(self.pictures.grid.prod(axis=1).sum())

    @property
    def num_bytes(self) -> int:
        """The approximate memory of its arrays, and of pictures that are in the record itself."""
        size = self.ids.nbytes + self.labels.nbytes
        if self.pictures is not None:
            size += self.pictures.modality.nbytes + self.pictures.positions.nbytes
            size += sum(source.num_bytes for source in self.pictures.sources)
        return size


@dataclass(frozen=True)
class PairTable:
    """The N pairs of answers in a batch; each column has one entry per pair.

    `prompts`, `chosen` and `rejected` int64 [N] are segment numbers in the batch. An answer attends to its prompt's
    segment and to its own; `prompts` is NO_SEGMENT for a prompt of one token, which has no segment. `score_deltas`
    float32 [N]. `reference` fp32 [2, N]: log-probabilities of the chosen and the rejected answers under the reference
    model, None until a recipe computes them. A reference model's numbers stay on the device, so this array may be a
    Paddle tensor.
    """

    prompts: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    score_deltas: np.ndarray
    reference: Any = None

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def answers(self) -> np.ndarray:
        """Segments of the chosen, then of the rejected answers [2N]."""
        return np.concatenate([self.chosen, self.rejected])

    @staticmethod
    def of(entries: Sequence[tuple[int, int, int, float]]) -> "PairTable":
        """The table of (prompt, chosen, rejected, score_delta) of each pair."""
        prompts, chosen, rejected = np.array([entry[:3] for entry in entries], np.int64).reshape(-1, 3).T
        return PairTable(prompts, chosen, rejected, np.array([entry[3] for entry in entries], np.float32))

    @staticmethod
    def join(tables: Sequence["PairTable"], first_segments: np.ndarray) -> "PairTable":
        """Joins the tables of several rows; the segments of each are renumbered from its entry in
        `first_segments` on.
        """
        shifted = [table._shifted(int(first)) for table, first in zip(tables, first_segments, strict=True)]
        return PairTable(
            prompts=np.concatenate([table.prompts for table in shifted]),
            chosen=np.concatenate([table.chosen for table in shifted]),
            rejected=np.concatenate([table.rejected for table in shifted]),
            score_deltas=np.concatenate([table.score_deltas for table in shifted]),
        )

    def _shifted(self, first_segment: int) -> "PairTable":
        prompts = np.where(self.prompts == NO_SEGMENT, NO_SEGMENT, self.prompts + first_segment)
        return replace(
            self, prompts=prompts, chosen=self.chosen + first_segment, rejected=self.rejected + first_segment
        )


NO_PAIRS = PairTable.of([])


@dataclass(frozen=True)
class JudgedTable:
    """The N judged answers of a batch: `segments` int64 [N], the number of the document's segment; `is_good` bool [N].
    `reference` fp32 [N]: log-probabilities under the reference model, None until a recipe computes them; it may be a
    Paddle tensor.
    """

    segments: np.ndarray
    is_good: np.ndarray
    reference: Any = None

    def __len__(self) -> int:
        return len(self.segments)

    @staticmethod
    def of(entries: Sequence[tuple[int, bool]]) -> "JudgedTable":
        """The table of (segment, is_good) of each answer."""
        return JudgedTable(np.array([e[0] for e in entries], np.int64), np.array([e[1] for e in entries], bool))

    @staticmethod
    def join(tables: Sequence["JudgedTable"], first_segments: np.ndarray) -> "JudgedTable":
        """Joins the tables of several rows; the segments of each are renumbered from its entry in
        `first_segments` on.
        """
        shifted = [table.segments + int(first) for table, first in zip(tables, first_segments, strict=True)]
        return JudgedTable(np.concatenate(shifted), np.concatenate([table.is_good for table in tables]))


NOT_JUDGED = JudgedTable.of([])


@dataclass(frozen=True)
class CompletionTable:
    """The N completions in a batch that a policy made, of which each is one segment.

    `prompts` and `segments` int64 [N] are segment numbers: a completion's segment begins with the last token of its
    prompt, and attends to the prompt's segment, which several completions share; NO_SEGMENT for a prompt of one token.
    `advantages` float32 [N]. `groups` int64 [N]: equal numbers for completions of one prompt. `lengths` int64 [N]: the
    labels of each, which stand in this order in the columns of labels, float32 [L]: `rollout_log_probs` (NaN: unknown),
    `old_log_probs` and `reference_log_probs` (None: not needed). `pairs` int64 [P, 2]: completions of one group, the
    better one first. `min_entropy`: the least entropy with which a token has a policy loss; None: all have.

    `is_offline`: they are pairs of answers that were made in advance, which only the preference loss reads.

    `experts` [T, S, K], unsigned: the experts that the batch's T tokens were sent to in each of S sparse layers while
    the completions were generated; None: not recorded. `replays_experts`: they are sent there again; otherwise the
    record is only compared.
    """

    prompts: np.ndarray
    segments: np.ndarray
    advantages: np.ndarray
    groups: np.ndarray
    lengths: np.ndarray
    rollout_log_probs: np.ndarray
    old_log_probs: np.ndarray | None = None
    reference_log_probs: np.ndarray | None = None
    pairs: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    min_entropy: float | None = None
    experts: np.ndarray | None = None
    replays_experts: bool = True
    is_offline: bool = False

    def __len__(self) -> int:
        return len(self.segments)


_NO_FLOATS, _NO_NUMBERS = np.zeros(0, np.float32), np.zeros(0, np.int64)
NO_COMPLETIONS = CompletionTable(_NO_NUMBERS, _NO_NUMBERS, _NO_FLOATS, _NO_NUMBERS, _NO_NUMBERS, _NO_FLOATS)


@dataclass(frozen=True)
class PictureTable:
    """The N images and videos of a batch, in the order of their placeholders.

    `patches` [P, channels * size * size], uint8 pixels or normalised floats, of one picture after another; `grid` int64
    [N, 3], the frames, rows and columns of patches of each (one frame: an image); `first_tokens` int64 [N], the token
    number of the first placeholder of each.

    Only the rank that trains on a batch decodes its pictures. Until then `patches` is empty, `sources` [N] has the
    objects that decode them, and `documents` int64 [N] the number of each picture's document in the batch.
    """

    patches: np.ndarray
    grid: np.ndarray
    first_tokens: np.ndarray
    documents: np.ndarray = field(default_factory=_NO_NUMBERS.copy)
    sources: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.grid)

    @property
    def num_patches(self) -> int:
        """P, also before the pictures are decoded."""
        return int(self.grid.prod(axis=1).sum())

    @staticmethod
    def of(documents: Sequence[Document]) -> "PictureTable":
        """The table of concatenated documents."""
        filled = [(i, document.pictures) for i, document in enumerate(documents) if document.pictures is not None]
        starts = _starts([len(document.ids) for document in documents])
        return PictureTable(
            NO_PICTURES.patches,
            np.concatenate([pictures.grid for _, pictures in filled]),
            np.concatenate([pictures.first_tokens + starts[i] for i, pictures in filled]),
            np.concatenate([np.full(len(pictures.grid), i, np.int64) for i, pictures in filled]),
            tuple(source for _, pictures in filled for source in pictures.sources),
        )

    @staticmethod
    def join(tables: Sequence["PictureTable"], first_tokens: np.ndarray, first_documents: np.ndarray) -> "PictureTable":
        """Joins the tables of several rows; their tokens and documents are renumbered from the given numbers on."""
        filled = [i for i, table in enumerate(tables) if len(table)]
        if not filled:
            return NO_PICTURES
        patches = [tables[i].patches for i in filled if len(tables[i].patches)]
        return PictureTable(
            np.concatenate(patches) if patches else NO_PICTURES.patches,
            np.concatenate([tables[i].grid for i in filled]),
            np.concatenate([tables[i].first_tokens + first_tokens[i] for i in filled]),
            np.concatenate([tables[i].documents + first_documents[i] for i in filled]),
            tuple(source for i in filled for source in tables[i].sources),
        )


NO_PICTURES = PictureTable(np.zeros((0, 0), np.uint8), np.zeros((0, 3), np.int64), _NO_NUMBERS)


@dataclass(frozen=True)
class PackedBatch:
    """The T tokens of R rows, concatenated without padding. A row has whole documents, or parts of documents for token
    files.

    Columns [T]: `input_ids` and `labels` int64, labels[t] being the target of token t or IGNORE; `position_ids` int64,
    which restart at 0 in each document, [T, 3] (time, height, width) where a row has pictures; `segment_ids` int64;
    `modality` int8 (see Modality; the start and end tokens of a picture have the picture's). Segments are consecutive
    tokens that attend only to one another, and are numbered 0, 1, ... over the whole batch. A document is one segment,
    a pair of answers up to three: prompt, chosen and rejected. The positions of both answers continue the prompt's, and
    so do those of completions.

    `row_lengths` [R] are the numbers of tokens of the rows, with the sum T. `sources` has each document's place,
    "file:line", for error messages about a step. `pairs` are the pairs of answers, `pictures` the images and videos,
    `judged` the judged answers, `completions` those of a policy; they are empty for other data.

    A side table such as `pairs` or `pictures` has one column per fact, and refers to tokens or segments by their
    numbers in the whole batch. To add one: (1) a frozen class with a `join` that concatenates the columns and shifts
    their numbers; (2) a field below, empty by default, which `make_row` fills; (3) one line in `join_rows`. A reward
    would be a column of the table of the objects that are rewarded; a weight for each token's loss would be one more
    column [T].
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    modality: np.ndarray
    row_lengths: list[int]
    sources: list[str]
    pairs: PairTable = NO_PAIRS
    pictures: PictureTable = NO_PICTURES
    completions: CompletionTable = NO_COMPLETIONS
    judged: JudgedTable = NOT_JUDGED

    @staticmethod
    def text_row(
        input_ids: np.ndarray,
        labels: np.ndarray,
        position_ids: np.ndarray,
        segment_ids: np.ndarray,
        sources: Sequence[str],
        pairs: PairTable = NO_PAIRS,
    ) -> "PackedBatch":
        """Makes a row of text; the columns may have any integer type."""
        return PackedBatch(
            input_ids=input_ids.astype(np.int64),
            labels=labels.astype(np.int64),
            position_ids=position_ids.astype(np.int64),
            segment_ids=segment_ids.astype(np.int64),
            modality=np.full(len(input_ids), Modality.TEXT, np.int8),
            row_lengths=[len(input_ids)],
            sources=list(sources),
            pairs=pairs,
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    @property
    def num_segments(self) -> int:
        """The number of segments."""
        return int(self.segment_ids[-1]) + 1 if len(self.segment_ids) else 0

    @property
    def num_samples(self) -> int:
        """The number of documents (a pair of answers is one), or of parts of documents."""
        return len(self.sources)

    @property
    def segment_lengths(self) -> np.ndarray:
        """The number of tokens of each segment [num_segments]."""
        return np.bincount(self.segment_ids, minlength=self.num_segments)

    @property
    def segment_modality(self) -> np.ndarray:
        """The modality of each segment: video if it has one, else image if it has one, else text; int8
        [num_segments].
        """
        kinds = np.full(self.num_segments, Modality.TEXT, np.int8)
        np.maximum.at(kinds, self.segment_ids, self.modality)
        return kinds

    @property
    def supervised(self) -> np.ndarray:
        """The numbers of the tokens that carry loss, ascending."""
        return np.flatnonzero(self.labels != IGNORE)

    @property
    def supervised_modality(self) -> np.ndarray:
        """The modality of the segment of each token that carries loss, in the order of `supervised`."""
        return self.segment_modality[self.segment_ids[self.supervised]]

    @property
    def prefixes(self) -> np.ndarray | None:
        """For each segment, the segment that it also attends to, or NO_SEGMENT; None if there is no such segment."""
        if not len(self.pairs) and not len(self.completions):
            return None
        prefixes = np.full(self.num_segments, NO_SEGMENT)
        prefixes[self.completions.segments] = self.completions.prompts
        prefixes[self.pairs.chosen] = self.pairs.prompts
        prefixes[self.pairs.rejected] = self.pairs.prompts
        return prefixes

    @property
    def answers(self) -> np.ndarray:
        """The segments of the answers whose log-probabilities a loss compares: the chosen, then the rejected ones of
        the pairs, then the judged ones [2 pairs + judged].
        """
        return np.concatenate([self.pairs.answers, self.judged.segments])

    @property
    def answer_labels(self) -> np.ndarray:
        """The number of labels of each of `answers`, fp32."""
        counts = np.bincount(self.segment_ids[self.supervised], minlength=self.num_segments)
        return counts[self.answers].astype(np.float32)


_EMPTY = PackedBatch.text_row(_NO_NUMBERS, _NO_NUMBERS, _NO_NUMBERS, _NO_NUMBERS, [])


def make_row(documents: Sequence[Document], sources: Sequence[str]) -> PackedBatch:
    """Makes a row by concatenating documents. Each document starts a new segment with positions from 0. The answers of
    a pair are separate segments, whose positions continue their prompt's.
    """
    spans: list[tuple[int, int]] = []  # (first position, length) of each segment
    pairs: list[tuple[int, int, int, float]] = []
    judged: list[tuple[int, bool]] = []
    for document in documents:
        if document.is_good is not None:
            judged.append((len(spans), document.is_good))
        if document.pair is None:
            spans.append((0, len(document.ids)))
            continue
        prompt, chosen, rejected, score_delta = document.pair
        first = len(spans)
        spans += [(0, prompt)] if prompt else []
        spans += [(prompt, chosen), (prompt, rejected)]
        pairs.append((first if prompt else NO_SEGMENT, len(spans) - 2, len(spans) - 1, score_delta))
    row = PackedBatch.text_row(
        np.concatenate([document.ids for document in documents]),
        np.concatenate([document.labels for document in documents]),
        np.concatenate([np.arange(first, first + length) for first, length in spans]),
        np.repeat(np.arange(len(spans)), [length for _, length in spans]),
        sources,
        PairTable.of(pairs),
    )
    row = replace(row, judged=JudgedTable.of(judged))
    return _with_pictures(row, documents) if any(document.pictures for document in documents) else row


def _with_pictures(row: PackedBatch, documents: Sequence[Document]) -> PackedBatch:
    """The row with the pictures of its documents."""
    positions, modality = _on_three_axes(row.position_ids), row.modality.copy()
    end = 0
    for document in documents:
        start, end = end, end + len(document.ids)
        if document.pictures is not None:
            positions[start:end] = document.pictures.positions
            modality[start:end] = document.pictures.modality
    return replace(row, position_ids=positions, modality=modality, pictures=PictureTable.of(documents))


def join_rows(rows: Sequence[PackedBatch]) -> PackedBatch:
    """Joins rows into one batch, and renumbers their segments and side tables.

    Without rows the batch has no tokens. With such a batch a rank without data takes part in a short last step, with a
    loss of zero.
    """
    batches = [_EMPTY, *rows]
    first_segments = _starts([row.num_segments for row in batches])
    return PackedBatch(
        input_ids=np.concatenate([row.input_ids for row in batches]),
        labels=np.concatenate([row.labels for row in batches]),
        position_ids=_join_positions([row.position_ids for row in batches]),
        segment_ids=np.concatenate(
            [row.segment_ids + first for row, first in zip(batches, first_segments, strict=True)]
        ),
        modality=np.concatenate([row.modality for row in batches]),
        row_lengths=[length for row in rows for length in row.row_lengths],
        sources=[source for row in rows for source in row.sources],
        pairs=PairTable.join([row.pairs for row in batches], first_segments),
        judged=JudgedTable.join([row.judged for row in batches], first_segments),
        pictures=_join_pictures(batches),
        completions=_no_completions(rows),
    )


def _join_pictures(batches: Sequence[PackedBatch]) -> PictureTable:
    """The pictures of all rows."""
    return PictureTable.join(
        [batch.pictures for batch in batches],
        _starts([batch.num_tokens for batch in batches]),
        _starts([batch.num_samples for batch in batches]),
    )


def _no_completions(rows: Sequence[PackedBatch]) -> CompletionTable:
    """Completions are added to joined rows (training/rl/batches.py), so rows have none."""
    assert not any(len(row.completions) for row in rows), "completions are added to joined rows"
    return NO_COMPLETIONS


def _join_positions(positions: Sequence[np.ndarray]) -> np.ndarray:
    """The positions of all rows: [T], or [T, 3] if any row has three axes."""
    if all(part.ndim == 1 for part in positions):
        return np.concatenate(positions)
    return np.concatenate([_on_three_axes(part) for part in positions])


def _on_three_axes(positions: np.ndarray) -> np.ndarray:
    """Converts positions to [T, 3]; text has the same position on all three axes."""
    return positions if positions.ndim == 2 else np.repeat(positions[:, None], 3, axis=1)


def _starts(counts: Sequence[int]) -> np.ndarray:
    """The start of each of several consecutive ranges with these lengths: int64 [number of ranges]."""
    return np.cumsum([0, *counts[:-1]], dtype=np.int64)
