"""Checks the data files with the readers of the training: bad records, lengths, steps, duplicates, one example."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from erniekit import hub
from erniekit.cli.check import preview, survey
from erniekit.cli.check.contact_sheet import Tile, write_sheet
from erniekit.cli.check.model import ModelFacts
from erniekit.cli.check.report import Level, Report, Section
from erniekit.config import Config
from erniekit.config.methods import Records
from erniekit.config.token_files import weighted_prefixes
from erniekit.data.chat.tokenizer import Tokenizer
from erniekit.data.evaluated_kinds import require_metric
from erniekit.data.lengths import Lengths
from erniekit.data.loader import Feed, Loader, build_loader
from erniekit.data.mixed_feed import MixedFeed
from erniekit.data.record_feed import Inspection, RecordFeed, specs_of
from erniekit.data.records.dataset import Dataset, Source, SourceSpec, with_pictures
from erniekit.data.records.find_files import find_files
from erniekit.data.records.readers import load_record
from erniekit.data.tokens.files import TokenFile, strip_suffix
from erniekit.data.vision.options import unsized_spec
from erniekit.training.batch_warmup import last_step, repeats_line
from erniekit.training.short_runs import warn_if_too_short
from erniekit.utils import atomic
from erniekit.utils.errors import UserError
from erniekit.utils.wording import count_of

# Limits that let a check end in seconds. Larger data is sampled, and the report says so.
CHECKED_BYTES = 64 << 20  # records are parsed and validated at about 20 MB/s
MEASURED_SAMPLES = 5_000  # tokenised for their lengths
COMPARED_RECORDS = 100_000  # of each split, for duplicates
_MANY_EPOCHS = 50
_ANY_ID = 2**31  # more than any id of a token file, which has at most 32 bits
_WITHOUT_ERROR = {"error": "drop"}  # samples that are too long are counted, and then called errors


@dataclass(frozen=True)
class CheckOptions:
    """What a check does in addition: decode every picture, and show `preview` records from number `first` on as the
    model gets them, with their pictures in the file `sheet`; also as JSON in the file `records`.
    """

    decode: bool = False
    preview: int = 0
    sheet: Path = Path("preview.png")
    first: int = 1
    records: Path | None = None


DEFAULT_OPTIONS = CheckOptions()


@dataclass
class Steps:
    """The number of steps of the training and of an epoch; None where the data does not determine it."""

    total: int | None = None
    per_epoch: int | None = None


def inspect(
    report: Report, cfg: Config, command: str, facts: ModelFacts, options: CheckOptions = DEFAULT_OPTIONS
) -> Steps:
    """Add a section for each split that `command` reads, one for duplicates and one with examples."""
    tiles: list[Tile] = []
    steps = Steps(total=cfg.max_steps if cfg.max_steps > 0 else None)
    opened: dict[str, Dataset] = {}
    written: preview.Written | None = None if options.records is None else []
    for split in _splits(cfg, command):
        section = report.section(f"{split} data")
        if not _is_local(section, cfg, split):
            continue
        tokenizer = _usable_tokenizer(cfg, facts)
        if tokenizer is None:
            _check_records(section, cfg, split, opened)
        elif cfg.method.records is Records.PROMPTS:
            from erniekit.cli.check import prompts  # imports Paddle

            found, counted = prompts.inspect(section, cfg, split, facts, options.decode)
            steps.total = steps.total or counted
            if found is not None:
                opened[split] = found.dataset
            if found is not None and (options.preview or not report.count("error")):
                count = options.preview or 1
                tiles += prompts.show(report, found, tokenizer, cfg.answer_key, split, count, options.first, written)
        else:
            feed = _rows(report, section, cfg, split, facts, options, steps, opened)
            tiles += _show(report, section, feed, split, tokenizer, options, written)
        _warn_if_too_short(section, cfg, split, steps)
    _draw(report, tiles, options)
    if options.records is not None:
        atomic.write_json(options.records, written)
    _duplicates(report, opened)
    return steps


def _rows(
    report: Report,
    section: Section,
    cfg: Config,
    split: str,
    facts: ModelFacts,
    options: CheckOptions,
    steps: Steps,
    opened: dict[str, Dataset],
) -> Feed | None:
    """Check the rows of a split -> where they come from; None where that cannot be opened."""
    feed: Feed | None = None
    with section.collecting():
        ranks = 1 if facts.degrees is None else facts.degrees.batch
        loader = _open(cfg, split, facts, ranks)
        with closing(loader):
            feed, usable = loader.feed, True
            for name, part in _record_feeds(feed, split):
                opened[name] = part.dataset
                usable &= _records(section, cfg, part, bool(facts.vision) and name == split, options)
            if split == "train" and usable:
                _steps(section, cfg, loader, ranks, steps)
            if split == "eval" and usable and report.command == "train":
                require_metric(cfg, loader)
    return feed


def _show(
    report: Report,
    section: Section,
    feed: Feed | None,
    split: str,
    tokenizer: Tokenizer,
    options: CheckOptions,
    written: preview.Written | None,
) -> list[Tile]:
    """Show some records -> their pictures. `written` takes what is to be written."""
    tiles: list[Tile] = []
    feeds = _record_feeds(feed, split)
    if feed is not None and not feeds and (options.preview or written is not None):
        section.add("note", "token files hold no records, so there are none to show")
    if options.preview or not report.count("error"):
        for name, part in feeds:
            count = options.preview or 1
            tiles += preview.inspect(report, part, tokenizer, name, count, options.first, written)
    return tiles


def _usable_tokenizer(cfg: Config, facts: ModelFacts) -> Tokenizer | None:
    """The tokenizer with which records can be encoded; None where they cannot, as the section of the model, or of the
    tokenizer, says.
    """
    return None if cfg.method.vision and facts.vision is None else facts.tokenizer


def _draw(report: Report, tiles: list[Tile], options: CheckOptions) -> None:
    """Write the sheet of the pictures, if it is wanted."""
    if options.preview and tiles:
        write_sheet(tiles, options.sheet)
        report.section("pictures").add("ok", f"{options.sheet} shows them as the model sees them")


def _record_feeds(feed: Feed | None, split: str) -> list[tuple[str, RecordFeed]]:
    """The feeds of records that a feed consists of, with their names: text beside pictures has its own."""
    if isinstance(feed, MixedFeed):
        return [(split, feed.pictures), (f"{split} text", feed.text)]
    return [(split, feed)] if isinstance(feed, RecordFeed) else []


def _records(section: Section, cfg: Config, feed: RecordFeed, has_pictures: bool, options: CheckOptions) -> bool:
    """The records of a split and their lengths; whether one of them can be used, as far as that is known."""
    _faults(section, cfg, feed.dataset)
    if has_pictures:
        return survey.inspect(section, cfg, feed, options.decode)
    lengths = feed.lengths()
    feed.require_samples()
    _lengths(section, lengths, cfg)
    return True


def _splits(cfg: Config, command: str) -> list[str]:
    return {"train": ["train", "eval"] if cfg.do_eval else ["train"], "eval": ["eval"]}.get(command, [])


def _reads_text(cfg: Config, split: str) -> bool:
    return cfg.dataset_type != "pretrain" or (split == "eval" and bool(cfg.eval_dataset_path))


def _is_local(section: Section, cfg: Config, split: str) -> bool:
    """Whether all data sets are on this machine. A wrong path is an error."""
    if not _reads_text(cfg, split):
        return True
    missing: list[str] = []
    found = False
    with section.collecting():
        specs = specs_of(cfg, split)
        missing = [spec.path for spec in specs if hub.find_dataset(spec.path, f"{split}_dataset_path") is None]
        found = not missing
    for name in missing:
        section.add("note", f"{name} is not a local path: the command downloads it, and it is checked then")
    return found


def _inspection(specs: list[SourceSpec], split: str) -> Inspection:
    """Opens every record, or as many as the limit allows; bad records are collected instead of ending the check."""
    total = 0
    for spec in specs:
        path = hub.find_dataset(spec.path, f"{split}_dataset_path")
        assert path is not None, "_is_local has checked it"
        total += sum(file.stat().st_size for file in find_files(path)[0])
    return Inspection(max(1, math.ceil(total / CHECKED_BYTES)), gather_faults=True)


def _open(cfg: Config, split: str, facts: ModelFacts, ranks: int) -> Loader:
    """Opens the loader of the training, with at most a sample of lengths measured; bad lines are skipped."""
    assert facts.tokenizer is not None
    once = replace(_counted(cfg), max_estimate_samples=min(cfg.max_estimate_samples, MEASURED_SAMPLES))
    if facts.vision is not None:  # every record is encoded, and what is wrong is gathered
        once = replace(once, on_bad_line="skip")
    if not _reads_text(cfg, split):
        return build_loader(once, facts.tokenizer, split, 0, ranks)
    inspection = _inspection(specs_of(cfg, split), split)
    vision = facts.vision and replace(facts.vision, truncation=_WITHOUT_ERROR.get(cfg.truncation, cfg.truncation))
    return build_loader(once, facts.tokenizer, split, 0, ranks, facts.template, inspection, vision=vision)


def _check_records(section: Section, cfg: Config, split: str, opened: dict[str, Dataset]) -> None:
    """Reports the records only, without lengths, since there is no tokenizer."""
    if not _reads_text(cfg, split):
        _token_files(section, cfg)
        return
    with section.collecting():
        specs = specs_of(cfg, split)
        inspection = _inspection(specs, split)
        vision = None
        if cfg.method.vision:
            specs, vision = with_pictures(specs), unsized_spec(cfg)
        sources = [Source(spec, split, "gather", cfg.download_hub, inspection.every, vision) for spec in specs]
        opened[split] = Dataset(sources)
        section.add("ok", opened[split].describe("record"))
        _faults(section, cfg, opened[split])


def _token_files(section: Section, cfg: Config) -> None:
    """Reports the files of input_dir; whether their ids are the tokenizer's cannot be known without it."""
    with section.collecting():
        for prefix in dict.fromkeys(strip_suffix(prefix) for _, prefix in weighted_prefixes(cfg.input_dir)):
            file = TokenFile(prefix, _ANY_ID)
            section.add("ok", f"{prefix}: {count_of(file.num_documents, 'document')}, {file.num_tokens} tokens")


