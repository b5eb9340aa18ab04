"""Opens the data sets of a run, checks every record at the start, and numbers all records consecutively."""

import hashlib
import re
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from erniekit import hub
from erniekit.config.methods import DEFAULT, METHODS, MethodFacts, Records
from erniekit.data.records.data_file import DataFile, Raw
from erniekit.data.records.errors import SKIPPABLE, BadLine
from erniekit.data.records.fields import Notes, unused_line
from erniekit.data.records.find_files import find_files, first_names, refuse_packed
from erniekit.data.records.formats import ALIASES, VISION_TYPE, parse_record
from erniekit.data.records.judged_formats import KTO_SUFFIX
from erniekit.data.records.preference_formats import MARGIN
from erniekit.data.records.prompt_formats import RL_SUFFIX
from erniekit.data.records.readers import load_record, open_file
from erniekit.data.records.sample import Sample
from erniekit.data.vision.encode import VisionSpec
from erniekit.data.vision.formats import parse_vision_record
from erniekit.data.vision.parts import media_of
from erniekit.data.vision.video import require_decoder
from erniekit.utils import log
from erniekit.utils.errors import DataError
from erniekit.utils.wording import count_of

_SHOWN_BAD_LINES = 5  # the others are only counted
_SECONDS_BETWEEN_NOTES = 30.0
_SUFFIXES = {
    Records.PAIRS: " (DPO)",
    Records.PROMPTS: RL_SUFFIX,
    Records.JUDGED: KTO_SUFFIX,
}  # of the types of records of a method
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "eval": ("validation", "valid", "val", "eval", "dev", "test"),
    "calibration": ("calibration", "calib", "train", "training"),
}


def path_key(split: str) -> str:
    """The key that names the data of a split: "train", "eval", or "calibration" of a quantisation."""
    return "quantization_calibration_path" if split == "calibration" else f"{split}_dataset_path"


def length_key(split: str) -> str:
    """The key that limits the tokens of a row of a split."""
    return "quantization_calibration_length" if split == "calibration" else "max_seq_len"


@dataclass(frozen=True)
class SourceSpec:
    """One entry of train_dataset_path: its path, the type of its records (a key of the tables in formats) and its
    share. `scored_by`: the key that needs to know how much better a chosen answer is; empty: none does.
    """

    path: str
    type: str
    prob: float
    scored_by: str = ""


def read_specs(
    paths: Sequence[str],
    types: Sequence[str],
    shares: Sequence[float],
    split: str,
    method: MethodFacts = METHODS[DEFAULT],
) -> list[SourceSpec]:
    """The sources that the keys of a split (path, type, prob) describe; config/checks.py has checked that their counts
    agree.

    The default type is erniekit. For a method that trains on text, it means the type `text`; for a method that trains
    on pairs of answers, on prompts or on judged answers, each type means that of preference_formats, prompt_formats or
    judged_formats. Shares are equal by default, and are divided by
    their sum.
    """
    if not paths:
        raise DataError(
            f"{path_key(split)} is not set. Hint: give the data file, a directory of data files, or a Hub name."
        )
    types, shares = types or ["erniekit"] * len(paths), shares or [1.0] * len(paths)
    return [
        SourceSpec(path, _type(name, method), share / sum(shares))
        for path, name, share in zip(paths, types, shares, strict=True)
    ]


def _type(name: str, method: MethodFacts) -> str:
    if method.records is Records.TEXT:
        return "text"
    return ALIASES.get(name, name) + _SUFFIXES.get(method.records, "")


def with_pictures(specs: Sequence[SourceSpec]) -> list[SourceSpec]:
    """The same sources with their types replaced by those of vision.formats, whose records may contain pictures."""
    return [replace(spec, type=spec.type + VISION_TYPE) for spec in specs]


