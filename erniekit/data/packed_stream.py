"""The global stream of packed rows. It is the same for any number of ranks, workers and microbatches, and can start at
any row.
"""

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from erniekit.data.chat.encode import Encoded
from erniekit.data.lengths import Lengths
from erniekit.data.packed_batch import Document, PackedBatch, make_row
from erniekit.data.packing import Packer
from erniekit.data.sampler import Sampler
from erniekit.data.workers import EncodingService
from erniekit.utils.errors import DataError


@dataclass(frozen=True)
class Counts:
    """What the stream has yielded so far. `samples` counts the records used, `cut` those of them that were shortened,
    `shrunk` those whose pictures were made smaller to fit, `dropped` the records of which nothing was left; a record is
    counted when the packer's window reads it, a little before its rows come. `rows`, `tokens`, `supervised_tokens`
    (those with a label), `pictures` (images and videos) and their `patches` count the rows yielded.
    """

    samples: int = 0
    cut: int = 0
    dropped: int = 0
    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    shrunk: int = 0
    pictures: int = 0
    patches: int = 0


@dataclass(frozen=True)
class Position:
    """A position between two rows.

    The current packing window begins in `round` at sample `start`. It also contains the documents that the previous
    window `carried` over, as (index of the sample in the round, index of the document in the sample). `emitted` of its
    rows have been yielded. `window_counts` are the counts at the beginning of the window, `counts` the present ones. To
    continue from here, only this window is read again. `stop` is the sample at which the window ended, `last` whether
    the round ended with it, `closed` whether all its rows have been yielded. They are saved because another
    num_train_epochs may change the length of the round, while this window must be read as before.
    """

    round: int = 0
    start: int = 0
    carried: tuple[tuple[int, int], ...] = ()
    emitted: int = 0
    window_counts: Counts = Counts()
    counts: Counts = Counts()
    stop: int = 0
    last: bool = False
    closed: bool = False

    @property
    def rounds_done(self) -> int:
        """The number of rounds of which every row has been yielded."""
        return self.round + (self.closed and self.last)

    def to_dict(self) -> dict[str, Any]:
        """The position as plain JSON values."""
        return {**asdict(self), "carried": [list(key) for key in self.carried]}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "Position":
        counts = {name: Counts(**state[name]) for name in ("window_counts", "counts")}
        return cls(
            state["round"],
            state["start"],
            tuple((int(i), int(j)) for i, j in state["carried"]),
            state["emitted"],
            stop=state.get("stop", 0),  # positions saved by earlier versions do not have it
            last=state.get("last", False),
            closed=state.get("closed", False),
            **counts,
        )


@dataclass(frozen=True)
class _Placed:
    """A document, its key in a round (see Position), and its record's "file:line"."""

    key: tuple[int, int]
    where: str
    document: Document


