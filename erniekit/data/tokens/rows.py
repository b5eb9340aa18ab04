"""Which tokens of which token file make up which row: pure functions of the seed and the files' lengths. What they
decide is described in data/tokens/feed.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from erniekit.data.batch import IGNORE, PackedBatch
from erniekit.data.sampler import permutation
from erniekit.data.tokens.files import TokenFile
from erniekit.utils.errors import ConfigError

_BLOCK = 65536  # rows that are mixed together
_MIXING, _DOCUMENTS, _ROWS = 0, 1, 2  # what an order is for


class Piece(NamedTuple):
    """A part of a document within a stretch of a source's tokens: the document's number, its tokens [start, stop), and
    whether that is its end.
    """

    document: int
    start: int
    stop: int
    ends: bool


class Source:
    """The documents [first, last) of a file, as one endless run of tokens; see the module's description.

    `key` is the seed and what else tells this source's orders from others'; None keeps the file's order. `repeats` [n]
    says how often each document comes in an epoch; None: once.
    """

    epoch_tokens: int

    def __init__(
        self, file: TokenFile, first: int, last: int, key: tuple[int, ...] | None, repeats: np.ndarray | None = None
    ):
        self.file, self.key = file, key
        self._lengths = np.diff(file.starts[first : last + 1])
        self._documents = np.arange(first, last) if repeats is None else np.repeat(np.arange(first, last), repeats)
        self._first = first
        self.num_documents = last - first
        self.empty = int((self._lengths == 0).sum())
        self.epoch_tokens = int(self._lengths.sum() if repeats is None else (self._lengths * repeats).sum())

    def walk(self) -> "Walk":
        """A reader of its own, for one thread."""
        return Walk(self)

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch [n], and the token of the epoch at which each begins, int64 [n + 1]."""
        documents = self._documents
        if self.key is not None:
            documents = documents[permutation(len(documents), (*self.key, _DOCUMENTS, epoch))]
        starts = np.zeros(len(documents) + 1, np.int64)
        np.cumsum(self._lengths[documents - self._first], out=starts[1:])
        return documents, starts


class Walk:
    """Reads stretches of a source. The order of the latest epoch is kept, since rows mostly follow one another."""

    def __init__(self, source: Source):
        self._source = source
        self._epoch, self._order = -1, (np.empty(0, np.int64), np.zeros(1, np.int64))

    def pieces(self, start: int, count: int) -> list[Piece]:
        """The parts of documents that make up tokens start..start+count-1 of the source."""
        pieces: list[Piece] = []
        while count:
            epoch, at = divmod(start, self._source.epoch_tokens)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._source.order(epoch)
            documents, starts = self._order
            place = int(np.searchsorted(starts, at, side="right")) - 1
            stop = min(at + count, self._source.epoch_tokens)
            while at < stop:
                begin, end = int(starts[place]), int(starts[place + 1])
                upto = min(end, stop)
                if upto > at:
                    pieces.append(Piece(int(documents[place]), at - begin, upto - begin, upto == end))
                    start, count, at = start + upto - at, count - (upto - at), upto
                place += 1
        return pieces

    def row(self, start: int, count: int, isolate: bool) -> tuple[PackedBatch, list[Piece]]:
        """Tokens start..start+count-1 of the source with their labels, and what they are made of."""
        file, pieces = self._source.file, self.pieces(start, count)
        ids = np.concatenate([file.read(piece.document, piece.start, piece.stop) for piece in pieces])
        last = pieces[-1]
        if isolate and last.ends:
            following = np.array([IGNORE])
        else:
            after = self.pieces(start + count, 1)[0]
            following = file.read(after.document, after.start, after.stop)
        labels = np.concatenate([ids[1:], following])
        lengths = [piece.stop - piece.start for piece in pieces]
        sources = [file.where(piece.document) for piece in pieces]
        if not isolate:
            return PackedBatch.text_row(ids, labels, np.arange(count), np.zeros(count, np.int64), sources), pieces
        ends = np.cumsum(lengths)
        labels[ends[[piece.ends for piece in pieces]] - 1] = IGNORE
        positions = np.arange(count, dtype=np.int64) - np.repeat(ends - lengths, lengths)
        segments = np.repeat(np.arange(len(pieces)), lengths)
        return PackedBatch.text_row(ids, labels, positions, segments, sources), pieces


class RowOrder:
    """Where the rows of a source begin, in the order in which they come. For any thread."""

    def __init__(self, source: Source, length: int):
        self._tokens, self._length, self._key = source.epoch_tokens, length, source.key
        self._latest = (-1, np.empty(0, np.int64))  # the latest epoch and its order

    def start(self, n: int) -> int:
        """First token of the n-th row that the source gives."""
        if self._key is None:
            return n * self._length
        epoch = n * self._length // self._tokens
        first, end = (-(-e * self._tokens // self._length) for e in (epoch, epoch + 1))  # its rows
        if n == end - 1:
            return n * self._length
        latest = self._latest
        if latest[0] != epoch:
            latest = self._latest = (epoch, permutation(end - 1 - first, (*self._key, _ROWS, epoch)))
        return (first + int(latest[1][n - first])) * self._length


class Mix:
    """Which row of which source is row n of the training, for sources of these weights. For any thread."""

    def __init__(self, weights: Sequence[float], seed: int):
        self._seed = seed
        self.quotas = _quotas(weights)
        self._owners = np.repeat(np.arange(len(weights)), self.quotas)
        # the latest block, its rows' sources, and their rows counted within the block
        self._latest = (-1, np.empty(0, np.int64), np.empty(0, np.int64))

    def place(self, n: int) -> tuple[int, int]:
        """(source, row of that source)."""
        if len(self.quotas) == 1:
            return 0, n
        block, at = divmod(n, _BLOCK)
        _, picks, ranks = self._drawn(block)
        source = int(picks[at])
        return source, block * int(self.quotas[source]) + int(ranks[at])

    def before(self, n: int) -> list[int]:
        """How many of the rows 0..n-1 come from each source."""
        if len(self.quotas) == 1:
            return [n]
        block, at = divmod(n, _BLOCK)
        _, picks, _ = self._drawn(block)
        return (block * self.quotas + np.bincount(picks[:at], minlength=len(self.quotas))).tolist()

    def _drawn(self, block: int) -> tuple[int, np.ndarray, np.ndarray]:
        latest = self._latest
        if latest[0] == block:
            return latest
        picks = self._owners[permutation(_BLOCK, (self._seed, _MIXING, block))]
        ranks = np.empty(_BLOCK, np.int64)
        for source, quota in enumerate(self.quotas):
            ranks[picks == source] = np.arange(quota)
        self._latest = (block, picks, ranks)
        return self._latest


def _quotas(weights: Sequence[float]) -> np.ndarray:
    """Rows of a block for each source, by the largest remainders, at least one each; int64 [sources]."""
    if len(weights) > _BLOCK:
        raise ConfigError(f"input_dir: {len(weights)} files; at most {_BLOCK}. Hint: join some of them.")
    exact = np.asarray(weights) / sum(weights) * _BLOCK
    quotas = np.maximum(1, np.floor(exact)).astype(np.int64)
    order = np.argsort(quotas - exact, kind="stable")  # furthest below its share first
    missing = _BLOCK - int(quotas.sum())
    if missing > 0:
        quotas[order[:missing]] += 1
    while missing < 0:  # many sources with less than a row each: the largest give way
        quotas[int(quotas.argmax())] -= 1
        missing += 1
    return quotas
