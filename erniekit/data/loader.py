"""The data pipeline from end to end: build_loader(cfg, ...) -> Loader, which gives each rank its microbatches step by
step.

files and sources (checked at the start) -> order (shuffled, mixed) -> encode (tokens, labels) -> packing (rows) ->
batches (data/batch.py).

Rows form one global stream. A step takes G = batch_size * accumulation * world of them; microbatch m of rank r takes
rows (m * world + r) * batch_size + [0, batch_size) of the step, so that layouts with the same G give the same rows to
the same step. Nothing is padded away or left out at the end of an epoch: a step may hold the last rows of one epoch and
the first of the next. Only at the very end of training may a step be short: it has as many microbatches as its rows
need, the same number on every rank, and a rank that gets no row in one gets a batch without tokens.
"""

import math
import weakref
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from erniekit.config import Config
from erniekit.data.batch import PackedBatch, join_rows
from erniekit.data.chat.encode import Template, Tokenizer
from erniekit.data.prefetch import Prefetcher
from erniekit.data.record_feed import EVERY_RECORD, Inspection, RecordFeed, open_text
from erniekit.data.records.dataset import Dataset
from erniekit.data.tokens.feed import TokenFeed, open_token_files
from erniekit.data.vision.encode import VisionSpec
from erniekit.utils.errors import DataError

_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """How the stream of rows is divided among ranks, steps and microbatches."""

    batch_size: int
    accumulation: int
    rank: int
    world: int
    prefetch: int

    @property
    def rows_per_step(self) -> int:
        """Rows that next_step() takes over all ranks."""
        return self.batch_size * self.accumulation * self.world


class Position(Protocol):
    """A position between two rows of a feed."""

    def to_dict(self) -> dict[str, Any]:
        """The position as plain JSON values."""
        ...