class Source:
    """The valid records of one data set. `bad_lines` counts skipped records, `faults` has the first of their errors,
    `judgements` which of good (True) and bad (False) its answers are judged.

    on_bad_line: error; skip; or gather, which is skip without a log line. With check_every = n only every n-th record
    is checked, and the others are assumed to be valid. `vision` has the options for records with pictures.
    """

    def __init__(
        self,
        spec: SourceSpec,
        split: str,
        on_bad_line: str = "error",
        download_hub: str | None = None,
        check_every: int = 1,
        vision: VisionSpec | None = None,
    ):
        self.spec, self.bad_lines = spec, 0
        self.judgements: set[bool] = set()
        self._vision = vision
        self.faults: list[str] = []
        self.check_every = check_every
        self._on_bad_line = on_bad_line
        self._note_at = time.monotonic() + _SECONDS_BETWEEN_NOTES
        self._checked = 0
        self._num_parsed = 0  # records of the present file that were parsed, and are valid
        self._unused: Counter[str] = Counter()
        self._doubts: Counter[str] = Counter()
        self._notes = Notes()  # those of the record that is being checked
        self.files: list[DataFile] = []
        for path in self._find(split, download_hub):
            self.files.append(open_file(path, self._check, self._on_bad))
            self._log_notes(self.files[-1])
        self._ends = list(accumulate(len(file) for file in self.files))
        empty = [file.path.name for file in self.files if not len(file)]
        if empty and len(self):
            log.warning(
                f"{spec.path}: no record in {len(empty)} of {len(self.files)} files ({first_names(empty)}). Check that "
                "nothing is missing"
            )
        if self.bad_lines and on_bad_line == "skip":
            log.warning(
                f"{spec.path}: skipped {count_of(self.bad_lines, 'bad line')} (on_bad_line: skip); "
                f"{count_of(len(self), 'record')} left"
            )
        if not len(self):
            skipped = f" (skipped {count_of(self.bad_lines, 'bad line')})" if self.bad_lines else ""
            raise DataError(
                f"{spec.path}: no record to read{skipped}. "
                f"Hint: is this the right file, and of type {spec.type}?"
                + (f"\n  the first bad line: {self.faults[0]}" if self.faults else "")
            )

    def _find(self, split: str, download_hub: str | None) -> list[Path]:
        path = hub.resolve_dataset(self.spec.path, download_hub, path_key(split))
        data, other_files = find_files(path)
        if other_files:
            names = first_names([other_file.name for other_file in other_files])
            log.info(
                f"{self.spec.path}: {count_of(len(other_files), 'other file is', 'other files are')} not data and not "
                f"read ({names})"
            )
        if path != Path(self.spec.path).expanduser():  # a Hub data set, which may have a second form of its data
            data = _of_split(data, path, split)
            log.info(f"{self.spec.path}: reading {', '.join(str(file.relative_to(path)) for file in data)} for {split}")
            return data
        refuse_packed(other_files)
        if len(data) > 1:
            self._warn_of_other_splits(data, path, split)
        return data

    def _warn_of_other_splits(self, data: list[Path], path: Path, split: str) -> None:
        """Warn if a directory of this machine, of which every file is read, looks like a data set with its splits."""
        others = [file for file in data if _names_split(file, path, split) is False]
        if others and any(_names_split(file, path, split) for file in data):
            names = first_names([str(file.relative_to(path)) for file in others])
            log.warning(
                f"{self.spec.path}: all files of the directory are read for {split}, also those that are named after "
                f"another split ({names}). Name the files to leave these out"
            )

    def _check(self, raw: Raw, where: str) -> None:
        self._checked += 1
        if self._checked % self.check_every:
            return
        if self._checked % 1000 == 0 and time.monotonic() > self._note_at:
            log.info(f"{self.spec.path}: checking records, {self._checked} so far (now at {where})")
            self._note_at = time.monotonic() + _SECONDS_BETWEEN_NOTES
        record = load_record(raw, where)
        if self.spec.type.endswith(VISION_TYPE):
            assert self._vision is not None, "records with pictures need the options of a vision model"
            options = self._vision.formats(where)
            sample = parse_vision_record(record, self.spec.type, where, options, self._notes)
            require_decoder(media_of(sample.messages), options.reader)
        else:
            sample = parse_record(record, self.spec.type, where, self._notes)
        if sample.is_good is not None:
            self.judgements.add(sample.is_good)
        if self.spec.scored_by:
            self._require_score(sample, where)
        self._num_parsed += 1
        if self._notes.unused or self._notes.doubts:
            self._unused.update(self._notes.unused)
            self._doubts.update(self._notes.doubts)
            self._notes = Notes()

    def _require_score(self, sample: Sample, where: str) -> None:
        key = self.spec.scored_by
        self._notes.unused.discard(repr(MARGIN))
        if sample.score_delta is None or (key == "offset_alpha" and not sample.score_delta):
            least = "above 0" if key == "offset_alpha" else "of at least 0"
            raise BadLine(
                f"{where}: {key} needs to know how much better the chosen answer is. Hint: give {MARGIN!r}, a number "
                f"{least} (in type erniekit: 'sort'), or leave {key} out."
            )

    def _on_bad(self, error: DataError) -> None:
        self._notes = Notes()  # discard the notes of a skipped record
        if self._on_bad_line == "error":
            raise DataError(f"{error} {SKIPPABLE}")
        self.bad_lines += 1
        if self.bad_lines <= _SHOWN_BAD_LINES:
            self.faults.append(str(error))
            if self._on_bad_line == "skip":
                log.warning(f"skipped: {error}")

    @property
    def digest(self) -> str:
        """A hash of all valid records in order; the names of the files do not enter it."""
        digests = "".join(file.digest for file in self.files)
        return digests if len(self.files) == 1 else hashlib.blake2b(digests.encode(), digest_size=8).hexdigest()

    def _log_notes(self, file: DataFile) -> None:
        """Log the unused fields and the doubts of those of one file's records that were parsed, each once with its
        count.
        """
        if self._unused:
            log.info(f"{file.path}: {unused_line(self._unused, self._num_parsed)}")
        for doubt, count in sorted(self._doubts.items()):
            log.warning(f"{file.path}: {count} of {count_of(self._num_parsed, 'record')}: {doubt}")
        self._unused.clear()
        self._doubts.clear()
        self._num_parsed = 0

    def __len__(self) -> int:
        return self._ends[-1]

    def record(self, i: int) -> tuple[Raw, str]:
        """Record i as its file has it, and its "file:line"."""
        which = bisect_right(self._ends, i)
        local = i - (self._ends[which - 1] if which else 0)
        return self.files[which].raw(local), self.files[which].where(local)


