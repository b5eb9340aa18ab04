"""The data pipeline from end to end: build_loader(cfg, ...) -> Loader, which gives each rank its microbatches step by
step.

files and sources (checked at the start) -> sampler (shuffles, mixes) -> encoder (tokens, labels) -> packing (rows) ->
batches (data/packed_batch.py).

Rows form one global stream. A step consists of G = batch_size * accumulation * world rows. Microbatch m of rank r has
rows (m * world + r) * batch_size + [0, batch_size) of the step, so layouts with the same G have the same rows in the
same step. Nothing is padded or left out at the end of an epoch: a step may contain the last rows of one epoch and the
first rows of the next. Only the last step of a training may have fewer rows. It has as many microbatches as its rows
need, the same number on every rank; a rank without a row in one of them gets a batch without tokens.
"""

import weakref
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from erniekit.config import Config
from erniekit.data.chat.encode import Template, Tokenizer
from erniekit.data.mixed_feed import MixedFeed
from erniekit.data.packed_batch import PackedBatch, join_rows
from erniekit.data.prefetch import Prefetcher
from erniekit.data.record_feed import EVERY_RECORD, Inspection, RecordFeed, open_text
from erniekit.data.records.dataset import Dataset
from erniekit.data.tokens.feed import open_token_files
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
        """The number of rows in a step, over all ranks."""
        return self.batch_size * self.accumulation * self.world


class Position(Protocol):
    """A position between two rows of a feed."""

    def to_dict(self) -> dict[str, Any]:
        """The position as plain JSON values."""
        ...