def _faults(section: Section, cfg: Config, dataset: Dataset) -> None:
    """Reports bad lines as errors, or as warnings if the configuration skips them."""
    level: Level = "error" if cfg.on_bad_line == "error" else "warning"
    for source in dataset.sources:
        for fault in source.faults:
            section.add(level, fault)
        more = source.bad_lines - len(source.faults)
        if more > 0:
            section.add(level, f"{source.spec.path}: {count_of(more, 'more bad line')}")
        every = source.check_every
        if every > 1:
            section.add(
                "note",
                f"{source.spec.path}: one record of {every} was checked, since the files of this split have more than "
                f"{CHECKED_BYTES >> 20} MB; training checks all of them",
            )


def _lengths(section: Section, lengths: Lengths, cfg: Config) -> None:
    tokens = lengths.tokens
    middle, high = (int(np.quantile(tokens, q)) for q in (0.5, 0.95))
    measured = "all samples" if lengths.exact else f"{lengths.num_measured} of {len(lengths.starts)} samples"
    section.add(
        "ok",
        f"tokens of {measured}: median {middle}, 95 % have at most {high}, the longest {int(tokens.max())} "
        f"(max_seq_len {cfg.max_seq_len}); {lengths.num_dropped} dropped, {lengths.num_truncated} cut",
    )
    if lengths.num_dropped * 10 > lengths.num_measured:
        share = lengths.num_dropped / lengths.num_measured
        instead = ", or set truncation: cut" if cfg.truncation == "drop" else ""
        section.add(
            "warning",
            f"{share:.0%} of the samples are dropped: too long for max_seq_len (raise it{instead}), or without "
            "anything to learn (look at their answers)",
        )


