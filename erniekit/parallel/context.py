"""Context parallelism: which tokens of a packed row each rank has, and what its attention needs from other ranks.

A row of n tokens is divided into 2C chunks of nearly equal length over C ranks; rank i has chunks i and 2C - 1 - i. In
causal attention a late chunk sees more than an early one, and in these pairs every rank has as much of one long
document to do (Llama 3, arXiv 2407.21783, section 3.3.2, has the same pairs; Brandon et al. 2023, arXiv 2311.09431,
balance by stripes). All of this is plain numpy, the same on every rank.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from erniekit.parallel.process_group import Group

# How queries get the keys of other ranks: keys and values are passed around a ring, or heads are exchanged for tokens.
Exchange = Literal["p2p", "a2a"]


def zigzag(row_lengths: Sequence[int], num_ranks: int) -> list[np.ndarray]:
    """The token numbers of each rank, ascending: int64 [num_ranks][t]. Together they are all tokens of the rows, once.
    Rows of fewer than 2 * num_ranks tokens leave some ranks without any.
    """
    of_ranks: list[list[np.ndarray]] = [[] for _ in range(num_ranks)]
    first = 0
    for length in row_lengths:
        bounds = first + length * np.arange(2 * num_ranks + 1) // (2 * num_ranks)
        for rank, spans in enumerate(of_ranks):
            for chunk in (rank, 2 * num_ranks - 1 - rank):
                spans.append(np.arange(bounds[chunk], bounds[chunk + 1]))
        first += length
    return [np.concatenate(spans) if spans else np.zeros(0, np.int64) for spans in of_ranks]


@dataclass(frozen=True)
class ContextShard:
    """How the tokens of a batch are divided over a group of context ranks. `row_lengths` [R]: of the whole rows.
    `by_rank`: the token numbers of each rank, ascending.
    """

    group: Group
    row_lengths: list[int]
    by_rank: list[np.ndarray]

    @property
    def tokens(self) -> np.ndarray:
        """The numbers of this rank's tokens in the batch, ascending int64 [t]."""
        return self.by_rank[self.group.index]

    @cached_property
    def own_row_lengths(self) -> list[int]:
        """How many tokens of each row this rank has [R]."""
        ends = np.searchsorted(self.tokens, np.cumsum(self.row_lengths))
        return np.diff(ends, prepend=0).tolist()

    def select(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A mask of the token numbers `places` that are on this rank, and the rows at which this rank has those."""
        rows = np.searchsorted(self.tokens, places)
        inside = np.minimum(rows, max(len(self.tokens) - 1, 0))
        mask = self.tokens[inside] == places if len(self.tokens) else np.zeros(len(places), bool)
        return mask, rows[mask]


@dataclass(frozen=True)
class ContextRanks:
    """The ranks that share the tokens of the same rows, and how their attention exchanges what it needs."""

    group: Group
    exchange: Exchange

    def shard(self, row_lengths: list[int]) -> ContextShard:
        """How a batch of these rows is divided."""
        return ContextShard(self.group, row_lengths, zigzag(row_lengths, self.group.size))


class _Piece(NamedTuple):
    """Consecutive tokens of one document on one rank: the first one's number in the batch and on the rank."""

    first: int
    row: int
    length: int
    document: int


class Tile(NamedTuple):
    """`queries` rows of this rank from row `query` on see `keys` keys from `key` on: all of them, or, if `causal`, the
    same tokens, each up to itself. Keys are numbered among those that are sent, or on this rank for its own.
    """

    query: int
    queries: int
    key: int
    keys: int
    causal: bool


@dataclass(frozen=True)
class RingPlan:
    """What one rank computes with the keys and values of every rank of the ring. `tiles`: by the rank that the keys are
    of. `sent`: of every rank, the rows whose keys and values another rank needs; only these are sent.
    """

    tiles: list[list[Tile]]
    sent: list[np.ndarray]


def ring_plan(shard: ContextShard, document_of_token: np.ndarray, prefix_of: np.ndarray | None = None) -> RingPlan:
    """The plan of this rank. `document_of_token` [T] rises; `prefix_of` [documents]: the document whose tokens a
    document sees before its own, or -1.

    Pieces of two ranks never overlap, so a piece of queries sees all keys of another piece or none. Only a piece
    meets itself token by token.
    """
    pieces = [_pieces_of(tokens, document_of_token) for tokens in shard.by_rank]
    by_document = [_by_document(of_rank) for of_rank in pieces]
    ranks, mine = range(shard.group.size), shard.group.index

    def seen_by(reader: int, rank: int) -> list[list[_Piece]]:
        """For each piece of queries of a rank, the pieces of keys of another that it sees."""
        return [_seen(query, by_document[rank], prefix_of) for query in pieces[reader]]

    sent, tiles = [], []
    for rank in ranks:
        readers = [reader for reader in ranks if reader != rank]
        needed = sorted({piece for reader in readers for keys in seen_by(reader, rank) for piece in keys})
        starts = np.cumsum([0, *(piece.length for piece in needed)]).tolist()
        place = {key: key.row for key in pieces[mine]} if rank == mine else dict(zip(needed, starts, strict=False))
        sent.append(np.concatenate([np.zeros(0, np.int64), *(_rows(piece) for piece in needed)]))
        tiles.append(
            [
                Tile(query.row, query.length, place[key], key.length, key == query)
                for query, keys in zip(pieces[mine], seen_by(mine, rank), strict=True)
                for key in keys
            ]
        )
    return RingPlan(tiles, sent)


def _by_document(pieces: Sequence[_Piece]) -> dict[int, list[_Piece]]:
    found: dict[int, list[_Piece]] = defaultdict(list)
    for piece in pieces:
        found[piece.document].append(piece)
    return found


def _seen(query: _Piece, keys: dict[int, list[_Piece]], prefix_of: np.ndarray | None) -> list[_Piece]:
    """The pieces of keys that a piece of queries sees: of its document's prefix all, of its own the earlier ones."""
    own = [piece for piece in keys.get(query.document, ()) if piece.first <= query.first]
    prefix = -1 if prefix_of is None else int(prefix_of[query.document])
    return own if prefix < 0 else [*keys.get(prefix, ()), *own]


def _pieces_of(tokens: np.ndarray, document_of_token: np.ndarray) -> list[_Piece]:
    if not len(tokens):
        return []
    documents = document_of_token[tokens]
    begins = np.flatnonzero((np.diff(tokens, prepend=-2) != 1) | (np.diff(documents, prepend=-1) != 0))
    lengths = np.diff(np.append(begins, len(tokens)))
    columns = (tokens[begins], begins, lengths, documents[begins])
    return [_Piece(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _rows(piece: _Piece) -> np.ndarray:
    return np.arange(piece.row, piece.row + piece.length)