class Feed(Protocol):
    """Where a Loader gets its rows: one global stream, the same on every rank. Two threads may read it at a time.
    `identity` is everything that decides which rows it yields, under names that a user knows.
    """

    identity: dict[str, Any]

    @property
    def exact(self) -> bool:
        """Whether rows_left() counts rows; otherwise it estimates them."""
        ...

    def begin(self) -> Any:
        """The position before the first row."""
        ...

    def read_position(self, state: dict[str, Any]) -> Any:
        """The position that to_dict() described."""
        ...

    def rows(self, position: Any) -> Generator[tuple[PackedBatch, Any], None, None]:
        """The rows after a position, each as a batch of one row with the position behind it."""
        ...

    def rows_left(self, position: Any) -> float:
        """Rows from a position to the end of num_train_epochs. It may have to measure the data first, and logs the
        result.
        """
        ...

    def epochs_done(self, position: Any) -> int:
        """Epochs of which every row lies before a position."""
        ...

    def report(self, position: Any) -> dict[str, Any]:
        """Counts up to a position."""
        ...

    def decode_media(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """The batches with what is only loaded for the rank that trains on them: the patches of pictures."""
        ...

    def interrupt(self) -> None:
        """Wake a thread that waits inside rows(), so that it can end."""
        ...


class Loader:
    """Yields the batches of one rank. `build_loader` makes it; close it (or use it in a `with`) when done.

    The batches are made in a background thread, `prefetch_factor` steps ahead, and encoded in `dataloader_num_workers`
    processes if there are any. All of these end with close(), with the interpreter, and, should the trainer be killed,
    with it.
    """

    def __init__(self, feed: Feed, plan: Plan):
        self._feed, self._plan = feed, plan
        self._position: Position = feed.begin()  # behind the last step that next_step() returned
        self._reported: Position = self._position  # behind the last step or batch that was yielded
        self._running: list[Prefetcher[tuple[list[PackedBatch], Position]]] = []
        self._steps: Prefetcher[tuple[list[PackedBatch], Position]] | None = None
        # runs when the loader is collected, or at the interpreter's exit
        self._finalizer = weakref.finalize(self, _stop_all, self._running)

    def next_step(self) -> list[PackedBatch]:
        """This rank's microbatches of the next step. StopIteration at the end of training; DataError names the file and
        line of a sample that cannot be read.
        """
        if self._steps is None:
            self._steps = self._start(self._position, self._plan.accumulation)
        batches, self._position = self._steps.next()
        self._reported = self._position
        return batches

    def batches(self, limit: int = -1) -> Generator[PackedBatch, None, None]:
        """For evaluation: this rank's batches of one pass over the data, or of its first `limit` * batch_size rows if
        `limit` is positive, however many ranks share them. Every rank gets the same number.
        """
        steps = self._start(self._feed.begin(), 1, limit * self._plan.batch_size if limit > 0 else None)
        try:
            while True:
                try:
                    batches, self._reported = steps.next()
                except StopIteration:
                    return
                yield from batches
        finally:
            self._stop(steps)

    @property
    def feed(self) -> Feed:
        """Where the rows come from."""
        return self._feed

    @property
    def dataset(self) -> Dataset:
        """The records that are read, in the order of the files; token files have none."""
        assert isinstance(self._feed, RecordFeed), "token files have no records"
        return self._feed.dataset

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides which rows come in which order, under names that a user knows, as JSON values."""
        return self._feed.identity

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step that next_step() returned, which is not the last one prefetched."""
        return {"version": _VERSION, "position": self._position.to_dict(), "data": self._feed.identity}

    def changes(self, state: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """What a saved position depends on and what has changed since: (then, now) under names that a user knows. What
        an earlier version of this program did not save cannot be compared.
        """
        then, now = state.get("data"), self._feed.identity
        if state.get("version") != _VERSION or not isinstance(then, dict):
            return {"version of the data position": (state.get("version"), _VERSION)}
        return {key: (then[key], now.get(key)) for key in then if then[key] != now.get(key)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position. Ranks, batch size, accumulation and the number of epochs may have changed;
        the data and how it is ordered and packed may not (DataError says what did).
        """
        changed = [f"{key} was {then!r} and is now {now!r}" for key, (then, now) in self.changes(state).items()]
        if changed:
            raise DataError(
                f"the data position was saved for other data: {'; '.join(changed)}. "
                "Hint: restore these to continue where the run stopped, or set ignore_data_skip: true to read the data "
                "from its beginning."
            )
        try:
            position = self._feed.read_position(state["position"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"the data position cannot be read: {error!r}. Hint: set ignore_data_skip: true.") from None
        if self._steps is not None:
            self._stop(self._steps)
            self._steps = None
        self._position = self._reported = position

    def rows_left(self) -> float:
        """Rows, over all ranks, from the position of state_dict() to the end of num_train_epochs.

        The first call may encode samples to measure them: all, or, beyond `max_estimate_samples`, that many, and
        extrapolates; `exact` says which, and so does a log line. Token files need no measuring.
        """
        return self._feed.rows_left(self._position)

    def announce(self) -> None:
        """Log how large the rows of data with pictures are; rows_left() logs it, too."""
        if isinstance(self._feed, RecordFeed):
            self._feed.announce()

    @property
    def epochs_done(self) -> int:
        """Epochs of which next_step() has returned every row."""
        return self._feed.epochs_done(self._position)

    @property
    def exact(self) -> bool:
        """Whether rows_left counts rows; otherwise it estimates them."""
        return self._feed.exact

    def report(self) -> dict[str, Any]:
        """Counts up to the last step returned, over all ranks and since the start of training, before a resume too:
        samples, cut, dropped, bad_lines, rows, tokens, supervised_tokens, fill_rate, epoch, and what else the kind of
        data has (RecordFeed.report, TokenFeed.report).
        """
        return self._feed.report(self._reported)

    def close(self) -> None:
        """End the thread and the workers. A loader that is used again starts them again."""
        self._steps = None
        _stop_all(self._running)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(
        self, position: Position, accumulation: int, max_rows: int | None = None
    ) -> Prefetcher[tuple[list[PackedBatch], Position]]:
        # locals: the thread must not keep the loader alive
        feed, plan = self._feed, replace(self._plan, accumulation=accumulation)
        steps = Prefetcher(lambda: _steps(feed, plan, position, max_rows), plan.prefetch, feed.interrupt)
        self._running.append(steps)
        return steps

    def _stop(self, steps: Prefetcher[tuple[list[PackedBatch], Position]]) -> None:
        if steps in self._running:
            self._running.remove(steps)
        steps.stop()


def _stop_all(running: list[Prefetcher[Any]]) -> None:
    while running:
        running.pop().stop()


def _steps(
    feed: Feed, plan: Plan, position: Position, max_rows: int | None
) -> Generator[tuple[list[PackedBatch], Position], None, None]:
    """A rank's microbatches step by step, each with the position behind the step."""
    with closing(feed.rows(position)) as all_rows:
        rows = islice(all_rows, max_rows)
        while taken := list(islice(rows, plan.rows_per_step)):
            batches = _microbatches([row for row, _ in taken], plan)
            yield feed.decode_media(batches), taken[-1][1]


def _microbatches(rows: list[PackedBatch], plan: Plan) -> list[PackedBatch]:
    """A rank's share of a step's rows; a short step has fewer microbatches, but the same number on every rank."""
    size, share = plan.batch_size, plan.batch_size * plan.world
    starts = range(plan.rank * size, plan.rank * size + math.ceil(len(rows) / share) * share, share)
    return [join_rows(rows[start : start + size]) for start in starts]


def build_loader(
    cfg: Config,
    tokenizer: Tokenizer,
    split: str = "train",
    rank: int = 0,
    world: int = 1,
    template: Template | None = None,
    inspection: Inspection = EVERY_RECORD,
    accumulation: int | None = None,
    vision: VisionSpec | None = None,
) -> Loader:
    """Open and check the data of `split` ("train" or "eval") and make the loader of one rank of `world` data ranks.

    `cfg` has the configuration's data keys. With dataset_type: pretrain the rows come from token files (input_dir), for
    evaluation unless eval_dataset_path is given; otherwise from text. `template` is only for a chat template of one's
    own; None loads the one that cfg.chat_template and the tokenizer's directory name. Training follows mix_strategy,
    random_shuffle and num_train_epochs or max_steps. Evaluation reads every data set once, in the order of the files.
    `inspection` is how records are looked at first; `accumulation`: the microbatches of a training step, None:
    gradient_accumulation_steps; `vision`: how records with pictures are read, None: they are text. Raises DataError
    (file:line, reason, hint) for data that cannot be read and ConfigError for keys that do not go together.
    """
    training = split == "train"
    feed: RecordFeed | TokenFeed
    if cfg.dataset_type == "pretrain" and (training or not cfg.eval_dataset_path):
        feed = open_token_files(cfg, tokenizer, split)
    else:
        feed = open_text(cfg, tokenizer, split, template, inspection, vision)
    plan = Plan(
        batch_size=cfg.batch_size,
        accumulation=(accumulation or cfg.gradient_accumulation_steps) if training else 1,
        rank=rank,
        world=world,
        prefetch=cfg.prefetch_factor,
    )
    return Loader(feed, plan)
