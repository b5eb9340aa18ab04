"""One model while it is quantised and written: which work is done at a time, by which thread, and what is compared.

A unit of work is a weight, or some rows of one. Up to four threads work on a unit each, while another one is written:
about N + 1 units are in memory for N threads. Within a unit, rows are read, quantised and packed in blocks that stay in
a processor's cache. Before a block is written, its codes and scales are read back from the form that they have in the
file. The finished files are opened as any command opens them, and compared with what was written by checksums of all
bits.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from erniekit.checkpoint import dtypes
from erniekit.checkpoint.model_reader import ModelReader
from erniekit.checkpoint.safetensors_header import Plan
from erniekit.checkpoint.safetensors_write import Writer
from erniekit.export.convert import Edit, digest
from erniekit.models.config import Format, ModelConfig
from erniekit.models.weights import Logical, Piece
from erniekit.precision.codes import squared_error
from erniekit.quantize.places import Place
from erniekit.quantize.quantiser import Quantiser
from erniekit.quantize.schemes import Matrix, Scheme
from erniekit.utils.arrays import transposed
from erniekit.utils.errors import CheckpointError
from erniekit.utils.ordered_pool import in_order

# Weights of a block: its 16-bit source, fp32 values and codes are some of the 1 or 2 MB of a core's second cache, and
# operations take long enough that threads seldom wait for the interpreter.
_BLOCK = 1 << 18
# Weights of a unit: small enough that the threads share a large embedding.
_UNIT = 1 << 21


class EditedModel:
    """The weights that are quantised (model_io.WeightSource): those of an opened directory, with the changes of
    `editor`. `config`: of the model, with the configuration's overrides.
    """

    def __init__(self, reader: ModelReader, editor: Edit | None, config: ModelConfig) -> None:
        self.reader, self.editor, self.config = reader, editor, config
        self.logicals = reader.logicals

    def read(self, logical: Logical, as_fp32: bool = True) -> np.ndarray:
        """A weight, fp32 in our layout."""
        weight = self.reader.read(logical, as_fp32=True)
        return weight if self.editor is None or not self.edits(logical) else self.editor.apply(logical, weight)

    def has_pieces(self, logical: Logical, format: Format) -> bool:
        """Whether the tensors of a weight in a file of `format` are those of the opened directory, as they are."""
        return self.reader.format == format and not self.edits(logical) and not self.reader.is_turned(logical)

    def edits(self, logical: Logical) -> bool:
        """Whether the editor changes a weight."""
        return self.editor is not None and self.editor.touches(logical)

    def read_pieces(self, logical: Logical, format: Format) -> Iterator[np.ndarray]:
        """A weight as the tensors of a file of `format`, fp32: [out, in] in -PT files. From a source of the same layout
        they are read as they are, without being transposed twice.
        """
        if self.has_pieces(logical, format):
            for piece in logical.pieces(format):
                yield self.reader.read_piece(piece, as_fp32=True)
            return
        weight = self.read(logical)
        for piece in logical.pieces(format):
            yield piece.extract(weight)


@dataclass(frozen=True)
class MatrixError:
    """What a quantised matrix lost: `squared` is the sum of (w' - w)^2, `total` that of w^2, both of what is rounded:
    of the rotated matrix where an engine rotates inputs.
    """

    name: str
    place: Place
    size: int
    squared: float
    total: float

    @property
    def relative(self) -> float:
        """|W' - W| / |W|, 0 for a matrix of zeros."""
        return math.sqrt(self.squared / self.total) if self.total else 0.0


class _Unit(NamedTuple):
    """Rows `begin` to `end` of `piece`, the tensor of a weight in the source's file; without a piece, the whole
    weight.
    """

    logical: Logical
    piece: Piece | None = None
    begin: int = 0
    end: int = 0
    matrix: Matrix | None = None  # where the piece is quantised


class _Checksum(NamedTuple):
    """The checksum of rows `begin` to `end` of a tensor of the target."""

    name: str
    begin: int
    end: int
    value: int


@dataclass(frozen=True)
class _Ready:
    """What a unit becomes in the files: tensors in the order of the plan, in parts along the first axis, and what is
    lost. `checksums`: of the parts of each tensor together, with the number of their rows.
    """

    tensors: list[tuple[str, list[np.ndarray]]]
    checksums: list[tuple[str, int, int]]
    errors: list[MatrixError]


class Job:
    """One model while it is written. `num_threads` quantise units, each by itself, while this thread writes."""

    def __init__(self, source: EditedModel, scheme: Scheme, quantiser: Quantiser, num_threads: int) -> None:
        self.source, self.scheme, self.quantiser = source, scheme, quantiser
        self.num_threads = num_threads
        self._errors: dict[str, MatrixError] = {}
        self._checksums: list[_Checksum] = []

    @property
    def errors(self) -> tuple[MatrixError, ...]:
        """The errors of every quantised matrix, in the order of the file."""
        return tuple(self._errors.values())

    def plan(self, logical: Logical) -> Plan:
        """The tensors of the file for a weight."""
        matrices = self.scheme.matrices(logical)
        if matrices:
            return [tensor for matrix in matrices for tensor in matrix.codec.plan(matrix.name, matrix.shape)]
        return [(piece.name, _plain_dtype(logical), piece.shape) for piece in logical.pieces(self.scheme.format)]

    def write(self, writer: Writer) -> None:
        """Read every weight, quantise it if the scheme says so, and write it, in the order of the source's table."""
        num_threads = self.num_threads if self.quantiser.is_local else 1
        waiting: dict[str, list[np.ndarray]] = defaultdict(list)  # the scales of a matrix come behind all its codes
        rows: dict[str, int] = defaultdict(int)
        units = (unit for logical in self.source.logicals for unit in self._units(logical))
        for ready in in_order(self._ready, units, num_threads):
            for name, parts in ready.tensors:
                waiting[name] += parts
            for name, count, value in ready.checksums:
                self._checksums.append(_Checksum(name, rows[name], rows[name] + count, value))
                rows[name] += count
            self._add_errors(ready.errors)
            del ready, parts  # before the next one is waited for
            while (next_name := writer.next_name) is not None and next_name in waiting:
                for part in waiting.pop(next_name):
                    writer.append(next_name, part)
                    del part

    def _add_errors(self, errors: Iterable[MatrixError]) -> None:
        for error in errors:
            before = self._errors.get(error.name)
            if before is not None:
                size, squared = before.size + error.size, before.squared + error.squared
                error = MatrixError(error.name, error.place, size, squared, before.total + error.total)
            self._errors[error.name] = error

    def _units(self, logical: Logical) -> Iterator[_Unit]:
        """The work for a weight. Rows of it are read by themselves where the source has them in the target's order."""
        matrices = self.scheme.matrices(logical)
        by_rows = self.quantiser.is_local and self.source.has_pieces(logical, self.scheme.format)
        # A file that has [in, out] has no rows of a matrix.
        if not by_rows or not all(matrix.piece.transposed and _row_unit(matrix) for matrix in matrices):
            yield _Unit(logical)
            return
        found: list[Matrix | None] = list(matrices) or [None] * len(logical.pieces(self.scheme.format))
        for piece, matrix in zip(logical.pieces(self.scheme.format), found, strict=True):
            step = _rows_of(_UNIT, piece, matrix)
            for begin in range(0, piece.shape[0], step):
                yield _Unit(logical, piece, begin, min(begin + step, piece.shape[0]), matrix)

    def _ready(self, unit: _Unit) -> _Ready:
        ready = _Ready([], [], [])
        matrices = self.scheme.matrices(unit.logical)
        if unit.piece is not None and unit.matrix is not None:
            blocks = (dtypes.to_fp32(stored, dtype) for stored, dtype in self._stored(unit))
            self._add_rows(unit.matrix, unit.begin, blocks, ready)
        elif unit.piece is not None:
            wanted = _plain_dtype(unit.logical)
            parts = [self._converted(unit.logical, stored, dtype, wanted) for stored, dtype in self._stored(unit)]
            ready.tensors.append((unit.piece.name, parts))
        elif matrices:
            pieces = self.source.read_pieces(unit.logical, self.scheme.format)
            for matrix in matrices:
                self._add_matrix(matrix, next(pieces), ready)
        else:
            ready.tensors.extend((name, [tensor]) for name, tensor in self._plain(unit.logical))
        for name, parts in ready.tensors:
            value = 0
            for part in parts:
                value = digest(np.ascontiguousarray(part), value)
            ready.checksums.append((name, sum(len(part) for part in parts), value))
        return ready

    def _stored(self, unit: _Unit) -> Iterator[tuple[np.ndarray, str]]:
        """The rows of a unit as they lie in the source's file, in blocks, and their header type."""
        assert unit.piece is not None
        reader, step = self.source.reader, _rows_of(_BLOCK, unit.piece, unit.matrix)
        name = reader.stored_name(unit.piece.name)
        dtype = reader.stored.info(name).dtype
        with reader.stored.rows_from(name, unit.begin) as fill:
            for begin in range(unit.begin, unit.end, step):
                block = np.empty((min(step, unit.end - begin), *unit.piece.shape[1:]), dtypes.STORAGE[dtype])
                fill(block)
                yield block, dtype

    def _plain(self, logical: Logical) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of a weight that is not quantised."""
        weight = self.quantiser.plain(logical, self.source.read(logical))
        weight = self._converted(logical, weight, "F32", _plain_dtype(logical))
        for piece in logical.pieces(self.scheme.format):
            yield piece.name, piece.extract(weight)

    def _converted(self, logical: Logical, weight: np.ndarray, stored: str, dtype: str) -> np.ndarray:
        """A weight of header type `stored` as `dtype`."""
        if not dtypes.all_finite(weight, stored):
            raise CheckpointError(
                f"{self.source.reader.path}: {logical.param}: a weight is not finite. Export another checkpoint."
            )
        try:
            return dtypes.convert(weight, stored, dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{self.source.reader.path}: {logical.param}: {error}") from error

    def _add_matrix(self, matrix: Matrix, original: np.ndarray, ready: _Ready) -> None:
        """`original`: as in an unquantised file of the layout, fp32."""
        weight = matrix.codec.rotated(original if matrix.piece.transposed else transposed(original))
        del original
        step = len(weight)
        if self.quantiser.is_local and (unit := _row_unit(matrix)):
            step = max(1, _BLOCK // (unit * weight.shape[1])) * unit
        self._add_rows(matrix, 0, (weight[begin : begin + step] for begin in range(0, len(weight), step)), ready)

    def _add_rows(self, matrix: Matrix, begin: int, blocks: Iterable[np.ndarray], ready: _Ready) -> None:
        """Quantise rows of a matrix, from row `begin` on. `blocks`: of them, one after another: fp32, rotated."""
        codec, plan = matrix.codec, matrix.codec.plan(matrix.name, matrix.shape)
        input_range = self.quantiser.input_range(matrix) if codec.needs_range else None
        parts: list[list[np.ndarray]] = [[] for _ in plan]
        size, squared, total = 0, 0.0, 0.0
        for weight in blocks:
            codes, scales = self._codes(matrix, weight)
            tensors = codec.stored(codes, scales, input_range, matrix.shape[0])
            named = {name: tensor for (name, _, _), tensor in zip(plan, tensors, strict=True)}
            read = codec.unstored(partial(_as_read, named, plan), matrix.name, (len(weight), matrix.shape[1]))
            if not (np.array_equal(read.codes, codes) and np.array_equal(read.scales, scales)):
                raise AssertionError(f"{matrix.name}: codes in the form of the file are read as others")
            lost = squared_error(weight, codes, scales, codec.spec)
            for tensor, (_, _, shape), earlier in zip(tensors, plan, parts, strict=True):
                if begin == 0 or tensor.shape != shape:  # a tensor of its whole shape is the same for all rows
                    earlier.append(tensor)
            begin, size, squared, total = begin + len(weight), size + weight.size, squared + lost[0], total + lost[1]
        relative = self.quantiser.error(matrix)
        squared = squared if relative is None else total * relative**2
        ready.tensors.extend((name, rows) for (name, _, _), rows in zip(plan, parts, strict=True))
        ready.errors.append(MatrixError(matrix.name, matrix.place, size, squared, total))

    def _codes(self, matrix: Matrix, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales of some rows of a matrix."""
        try:
            codes, scales = self.quantiser.codes(matrix, weight)
        except ValueError as error:
            where = f"{self.source.reader.path}: {matrix.name}"
            raise CheckpointError(f"{where}: {error}: it cannot be quantised. Export another checkpoint.") from None
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{matrix.name}: a scale is not finite: the algorithm failed. Nothing was kept.")
        return codes, scales

    def verify(self, target_dir: Path) -> None:
        """Read every tensor of the target and compare its checksums with those of what was written. The target is
        opened as any command opens it, so that all tensors are there and are recognised as what they were written for.
        """
        target = ModelReader(target_dir, keep_mtp=True, quiet=True)
        for logical in target.logicals:
            for matrix in self.scheme.matrices(logical):
                found = target.codec_of(matrix.piece)
                if found is None or not found.reads_as(matrix.codec, matrix.shape):
                    raise AssertionError(f"{matrix.name}: written as {matrix.codec}, and recognised as {found}")
        found_again = in_order(partial(_checksum_of, target), self._checksums, self.num_threads)
        for written, value in zip(self._checksums, found_again, strict=True):
            if value != written.value:
                raise CheckpointError(
                    f"{written.name} read again from {target_dir} differs from what was written: the disk or the "
                    "memory of this machine is at fault. Nothing was kept; try again."
                )


def _row_unit(matrix: Matrix) -> int | None:
    return matrix.codec.row_unit(matrix.shape)


def _rows_of(size: int, piece: Piece, matrix: Matrix | None) -> int:
    """The number of rows with about `size` weights, a multiple of what can be stored by itself."""
    unit = 1 if matrix is None else _row_unit(matrix) or piece.shape[0]
    return max(1, size // max(1, unit * math.prod(piece.shape[1:]))) * unit


def _checksum_of(target: ModelReader, written: _Checksum) -> int:
    """The checksum of the same rows in the target."""
    dtype, shape = target.stored.info(written.name)
    step = max(1, _BLOCK // max(1, math.prod(shape[1:])))
    block = np.empty((min(step, written.end - written.begin), *shape[1:]), dtypes.STORAGE[dtype])
    value = 0
    with target.stored.rows_from(written.name, written.begin) as fill:
        for begin in range(written.begin, written.end, step):
            rows = block[: written.end - begin]
            fill(rows)
            value = digest(rows, value)
    return value


def _as_read(tensors: Mapping[str, np.ndarray], plan: Plan, name: str) -> np.ndarray:
    """A tensor that is to be written, as quantised_codecs.Read would read it."""
    dtype = next(dtype for planned, dtype, _ in plan if planned == name)
    return dtypes.to_fp32(tensors[name], dtype) if dtype in dtypes.FLOATS else tensors[name]


def _plain_dtype(logical: Logical) -> str:
    """The type of a weight that is not quantised: engines multiply in bf16."""
    return "F32" if logical.keep_fp32 else "BF16"