def _steps(section: Section, cfg: Config, loader: Loader, data_ranks: int, steps: Steps) -> None:
    """Reports the steps of the training and the number of epochs. Data that is drawn at random has no epochs."""
    if cfg.mix_strategy == "random" and _reads_text(cfg, "train"):
        section.add("ok", f"training: {count_of(cfg.max_steps, 'step')} of samples drawn by mix_strategy: random")
        return
    counted = last_step(_counted(cfg), loader, data_ranks)
    rows = cfg.batch_size * cfg.gradient_accumulation_steps * data_ranks
    of_epoch = max(loader.rows_left() / _counted(cfg).num_train_epochs, 1.0)
    if cfg.max_steps > 0:
        steps.per_epoch, steps.total = counted, cfg.max_steps
        epochs = steps.total * rows / of_epoch if rows > of_epoch else steps.total / max(counted, 1)
    else:
        steps.per_epoch, steps.total = math.ceil(counted / cfg.num_train_epochs), counted
        epochs = cfg.num_train_epochs
    about = "" if loader.exact else "about "
    total = f"{'' if cfg.max_steps > 0 else about}{count_of(steps.total, 'step')}"
    section.add(
        "ok",
        f"training: {total}; an epoch is {about}{count_of(steps.per_epoch, 'step')}: "
        f"{count_of(float(epochs), 'epoch')}",
    )
    if min(rows, epochs * of_epoch) >= 2 * of_epoch:
        section.add("warning", repeats_line(rows))
    if epochs > _MANY_EPOCHS:
        section.add("warning", f"max_steps: {cfg.max_steps} reads the data {epochs:.0f} times")


