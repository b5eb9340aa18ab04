"""Writes a model with quantised weights, tensor by tensor, and reads it again.

Up to four threads work on a weight each, while another one is written: about N + 1 weights are in memory for N threads.
Before a matrix is written, its codes and scales are read back from the form that they have in the file. The finished
files are opened as any command opens them, and compared with what was written by checksums of all bits. How far codes
and scales are from the source is the report.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.build import Overrides
from erniekit.checkpoint import dtypes
from erniekit.checkpoint.model_dir import write_configs
from erniekit.checkpoint.model_reader import METADATA, ModelReader
from erniekit.checkpoint.safetensors_header import Plan
from erniekit.checkpoint.safetensors_write import Writer
from erniekit.export.convert import Edit, Report, digest
from erniekit.models.config import Format, ModelConfig
from erniekit.models.weights import Logical
from erniekit.precision.codes import squared_error
from erniekit.quantize.places import Place
from erniekit.quantize.quantiser import Quantiser
from erniekit.quantize.schemes import Matrix, Options, Scheme, scheme_for
from erniekit.quantize.tensor_parallel import Degrees, degrees_of
from erniekit.utils import log
from erniekit.utils.arrays import transposed
from erniekit.utils.errors import CheckpointError, ConfigError
from erniekit.utils.ordered_pool import in_order
from erniekit.utils.runtime import keep_freed_memory, wanted_threads

# More threads need more memory, one weight each, and four are faster than most disks. Operations on small matrices are
# over before another thread has the interpreter: two threads took twice as long as one with 131,072 weights a matrix.
_MOST_THREADS = 4
_LARGE = 1 << 19


@dataclass(frozen=True)
class Quantisation:
    """How a model is quantised: by the scheme `name` with `options`; `quantiser` makes the algorithm for an opened
    source.
    """

    name: str
    options: Options
    quantiser: Callable[["EditedModel", Scheme], Quantiser]


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

    def edits(self, logical: Logical) -> bool:
        """Whether the editor changes a weight."""
        return self.editor is not None and self.editor.touches(logical)

    def read_pieces(self, logical: Logical, format: Format) -> Iterator[np.ndarray]:
        """A weight as the tensors of a file of `format`, fp32: [out, in] in -PT files. From a source of the same layout
        they are read as they are, without being transposed twice.
        """
        if self.reader.format == format and not self.edits(logical):
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


@dataclass(frozen=True)
class QuantisedReport(Report):
    """See Report. `errors`: of every quantised matrix, in the order of the file; `scheme`: what was written;
    `degrees`: with how many tensor-parallel ranks an engine can divide it; `algorithm`: how the codes were chosen;
    `calibration`: what was measured (see Quantiser.measured).
    """

    scheme: Scheme
    errors: tuple[MatrixError, ...]
    degrees: Degrees
    algorithm: str
    calibration: dict[str, Any] | None


def write_quantised(
    source_dir: str | Path,
    target_dir: Path,
    format: str,
    quantisation: Quantisation,
    max_shard_size: int | str,
    edit: Callable[[ModelReader], Edit] | None = None,
    overrides: Overrides | None = None,
    num_threads: int | None = None,
) -> QuantisedReport:
    """Write quantised weights, config.json and, if there is none, generation_config.json; then verify them. `edit` and
    `overrides` as in export.convert.rewrite. `num_threads`: None: ERNIEKIT_NUM_THREADS, OMP_NUM_THREADS or the cores of
    this process, at most 4, and 1 where matrices are small. The bytes do not depend on it.

    Raises ConfigError where the scheme does not fit the format or the model, and CheckpointError where the source is
    quantised already, or has weights that are not finite.
    """
    source, config, scheme = _opened(source_dir, format, quantisation, overrides)
    _say_rounding(source)
    edited = EditedModel(source, None if edit is None else edit(source), config)
    quantiser = quantisation.quantiser(edited, scheme)
    _require_ranges(scheme, quantiser, config)
    keep_freed_memory()
    job = _Job(edited, scheme, quantiser, num_threads or _num_threads(scheme, config))
    plan = [tensor for logical in source.logicals for tensor in job.plan(logical)]
    with Writer(target_dir, plan, max_shard_size, METADATA[scheme.format]) as writer:
        job.write(writer)
    measured = quantiser.measured()
    bf16 = dataclasses.replace(config, dtype="bfloat16")
    write_configs(target_dir, bf16, scheme.format, {"quantization_config": scheme.settings})
    job.verify(target_dir)
    quantiser.finish()
    counts, degrees = (len(plan), writer.num_bytes, len(writer.files)), degrees_of(scheme, config)
    if not degrees.good:
        log.warning(f"{scheme.name}: vLLM takes no file with these sizes, on any number of ranks: {degrees.limit}")
    return QuantisedReport(*counts, scheme, tuple(job.errors), degrees, quantiser.name, measured)


def _num_threads(scheme: Scheme, config: ModelConfig) -> int:
    """How many threads are of use: one where most matrices are small."""
    sizes = sorted(matrix.shape[0] * matrix.shape[1] for matrix in scheme.every_matrix(config))
    return min(_MOST_THREADS, wanted_threads()) if sizes and sizes[len(sizes) // 2] >= _LARGE else 1


def check_quantised(
    source_dir: str | Path,
    format: str,
    quantisation: Quantisation,
    calibrates: bool,
    overrides: Overrides | None,
) -> None:
    """Raise what `write_quantised` raises before it reads a weight. `calibrates`: whether the quantiser measures the
    ranges of inputs, so that it is not made here.
    """
    source, config, scheme = _opened(source_dir, format, quantisation, overrides)
    if not calibrates:
        _require_ranges(scheme, quantisation.quantiser(EditedModel(source, None, config), scheme), config)


def _opened(
    source_dir: str | Path, format: str, quantisation: Quantisation, overrides: Overrides | None
) -> tuple[ModelReader, ModelConfig, Scheme]:
    """The source, its configuration with `overrides`, and the scheme for it."""
    source = ModelReader(source_dir, keep_mtp=True)
    if source.quantised:
        raise CheckpointError(
            f"{source_dir} is quantised already ({source.quantised}): quantising twice adds both errors. Export the "
            "checkpoint that it was made from."
        )
    config = source.config if overrides is None else overrides.apply(source.config)
    scheme = scheme_for(quantisation.name, "paddle" if format == "paddle" else "pt", config, quantisation.options)
    return source, config, scheme


@dataclass(frozen=True)
class _Ready:
    """What a weight becomes in the files: tensors in the order of the plan, their checksums, and what is lost."""

    tensors: list[tuple[str, np.ndarray]]
    digests: dict[str, int]
    errors: list[MatrixError]


class _Job:
    """One model while it is written. `num_threads` quantise weights, each by itself, while this thread writes."""

    def __init__(self, source: EditedModel, scheme: Scheme, quantiser: Quantiser, num_threads: int) -> None:
        self.source, self.scheme, self.quantiser = source, scheme, quantiser
        self.num_threads = num_threads
        self.errors: list[MatrixError] = []
        self.digests: dict[str, int] = {}  # of every tensor, by its name in the file

    def plan(self, logical: Logical) -> Plan:
        """The tensors of the file for a weight."""
        matrices = self.scheme.matrices(logical)
        if matrices:
            return [tensor for matrix in matrices for tensor in matrix.codec.plan(matrix.name, matrix.shape)]
        return [(piece.name, _plain_dtype(logical), piece.shape) for piece in logical.pieces(self.scheme.format)]

    def write(self, writer: Writer) -> None:
        """Read every weight, quantise it if the scheme says so, and write it, in the order of the source's table."""
        num_threads = self.num_threads if self.quantiser.is_local else 1
        for ready in in_order(self._ready, self.source.logicals, num_threads):
            for name, tensor in ready.tensors:
                writer.write(name, tensor)
            self.digests |= ready.digests
            self.errors += ready.errors
            del ready, tensor  # before the next one is waited for

    def _ready(self, logical: Logical) -> _Ready:
        matrices = self.scheme.matrices(logical)
        ready = _Ready([], {}, [])
        if matrices:
            pieces = self.source.read_pieces(logical, self.scheme.format)
            for matrix in matrices:
                self._add_matrix(matrix, next(pieces), ready)
        else:
            ready.tensors.extend(self._plain(logical))
        ready.digests.update((name, digest(tensor)) for name, tensor in ready.tensors)
        return ready

    def _plain(self, logical: Logical) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of a weight that is not quantised. One that nothing changes is copied as it lies in the file."""
        source, dtype = self.source, _plain_dtype(logical)
        pieces = logical.pieces(self.scheme.format)
        if self.quantiser.is_local and source.reader.format == self.scheme.format and not source.edits(logical):
            for piece in pieces:
                stored = source.reader.info(piece.name).dtype
                yield piece.name, self._converted(logical, source.reader.read_piece(piece), stored, dtype)
            return
        weight = self._converted(logical, self.quantiser.plain(logical, source.read(logical)), "F32", dtype)
        for piece in pieces:
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
        codec = matrix.codec
        weight = codec.rotated(original if matrix.piece.transposed else transposed(original))
        del original
        try:
            codes, scales = self.quantiser.codes(matrix, weight)
        except ValueError as error:
            where = f"{self.source.reader.path}: {matrix.name}"
            raise CheckpointError(f"{where}: {error}: it cannot be quantised. Export another checkpoint.") from None
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{matrix.name}: a scale is not finite: the algorithm failed. Nothing was kept.")
        tensors = codec.stored(codes, scales, self.quantiser.input_range(matrix) if codec.needs_range else None)
        named = {name: tensor for (name, _, _), tensor in zip(self._plan(matrix), tensors, strict=True)}
        read = codec.unstored(partial(_as_read, named, self._plan(matrix)), matrix.name, matrix.shape)
        if not (np.array_equal(read.codes, codes) and np.array_equal(read.scales, scales)):
            raise AssertionError(f"{matrix.name}: codes in the form of the file are read as others")
        squared, total = squared_error(weight, codes, scales, codec.spec)
        relative = self.quantiser.error(matrix)
        squared = squared if relative is None else total * relative**2
        ready.tensors.extend(named.items())
        ready.errors.append(MatrixError(matrix.name, matrix.place, weight.size, squared, total))

    @staticmethod
    def _plan(matrix: Matrix) -> Plan:
        return matrix.codec.plan(matrix.name, matrix.shape)

    def verify(self, target_dir: Path) -> None:
        """Read every tensor of the target and compare its checksum with that of what was written. The target is opened
        as any command opens it, so that all tensors are there and are recognised as what they were written for.
        """
        target = ModelReader(target_dir, keep_mtp=True)
        for logical in target.logicals:
            for matrix in self.scheme.matrices(logical):
                found = target.codec_of(matrix.piece)
                if found is None or not found.reads_as(matrix.codec, matrix.shape):
                    raise AssertionError(f"{matrix.name}: written as {matrix.codec}, and recognised as {found}")
        names = list(self.digests)
        for name, checksum in zip(names, in_order(partial(_digest_of, target), names, self.num_threads), strict=True):
            if checksum != self.digests[name]:
                raise CheckpointError(
                    f"{name} read again from {target_dir} differs from what was written: the disk or the memory of "
                    "this machine is at fault. Nothing was kept; try again."
                )


def _digest_of(target: ModelReader, name: str) -> int:
    return digest(target.read_stored(name))


def _as_read(tensors: Mapping[str, np.ndarray], plan: Plan, name: str) -> np.ndarray:
    """A tensor that is to be written, as quantised_codecs.Read would read it."""
    dtype = next(dtype for planned, dtype, _ in plan if planned == name)
    return dtypes.to_fp32(tensors[name], dtype) if dtype in dtypes.FLOATS else tensors[name]


def _require_ranges(scheme: Scheme, quantiser: Quantiser, config: ModelConfig) -> None:
    """Raise ConfigError where the file keeps the ranges of inputs and the algorithm does not know one."""
    for matrix in scheme.every_matrix(config):
        if matrix.codec.needs_range and quantiser.input_range(matrix) is None:
            raise ConfigError(
                f"quantization: {scheme.name} with format: {scheme.format}: the file keeps the largest magnitude of "
                f"the inputs of {matrix.name}, which only calibration or training for the scheme measures: set "
                "quantization_calibration_path, or export a run with qat"
            )


def _plain_dtype(logical: Logical) -> str:
    """The type of a weight that is not quantised: engines multiply in bf16."""
    return "F32" if logical.keep_fp32 else "BF16"


def describe(report: QuantisedReport) -> str:
    """For the log: what was quantised, what it lost by kind, and the bits of a weight."""
    kinds: dict[str, list[MatrixError]] = {}
    for error in report.errors:
        kinds.setdefault(error.place.role, []).append(error)
    lost = []
    for role, errors in kinds.items():
        total = sum(error.total for error in errors)
        relative = math.sqrt(sum(error.squared for error in errors) / total) if total else 0.0
        lost.append(f"{role} {100 * relative:.3g} %")
    count = sum(error.size for error in report.errors)
    return (
        f"{report.scheme.name}: {len(report.errors)} matrices, {count / 1e6:,.1f} M weights: {report.scheme.method}; "
        f"error |W' - W| / |W|: {', '.join(lost)}; read by {report.scheme.readers}; {report.degrees}"
    )


def _say_rounding(source: ModelReader) -> None:
    """Log a line if weights that are not quantised lose precision."""
    kept = {source.dtype_of(logical) for logical in source.logicals if not logical.keep_fp32} - {"BF16"}
    if kept:
        names = ", ".join(sorted(kept))
        log.info(f"{source.path}: weights that are not quantised are rounded from {names} to bfloat16")
