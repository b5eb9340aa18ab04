"""Builds token files from text: several processes tokenise, and a build that was interrupted can be continued.

Each record of a .jsonl file ({"text": ...} or {"tgt": [...]}, as for stage PT) and each .txt file is a document. The
progress is recorded next to the output (prefix.progress.json) after the documents have reached the disk, and a later
run resumes from this record. Documents are written in the order of the input for any number of workers, so the files
are the same byte for byte.
"""

import json
import os
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from erniekit.data.chat.tokenizer import Tokenizer
from erniekit.data.records.data_file import Raw
from erniekit.data.records.errors import BadLine, reading
from erniekit.data.records.fields import Notes, unused_line
from erniekit.data.records.find_files import check_form, find_files, first_names, refuse_packed
from erniekit.data.records.formats import parse_record
from erniekit.data.records.readers import load_record
from erniekit.data.tokens.files import TokenWriter, dtype_for, file_of
from erniekit.data.workers import Worker
from erniekit.utils import log
from erniekit.utils.errors import DataError
from erniekit.utils.progress import track
from erniekit.utils.user_files import JsonObject, read_json_object
from erniekit.utils.wording import count_of

SUFFIXES = (".jsonl", ".json", ".txt")
_CHUNK_BYTES, _CHUNK_RECORDS = 2**18, 2000
_MB = 10**6
_MAX_WARNINGS = 5  # the others are only counted
_BOM = b"\xef\xbb\xbf"


class Tokenised(NamedTuple):
    """The ids of a document, and the fields of its record that are not used; or the error of a bad record."""

    ids: np.ndarray
    unused: tuple[str, ...] = ()
    error: str = ""


class DocumentEncoder:
    """Encodes a document to ids, followed by the end token if `append_eos`; with `skip_bad` an error is returned."""

    def __init__(self, tokenizer: Tokenizer, append_eos: bool, skip_bad: bool):
        self._tokenizer, self._skip_bad = tokenizer, skip_bad
        self._end = [tokenizer.eos_id] if append_eos else []
        self._dtype = dtype_for(tokenizer.vocab_size)

    def __call__(self, raw: Raw, where: str) -> Tokenised:
        notes = Notes()
        try:
            with reading(where):
                text = parse_record(load_record(raw, where), "text", where, notes).text
                ids = np.array(self._tokenizer.encode_plain(text) + self._end, self._dtype)
                return Tokenised(ids, tuple(notes.unused))
        except BadLine as error:
            if not self._skip_bad:
                raise
            return Tokenised(np.empty(0, self._dtype), error=str(error))


@dataclass(frozen=True)
class EncodeJob:
    """The arguments of a DocumentEncoder, in a form that can be sent to a worker."""

    tokenizer: Tokenizer
    append_eos: bool
    skip_bad: bool

    def make(self) -> DocumentEncoder:
        """The encoder."""
        return DocumentEncoder(self.tokenizer, self.append_eos, self.skip_bad)


@dataclass(frozen=True)
class Progress:
    """The progress of a build. Everything before byte `offset` (line `line`) of input file number `file` has been
    written. `read` counts bytes over all input files, `skipped` the bad records that were left out.
    """

    file: int = 0
    offset: int = 0
    line: int = 0
    read: int = 0
    documents: int = 0
    tokens: int = 0
    skipped: int = 0


