"""Yields rows of token files (`dataset_type: pretrain`).

**A source** is the documents of one split in one entry of input_dir. An epoch of a source is these documents in random
order (in the file's order with random_shuffle: false; long documents may occur several times, see below), concatenated.
The epochs are concatenated too, so a source is an endless sequence of tokens, divided into rows of max_seq_len tokens:
a document that does not fit into a row continues in another row, and nothing is padded, dropped or read twice. The rows
of an epoch are shuffled as well (not with random_shuffle: false), so that a batch does not consist of one long
document. Only the last row of an epoch, which reaches into the next epoch, keeps its place.

**Mixing.** Rows are mixed in blocks of 65,536. In each block a source has 65,536 * weight rows (by largest remainders,
at least one), in an order that is drawn for each block. The weights are therefore exact to 1/65,536 in every block, and
the source and row of the n-th training row follow from n alone, so that a position in the data is just a number.

**Ends.** An epoch of the training has as many tokens as all sources have in one epoch. Without max_steps the training
reads num_train_epochs of them, M tokens, in ceil((M - 1) / max_seq_len) rows, of which only the last may be shorter:
token M is the last label. Evaluation reads each source of the split once in the file's order; the last row of each
source may be shorter.

**Labels** are the next token of the source. With isolate_documents every document (or part of one in a row) is a
segment whose positions begin at 0, and the last token of a document has no label, since the next document is unrelated.
Without it, as in Megatron-LM, a row is one segment and every token has a label.

**Long documents.** A document of at least long_document_min_tokens tokens occurs long_document_weight times in every
epoch, at independent places.

Every order is drawn with SplitMix64 from (seed, ...), as in data/sampler.py.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from erniekit.config import Config
from erniekit.config.token_files import weighted_prefixes
from erniekit.data.chat.encode import Tokenizer
from erniekit.data.packed_batch import PackedBatch
from erniekit.data.tokens.files import TokenFile, strip_suffix
from erniekit.data.tokens.rows import DocumentPart, Mix, RowOrder, Source
from erniekit.utils import log
from erniekit.utils.errors import DataError
from erniekit.utils.wording import count_of

_CHECKED_DOCUMENTS = 1000  # documents whose last token is checked
_SPLITS = ("train", "eval", "test")


class Weighted(NamedTuple):
    """One entry of input_dir; without a weight it is mixed in proportion to its tokens."""

    prefix: Path
    weight: float | None


def split_documents(shares: Sequence[float], count: int) -> dict[str, tuple[int, int]]:
    """Divides the documents of a file: (998, 1, 1) -> [first, last) of train, eval and test, which follow one another
    in the file. Missing numbers are 0. Each split has its rounded share, and the first split compensates for the error
    of rounding, as in ERNIE's and older Megatron-LM's data sets.
    """
    numbers = [*shares, *[0.0] * (len(_SPLITS) - len(shares))]
    ends = np.cumsum([round(count * number / sum(numbers)) for number in numbers])
    ends = np.maximum(0, ends - (ends[-1] - count)).tolist()
    return dict(zip(_SPLITS, zip([0, *ends], ends, strict=False), strict=True))


@dataclass(frozen=True)
class Counts:
    """Counts of what the stream has yielded so far. `samples` counts the documents begun, `long_documents` those among
    them with at least long_document_min_tokens tokens.
    """

    samples: int = 0
    long_documents: int = 0
    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0


@dataclass(frozen=True)
class RowNumber:
    """A position in the stream: `row` rows have been yielded, and `into` tokens of the next row if training ended
    within it (with more epochs that row becomes longer). `counts` is for reporting only.
    """

    row: int = 0
    counts: Counts = Counts()
    into: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The position as plain JSON values."""
        return asdict(self)


class Schedule(Protocol):
    """Where each row is in the sources. `num_rows`: None if the stream is endless."""

    num_rows: int | None

    def place(self, n: int) -> tuple[int, int, int]:
        """(source, first token in it, number of tokens) of row n."""
        ...

    def rows_of_sources(self, n: int) -> list[int]:
        """How many of the rows 0..n-1 come from each source."""
        ...


class Mixed(Schedule):
    """The schedule of training, which mixes sources by weight. `num_tokens`: None if the stream is endless."""

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float], seed: int, length: int, num_tokens: int | None
    ):
        self._length, self._num_tokens = length, num_tokens
        self._mix, self._orders = Mix(weights, seed), [RowOrder(source, length) for source in sources]
        self.num_rows = None if num_tokens is None else math.ceil((num_tokens - 1) / length)

    def place(self, n: int) -> tuple[int, int, int]:
        source, row = self._mix.place(n)
        left = self._length if self._num_tokens is None else self._num_tokens - 1 - n * self._length
        return source, self._orders[source].start(row), min(self._length, left)

    def rows_of_sources(self, n: int) -> list[int]:
        return self._mix.before(n)


