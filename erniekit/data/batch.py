"""One batch from the packer to the model: PackedBatch. Plain numpy; nothing here knows of Paddle or of ranks.

The packer makes rows, batches of one row (`make_row`); the loader joins a microbatch's rows (`join_rows`). Nothing is
padded: where a device needs more tokens, models.inputs.batch_inputs appends them when it makes the tensors.

Legend: T tokens, R rows, N entries of a side table.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

IGNORE = -100  # a label with no loss
NO_SEGMENT = -1  # in a column of segment numbers


class Modality(IntEnum):
    """What a token stands for."""

    TEXT = 0
    IMAGE = 1
    VIDEO = 2


class PairLayout(NamedTuple):
    """How a pair of answers lies in a document: `prompt` tokens of the prompt but its last, then `chosen` tokens, then
    `rejected` tokens. Both answers begin with the prompt's last token, which predicts the first of their own: it is
    there twice, so that every token has one label. `score_delta` > 0: how much better the chosen answer is.
    """

    prompt: int
    chosen: int
    rejected: int
    score_delta: float


class DocumentPictures(NamedTuple):
    """The N images and videos of a document of n tokens, in the order of their placeholders.

    `modality` int8 [n]; `positions` int64 [n, 3] (time, height, width); `grid` int64 [N, 3]; `first_tokens` int64 [N];
    `sources` [N]: what decodes each of them (vision.plan.MediaPlan).
    """

    modality: np.ndarray
    positions: np.ndarray
    grid: np.ndarray
    first_tokens: np.ndarray
    sources: tuple[Any, ...]


class Document(NamedTuple):
    """What is packed: `ids` and `labels` int32 [n], labels[t] the target of position t or -100; for a pair of answers
    its layout; its images and videos.
    """

    ids: np.ndarray
    labels: np.ndarray
    pair: PairLayout | None = None
    pictures: DocumentPictures | None = None

    @property
    def num_patches(self) -> int:
        """Patches of its images and videos."""
        return 0 if self.pictures is None else int(self.pictures.grid.prod(axis=1).sum())

    @property
    def num_bytes(self) -> int:
        """About how much memory its arrays take, and pictures that are in the record itself."""
        size = self.ids.nbytes + self.labels.nbytes
        if self.pictures is not None:
            size += self.pictures.modality.nbytes + self.pictures.positions.nbytes
            size += sum(source.num_bytes for source in self.pictures.sources)
        return size


@dataclass(frozen=True)
class PairTable:
    """The N pairs of answers of a batch, one entry of each column for each pair.

    `prompts`, `chosen` and `rejected` int64 [N] are segment numbers of the batch. An answer sees its prompt's segment
    and its own; `prompts` is NO_SEGMENT where a prompt has no segment, as it consists of one token. `score_deltas`
    float32 [N]. `reference` fp32 [2, N]: log-probabilities of the chosen and the rejected answers under the reference
    model, None until a recipe computes them. It is an array of the library that computed it, because numbers of a
    reference model stay on the device.
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
        """One table of several rows' tables, whose segments are counted from `first_segments` on."""
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