def find_inputs(paths: Sequence[str]) -> list[Path]:
    """The .jsonl, .json and .txt files among `paths` and, sorted, in the directories among them. In directories, texts
    for people (README.txt) are left out. Raises DataError for a .txt file of records.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: no such file or directory. Hint: check the path.")
        chosen, others = find_files(path, SUFFIXES, with_prose=True)
        if others:
            names = first_names([other.name for other in others])
            log.info(f"{path}: {count_of(len(others), 'other file')} not read ({names})")
        refuse_packed(others, SUFFIXES)
        files += chosen
    empty = [str(file) for file in files if file.suffix.lower() != ".txt" and not file.stat().st_size]
    if empty:  # an empty .txt file is a bad record
        log.warning(
            f"{count_of(len(empty), 'empty file')} without a document ({first_names(empty)}). Check that nothing is "
            "missing"
        )
    for file in files:
        if file.suffix.lower() == ".txt" and _has_records(file):
            raise DataError(
                f"{file}: it has records, one a line, but a .txt file is read as one document, with its braces and "
                "quotes. Hint: rename it to .jsonl."
            )
    return files


def _has_records(path: Path) -> bool:
    """Whether a file begins with a record of pretraining text on a line of its own."""
    try:
        with open(path, "rb") as file:
            if not file.read(64).removeprefix(_BOM).lstrip().startswith(b"{"):
                return False
            file.seek(0)
            line = next(line for line in file if line.removeprefix(_BOM).strip())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Hint: check its permissions.") from None
    try:
        record = json.loads(line.removeprefix(_BOM))
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and ("text" in record or "tgt" in record)


@dataclass
class _Chunk:
    records: list[tuple[Raw, str]]
    behind: Progress  # the position in the input after this chunk, without counts


def _chunks(files: Sequence[Path], begin: Progress) -> Iterator[_Chunk]:
    """Yields the input from `begin` on in chunks of some hundred kilobytes."""
    read = begin.read
    for number in range(begin.file, len(files)):
        start, line = (begin.offset, begin.line) if number == begin.file else (0, 0)
        path = files[number]
        try:
            size = path.stat().st_size
            if path.suffix.lower() == ".txt":
                if start == 0:
                    data = path.read_bytes()
                    read += len(data)
                    yield _Chunk([_whole(path, data)], Progress(number, len(data), 1, read))
                continue
            yield from _line_chunks(path, number, start, line, read)
            if path.stat().st_size != size:
                raise DataError(
                    f"{path}: changed while it was read. Hint: start again when it is complete (overwrite=true)."
                )
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}. Hint: check its permissions.") from None
        read += size - start


def _line_chunks(path: Path, number: int, start: int, line: int, read: int) -> Iterator[_Chunk]:
    records: list[tuple[Raw, str]] = []
    size = done = 0
    with open(path, "rb") as file:
        file.seek(start)
        for raw in file:
            if line == 0:
                _check_lines(path, raw)
            at_start, line = line == 0, line + 1
            done += len(raw)
            size += len(raw)
            text = raw.removeprefix(_BOM) if at_start else raw
            if text.strip():
                records.append((text, f"{path}:{line}"))
            if size >= _CHUNK_BYTES or len(records) >= _CHUNK_RECORDS:
                yield _Chunk(records, Progress(number, start + done, line, read + done))
                records, size = [], 0
    if size:
        yield _Chunk(records, Progress(number, start + done, line, read + done))


def _check_lines(path: Path, first: bytes) -> None:
    check_form(path, first)
    if first.removeprefix(_BOM).lstrip().startswith(b"["):
        raise DataError(f"{path}: a JSON list. Hint: write one object per line (.jsonl).")


def _whole(path: Path, data: bytes) -> tuple[Raw, str]:
    """A whole file as a record with its place; if it is not text, the line that is not, which is a bad record."""
    check_form(path, data)
    try:
        return {"text": data.removeprefix(_BOM).decode("utf-8")}, str(path)
    except UnicodeDecodeError as error:
        position = len(data) - len(error.object) + error.start
        begin = data.rfind(b"\n", 0, position) + 1
        return data[begin : position + 1], f"{path}:{data[:begin].count(10) + 1}"


def _encoded(
    chunks: Iterator[_Chunk], job: EncodeJob, num_workers: int
) -> Generator[tuple[Progress, list[Tokenised]], None, None]:
    """Yields the end and the results of each chunk in order. Workers encode while the main process reads and writes."""
    if num_workers == 0:
        encoder = job.make()
        for chunk in chunks:
            yield chunk.behind, [encoder(*record) for record in chunk.records]
        return
    workers = [Worker(job) for _ in range(num_workers)]
    waiting: deque[tuple[_Chunk, Worker]] = deque()
    free = list(workers)
    try:
        for chunk in chunks:
            answer = None
            if not free:
                answer = _receive(*waiting.popleft(), free)
            worker = free.pop()
            worker.send(chunk.records)
            waiting.append((chunk, worker))
            if answer is not None:
                yield answer
        while waiting:
            yield _receive(*waiting.popleft(), free)
    finally:
        for worker in workers:
            worker.stop()


def _receive(chunk: _Chunk, worker: Worker, free: list[Worker]) -> tuple[Progress, list[Tokenised]]:
    done, error = worker.receive()
    if error is not None:
        raise error
    free.append(worker)
    return chunk.behind, done


class _Note:
    """The file that records the progress of a build and what it is made from."""

    def __init__(self, prefix: Path, job: dict[str, Any]):
        self.path = file_of(prefix, ".progress.json")
        self._job = job

    def read(self) -> Progress | None:
        """The recorded progress, or None. Raises DataError if it belongs to another build."""
        try:
            noted = JsonObject(read_json_object(self.path, DataError), str(self.path), DataError)
            counts = noted.get_object("progress")
            progress = Progress(**{field.name: counts.get_int(field.name, 0, 0, 2**62) for field in fields(Progress)})
        except FileNotFoundError:
            return None
        except DataError as error:
            raise DataError(f"{error} Hint: start from scratch (overwrite=true).") from None
        if not counts.values:
            raise DataError(f"{self.path}: does not describe a build. Hint: start from scratch (overwrite=true).")
        then = noted.get_object("job").values
        changed = [name for name in {**then, **self._job} if then.get(name) != self._job.get(name)]
        if changed:
            raise DataError(
                f"{self.path}: an unfinished build of something else: different {', '.join(changed)}. "
                "Hint: repeat its command to finish it, or start from scratch (overwrite=true)."
            )
        return progress

    def write(self, progress: Progress) -> None:
        """Record `progress` atomically."""
        new = self.path.with_name(self.path.name + ".new")
        with open(new, "w", encoding="utf-8") as file:
            json.dump({"job": self._job, "progress": asdict(progress)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        new.rename(self.path)


def build_token_files(
    inputs: Sequence[Path],
    prefix: Path,
    tokenizer: Tokenizer,
    num_workers: int = 1,
    append_eos: bool = True,
    on_bad_line: str = "error",
    overwrite: bool = False,
    note_every: float = 5.0,
) -> Progress:
    """Write the documents of `inputs` as prefix.bin and prefix.idx, or resume a build that was interrupted.

    num_workers: processes that tokenise; 0: only this process. on_bad_line: "error" stops at a record that is not
    pretraining text, with its file and line; "skip" skips and counts it. overwrite: replace existing files. note_every:
    seconds between records of the progress. Returns the final counts. Raises DataError.
    """
    sizes = [path.stat().st_size for path in inputs]
    note = _Note(prefix, _identity(inputs, tokenizer, append_eos))
    begin = _begin(prefix, note, overwrite)
    if begin is None:
        progress = note.read()
        note.path.unlink()
        assert progress is not None
        return progress
    if begin.read:
        log.info(
            f"{prefix}: resuming after {count_of(begin.documents, 'document')} ({begin.read / 1e6:.1f} MB of text)"
        )
    writer = TokenWriter(prefix, dtype_for(tokenizer.vocab_size), begin.documents, begin.tokens)
    job = EncodeJob(tokenizer, append_eos, on_bad_line == "skip")
    skipped, done, noted_at = begin.skipped, begin, time.monotonic()
    unused: Counter[str] = Counter()
    try:
        with closing(_encoded(_chunks(inputs, begin), job, num_workers)) as encoded:
            megabytes = sum(sizes) // _MB
            tracked = track(encoded, megabytes, "tokenising, in MB of text", lambda item: item[0].read // _MB)
            for behind, results in tracked:
                for result in results:
                    if result.error:
                        skipped += 1
                        _warn_bad(result.error, skipped)
                    else:
                        writer.add(result.ids)
                        unused.update(result.unused)
                counts = {"documents": writer.documents, "tokens": writer.tokens, "skipped": skipped}
                done = Progress(behind.file, behind.offset, behind.line, behind.read, **counts)
                if time.monotonic() - noted_at >= note_every:
                    writer.sync()
                    note.write(done)
                    noted_at = time.monotonic()
        if unused:
            log.info(unused_line(unused, writer.documents - begin.documents))
        if writer.documents == 0:
            raise DataError(
                f"no document in {count_of(len(inputs), 'file')} ({count_of(skipped, 'bad record')}). Hint: is this "
                "the text?"
            )
        writer.sync()
        note.write(done)
        writer.finish()
    except OSError as error:
        raise DataError(
            f"{prefix}: cannot be written: {error.strerror}. Hint: make room; the same command then resumes."
        ) from None
    finally:
        writer.close()
    note.path.unlink()
    return done


def _begin(prefix: Path, note: _Note, overwrite: bool) -> Progress | None:
    """The progress to begin from; None if everything is written and only the progress file needs to be removed."""
    final = [file_of(prefix, suffix) for suffix in (".bin", ".idx")]
    if overwrite:  # the files themselves stay until new ones can take their names
        for path in [note.path, *TokenWriter.leftovers(prefix)]:
            path.unlink(missing_ok=True)
    noted = note.read()
    if noted is not None:
        return None if all(path.exists() for path in final) and not TokenWriter.leftovers(prefix) else noted
    for path in final:
        if path.exists() and not overwrite:
            raise DataError(f"{path}: already there. Hint: choose another prefix, or replace it (overwrite=true).")
    return Progress()


def _warn_bad(reason: str, number: int) -> None:
    if number <= _MAX_WARNINGS:
        log.warning(f"skipped: {reason}" + (" (further ones are only counted)" if number == _MAX_WARNINGS else ""))


def _identity(inputs: Sequence[Path], tokenizer: Tokenizer, append_eos: bool) -> dict[str, Any]:
    """Everything that decides the output, under the names that messages use."""
    stats = [(path, path.stat()) for path in inputs]
    return {
        "input files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        "tokenizer": tokenizer.fingerprint,
        "end tokens": append_eos,
    }
