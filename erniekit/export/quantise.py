"""Writes a model with quantised weights, tensor by tensor, and reads it again.

About two weights are in memory at a time. What the finished files stand for is compared, by checksums of all bits, with
what the codes and scales stood for when they were chosen; how far that is from the source is the report.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from erniekit.quantize.places import Place
from erniekit.quantize.quantiser import Quantiser
from erniekit.quantize.schemes import Matrix, Options, Scheme, scheme_for
from erniekit.quantize.tensor_parallel import Degrees, degrees_of
from erniekit.utils import log
from erniekit.utils.arrays import transposed
from erniekit.utils.errors import CheckpointError, ConfigError


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
        if self.editor is not None and self.editor.touches(logical):
            weight = self.editor.apply(logical, weight)
        return weight

    def read_pieces(self, logical: Logical, format: Format) -> Iterator[np.ndarray]:
        """A weight as the tensors of a file of `format`, fp32: [out, in] in -PT files. From a source of the same layout
        they are read as they are, without being transposed twice.
        """
        if self.reader.format == format and not (self.editor is not None and self.editor.touches(logical)):
            for piece in logical.pieces(format):
                yield self.reader.read_piece(piece, as_fp32=True)
            return
        weight = self.read(logical)
        for piece in logical.pieces(format):
            yield piece.extract(weight)


@dataclass(frozen=True)
class MatrixError:
    """What a quantised matrix lost: `squared` is the sum of (w' - w)^2, `total` that of w^2."""

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
) -> QuantisedReport:
    """Write quantised weights, config.json and, if there is none, generation_config.json; then verify them. `edit` and
    `overrides` as in export.convert.rewrite.

    Raises ConfigError where the scheme does not fit the format or the model, and CheckpointError where the source is
    quantised already, or has weights that are not finite.
    """
    source, config, scheme = _opened(source_dir, format, quantisation, overrides)
    _say_rounding(source)
    edited = EditedModel(source, None if edit is None else edit(source), config)
    quantiser = quantisation.quantiser(edited, scheme)
    _require_ranges(scheme, quantiser, config)
    job = _Job(edited, scheme, quantiser)
    plan = [tensor for logical in source.logicals for tensor in job.plan(logical)]
    with Writer(target_dir, plan, max_shard_size, METADATA[scheme.format]) as writer:
        for logical in source.logicals:
            job.write(logical, writer)
    measured = quantiser.measured()
    bf16 = dataclasses.replace(config, dtype="bfloat16")
    write_configs(target_dir, bf16, scheme.format, {"quantization_config": scheme.settings})
    job.verify(target_dir)
    quantiser.finish()
    counts, degrees = (len(plan), writer.num_bytes, len(writer.files)), degrees_of(scheme, config)
    if not degrees.good:
        log.warning(f"{scheme.name}: vLLM takes no file with these sizes, on any number of ranks: {degrees.limit}")
    return QuantisedReport(*counts, scheme, tuple(job.errors), degrees, quantiser.name, measured)


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


class _Job:
    """One model while it is written."""

    def __init__(self, source: EditedModel, scheme: Scheme, quantiser: Quantiser) -> None:
        self.source, self.scheme, self.quantiser = source, scheme, quantiser
        self.errors: list[MatrixError] = []
        self.digests: dict[str, int] = {}  # of what is written, unquantised, in the file's layout, by its name there

    def plan(self, logical: Logical) -> Plan:
        """The tensors of the file for a weight."""
        matrices = self.scheme.matrices(logical)
        if matrices:
            return [tensor for matrix in matrices for tensor in matrix.codec.plan(matrix.name, matrix.shape)]
        return [(piece.name, _plain_dtype(logical), piece.shape) for piece in logical.pieces(self.scheme.format)]

    def write(self, logical: Logical, writer: Writer) -> None:
        """Read a weight, quantise it if the scheme says so, and write it."""
        matrices = self.scheme.matrices(logical)
        if not matrices:
            self._write_plain(logical, self.quantiser.plain(logical, self.source.read(logical)), writer)
            return
        pieces = self.source.read_pieces(logical, self.scheme.format)
        for matrix in matrices:
            self._write_matrix(matrix, next(pieces), writer)

    def _write_plain(self, logical: Logical, weight: np.ndarray, writer: Writer) -> None:
        if not np.isfinite(weight).all():
            raise CheckpointError(
                f"{self.source.reader.path}: {logical.param}: a weight is not finite. Export another checkpoint."
            )
        try:
            stored = dtypes.convert(weight, "F32", _plain_dtype(logical))
        except CheckpointError as error:
            raise CheckpointError(f"{self.source.reader.path}: {logical.param}: {error}") from error
        for piece in logical.pieces(self.scheme.format):
            tensor = piece.extract(stored)
            self.digests[piece.name] = digest(tensor)
            writer.write(piece.name, tensor)

    def _write_matrix(self, matrix: Matrix, original: np.ndarray, writer: Writer) -> None:
        """`original`: as in an unquantised file of the layout, fp32."""
        piece, codec = matrix.piece, matrix.codec
        if not piece.transposed:
            original = transposed(original)
        try:
            codes, scales = self.quantiser.codes(matrix, codec.rotated(original))
        except ValueError as error:
            where = f"{self.source.reader.path}: {matrix.name}"
            raise CheckpointError(f"{where}: {error}: it cannot be quantised. Export another checkpoint.") from None
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{matrix.name}: a scale is not finite: the algorithm failed. Nothing was kept.")
        tensors = codec.stored(codes, scales, self.quantiser.input_range(matrix) if codec.needs_range else None)
        for (name, _, _), stored in zip(codec.plan(matrix.name, matrix.shape), tensors, strict=True):
            writer.write(name, stored)
        restored = codec.restored(codes, scales)
        self.digests[piece.name] = digest(restored if piece.transposed else transposed(restored))
        total = float(np.vdot(original, original))
        restored -= original
        relative = self.quantiser.error(matrix)
        squared = float(np.vdot(restored, restored)) if relative is None else total * relative**2
        self.errors.append(MatrixError(matrix.name, matrix.place, original.size, squared, total))

    def verify(self, target_dir: Path) -> None:
        """Read every tensor of the target and compare what it stands for with what the written ones stood for."""
        target = ModelReader(target_dir, keep_mtp=True)
        pieces = [(logical, piece) for logical in target.logicals for piece in logical.pieces(target.format)]
        assert len(pieces) == len(self.digests)
        for logical, piece in pieces:
            if digest(target.read_piece(piece)) != self.digests[piece.name]:
                raise CheckpointError(
                    f"{logical.param} read again from {target_dir} differs from what was written: the disk or the "
                    "memory of this machine is at fault. Nothing was kept; try again."
                )


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
