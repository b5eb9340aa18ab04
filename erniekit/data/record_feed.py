"""Yields rows made from text records: conversations and pretraining text, tokenised during training.

files and sources (checked at the start) -> order (shuffled, mixed) -> encode (tokens, labels) -> packing (rows).
"""

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from erniekit.config import Config
from erniekit.data.chat import template as chat
from erniekit.data.chat import tokenizer as text_tokenizer
from erniekit.data.chat.encode import Encoded, Template, Tokenizer, template_hash
from erniekit.data.lengths import Lengths, choose_sample, measure_lengths
from erniekit.data.packed_batch import PackedBatch
from erniekit.data.packed_stream import PackedStream, Position
from erniekit.data.packing import Packer, greedy, no_packing, sequential
from erniekit.data.records.dataset import Dataset, Source, SourceSpec, length_key, path_key, read_specs, with_pictures
from erniekit.data.sampler import Sampler
from erniekit.data.vision.decode import MediaDecoder
from erniekit.data.vision.encode import VisionSpec
from erniekit.data.vision.template import load_vision_template
from erniekit.data.workers import EncoderSpec, EncodingService
from erniekit.utils import log
from erniekit.utils.errors import DataError
from erniekit.utils.wording import count_of

_COUNTED = 100_000  # samples of an epoch that are packed to estimate its rows
_GLANCED = 2_000  # samples measured where max_steps decides the end, only to know their sizes
_WINDOW = 64  # samples read at a time where the packer does not care


@dataclass(frozen=True)
class Extent:
    """The length of the stream. `num_epochs` None: max_steps decides, and the stream is endless."""

    max_seq_len: int
    max_estimate_samples: int
    num_epochs: float | None
    # the size of an epoch of the strategy `random`, which has no natural one; None: an epoch is a round of the order
    samples_per_epoch: int | None


@dataclass(frozen=True)
class Inspection:
    """How records are checked when their files are opened: every `every`-th record. With `gather_faults` the errors of
    bad lines are collected (Source.faults), whatever on_bad_line says.
    """

    every: int = 1
    gather_faults: bool = False


EVERY_RECORD = Inspection()


