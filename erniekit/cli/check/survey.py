"""Data with pictures: every record encoded as in training, with the sizes that the headers of its pictures say."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

from erniekit.cli.check.report import Level, Section
from erniekit.config import Config
from erniekit.data.chat.encode import Encoded
from erniekit.data.record_feed import RecordFeed
from erniekit.data.vision.decode import MediaDecoder
from erniekit.data.vision.plan import MediaPlan
from erniekit.data.vision.smart_resize import MAX_RATIO
from erniekit.utils import log
from erniekit.utils.progress import track
from erniekit.utils.runtime import num_cores
from erniekit.utils.wording import count_of

_FEW_RECORDS = 400  # are encoded sooner than workers have started
_SHOWN = 10  # of the records with one kind of fault; the others are only counted
_DECODED_AT_ONCE = 64  # pictures that are sent to the workers at a time


class _Most(NamedTuple):
    """The largest number of something, and the place of the record that has it."""

    amount: int = 0
    where: str = ""


_NOTHING = _Most()


@dataclass
class Survey:
    """What all records of a split are, and what is wrong with them."""

    samples: int = 0
    cut: int = 0
    shrunk: int = 0
    bad: int = 0
    too_long: int = 0
    without_loss: int = 0
    first_bad: list[str] = field(default_factory=list)
    first_without_loss: str = ""
    needed: _Most = _NOTHING
    needed_reason: str = ""
    tokens: list[int] = field(default_factory=list)
    longest: _Most = _NOTHING
    most_patches: _Most = _NOTHING
    pictures: int = 0
    videos: int = 0
    frames: int = 0
    made_smaller: int = 0
    too_narrow: int = 0
    first_too_narrow: str = ""
    vision_tokens: int = 0

    def add(self, record: Encoded) -> None:
        """Count one record."""
        if record.bad:
            self.bad += 1
            if self.bad <= _SHOWN:
                self.first_bad.append(f"{record.where}: {record.dropped}")
        elif record.needed:
            self.too_long += 1
            if record.needed > self.needed.amount:
                self.needed = _Most(record.needed, record.where)
                self.needed_reason = record.dropped
        elif record.dropped:
            self.without_loss += 1
            self.first_without_loss = self.first_without_loss or f"{record.where}: {record.dropped}"
        else:
            self._add_used(record)

    def _add_used(self, record: Encoded) -> None:
        self.samples += 1
        self.cut += record.cut
        self.shrunk += record.shrunk
        lengths = [len(document.ids) for document in record.documents]
        self.tokens += lengths
        self.longest = max(self.longest, _Most(max(lengths), record.where), key=_amount)
        patches = max(document.num_patches for document in record.documents)
        self.most_patches = max(self.most_patches, _Most(patches, record.where), key=_amount)
        for plan in media_of(record):
            self.pictures += plan.frames is None
            self.videos += plan.frames is not None
            self.frames += plan.frames or 0
            self.made_smaller += plan.width * plan.height > plan.limits.max_pixels
            if max(plan.width, plan.height) > MAX_RATIO * min(plan.width, plan.height):
                self.too_narrow += 1
                self.first_too_narrow = self.first_too_narrow or f"{record.where}: {plan.name}"
            self.vision_tokens += plan.geometry.tokens


def _amount(most: _Most) -> int:
    return most.amount


def media_of(record: Encoded) -> list[MediaPlan]:
    """The pictures and videos of a record, each once: a record may have become several documents."""
    tables = [document.pictures for document in record.documents if document.pictures is not None]
    return list({id(plan): plan for table in tables for plan in table.sources}.values())


def inspect(section: Section, cfg: Config, feed: RecordFeed, decode: bool) -> bool:
    """Add what is found in all records of a feed; with `decode` also what decoding every picture and video finds.
    Whether there is a sample to train on.
    """
    survey, decoding = Survey(), Decoding()
    with log.captured():  # what the loader says of records that are left out is reported here
        _look(feed, survey, decoding if decode else None)
    _report(section, cfg, survey)
    if decode:
        decoding.report(section, _level(cfg))
    return survey.samples > 0


def _look(feed: RecordFeed, survey: Survey, decoding: "Decoding | None") -> None:
    """Encode all records, and decode their media if that is wanted."""
    size, decode = len(feed.dataset), decoding is not None
    decoder = MediaDecoder(num_cores() if decode else 0, "skip", keep=False)
    try:
        with closing(feed.encode(range(size), num_cores() if size > _FEW_RECORDS else None)) as records:
            shown = track(records, size, "data: checking pictures" if not decode else "data: decoding pictures")
            while some := list(islice(shown, _DECODED_AT_ONCE)):
                for record in some:
                    survey.add(record)
                if decoding is not None:
                    decoding.add(some, decoder)
    finally:
        decoder.stop()


def decode(section: Section, cfg: Config, records: Iterable[Encoded]) -> None:
    """Add what decoding every picture and video of records finds."""
    decoding, decoder, rest = Decoding(), MediaDecoder(num_cores(), "skip", keep=False), iter(records)
    try:
        while some := list(islice(rest, _DECODED_AT_ONCE)):
            decoding.add(some, decoder)
    finally:
        decoder.stop()
    decoding.report(section, _level(cfg))


def _level(cfg: Config) -> Level:
    return "error" if cfg.on_bad_line == "error" else "warning"


def _report(section: Section, cfg: Config, survey: Survey) -> None:
    for fault in survey.first_bad:
        section.add(_level(cfg), fault)
    if survey.bad > len(survey.first_bad):
        section.add(_level(cfg), f"{count_of(survey.bad - len(survey.first_bad), 'more record')} that cannot be used")
    if survey.too_long:
        section.add(
            "error" if cfg.truncation == "error" else "warning",
            f"{count_of(survey.too_long, 'sample')} of {_all(survey)} {'is' if survey.too_long == 1 else 'are'} too "
            f"long{'' if cfg.truncation == 'error' else ' and dropped'}. The longest is {survey.needed.where}: "
            f"{survey.needed_reason}",
        )
    if survey.without_loss:
        section.add(
            "warning",
            f"{count_of(survey.without_loss, 'sample')} without an answer to learn; the first is "
            f"{survey.first_without_loss}",
        )
    if not survey.samples:
        section.add("error", "no sample can be used")
        return
    tokens = np.array(survey.tokens)
    middle, high = (int(np.quantile(tokens, q)) for q in (0.5, 0.95))
    section.add(
        "ok",
        f"tokens of {count_of(survey.samples, 'sample')}: median {middle}, 95 % have at most {high}, the longest "
        f"{survey.longest.amount} ({survey.longest.where}; max_seq_len {cfg.max_seq_len}); {survey.too_long} dropped, "
        f"{survey.cut} without their last rounds, {survey.shrunk} with pictures made smaller to fit",
    )
    if not survey.pictures + survey.videos:
        section.add("note", "no record has a picture")
        return
    if survey.too_narrow:
        section.add(
            "warning",
            f"{survey.too_narrow} of the pictures are more than {MAX_RATIO} times as long as wide, and are compressed "
            f"to that; the first is {survey.first_too_narrow}",
        )
    share = survey.vision_tokens / max(int(tokens.sum()), 1)
    section.add(
        "ok",
        f"{count_of(survey.pictures, 'picture')}, {count_of(survey.videos, 'video')} "
        f"({count_of(survey.frames, 'frame')}): {survey.vision_tokens} tokens ({share:.0%} of all); larger than "
        f"their max_pixels and made smaller: {survey.made_smaller}; the most patches in one sample are "
        f"{survey.most_patches.amount} ({survey.most_patches.where})",
    )


def _all(survey: Survey) -> int:
    return survey.samples + survey.too_long + survey.without_loss + survey.bad


@dataclass
class Decoding:
    """What decoding every picture and video found."""

    decoded: int = 0
    failed: int = 0
    first_failed: list[str] = field(default_factory=list)
    doubts: Counter[str] = field(default_factory=Counter)
    first_doubt: dict[str, str] = field(default_factory=dict)

    def add(self, records: Sequence[Encoded], decoder: MediaDecoder) -> None:
        """Decode the media of records."""
        media = [(record.where, plan) for record in records for plan in media_of(record)]
        results: Iterator = decoder.results([plan for _, plan in media])
        for (where, _), result in zip(media, results, strict=True):
            self.decoded += result.patches is not None
            for doubt in result.doubts:
                self.doubts[doubt] += 1
                self.first_doubt.setdefault(doubt, where)
            if result.patches is None:
                self.failed += 1
                if self.failed <= _SHOWN:
                    self.first_failed.append(f"{where}: {result.failure}")

    def report(self, section: Section, level: Level) -> None:
        """Add it to a section."""
        for fault in self.first_failed:
            section.add(level, fault)
        if self.failed > len(self.first_failed):
            more = self.failed - len(self.first_failed)
            what = count_of(more, "more picture or video", "more pictures and videos")
            section.add(level, f"{what} cannot be decoded")
        for doubt, count in self.doubts.most_common():
            section.add("warning", f"{count} of the pictures and videos, first in {self.first_doubt[doubt]}: {doubt}")
        section.add("ok", f"{count_of(self.decoded, 'picture or video', 'pictures and videos')} decoded")