class PackedStream:
    """The rows packed from the documents of records, which `order` selects and `service` encodes.

    `num_rounds`: None if the stream is endless; a fraction ends within a round: 1.5 rounds are one round and the first
    half of the next. At the end of a round the packer's open rows are yielded, so that rows do not mix epochs.
    """

    def __init__(
        self,
        order: Sampler,
        service: EncodingService,
        packer: Packer,
        window: int,
        max_seq_len: int,
        num_rounds: float | None,
    ):
        self._order, self._service, self._packer = order, service, packer
        self._window, self._max_seq_len, self._num_rounds = window, max_seq_len, num_rounds
        self._recent: dict[int, np.ndarray] = {}
        self._lengths: dict[int, int] = {}  # round -> number of samples in the whole round

    def ids(self, number: int) -> np.ndarray:
        """The record numbers of a round, int64 [N]; fewer if only a part of the round is used, none after the
        last round.
        """
        if number not in self._recent:
            # Two rounds are cached, since the encoding service reads ahead into the next one. `pop` instead of `del`,
            # since another thread may do the same at this moment.
            for old in sorted(self._recent)[:-1]:
                self._recent.pop(old, None)
            ids = self._order.round(number)
            self._lengths[number] = len(ids)
            if self._num_rounds is not None:
                ids = ids[: max(0, round(len(ids) * min(1.0, self._num_rounds - number)))]
            self._recent[number] = ids
            return ids
        return self._recent[number]

    def round_length(self, number: int) -> int:
        """The number of samples in a whole round, even if num_rounds ends within it."""
        self.ids(number)
        return self._lengths[number]

    def _more(self, number: int) -> bool:
        return self._num_rounds is None or number < math.ceil(self._num_rounds)

    def _is_beyond(self, position: Position) -> bool:
        """Whether this training ends before `position`, which a run with more epochs has reached."""
        return not self._more(position.round) or len(self.ids(position.round)) < max(position.start, position.stop)

    def epochs(self, position: Position) -> float:
        """The number of rounds that have been read at `position`; the current window counts as read."""
        if not self._more(position.round):
            return float(position.round)
        length = len(self.ids(position.round))
        end = position.stop or position.start + self._window if position.emitted else position.start
        return position.round + min(end, length) / self.round_length(position.round)

    def is_at_end(self, position: Position) -> bool:
        """Whether there is no row after `position`, as far as this is known without reading."""
        if self._is_beyond(position):
            return True
        whole = position.closed and position.stop == len(self.ids(position.round))
        return whole and not self._more(position.round + 1)

    def rows(self, position: Position) -> Generator[tuple[PackedBatch, Position], None, None]:
        """Yields the rows after `position`, each with the position after it. Close the generator to end the workers
        that it may have started.
        """
        # One iteration per packing window. The window is packed again from its beginning, also when the stream resumes
        # within it: packing is deterministic, so the rows that were already yielded are just skipped.
        if self._is_beyond(position):
            return
        encoded = self._service.stream(self._numbers(position))
        try:
            number, start, emitted, counts = position.round, position.start, position.emitted, position.window_counts
            pending = self._take_carried(encoded, position.carried)
            while self._more(number):
                length = len(self.ids(number))
                stop, last = self._window_end(start, length, position if emitted else None)
                if start == stop and not pending:
                    return
                # The position at the beginning of this window, from which the window can be read and packed again.
                began = Position(number, start, tuple(placed.key for placed in pending), 0, counts, counts, stop, last)
                counts, new = self._take(encoded, start, stop, counts)
                documents = pending + new
                groups, carried = self._packer(
                    [len(placed.document.ids) for placed in documents], self._max_seq_len, last
                )
                for num_done, group in enumerate(groups, 1):
                    row = make_row([documents[i].document for i in group], [documents[i].where for i in group])
                    counts = _count_row(counts, row)
                    if num_done > emitted:
                        yield row, replace(began, emitted=num_done, counts=counts, closed=num_done == len(groups))
                emitted = 0
                pending = [documents[i] for i in carried]
                start = stop
                if stop == length and not pending:
                    self._check_not_empty(counts)
                    number, start = number + 1, 0
        finally:
            encoded.close()

    def _window_end(self, start: int, length: int, resumed: Position | None) -> tuple[int, bool]:
        """The sample at which a window that begins at `start` ends, and whether its round of `length` samples ends
        there. The window of a `resumed` position keeps its saved values.
        """
        if resumed is not None and resumed.stop:
            return resumed.stop, resumed.last
        stop = min(start + self._window, length)
        return stop, stop == length

    def _numbers(self, position: Position) -> Iterator[int]:
        """The record numbers to encode from `position` on: those with carried documents, then those in order."""
        ids = self.ids(position.round)
        for index in dict.fromkeys(index for index, _ in position.carried):
            yield int(ids[index])
        number, start = position.round, position.start
        while self._more(number):
            ids = self.ids(number)
            for index in range(start, len(ids)):
                yield int(ids[index])
            number, start = number + 1, 0

    @staticmethod
    def _take_carried(encoded: Iterator[Encoded], carried: Sequence[tuple[int, int]]) -> list[_Placed]:
        records = {index: next(encoded) for index in dict.fromkeys(index for index, _ in carried)}
        return [_Placed((i, j), records[i].where, records[i].documents[j]) for i, j in carried]

    @staticmethod
    def _take(encoded: Iterator[Encoded], start: int, stop: int, counts: Counts) -> tuple[Counts, list[_Placed]]:
        """The documents of the next samples, and the counts including these samples."""
        documents: list[_Placed] = []
        samples = cut = shrunk = dropped = 0
        for index in range(start, stop):
            record = next(encoded)
            samples += not record.dropped
            dropped += bool(record.dropped)
            cut += record.cut
            shrunk += record.shrunk
            documents += [_Placed((index, j), record.where, document) for j, document in enumerate(record.documents)]
        now = replace(
            counts,
            samples=counts.samples + samples,
            cut=counts.cut + cut,
            shrunk=counts.shrunk + shrunk,
            dropped=counts.dropped + dropped,
        )
        return now, documents

    @staticmethod
    def _check_not_empty(counts: Counts) -> None:
        if counts.rows == 0:
            raise DataError(
                f"nothing is left to read: every sample was dropped ({counts.dropped}). "
                "Hint: the lines above say why; raise the limit that they name."
            )

    def row_sizes(self, number: int, lengths: Lengths, limit: int | None = None) -> Iterator[tuple[int, int]]:
        """The tokens and the patches of each row of a round (of its first `limit` samples): what rows() gives, without
        reading anything.
        """
        ids = self.ids(number)[:limit]
        pending: list[tuple[int, int]] = []
        for start in range(0, len(ids), self._window):
            stop = min(start + self._window, len(ids))
            window = ids[start:stop]
            sizes = pending + list(zip(lengths.of(window), lengths.patches_of(window), strict=True))
            groups, carried = self._packer([tokens for tokens, _ in sizes], self._max_seq_len, stop == len(ids))
            for group in groups:
                yield sum(sizes[i][0] for i in group), sum(sizes[i][1] for i in group)
            pending = [sizes[i] for i in carried]

    def rows_left(self, position: Position, lengths: Lengths) -> int:
        """The number of rows from `position` to the end of a training that is not endless (see count_rows)."""
        number, start, emitted, rows = position.round, position.start, position.emitted, 0
        if self._is_beyond(position):
            return 0
        ids = self.ids(number)
        pending = [lengths.of(ids[i : i + 1])[j] for i, j in position.carried]
        while self._more(number):
            ids = self.ids(number)
            stop, last = self._window_end(start, len(ids), position if emitted else None)
            if start == stop and not pending:
                break
            tokens = pending + lengths.of(ids[start:stop])
            groups, carried = self._packer(tokens, self._max_seq_len, last)
            rows += len(groups) - emitted
            emitted, start, pending = 0, stop, [tokens[i] for i in carried]
            if stop == len(ids) and not pending:
                number, start = number + 1, 0
        return rows


def _count_row(counts: Counts, row: PackedBatch) -> Counts:
    return replace(
        counts,
        rows=counts.rows + 1,
        tokens=counts.tokens + row.num_tokens,
        supervised_tokens=counts.supervised_tokens + len(row.supervised),
        pictures=counts.pictures + len(row.pictures),
        patches=counts.patches + row.pictures.num_patches,
    )