class RecordFeed:
    """The feed of rows from text records, for a Loader (see loader.Feed)."""

    def __init__(
        self,
        dataset: Dataset,
        stream: PackedStream,
        service: EncodingService,
        extent: Extent,
        identity: dict[str, Any],
        decoder: MediaDecoder | None,
    ):
        self.dataset, self.identity, self._decoder = dataset, identity, decoder
        self._stream, self._service, self._extent = stream, service, extent
        self._lengths: Lengths | None = None
        self._measured: tuple[float, Lengths] | None = None
        self._left: tuple[Position, int] | None = None  # the last answer of rows_left()

    @property
    def exact(self) -> bool:
        """Whether `rows_left` is exact; otherwise it is an estimate."""
        measured = choose_sample(self.dataset, self._extent.max_estimate_samples)
        return len(measured) == len(self.dataset) and self._extent.samples_per_epoch is None

    def begin(self) -> Position:
        """The position before the first row."""
        return Position()

    def read_position(self, state: dict[str, Any]) -> Position:
        """The position that to_dict() has saved."""
        return Position.from_dict(state)

    def rows(self, position: Position) -> Generator[tuple[PackedBatch, Position], None, None]:
        """Yields the rows after `position`, each with the position after it."""
        return self._stream.rows(position)

    def decode_media(self, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """The batches with the pixels of their pictures."""
        return list(batches) if self._decoder is None else self._decoder.decode(batches)

    def interrupt(self) -> None:
        """End the workers of every stream, also while another thread waits for them."""
        self._service.stop()
        if self._decoder is not None:
            self._decoder.stop()

    def report(self, position: Position) -> dict[str, Any]:
        """samples (used), cut, dropped, bad_lines (skipped when the files were checked), rows, tokens,
        supervised_tokens, fill_rate (tokens / (rows * max_seq_len)), epoch. With pictures also shrunk, pictures and
        patches (see packed_stream.Counts); and of those that this process has decoded, undecodable and the notes about
        them with how often each was true (such as frames that were repeated).
        """
        counts = asdict(position.counts)
        fill_rate = counts["tokens"] / (counts["rows"] * self._extent.max_seq_len) if counts["rows"] else 0.0
        pictures = {name: counts.pop(name) for name in ("shrunk", "pictures", "patches")}
        if self._decoder is not None:
            counts |= pictures | {"undecodable": self._decoder.failures, "media_notes": dict(self._decoder.doubts)}
        return {
            **counts,
            "bad_lines": self.dataset.bad_lines,
            "fill_rate": round(fill_rate, 4),
            "epoch": round(self._epoch(position), 4),
        }

    def _epoch(self, position: Position) -> float:
        if self._extent.samples_per_epoch is not None:
            return (position.counts.samples + position.counts.dropped) / self._extent.samples_per_epoch
        return self._stream.epochs(position)

    def lengths(self) -> Lengths:
        """The numbers of tokens of all samples, measured at the first call (see data.lengths)."""
        if self._lengths is None:
            most = self._extent.max_estimate_samples
            if self._extent.num_epochs is None:
                most = min(most, _GLANCED)
            self._lengths = measure_lengths(self.dataset, self._service, most)
        return self._lengths

    def require_samples(self) -> None:
        """Encode the samples, of many records some of them: DataError if the chat template refuses one of them, or if
        nothing is left of any record.
        """
        most = min(self._extent.max_estimate_samples, _GLANCED)
        self._require_some(self._lengths or measure_lengths(self.dataset, self._service, most))

    def _require_some(self, lengths: Lengths) -> None:
        if lengths.num_dropped < lengths.num_measured:
            return
        hint = "raise the limit that they name; truncation decides what becomes of longer samples"
        if self._decoder is not None:
            hint = "the lines above say which max_seq_len or max_pixels would do"
        paths = ", ".join(source.spec.path for source in self.dataset.sources)
        raise DataError(
            f"{paths}: none of {count_of(lengths.num_measured, 'sample')} can be used ({lengths.num_dropped} "
            f"dropped). Hint: the lines above say why; {hint}."
        )

    def encode(self, numbers: Iterable[int], num_workers: int | None = None) -> Generator[Encoded, None, None]:
        """The documents that records become; `num_workers`: the least number of processes that encode."""
        return self._service.stream(numbers, num_workers)

    def announce(self) -> None:
        """Log, before training, what rows_left() would log, for data with pictures: how large its largest row is
        decides whether a step fits into memory. Where max_steps decides the end, of a few samples only.
        """
        if self._decoder is not None:
            self._measure()

    def epochs_done(self, position: Position) -> int:
        """The number of epochs of which every row has been yielded."""
        return position.rounds_done if self._extent.samples_per_epoch is None else int(self._epoch(position))

    def rows_left(self, position: Position) -> float:
        """The number of rows from `position` to the end of num_train_epochs. If the lengths are estimated, a margin is
        added, so that the training reads all data and ends where the data does.
        """
        epochs = self._extent.num_epochs
        assert epochs is not None, "rows_left is not needed if max_steps decides the end"
        if self._stream.is_at_end(position):
            return 0.0
        rows, lengths = self._measure()
        if lengths.exact:
            if self._left is None or self._left[0] != position:
                self._left = position, self._stream.rows_left(position, lengths)  # packs all of the data
            return float(self._left[1])
        # larger than the expected error with a sample of this size
        margin = 0.005 + 0.25 / math.sqrt(lengths.num_measured)
        left = rows * (epochs - self._stream.epochs(replace(position, emitted=0))) - position.emitted
        return max(0.0, left) + rows * epochs * margin

    def _measure(self) -> tuple[float, Lengths]:
        """The rows of the first epoch and the lengths of all samples (see data.lengths); the result is logged."""
        if self._measured is not None:
            return self._measured
        stream, extent = self._stream, self._extent
        lengths = self.lengths()
        self._require_some(lengths)
        ids = len(stream.ids(0))
        if not ids:
            raise DataError(
                f"num_train_epochs: {extent.num_epochs:g}: less than one sample, since an epoch has "
                f"{stream.round_length(0)}. Hint: raise num_train_epochs, or set max_steps."
            )
        limit = ids if lengths.exact else min(ids, _COUNTED)
        epoch_samples = extent.samples_per_epoch or stream.round_length(0)
        sizes = list(stream.row_sizes(0, lengths, limit))
        rows = len(sizes) * epoch_samples / limit
        shrunk = f", {lengths.num_shrunk} with smaller pictures" if lengths.num_shrunk else ""
        estimated = "" if lengths.exact else " (estimated)"
        log.info(
            f"data: {count_of(lengths.num_measured, 'sample')} measured ({lengths.num_dropped} dropped, "
            f"{lengths.num_truncated} cut{shrunk}), {count_of(lengths.total_tokens, 'token')}{estimated}; an epoch is "
            f"{count_of(epoch_samples, 'sample')} in {count_of(round(rows), 'row')} "
            f"({_basis_of_estimate(lengths, self.exact)})"
        )
        if self._decoder is not None and sizes:
            tokens, patches = (max(size[i] for size in sizes) for i in (0, 1))
            log.info(
                f"data: the largest rows of an epoch have {tokens:,} tokens and {patches:,} patches of "
                f"pictures{estimated}"
            )
        self._measured = rows, lengths
        return self._measured


def _basis_of_estimate(lengths: Lengths, exact: bool) -> str:
    if lengths.exact:
        return "exact" if exact else "estimated from all samples"
    return f"estimated from {count_of(lengths.num_measured, 'sample')}"


def specs_of(cfg: Config, split: str) -> list[SourceSpec]:
    """The text data sets that a configuration names for `split` ("train", "eval" or "calibration")."""
    keys = _split_keys(cfg, split)
    specs = read_specs(keys.paths, keys.types, keys.probs, split, cfg.method)
    readers = (key for key in ("offset_alpha", "reward_margin") if cfg.method.reads(key) and vars(cfg)[key])
    return [replace(spec, scored_by=next(readers, "")) for spec in specs]


def open_text(
    cfg: Config,
    tokenizer: Tokenizer,
    split: str,
    template: Template | None,
    inspection: Inspection = EVERY_RECORD,
    vision: VisionSpec | None = None,
) -> RecordFeed:
    """Open and check the records of `split`; see loader.build_loader."""
    keys, specs = _split_keys(cfg, split), specs_of(cfg, split)
    if vision is not None:
        specs = with_pictures(specs)
        vision = vision if split == "train" else replace(vision, drawn_bounds=None)  # only a training draws
    on_bad_line = "gather" if inspection.gather_faults else cfg.on_bad_line
    dataset = Dataset([Source(spec, split, on_bad_line, cfg.download_hub, inspection.every, vision) for spec in specs])
    log.info(f"{split} data: {dataset.describe('sample')}")
    _warn_of_one_judgement(cfg, dataset, split)
    packer, window = _packer(cfg)
    if template is None and not _is_plain(specs):
        assert isinstance(tokenizer, text_tokenizer.Tokenizer), "other tokenizers are passed together with a template"
        load = chat.load_template if vision is None else load_vision_template
        template = load(tokenizer, cfg.chat_template)
    spec = EncoderSpec(
        tokenizer,
        cfg.max_seq_len,
        cfg.truncation,
        cfg.on_bad_line,
        cfg.max_prompt_len if cfg.method.reads("max_prompt_len") else None,
        template,
        vision=vision,
        length_key=length_key(split),
    )
    remember = len(dataset) <= cfg.max_estimate_samples
    service = EncodingService(dataset, spec, cfg.dataloader_num_workers, remember)
    order = Sampler(dataset.sizes, [spec.prob for spec in specs], keys.strategy, cfg.seed, keys.shuffle)
    stream = PackedStream(order, service, packer, window, cfg.max_seq_len, keys.num_epochs)
    samples = cfg.num_samples_each_epoch if order.endless else None
    extent = Extent(cfg.max_seq_len, cfg.max_estimate_samples, keys.num_epochs, samples)
    identity = _identity(cfg, specs, dataset, packer) | {
        f"content of {path_key(split)}": dataset.digests,
        "tokenizer": tokenizer.fingerprint,
        "chat template": None if _is_plain(specs) else template_hash(template),
    }
    if vision is not None:
        identity["pictures"] = repr(vision)
    decoder = None if vision is None else MediaDecoder(cfg.dataloader_num_workers, cfg.on_bad_line)
    return RecordFeed(dataset, stream, service, extent, identity, decoder)


def _warn_of_one_judgement(cfg: Config, dataset: Dataset, split: str) -> None:
    """Warn if all answers to train on are judged alike."""
    if split == "train" and len(dataset.judgements) == 1:
        log.warning(
            f"{path_key(split)}: every answer is judged {'good' if dataset.judgements.pop() else 'bad'}. stage: "
            f"{cfg.method.name} learns what sets good answers apart from bad ones, so give it both (stage: SFT learns "
            "from good ones alone)"
        )


def _is_plain(specs: list[SourceSpec]) -> bool:
    """Whether no record needs a chat template."""
    return all(spec.type == "text" for spec in specs)


def training_template(
    cfg: Config, tokenizer: text_tokenizer.Tokenizer, sees_pictures: bool = False
) -> chat.Template | None:
    """The chat template of a run; None if all data is plain text and no template is named. `sees_pictures`: the model
    is a vision-language model, which has one template for conversations with and without pictures.
    """
    specs: list[SourceSpec] = []
    if cfg.dataset_type != "pretrain":
        specs += specs_of(cfg, "train")
    if cfg.eval_dataset_path:
        specs += specs_of(cfg, "eval")
    if cfg.chat_template is None and _is_plain(specs):
        return None
    load = load_vision_template if sees_pictures else chat.load_template
    return load(tokenizer, cfg.chat_template)


@dataclass(frozen=True)
class _SplitKeys:
    """The keys of the configuration about the data of a split."""

    paths: tuple[str, ...]
    types: tuple[str, ...]
    probs: tuple[float, ...]
    strategy: str
    shuffle: bool
    num_epochs: float | None


def _split_keys(cfg: Config, split: str) -> _SplitKeys:
    if split != "eval":  # calibration has its data under the same keys
        paths, types, probs = cfg.train_dataset_path, cfg.train_dataset_type, cfg.train_dataset_prob
        num_epochs = None if cfg.max_steps > 0 else float(cfg.num_train_epochs)
        return _SplitKeys(paths, types, probs, cfg.mix_strategy, cfg.random_shuffle, num_epochs)
    paths, types, probs = cfg.eval_dataset_path, cfg.eval_dataset_type, cfg.eval_dataset_prob
    return _SplitKeys(paths, types, probs, "concat", False, 1.0)


def _packer(cfg: Config) -> tuple[Packer, int]:
    """The packer that the configuration selects, and the number of samples in its window."""
    if not cfg.packing:
        return no_packing, _WINDOW
    return (greedy, cfg.buffer_size) if cfg.greedy_intokens else (sequential, _WINDOW)


def _identity(cfg: Config, specs: list[SourceSpec], dataset: Dataset, packer: Packer) -> dict[str, Any]:
    """Everything that decides which rows the stream yields, under names that a user knows."""
    identity = {
        "seed": cfg.seed,
        "random_shuffle": cfg.random_shuffle,
        "mix_strategy": cfg.mix_strategy,
        "train_dataset_type": [spec.type for spec in specs],
        "train_dataset_prob": [spec.prob for spec in specs],
        "number of samples": dataset.sizes,
        "max_seq_len": cfg.max_seq_len,
        "truncation": cfg.truncation,
        "packing": packer.__name__,
        "buffer_size": cfg.buffer_size if packer is greedy else None,
    }
    return identity | ({"max_prompt_len": cfg.max_prompt_len} if cfg.method.reads("max_prompt_len") else {})