def _warn_if_too_short(section: Section, cfg: Config, split: str, steps: Steps) -> None:
    if split == "train" and steps.total is not None:
        with section.collecting():
            warn_if_too_short(cfg, steps.total)


def _counted(cfg: Config) -> Config:
    """The configuration whose steps are counted: one epoch, if max_steps decides the length of the real training."""
    if cfg.max_steps <= 0 or (cfg.mix_strategy == "random" and _reads_text(cfg, "train")):
        return cfg
    return replace(cfg, max_steps=-1, num_train_epochs=1.0)


def _duplicates(report: Report, opened: dict[str, Dataset]) -> None:
    """Reports records that occur twice in a split, and evaluation records that also occur in the training data."""
    if not opened:
        return
    section = report.section("duplicates")
    places_of_split: dict[str, dict[bytes, str]] = {}
    for split, dataset in opened.items():
        places: dict[bytes, str] = {}
        count, first = 0, ""
        for digest, place in _digests(dataset):
            if digest in places:
                count += 1
                first = first or f"{place} repeats {places[digest]}"
            else:
                places[digest] = place
        places_of_split[split] = places
        looked = min(len(dataset), COMPARED_RECORDS)
        note = "" if looked == len(dataset) else f" (the first {looked} of {len(dataset)} were compared)"
        if count:
            section.add("warning", f"{split} data: {count} of the records repeat an earlier one: {first}{note}")
        else:
            section.add("ok", f"{split} data: no record repeats another{note}")
    if {"train", "eval"} <= places_of_split.keys():
        common = places_of_split["train"].keys() & places_of_split["eval"].keys()
        if common:
            digest = next(digest for digest in places_of_split["eval"] if digest in common)
            section.add(
                "warning",
                f"{len(common)} of the evaluation's records are also trained on: "
                f"{places_of_split['eval'][digest]} repeats {places_of_split['train'][digest]}",
            )
        else:
            section.add("ok", "no record of the evaluation is trained on")


def _digests(dataset: Dataset) -> Iterator[tuple[bytes, str]]:
    """A short hash of each record's content, independent of the order of its fields, and the record's place."""
    for number in range(min(len(dataset), COMPARED_RECORDS)):
        _, raw, place = dataset.record(number)
        try:
            text = json.dumps(load_record(raw, place), sort_keys=True, ensure_ascii=False, default=str)
        except UserError:  # a bad record that the sampled check did not see
            continue
        yield hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest(), place