_NO_NUMBERS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class PictureTable:
    """The N images and videos of a batch, in the order of their placeholders.

    `patches` [P, channels * size * size], uint8 pixels or normalised floats, of one picture after another; `grid` int64
    [N, 3], the frames, rows and columns of patches of each (one frame: an image); `first_tokens` int64 [N], the token
    number of the first placeholder of each.

    Only the rank that trains on a batch decodes its pictures. Until then `patches` is empty, `sources` [N] is what
    decodes them, and `documents` int64 [N] is the number of each one's document among the batch's.
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
        """P, also before they are decoded."""
        return int(self.grid.prod(axis=1).sum())

    @staticmethod
    def of(documents: Sequence[Document]) -> "PictureTable":
        """The table of documents that are laid one after another."""
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
        """One table of several rows' tables, whose tokens and documents are counted from the given numbers on."""
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
    """The T tokens of R rows, one row after another, without padding. A row holds whole documents, or the parts of
    documents that fit; a batch of one row is what the packer makes.

    Columns [T]: `input_ids` and `labels` int64, labels[t] being the target of token t or IGNORE; `position_ids` int64,
    which restart at 0 in each document, [T, 3] (time, height, width) where a row has pictures; `segment_ids` int64;
    `modality` int8 (see Modality; the start and end tokens of a picture have the picture's). Segments are stretches of
    tokens that attend to themselves, and are numbered 0, 1, ... through the whole batch. A document is one segment, a
    pair of answers up to three: prompt, chosen, rejected. The positions of both answers continue the prompt's.

    `row_lengths` [R] are the rows' numbers of tokens, and add up to T. `sources` names each document's place,
    "file:line", for messages about a step that went wrong. `pairs` are the pairs of answers, `pictures` the images and
    videos; other data has none.

    A side table, as `pairs` and `pictures` are, has a column for each fact and numbers what it points to through the
    whole batch. To add one: (1) a frozen class with a `join` that concatenates the columns and shifts their numbers;
    (2) a field below, empty by default, which `make_row` fills; (3) one line in `join_rows`. A reward is a column of
    the table of what it is given for; a weight of each token's loss is one more column [T].
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

    @staticmethod
    def text_row(
        input_ids: np.ndarray,
        labels: np.ndarray,
        position_ids: np.ndarray,
        segment_ids: np.ndarray,
        sources: Sequence[str],
        pairs: PairTable = NO_PAIRS,
    ) -> "PackedBatch":
        """A row of text; the columns may be of any integer type."""
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
        """Segments are numbered below this."""
        return int(self.segment_ids[-1]) + 1 if len(self.segment_ids) else 0

    @property
    def num_samples(self) -> int:
        """Documents (a pair of answers is one), or parts of documents."""
        return len(self.sources)

    @property
    def segment_lengths(self) -> np.ndarray:
        """Tokens of each segment [num_segments]."""
        return np.bincount(self.segment_ids, minlength=self.num_segments)

    @property
    def segment_modality(self) -> np.ndarray:
        """Of each segment: video if it has one, else image if it has one, else text; int8 [num_segments]."""
        kinds = np.full(self.num_segments, Modality.TEXT, np.int8)
        np.maximum.at(kinds, self.segment_ids, self.modality)
        return kinds

    @property
    def supervised(self) -> np.ndarray:
        """Numbers of the tokens that carry loss, ascending."""
        return np.flatnonzero(self.labels != IGNORE)

    @property
    def prefixes(self) -> np.ndarray | None:
        """For each segment, the segment whose tokens it also sees, or NO_SEGMENT; None where no segment does."""
        if not len(self.pairs):
            return None
        prefixes = np.full(self.num_segments, NO_SEGMENT)
        prefixes[self.pairs.chosen] = self.pairs.prompts
        prefixes[self.pairs.rejected] = self.pairs.prompts
        return prefixes

    @property
    def answer_labels(self) -> np.ndarray:
        """How many labels each answer has, the chosen and then the rejected ones: fp32 [2N]."""
        counts = np.bincount(self.segment_ids[self.supervised], minlength=self.num_segments)
        return counts[self.pairs.answers].astype(np.float32)


_NONE = np.empty(0, np.int64)
_EMPTY = PackedBatch.text_row(_NONE, _NONE, _NONE, _NONE, [])


def make_row(documents: Sequence[Document], sources: Sequence[str]) -> PackedBatch:
    """Lay documents one after another. Positions restart and the segment number rises at each; the answers of a pair
    are segments of their own, whose positions continue their prompt's.
    """
    spans: list[tuple[int, int]] = []  # of each segment: its first position, its length
    pairs: list[tuple[int, int, int, float]] = []
    for document in documents:
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
    return _with_pictures(row, documents) if any(document.pictures for document in documents) else row


def _with_pictures(row: PackedBatch, documents: Sequence[Document]) -> PackedBatch:
    """The row of documents of which some have pictures."""
    positions, modality = _on_three_axes(row.position_ids), row.modality.copy()
    end = 0
    for document in documents:
        start, end = end, end + len(document.ids)
        if document.pictures is not None:
            assert document.pair is None, "the positions of a pair with pictures are not defined"
            positions[start:end] = document.pictures.positions
            modality[start:end] = document.pictures.modality
    return replace(row, position_ids=positions, modality=modality, pictures=PictureTable.of(documents))


def join_rows(rows: Sequence[PackedBatch]) -> PackedBatch:
    """One batch of all rows, whose segments and side tables share one numbering.

    No row at all gives a batch without tokens: it lets a rank that has no data in a short last step take part in it
    with a loss of zero.
    """
    parts = [_EMPTY, *rows]
    first_segments = _starts([part.num_segments for part in parts])
    return PackedBatch(
        input_ids=np.concatenate([part.input_ids for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        position_ids=_join_positions([part.position_ids for part in parts]),
        segment_ids=np.concatenate(
            [part.segment_ids + first for part, first in zip(parts, first_segments, strict=True)]
        ),
        modality=np.concatenate([part.modality for part in parts]),
        row_lengths=[length for row in rows for length in row.row_lengths],
        sources=[source for row in rows for source in row.sources],
        pairs=PairTable.join([part.pairs for part in parts], first_segments),
        pictures=PictureTable.join(
            [part.pictures for part in parts],
            _starts([part.num_tokens for part in parts]),
            _starts([part.num_samples for part in parts]),
        ),
    )


def _join_positions(parts: Sequence[np.ndarray]) -> np.ndarray:
    """[T], or [T, 3] where a part has three axes."""
    if all(part.ndim == 1 for part in parts):
        return np.concatenate(parts)
    return np.concatenate([_on_three_axes(part) for part in parts])


def _on_three_axes(positions: np.ndarray) -> np.ndarray:
    """Positions as [T, 3]: text has the same position on all of them."""
    return positions if positions.ndim == 2 else np.repeat(positions[:, None], 3, axis=1)


def _starts(counts: Sequence[int]) -> np.ndarray:
    """Where each of several stretches begins that follow one another: int64 [number of stretches]."""
    return np.cumsum([0, *counts[:-1]], dtype=np.int64)