class InTurn(Schedule):
    """The schedule of evaluation, which reads every source once, one after another."""

    def __init__(self, sizes: Sequence[int], length: int):
        self._sizes, self._length = list(sizes), length
        self._ends = np.cumsum([math.ceil((size - 1) / length) for size in sizes]).tolist()
        self.num_rows: int | None = self._ends[-1]

    def place(self, n: int) -> tuple[int, int, int]:
        source = int(np.searchsorted(self._ends, n, side="right"))
        start = (n - (self._ends[source - 1] if source else 0)) * self._length
        return source, start, min(self._length, self._sizes[source] - 1 - start)

    def rows_of_sources(self, n: int) -> list[int]:
        return np.diff(np.minimum([0, *self._ends], n)).tolist()


class TokenFeed:
    """The feed of rows from token files, for a Loader (see loader.Feed)."""

    exact = True

    def __init__(
        self,
        sources: Sequence[Source],
        schedule: Schedule,
        length: int,
        isolate: bool,
        long_tokens: int | None,
        identity: dict[str, Any],
    ):
        self.identity = identity
        self._sources, self._schedule, self._length = list(sources), schedule, length
        self._isolate, self._long_tokens = isolate, long_tokens
        self._epoch_tokens = sum(source.epoch_tokens for source in sources)
        self._was_logged = False

    def begin(self) -> RowNumber:
        """The position before the first row."""
        return RowNumber()

    def read_position(self, state: dict[str, Any]) -> RowNumber:
        """The position that to_dict() has saved."""
        return RowNumber(state["row"], Counts(**state["counts"]), state.get("into", 0))

    def rows(self, position: RowNumber) -> Generator[tuple[PackedBatch, RowNumber], None, None]:
        """Yields the rows after `position`, each with the position after it. Nothing before them is read."""
        walks = [source.walk() for source in self._sources]
        number, counts, into = position.row, position.counts, position.into
        while self._schedule.num_rows is None or number < self._schedule.num_rows:
            source, start, count = self._schedule.place(number)
            if into < count:
                row, row_parts = walks[source].row(start + into, count - into, self._isolate)
                counts = self._count(counts, row, row_parts, self._sources[source])
                whole = count == self._length
                yield row, RowNumber(number + whole, counts, 0 if whole else count)
            number, into = number + 1, 0

    def _count(self, counts: Counts, row: PackedBatch, row_parts: list[DocumentPart], source: Source) -> Counts:
        begun = [part.document for part in row_parts if part.start == 0]
        starts = source.file.starts
        long = 0
        if self._long_tokens is not None:
            long = sum(int(starts[document + 1] - starts[document]) >= self._long_tokens for document in begun)
        return Counts(
            counts.samples + len(begun),
            counts.long_documents + long,
            counts.rows + 1,
            counts.tokens + row.num_tokens,
            counts.supervised_tokens + len(row.supervised),
        )

    def rows_left(self, position: RowNumber) -> float:
        """Rows from `position` to the end of num_train_epochs, from the lengths alone."""
        end = self._schedule.num_rows
        assert end is not None, "rows_left is not needed if max_steps decides the end"
        epoch = math.ceil((self._epoch_tokens - 1) / self._length)
        if not self._was_logged:
            log.info(f"data: an epoch is {self._epoch_tokens} tokens in {count_of(epoch, 'row')} of {self._length}")
            self._was_logged = True
        if position.row >= end:
            return 0.0
        _, _, count = self._schedule.place(position.row)
        return float(end - position.row - (position.into >= count))

    def epochs_done(self, position: RowNumber) -> int:
        """The number of epochs of which every label has been yielded; the very first token is not a label."""
        return (position.counts.tokens + 1) // self._epoch_tokens

    def report(self, position: RowNumber) -> dict[str, Any]:
        """The counts up to `position`: samples (documents begun), rows, tokens, supervised_tokens, fill_rate (tokens /
        (rows * max_seq_len)) and epoch; cut, dropped and bad_lines, which are always 0; with several sources the rows
        of each, and with long_document_min_tokens the number of long documents.
        """
        counts = position.counts
        known: dict[str, Any] = asdict(counts)
        if self._long_tokens is None:
            del known["long_documents"]
        if len(self._sources) > 1:
            rows = self._schedule.rows_of_sources(position.row + (position.into > 0))
            names = [str(source.file.prefix) for source in self._sources]
            known["rows_by_source"] = dict.fromkeys(names, 0)
            for name, number in zip(names, rows, strict=True):
                known["rows_by_source"][name] += number
        fill_rate = counts.tokens / (counts.rows * self._length) if counts.rows else 0.0
        return {
            **known,
            "cut": 0,
            "dropped": 0,
            "bad_lines": 0,
            "fill_rate": round(fill_rate, 4),
            "epoch": round(counts.tokens / self._epoch_tokens, 4),
        }

    def decode_media(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """Return the batches unchanged: token files contain no pictures."""
        return list(batches)

    def interrupt(self) -> None:
        """Has no effect, since reading token files never blocks."""


def open_token_files(cfg: Config, tokenizer: Tokenizer, split: str) -> TokenFeed:
    """Open and check the files of cfg.input_dir for `split` ("train" or "eval"); see loader.build_loader."""
    entries = [Weighted(strip_suffix(prefix), weight) for weight, prefix in weighted_prefixes(cfg.input_dir)]
    if split == "train":
        sources = _open_sources(cfg, tokenizer, split, entries)
        schedule, weights = _training_schedule(cfg, entries, sources)
        long_tokens = cfg.long_document_min_tokens
        for file in {source.file.prefix: source.file for source in sources}.values():
            _check_ends(file, tokenizer.eos_id)
    else:
        sources = _open_sources(cfg, tokenizer, split, list({entry.prefix: entry for entry in entries}.values()))
        schedule, weights = InTurn([source.epoch_tokens for source in sources], cfg.max_seq_len), []
        long_tokens = None
    identity = {
        "seed": cfg.seed,
        "random_shuffle": cfg.random_shuffle,
        "documents of each file": [source.file.num_documents for source in sources],
        "tokens of each file": [source.file.num_tokens for source in sources],
        "content of each file": [source.file.digest() for source in sources],
        "tokenizer": tokenizer.fingerprint,
        "weights of input_dir": weights,
        "split": _shares(cfg),
        "max_seq_len": cfg.max_seq_len,
        "isolate_documents": cfg.isolate_documents,
        "long_document_min_tokens": cfg.long_document_min_tokens,
        "long_document_weight": cfg.long_document_weight,
    }
    return TokenFeed(sources, schedule, cfg.max_seq_len, cfg.isolate_documents, long_tokens, identity)


def _shares(cfg: Config) -> str:
    return ",".join(f"{share:g}" for share in cfg.split)


def _open_sources(cfg: Config, tokenizer: Tokenizer, split: str, entries: list[Weighted]) -> list[Source]:
    """The sources of `entries`. A file that is named twice is opened once. Raises DataError if there is no text."""
    files = {entry.prefix: TokenFile(entry.prefix, tokenizer.vocab_size) for entry in entries}
    sources = [_source(cfg, files[entry.prefix], number, split) for number, entry in enumerate(entries)]
    largest = max(source.epoch_tokens for source in sources)
    for source in sources:
        if source.epoch_tokens < 2 and (split == "train" or largest < 2):
            reason = (
                f"split: {_shares(cfg)} leaves no text for {split} of its "
                f"{count_of(source.file.num_documents, 'document')}. Hint: give it a larger share, or use a file with "
                "more documents."
                if source.num_documents == 0
                else f"{count_of(source.num_documents, 'document')} for {split} "
                "with fewer than two tokens in all, so that there is none to predict. Hint: look at how the file was "
                "made."
            )
            raise DataError(f"{source.file.prefix}: {reason}")
    return sources


def _training_schedule(cfg: Config, entries: list[Weighted], sources: list[Source]) -> tuple[Schedule, list[float]]:
    """The schedule of the training, and the weights, scaled to sum to 1."""
    tokens = [source.epoch_tokens for source in sources]
    given = [float(entry.weight or size) for entry, size in zip(entries, tokens, strict=True)]
    weights = [weight / sum(given) for weight in given]
    end = None if cfg.max_steps > 0 else max(2, round(cfg.num_train_epochs * sum(tokens)))
    return Mixed(sources, weights, cfg.seed, cfg.max_seq_len, end), weights


def _source(cfg: Config, file: TokenFile, number: int, split: str) -> Source:
    """The source of entry `number` of input_dir: its documents of `split`, shuffled and repeated for training."""
    first, last = split_documents(cfg.split, file.num_documents)[split]
    key, repeats, more = None, None, ""
    if split == "train":
        key = (cfg.seed, number) if cfg.random_shuffle else None
        repeats = _repeats(cfg, file, first, last)
        more = f", {int(repeats.sum()) - (last - first)} repeats of long ones included" if repeats is not None else ""
    source = Source(file, first, last, key, repeats)
    empty = f", {source.empty} of them empty and ignored" if source.empty else ""
    log.info(
        f"{split} data: {file.prefix}: {source.num_documents} of its "
        f"{count_of(file.num_documents, 'document')}{empty}; {source.epoch_tokens} tokens{more}"
    )
    return source


def _repeats(cfg: Config, file: TokenFile, first: int, last: int) -> np.ndarray | None:
    """How often each document occurs in an epoch, int64 [n]; None: once."""
    if cfg.long_document_min_tokens is None:
        return None
    long = np.diff(file.starts[first : last + 1]) >= cfg.long_document_min_tokens
    log.info(
        f"{file.prefix}: {int(long.sum())} of {last - first} documents with {cfg.long_document_min_tokens} tokens or "
        f"more; each comes {count_of(cfg.long_document_weight, 'time')} in an epoch (long_document_weight)"
    )
    return np.where(long, cfg.long_document_weight, 1) if cfg.long_document_weight > 1 else None


def _check_ends(file: TokenFile, eos_id: int) -> None:
    without, looked_at = file.without_end(eos_id, _CHECKED_DOCUMENTS)
    if without:
        log.warning(
            f"{file.prefix}: no end token (id {eos_id}) after {without} of {count_of(looked_at, 'document')} that were "
            "checked: the model does not learn from these to end a text"
        )
