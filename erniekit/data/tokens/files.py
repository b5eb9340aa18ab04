"""Token files: tokenised documents in Megatron-LM's format, `prefix.bin` and `prefix.idx`.

`prefix.bin` has the token ids of all documents, one after another. `prefix.idx` is, little-endian:

    9 bytes      the magic MMIDIDX and two zero bytes
    uint64       version, 1
    uint8        type of an id: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 6 float64, 7 float32, 8 uint16,
                 9 uint32, 10 uint64
    uint64       S, the number of sequences
    uint64       D, the number of entries in the last array: documents + 1
    int32 [S]    tokens in each sequence
    int64 [S]    byte in prefix.bin where each sequence begins
    int64 [D]    sequence with which each document begins; at last S

Source: Megatron-LM, megatron/core/datasets/indexed_dataset.py (types 1 to 8); PaddleNLP and PaddleFormers, data/
indexed_dataset.py, add types 9 and 10. Floating-point ids are refused. A document of several sequences is read as
their concatenation. All known writers put the sequences one after another without gaps, and other files are refused, so
that a truncated or exchanged file is detected by its size.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from erniekit.utils import log
from erniekit.utils.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}
_FLOATS = (6, 7)
_HEADER = struct.Struct("<QBQQ")  # the fields after the magic
_CHUNK = 2**20  # entries of the index that are checked at a time
_WINDOWS, _WINDOW = 16, 2**16  # windows of ids that are checked when a file is opened, and their length


def dtype_for(vocab_size: int) -> str:
    """The smaller of uint16 and int32 that can represent every id below vocab_size."""
    return "<u2" if vocab_size <= 2**16 else "<i4"


def strip_suffix(path: str) -> Path:
    """The prefix of a path that is either the prefix itself or one of its two files."""
    return Path(path.removesuffix(".idx") if path.endswith(".idx") else path.removesuffix(".bin"))


def file_of(prefix: Path, suffix: str) -> Path:
    """The file whose name is that of a prefix and a suffix."""
    return prefix.with_name(prefix.name + suffix)


class TokenFile:
    """One pair of files, checked and mapped into memory. It needs 8 bytes of memory per document, for its position.

    Every id must be less than `vocab_size`: a sample of ids is checked here, and all others when they are read. Raises
    DataError that names the file and its problem.
    """

    def __init__(self, prefix: Path, vocab_size: int):
        self.prefix, self._vocab_size = prefix, vocab_size
        self.bin_path, self.idx_path = file_of(prefix, ".bin"), file_of(prefix, ".idx")
        _check_there(prefix, self.bin_path, self.idx_path)
        if file_of(prefix, ".lsm").exists():
            log.warning(f"{prefix}.lsm: a loss mask of PaddleFormers, which is not read: every token is learnt")
        try:
            self.starts = self._read_index()  # the token at which each document begins, int64 [documents + 1]
            self._ids = np.memmap(self.bin_path, self.dtype, "r") if self.num_tokens else np.empty(0, self.dtype)
        except OSError as error:
            raise DataError(f"{prefix}: cannot be read: {error.strerror}. Hint: check its permissions.") from None
        for window in self._windows():
            self._check_ids(window, self._ids[window : window + _WINDOW])

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1])

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Ids start..stop-1 of a document, int64 [stop - start]."""
        at = int(self.starts[document])
        # reading a mapped page beyond the end of the file would kill the process with SIGBUS, without any message
        self._check_bin(self.num_tokens * self.dtype.itemsize)
        ids = self._ids[at + start : at + stop]
        self._check_ids(at + start, ids)
        return ids.astype(np.int64)

    def where(self, document: int) -> str:
        """The place of a document for messages."""
        return f"{self.prefix}:document {document}"

    def digest(self) -> str:
        """A hash of the lengths of all documents and of the ids in windows spread over the file, since reading the
        whole file would take as long as the first epoch of the training.
        """
        state = hashlib.blake2b(np.ascontiguousarray(self.starts, "<i8").data, digest_size=8)
        for window in self._windows():
            state.update(np.ascontiguousarray(self._ids[window : window + _WINDOW], "<i8").data)
        return state.hexdigest()

    def _windows(self) -> list[int]:
        return np.unique(np.linspace(0, max(0, self.num_tokens - _WINDOW), _WINDOWS).astype(np.int64)).tolist()

    def without_end(self, eos_id: int, look_at: int) -> tuple[int, int]:
        """(number of documents that do not end with `eos_id`, number of checked documents) of at most `look_at`
        documents spread over the file. Empty documents are not counted.
        """
        sample = np.unique(np.linspace(0, self.num_documents - 1, min(look_at, self.num_documents)).astype(np.int64))
        ends = self.starts[sample + 1][self.starts[sample + 1] > self.starts[sample]]
        return int((self._ids[ends - 1] != eos_id).sum()), len(ends)

    def _check_ids(self, start: int, ids: np.ndarray) -> None:
        if len(ids) == 0 or (int(ids.max()) < self._vocab_size and int(ids.min()) >= 0):
            return
        bad = int(np.flatnonzero((ids >= self._vocab_size) | (ids < 0))[0])
        document = int(np.searchsorted(self.starts, start + bad, side="right")) - 1
        raise DataError(
            f"{self.bin_path}: document {document}, token {start + bad - int(self.starts[document])}: id {ids[bad]} "
            f"is not in the tokenizer's vocabulary of {self._vocab_size}. "
            "Hint: the file was made with another tokenizer; build it again with the model's own."
        )

    def _read_index(self) -> np.ndarray:
        size = self.idx_path.stat().st_size
        with open(self.idx_path, "rb") as file:
            head = file.read(len(MAGIC) + _HEADER.size)
        if not head.startswith(MAGIC):
            raise self._refused(_foreign(head))
        if len(head) < len(MAGIC) + _HEADER.size:
            raise self._refused(f"truncated: {size} bytes are less than its header", "copy it again")
        version, code, sequences, entries = _HEADER.unpack_from(head, len(MAGIC))
        if version != 1:
            raise self._refused(f"version {version} of the format; only version 1 is known")
        if code not in DTYPES:
            kind = "floating-point numbers, which are not token ids" if code in _FLOATS else "unknown"
            raise self._refused(f"its type of ids has code {code}: {kind}")
        self.dtype = np.dtype(DTYPES[code])
        expected = len(head) + 12 * sequences + 8 * entries
        if size < expected:
            raise self._refused(
                f"truncated: {size} of the {expected} bytes that {sequences} sequences take", "copy it again"
            )
        if size == expected + sequences and sequences:
            raise self._refused(
                "a mode is recorded for each sequence (multimodal data)", "only files of text can be read"
            )
        if size > expected:
            raise self._refused(
                f"{size - expected} bytes too many for {sequences} sequences and {entries - 1} documents"
            )
        return self._starts(len(head), sequences, entries)

    def _starts(self, offset: int, sequences: int, entries: int) -> np.ndarray:
        """The token at which each document begins, from the index's three arrays, which are checked for consistency."""
        if not sequences or not entries:
            raise self._refused("it holds no document", "look at how it was made")
        sizes = np.memmap(self.idx_path, "<i4", "r", offset, (sequences,))
        pointers = np.memmap(self.idx_path, "<i8", "r", offset + 4 * sequences, (sequences,))
        documents = np.memmap(self.idx_path, "<i8", "r", offset + 12 * sequences, (entries,))
        total = 0  # bytes
        for start in range(0, sequences, _CHUNK):
            lengths = sizes[start : start + _CHUNK].astype(np.int64)
            if lengths.min() < 0:
                raise self._refused(f"sequence {start + int(lengths.argmin())} has a negative length")
            ends = total + np.cumsum(lengths * self.dtype.itemsize)
            wrong = np.flatnonzero(pointers[start : start + _CHUNK] != ends - lengths * self.dtype.itemsize)
            if len(wrong):
                n = start + int(wrong[0])
                raise self._refused(
                    f"sequence {n} begins at byte {pointers[n]}, but those before it end at byte "
                    f"{int(ends[wrong[0]] - lengths[wrong[0]] * self.dtype.itemsize)}"
                )
            total = int(ends[-1])
        self._check_bin(total)
        if documents[0] != 0 or documents[-1] != sequences:
            raise self._refused(f"its documents span the sequences {documents[0]} to {documents[-1]} of {sequences}")
        starts = np.empty(entries, np.int64)
        last = 0
        for start in range(0, entries, _CHUNK):
            firsts = documents[start : start + _CHUNK].astype(np.int64)
            if firsts[0] < last or (np.diff(firsts) < 0).any():
                raise self._refused("its documents are not in rising order")
            last = int(firsts[-1])
            begins = np.full(len(firsts), total, np.int64)
            inside = firsts < sequences
            begins[inside] = pointers[firsts[inside]]
            starts[start : start + _CHUNK] = begins // self.dtype.itemsize
        return starts

    def _check_bin(self, expected: int) -> None:
        size = self.bin_path.stat().st_size
        if size < expected:
            raise DataError(
                f"{self.bin_path}: truncated: {size} of the {expected} bytes that {self.idx_path.name} describes. "
                "Hint: copy it again, or build it again."
            )
        if size > expected:
            raise DataError(
                f"{self.bin_path}: {size} bytes, but {self.idx_path.name} describes {expected}. "
                "Hint: the two files do not belong together."
            )

    def _refused(
        self, reason: str, hint: str = "it is damaged, or no index of token files; build it again"
    ) -> DataError:
        return DataError(f"{self.idx_path}: {reason}. Hint: {hint}.")


