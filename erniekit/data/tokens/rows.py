"""Decides which tokens of which token file make up each row, by pure functions of the seed and the files' lengths. The
rules are described in data/tokens/feed.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from erniekit.data.packed_batch import IGNORE, PackedBatch
from erniekit.data.sampler import permutation
from erniekit.data.tokens.files import TokenFile
from erniekit.utils.errors import ConfigError

_BLOCK = 65536  # rows in a block of the mixture
_MIXING, _DOCUMENTS, _ROWS = 0, 1, 2  # the first number of a random key: what the order is for


class DocumentPart(NamedTuple):
    """A part of a document in a row: the document's number, its tokens [start, stop), and whether they include the
    document's end.
    """

    document: int
    start: int
    stop: int
    ends: bool


class Source:
    """The documents [first, last) of a file as an endless sequence of tokens (see feed.py).

    `key` has the seed and further numbers that distinguish the orders of this source from others; None keeps the file's
    order. `repeats` [n]: how often each document occurs in an epoch; None: once.
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
        """A new reader, for use by one thread."""
        return Walk(self)

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch in order [n], and the token at which each begins, int64 [n + 1]."""
        documents = self._documents
        if self.key is not None:
            documents = documents[permutation(len(documents), (*self.key, _DOCUMENTS, epoch))]
        starts = np.zeros(len(documents) + 1, np.int64)
        np.cumsum(self._lengths[documents - self._first], out=starts[1:])
        return documents, starts


class Walk:
    """Reads ranges of a source's tokens. It caches the order of the latest epoch, since most rows are in the
    same epoch.
    """

    def __init__(self, source: Source):
        self._source = source
        self._epoch, self._order = -1, (np.empty(0, np.int64), np.zeros(1, np.int64))

    def pieces(self, start: int, count: int) -> list[DocumentPart]:
        """The parts of documents that tokens start..start+count-1 of the source consist of."""
        pieces: list[DocumentPart] = []
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
                    pieces.append(DocumentPart(int(documents[place]), at - begin, upto - begin, upto == end))
                    start, count, at = start + upto - at, count - (upto - at), upto
                place += 1
        return pieces

    def row(self, start: int, count: int, isolate: bool) -> tuple[PackedBatch, list[DocumentPart]]:
        """Tokens start..start+count-1 of the source as a row with labels, and the parts of documents in it."""
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
    """The first tokens of a source's rows, in the order in which rows are used. It is safe to use from any thread."""

    def __init__(self, source: Source, length: int):
        self._tokens, self._length, self._key = source.epoch_tokens, length, source.key
        self._latest = (-1, np.empty(0, np.int64))  # the latest epoch and its order, cached

    def start(self, n: int) -> int:
        """The first token of the n-th row that is used from the source."""
        if self._key is None:
            return n * self._length
        epoch = n * self._length // self._tokens
        first, end = (-(-e * self._tokens // self._length) for e in (epoch, epoch + 1))  # the range of the epoch's rows
        if n == end - 1:
            return n * self._length
        latest = self._latest
        if latest[0] != epoch:
            latest = self._latest = (epoch, permutation(end - 1 - first, (*self._key, _ROWS, epoch)))
        return (first + int(latest[1][n - first])) * self._length


class Mix:
    """Maps row n of the training to a source and a row of it, by the weights. It is safe to use from any thread."""

    def __init__(self, weights: Sequence[float], seed: int):
        self._seed = seed
        self.quotas = _quotas(weights)
        self._owners = np.repeat(np.arange(len(weights)), self.quotas)
        # cache: the latest block, the source of each of its rows, and the row's number within its source and block
        self._latest = (-1, np.empty(0, np.int64), np.empty(0, np.int64))

    def place(self, n: int) -> tuple[int, int]:
        """The source of row n, and the number of the row in that source."""
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
    """The rows that each source has in a block, by largest remainders and at least one, int64 [sources]."""
    if len(weights) > _BLOCK:
        raise ConfigError(f"input_dir: {len(weights)} files; at most {_BLOCK}. Hint: join some of them.")
    exact = np.asarray(weights) / sum(weights) * _BLOCK
    quotas = np.maximum(1, np.floor(exact)).astype(np.int64)
    order = np.argsort(quotas - exact, kind="stable")  # sources furthest below their share first
    missing = _BLOCK - int(quotas.sum())
    if missing > 0:
        quotas[order[:missing]] += 1
    while missing < 0:  # many sources have less than one row each, so the largest give up rows
        quotas[int(quotas.argmax())] -= 1
        missing += 1
    return quotas