def _of_split(files: list[Path], root: Path, split: str) -> list[Path]:
    """The files of a Hub data set whose path names `split`, since such a data set often has all its splits in one
    place; all files if no path names any split.
    """

    chosen = [file for file in files if _names_split(file, root, split)]
    if chosen:
        return chosen
    rest = [file for file in files if _names_split(file, root, split) is None]
    if not rest:
        raise DataError(
            f"{root}: no file there is for {split}: {', '.join(file.name for file in files)}. "
            "Hint: give the path of the file itself."
        )
    return rest


def _names_split(file: Path, root: Path, split: str) -> bool | None:
    """Whether the path of a file below `root` names `split`; None if it names no split at all."""
    words = set(re.split(r"[^a-z]+", str(file.relative_to(root)).lower()))
    if words & set(_SPLIT_WORDS[split]):
        return True
    return False if words & {word for group in _SPLIT_WORDS.values() for word in group} else None


class Dataset:
    """All sources of a split, with records numbered consecutively, source after source."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = list(sources)
        self.sizes = [len(source) for source in self.sources]
        self.digests = [source.digest for source in self.sources]
        self._ends = list(accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def describe(self, noun: str) -> str:
        """How many records there are and where from, for a log line: "9 samples from a.jsonl (4), b.jsonl (5)"."""
        paths = [source.spec.path for source in self.sources]
        if len(paths) > 1:
            paths = [f"{path} ({size})" for path, size in zip(paths, self.sizes, strict=True)]
        return f"{count_of(len(self), noun)} from {', '.join(paths)}"

    @cached_property
    def record_bytes(self) -> np.ndarray:
        """The size of each record in its file in bytes, int64 [N]; for parquet, which has no lines, the file's mean."""
        return np.concatenate([file.record_bytes() for source in self.sources for file in source.files])

    @property
    def judgements(self) -> set[bool]:
        """Which of good (True) and bad (False) the answers that were checked are judged."""
        return set().union(*(source.judgements for source in self.sources))

    @property
    def bad_lines(self) -> int:
        """The number of records that were skipped when the files were checked."""
        return sum(source.bad_lines for source in self.sources)

    def record(self, number: int) -> tuple[str, Raw, str]:
        """(type, record, "file:line") of record `number`."""
        which = bisect_right(self._ends, number)
        source = self.sources[which]
        raw, where = source.record(number - (self._ends[which - 1] if which else 0))
        return source.spec.type, raw, where