def _check_there(prefix: Path, bin_path: Path, idx_path: Path) -> None:
    missing = [path for path in (idx_path, bin_path) if not path.is_file()]
    if not missing:
        return
    old = file_of(prefix, "_ids.npy")
    if old.is_file():
        hint = f"{old.name} is PaddleNLP's older form, which is not read; make {prefix.name}.bin and .idx from the text"
    else:
        prefixes = sorted(str(path)[: -len(".idx")] for path in prefix.parent.glob("*.idx"))
        prefixes += sorted(str(path)[: -len(".idx")] for path in prefix.glob("*.idx"))
        hint = f"there are {', '.join(prefixes[:5])}" if prefixes else "`erniekit tokenize` makes them from text"
    raise DataError(f"{missing[0]}: no such file. Hint: {hint}.")


def _foreign(head: bytes) -> str:
    if head.startswith(b"TNTIDX"):
        return "the older form TNTIDX (`lazy` or `cached`); only `mmap` files (MMIDIDX) are read"
    return f"no index of token files: it begins with {head[:9]!r} instead of {MAGIC!r}"


class TokenWriter:
    """Writes a pair of files document by document, under temporary names until finish().

    If an interrupted build is continued, its first `documents` documents with `tokens` tokens are kept and anything
    after them is removed; with 0 the build starts from scratch. Documents are safe on disk only after sync().
    """

    def __init__(self, prefix: Path, dtype: str, documents: int = 0, tokens: int = 0):
        self._dtype = np.dtype(dtype)
        self.documents, self.tokens = documents, tokens
        self._final = {suffix: file_of(prefix, suffix) for suffix in (".bin", ".idx")}
        self._parts = {suffix: file_of(prefix, f"{suffix}.part") for suffix in (".bin", ".idx", ".sizes")}
        prefix.parent.mkdir(parents=True, exist_ok=True)
        size, part, final = tokens * self._dtype.itemsize, self._parts[".bin"], self._final[".bin"]
        if documents and not part.exists() and final.exists() and final.stat().st_size == size:
            final.rename(part)  # the build was interrupted in finish(), behind the first rename
        self._bin = _open_at(part, size)
        self._sizes = _open_at(self._parts[".sizes"], documents * 4)

    @staticmethod
    def leftovers(prefix: Path) -> list[Path]:
        """The existing temporary files of an unfinished build."""
        paths = (file_of(prefix, f"{suffix}.part") for suffix in (".bin", ".idx", ".sizes"))
        return [path for path in paths if path.exists()]

    def add(self, ids: np.ndarray) -> None:
        """Append one document, ids [n] within the range of the file's type."""
        assert len(ids) < 2**31, "a length is an int32"
        self._bin.write(ids.astype(self._dtype).tobytes())
        self._sizes.write(struct.pack("<i", len(ids)))
        self.documents += 1
        self.tokens += len(ids)

    def sync(self) -> None:
        """Force everything added so far to the disk."""
        for file in (self._bin, self._sizes):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files without finishing; the temporary files are kept."""
        self._bin.close()
        self._sizes.close()

    def finish(self) -> None:
        """Write the index and rename both files to their final names, which they may take over from older files."""
        self.sync()
        self.close()
        code = next(code for code, dtype in DTYPES.items() if np.dtype(dtype) == self._dtype)
        with open(self._parts[".idx"], "wb") as file:
            file.write(MAGIC + _HEADER.pack(1, code, self.documents, self.documents + 1))
            for sizes in self._chunks():
                file.write(sizes.astype("<i4").tobytes())
            total = 0
            for sizes in self._chunks():
                ends = total + np.cumsum(sizes * self._dtype.itemsize)
                file.write((ends - sizes * self._dtype.itemsize).astype("<i8").tobytes())
                total = int(ends[-1])
            for start in range(0, self.documents + 1, _CHUNK):
                file.write(np.arange(start, min(start + _CHUNK, self.documents + 1), dtype="<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        self._final[".idx"].unlink(missing_ok=True)  # that of replaced files, which must never stand beside new ids
        for suffix in (".bin", ".idx"):
            self._parts[suffix].rename(self._final[suffix])
        self._parts[".sizes"].unlink()

    def _chunks(self) -> Iterator[np.ndarray]:
        with open(self._parts[".sizes"], "rb") as file:
            while block := file.read(4 * _CHUNK):
                yield np.frombuffer(block, "<i4").astype(np.int64)


def _open_at(path: Path, size: int) -> BinaryIO:
    """Opens a file for appending after its first `size` bytes; anything after them is removed."""
    actual = path.stat().st_size if path.exists() else 0
    if actual < size:
        raise DataError(
            f"{path}: {actual} bytes, but {size} had been written. Hint: start from scratch (overwrite=true)."
        )
    file = open(path, "ab")  # noqa: SIM115 - the writer keeps it open
    file.truncate(size)
    return file