class Feed(Protocol):
    """The source of a Loader's rows: one global stream, the same on every rank, which two threads may read at the same
    time. `identity` has everything that its rows depend on, under names that a user knows.
    """

    identity: dict[str, Any]

    @property
    def exact(self) -> bool:
        """Whether rows_left() is exact; otherwise it is an estimate."""
        ...

    def begin(self) -> Any:
        """The position before the first row."""
        ...

    def read_position(self, state: dict[str, Any]) -> Any:
        """The position that to_dict() has saved."""
        ...

    def rows(self, position: Any) -> Generator[tuple[PackedBatch, Any], None, None]:
        """Yields the rows after a position, each as a batch of one row, with the position after it."""
        ...

    def rows_left(self, position: Any) -> float:
        """The number of rows from a position to the end of num_train_epochs. The first call may have to measure the
        data, and logs the result.
        """
        ...

    def epochs_done(self, position: Any) -> int:
        """The number of epochs of which every row is before a position."""
        ...

    def report(self, position: Any) -> dict[str, Any]:
        """The counts up to a position."""
        ...

    def decode_media(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """Load the parts of batches that only the rank that trains on them needs: the patches of pictures."""
        ...

    def interrupt(self) -> None:
        """Wake a thread that waits inside rows(), so that it can end."""
        ...


class StepReport(NamedTuple):
    """What a step's data say of themselves: numbers for metrics.jsonl, lines for samples.jsonl, and numbers for
    metrics.jsonl that the user's functions named.
    """

    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    logged: Mapping[str, float] = MappingProxyType({})


class StepSource(Protocol):
    """The data of a training as the trainer and its checkpoints see them; Loader describes what they have in common."""

    @property
    def identity(self) -> dict[str, Any]: ...

    def next_step(self) -> list[PackedBatch]: ...

    def steps_left(self) -> int | None:
        """Optimizer steps from here to the end of num_train_epochs; None: they follow from rows_left."""
        ...

    def rows_left(self) -> float: ...

    def report_step(self) -> StepReport:
        """Numbers and lines about the step that next_step returned last."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def changes(self, state: dict[str, Any]) -> dict[str, tuple[Any, Any]]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def files(self) -> dict[str, bytes]:
        """Files of a checkpoint, by name, with what state_dict has no room for."""
        ...

    def load_files(self, directory: Path) -> None:
        """Read them again."""
        ...

    @property
    def exact(self) -> bool: ...

    @property
    def epochs_done(self) -> int: ...

    def announce(self) -> None: ...

    def report(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


class Loader:
    """Yields the batches of one rank. `build_loader` makes it; close it (or use it in a `with`) when done.

    A background thread makes the batches, `prefetch_factor` steps ahead, and `dataloader_num_workers` processes encode
    the records. They all end with close(), at the exit of the interpreter, and if the trainer is killed.
    """

    def __init__(self, feed: Feed, plan: Plan):
        self._feed, self._plan = feed, plan
        self._position: Position = feed.begin()  # after the last step that next_step() returned
        self._reported: Position = self._position  # after the last step or batch that was yielded
        self._running: list[Prefetcher[tuple[list[PackedBatch], Position]]] = []
        self._steps: Prefetcher[tuple[list[PackedBatch], Position]] | None = None
        # runs when the loader is garbage-collected, or at the interpreter's exit
        self._finalizer = weakref.finalize(self, _stop_all, self._running)

    def next_step(self) -> list[PackedBatch]:
        """This rank's microbatches of the next step. Raises StopIteration at the end of the training, or DataError with
        file and line for a sample that cannot be read.
        """
        if self._steps is None:
            self._steps = self._start(self._position, self._plan.accumulation)
        batches, self._position = self._steps.next()
        self._reported = self._position
        return batches

    def batches(self, limit: int = -1) -> Generator[PackedBatch, None, None]:
        """Yields this rank's batches of an evaluation: one pass over the data, or its first `limit` * batch_size rows
        over all ranks if `limit` is positive. Every rank gets the same number of batches.
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

    def evaluated_rows(self, limit: int = -1) -> Generator[PackedBatch, None, None]:
        """Yields the rows, each as a batch of one row without the pixels of its pictures, that `batches` of all ranks
        have together.
        """
        with closing(self._feed.rows(self._feed.begin())) as rows:
            for row, _ in islice(rows, limit * self._plan.batch_size if limit > 0 else None):
                yield row

    @property
    def feed(self) -> Feed:
        """The source of the rows."""
        return self._feed

    @property
    def dataset(self) -> Dataset:
        """The records, in the order of the files. It does not exist for token files."""
        assert isinstance(self._feed, RecordFeed | MixedFeed), "token files have no records"
        return self._feed.dataset

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the rows and their order depend on, as JSON values under names that a user knows."""
        return self._feed.identity

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step that next_step() returned; prefetched steps do not count."""
        return {"version": _VERSION, "position": self._position.to_dict(), "data": self._feed.identity}

    def changes(self, state: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The changes since a position was saved, among the things that it depends on: (then, now) under names that a
        user knows. Values that an earlier version did not save are not compared.
        """
        then, now = state.get("data"), self._feed.identity
        if state.get("version") != _VERSION or not isinstance(then, dict):
            return {"version of the data position": (state.get("version"), _VERSION)}
        return {key: (then[key], now.get(key)) for key in then if then[key] != now.get(key)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position. Ranks, batch size, accumulation and the number of epochs may have changed.
        Raises DataError if the data, or its order or packing, has changed.
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
        """The number of rows, over all ranks, from the position of state_dict() to the end of num_train_epochs.

        The first call may encode samples to measure them: all, or at most `max_estimate_samples`, from which it then
        extrapolates. `exact` and a log line say which. Token files need no measurement.
        """
        return self._feed.rows_left(self._position)

    def steps_left(self) -> int | None:
        """See StepSource."""
        return None

    def report_step(self) -> StepReport:
        """See StepSource."""
        return StepReport({}, [])

    def files(self) -> dict[str, bytes]:
        """See StepSource: the position is all that there is."""
        return {}

    def load_files(self, directory: Path) -> None:
        """See StepSource."""
        return

    def announce(self) -> None:
        """Log how large the rows of data with pictures are; rows_left() logs it, too."""
        if isinstance(self._feed, RecordFeed | MixedFeed):
            self._feed.announce()

    def require_samples(self) -> None:
        """Raise DataError for records of which nothing can be read, or which the chat template refuses; of many
        records some are looked at. Token files need no look.
        """
        if isinstance(self._feed, RecordFeed | MixedFeed):
            self._feed.require_samples()

    @property
    def epochs_done(self) -> int:
        """The number of epochs of which next_step() has returned every row."""
        return self._feed.epochs_done(self._position)

    @property
    def exact(self) -> bool:
        """Whether rows_left is exact; otherwise it is an estimate."""
        return self._feed.exact

    def report(self) -> dict[str, Any]:
        """The counts up to the last returned step, over all ranks and since the start of the training, also before a
        resume: samples, cut, dropped, bad_lines, rows, tokens, supervised_tokens, fill_rate, epoch, and further counts
        of the kind of data (RecordFeed.report, TokenFeed.report).
        """
        return self._feed.report(self._reported)

    def close(self) -> None:
        """End the thread and the workers. They start again if the loader is used again."""
        self._steps = None
        _stop_all(self._running)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(
        self, position: Position, accumulation: int, max_rows: int | None = None
    ) -> Prefetcher[tuple[list[PackedBatch], Position]]:
        # use locals only: a reference to self in the thread would keep the loader alive
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
    """Yields a rank's microbatches step by step, with the position after each step."""
    with closing(feed.rows(position)) as all_rows:
        rows = islice(all_rows, max_rows)
        for first in rows:
            batches, position = _microbatches(chain([first], islice(rows, plan.rows_per_step - 1)), plan)
            yield feed.decode_media(batches), position


def _microbatches(rows: Iterable[tuple[PackedBatch, Position]], plan: Plan) -> tuple[list[PackedBatch], Position]:
    """A rank's share of a step's rows, with the position after the last of them all; the rows of other ranks are
    dropped as they come. A short step has fewer microbatches, but the same number on every rank.
    """
    own: list[list[PackedBatch]] = []
    for number, (row, after) in enumerate(rows):
        place = number % (plan.batch_size * plan.world)
        if place == 0:
            own.append([])
        if place // plan.batch_size == plan.rank:
            own[-1].append(row)
        position = after
    return [join_rows(batch) for batch in own], position


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
    """Open and check the data of `split` ("train", "eval" or "calibration") and make the loader of one rank of `world`
    data ranks.

    `cfg` has the configuration's data keys. With dataset_type: pretrain, training rows come from token files
    (input_dir), and so do evaluation rows unless eval_dataset_path is given; otherwise rows come from text. `template`
    is for a custom chat template; None loads the one that cfg.chat_template and the tokenizer's directory select.
    Training follows mix_strategy, random_shuffle and num_train_epochs or max_steps. Evaluation reads every data set
    once, in the order of the files. Calibration reads the keys of training. `inspection`: how records are checked
    first. `accumulation`: the microbatches of a training step, by default gradient_accumulation_steps. `vision`: the
    options for records with pictures; None: all records are text. Raises DataError (file:line, reason, hint) for data
    that cannot be read and ConfigError for keys that contradict each other.
    """
    training = split == "train"
    feed: Feed
    if cfg.dataset_type == "pretrain" and (training or not cfg.eval_dataset_path):
        feed = open_token_files(cfg, tokenizer, split)
    else:
        feed = open_text(cfg, tokenizer, split, template, inspection, vision)
        if training and vision is not None and cfg.text_dataset_path and cfg.method.reads("text_dataset_path"):
            feed = _with_text(cfg, feed, open_text(text_keys(cfg), tokenizer, split, template, inspection), world)
    plan = Plan(
        batch_size=cfg.batch_size,
        accumulation=(accumulation or cfg.gradient_accumulation_steps) if training else 1,
        rank=rank,
        world=world,
        prefetch=cfg.prefetch_factor,
    )
    return Loader(feed, plan)


def text_keys(cfg: Config) -> Config:
    """The configuration of the text that text_dataset_path names, as if it were all of the data. It has no end."""
    return replace(
        cfg,
        train_dataset_path=cfg.text_dataset_path,
        train_dataset_type=cfg.text_dataset_type,
        train_dataset_prob=cfg.text_dataset_prob,
        truncation="drop" if cfg.truncation == "shrink" else cfg.truncation,
        max_steps=max(cfg.max_steps, 1),
    )


def _with_text(cfg: Config, pictures: RecordFeed, text: RecordFeed, world: int) -> MixedFeed:
    """Rows with pictures and of text by turns."""
    microbatch = cfg.batch_size * world
    block = {"acc": microbatch, "batch": microbatch * cfg.gradient_accumulation_steps, "mixed": 1}
    with_pictures, of_text = cfg.modality_ratio or (1, 1)
    interleave = cfg.modality_interleave
    return MixedFeed(pictures, text, (with_pictures, of_text), block[interleave], interleave)
