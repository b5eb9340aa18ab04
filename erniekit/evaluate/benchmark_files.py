"""Reads the files of multiple-choice benchmarks, as their authors publish them.

A csv file has a header line with the columns question, A, B, C, D and answer, in any order and case (C-Eval, CMMLU), or
none and these six columns (MMLU). A jsonl file has one object a line: `question`, `choices` (a list of four) or A to D,
and `answer`, a letter or the number of a choice from 0 on (MMLU in the form of the Hub's `cais/mmlu`).

The split and the subject of a file are in its path: `test/anatomy_test.csv`, `test/anatomy.csv`, `anatomy/test.jsonl`,
or `test.jsonl` with a field `subject` in each line.
"""

import csv
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erniekit.data.records.errors import BadLine, BadRecord, reading
from erniekit.utils.errors import ConfigError, DataError
from erniekit.utils.user_files import kind, parse_json, read_text
from erniekit.utils.wording import count_of

LETTERS = "ABCD"
_MAX_LINES = 5  # bad lines that an error names; the others are counted
_COLUMNS = ("question", *LETTERS.lower(), "answer")


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with four options. `answer`: the number of the right one, 0 to 3. `where`: its "file:line"."""

    subject: str
    question: str
    options: tuple[str, ...]
    answer: int
    where: str


def read_split(root: Path, split: str, key: str) -> list[ChoiceQuestion]:
    """The questions of a split below `root`, file by file in the order of their paths.

    Raises:
        ConfigError: there is no such directory, or no file of that split in it; `key` names the directory.
        DataError: lines that cannot be read, each as "file:line".
    """
    if not root.is_dir():
        raise ConfigError(f"{key}: {root} is not a directory. Give the directory with the benchmark's files.")
    files = [path for path in sorted(root.rglob("*")) if path.suffix in _READERS and _subject_of(path, root, split)]
    if not files:
        raise ConfigError(
            f"{key}: {root} has no .csv or .jsonl file of the split {split}. Expected {split}/SUBJECT_{split}.csv, "
            f"{split}/SUBJECT.csv, SUBJECT/{split}.jsonl or {split}.jsonl."
        )
    questions: list[ChoiceQuestion] = []
    problems: list[str] = []
    for path in files:
        subject = _subject_of(path, root, split)
        for where, record in _READERS[path.suffix](path):
            try:
                with reading(where):
                    questions.append(_question(record(), subject, where))
            except BadLine as error:
                problems.append(str(error))
    if problems:
        more = f"\nand {len(problems) - _MAX_LINES} more" if len(problems) > _MAX_LINES else ""
        raise DataError("\n".join(problems[:_MAX_LINES]) + more)
    if not questions:
        raise DataError(f"{key}: the files of the split {split} in {root} have no questions.")
    return questions


def by_subject(questions: Sequence[ChoiceQuestion]) -> dict[str, list[ChoiceQuestion]]:
    """The questions of each subject, in the order in which they were read."""
    subjects: dict[str, list[ChoiceQuestion]] = {}
    for question in questions:
        subjects.setdefault(question.subject, []).append(question)
    return subjects


def fingerprint(questions: Sequence[ChoiceQuestion]) -> str:
    """A hash of what was read, without the places of the files."""
    digest = hashlib.sha256()
    for item in questions:
        digest.update(repr((item.subject, item.question, item.options, item.answer)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _subject_of(path: Path, root: Path, split: str) -> str:
    """The subject that the path of a file of this split names; "" for a file of another split."""
    folders, stem = path.relative_to(root).parts[:-1], path.stem
    folder = folders[-1] if folders else root.name
    if stem == split or stem.startswith(f"{split}-"):  # of the Hub: test-00000-of-00001
        return folder
    if stem.endswith(f"_{split}"):
        return stem.removesuffix(f"_{split}")
    return stem if folders and folder == split else ""


Record = Callable[[], Mapping[str, Any]]  # reads a record, or raises BadRecord


def _csv_records(path: Path) -> Iterator[tuple[str, Record]]:
    """("file:line", reader) of each row behind the header. The fields are named as in _COLUMNS."""
    rows = csv.reader(io.StringIO(read_text(path, DataError), newline=""), strict=True)
    names: list[str] | None = None
    line = 1
    while True:
        where = f"{path}:{line}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{where}: not csv from here on ({error}). Hint: check the quotes.") from None
        line = rows.line_num + 1
        if not row:
            continue
        if names is None:
            names = [cell.strip().lower() for cell in row]
            if set(_COLUMNS[:-1]) <= set(names):
                continue
            names = list(_COLUMNS)
            if len(row) != len(names):
                raise DataError(
                    f"{where}: expected a header with {', '.join(_COLUMNS)}, or a row with these six and no header, "
                    f"got {count_of(len(row), 'column')}."
                )
        yield where, lambda names=names, row=row: _row(names, row)  # type: ignore[misc]


def _row(names: Sequence[str], row: Sequence[str]) -> dict[str, str]:
    if len(row) != len(names):
        raise BadRecord(
            f"{count_of(len(row), 'column')} instead of {len(names)}", "check the commas and quotes of this row"
        )
    return dict(zip(names, row, strict=True))


def _json_records(path: Path) -> Iterator[tuple[str, Record]]:
    """("file:line", reader) of each line."""
    for number, text in enumerate(read_text(path, DataError).split("\n"), 1):
        if text.strip():
            where = f"{path}:{number}"
            yield where, lambda text=text, where=where: _object(text, where)  # type: ignore[misc]


def _object(text: str, where: str) -> Mapping[str, Any]:
    record = parse_json(text, where, DataError)
    if not isinstance(record, dict):
        raise BadRecord(f"expected an object, got {kind(record)}", "write one question a line")
    return {name if name == "choices" else str(name).lower(): value for name, value in record.items()}


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Record]]]] = {".csv": _csv_records, ".jsonl": _json_records}


def _question(record: Mapping[str, Any], subject: str, where: str) -> ChoiceQuestion:
    options = record.get("choices")
    if options is None:
        options = [_text(record, letter.lower()) for letter in LETTERS]
    elif not isinstance(options, list) or len(options) != len(LETTERS) or not all(isinstance(o, str) for o in options):
        raise BadRecord(f"choices: expected a list of {len(LETTERS)} texts", "MMLU has four choices to a question")
    question = _text(record, "question").strip()
    if not question:
        raise BadRecord("question: empty", "write the question, or remove the line")
    named = record.get("subject")
    return ChoiceQuestion(
        named if isinstance(named, str) and named else subject, question, tuple(options), _answer(record), where
    )


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        shown = name.upper() if len(name) == 1 else name
        raise BadRecord(f"{shown}: {'missing' if value is None else 'expected text, got ' + kind(value)}", "add it")
    return value


def _answer(record: Mapping[str, Any]) -> int:
    value = record.get("answer")
    if type(value) is int and 0 <= value < len(LETTERS):
        return value
    if isinstance(value, str) and len(value.strip()) == 1 and value.strip().upper() in LETTERS:
        return LETTERS.index(value.strip().upper())
    if value in (None, ""):
        raise BadRecord("answer: missing", "C-Eval publishes no answers of its test split; its val split has them")
    raise BadRecord(f"answer: expected A, B, C or D, or 0 to 3, got {value!r:.40}", "correct it")
