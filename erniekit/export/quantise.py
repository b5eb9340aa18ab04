"""Writes a model with quantised weights, tensor by tensor, and reads it again (see quantise_job). How far codes and
scales are from the source is the report.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erniekit.checkpoint.generation_config import read_generation_config
from erniekit.checkpoint.model_dir import write_configs
from erniekit.checkpoint.model_reader import METADATA, ModelReader
from erniekit.checkpoint.safetensors_write import Writer
from erniekit.export.convert import Edit, Report
from erniekit.export.quantise_job import EditedModel, Job, MatrixError
from erniekit.models.config import ModelConfig
from erniekit.models.overrides import Overrides
from erniekit.quantize.quantiser import Quantiser
from erniekit.quantize.schemes import Options, Scheme, scheme_for
from erniekit.quantize.tensor_parallel import Degrees, degrees_of
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError, ConfigError
from erniekit.utils.runtime import keep_freed_memory, wanted_threads
from erniekit.utils.wording import count_of

# More threads need more memory, one weight each, and four are faster than most disks. Operations on small matrices are
# over before another thread has the interpreter: two threads took twice as long as one with 131,072 weights a matrix.
_MAX_THREADS = 4
_LARGE = 1 << 19


@dataclass(frozen=True)
class Quantisation:
    """How a model is quantised: by the scheme `name` with `options`; `quantiser` makes the algorithm for an opened
    source.
    """

    name: str
    options: Options
    quantiser: Callable[[EditedModel, Scheme], Quantiser]


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
    _log_rounding(source)
    edited = EditedModel(source, None if edit is None else edit(source), config)
    quantiser = quantisation.quantiser(edited, scheme)
    _require_ranges(scheme, quantiser, config)
    keep_freed_memory()
    job = Job(edited, scheme, quantiser, num_threads or _num_threads(scheme, config))
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
    return QuantisedReport(*counts, scheme, job.errors, degrees, quantiser.name, measured)


def _num_threads(scheme: Scheme, config: ModelConfig) -> int:
    """How many threads are of use: one where most matrices are small."""
    sizes = sorted(matrix.shape[0] * matrix.shape[1] for matrix in scheme.every_matrix(config))
    return min(_MAX_THREADS, wanted_threads()) if sizes and sizes[len(sizes) // 2] >= _LARGE else 1


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
    read_generation_config(source_dir, source.config)  # it is copied, and a model with a wrong one cannot be loaded
    if source.quantised:
        raise CheckpointError(
            f"{source_dir} is quantised already ({source.quantised}): quantising twice adds both errors. Export the "
            "checkpoint that it was made from."
        )
    config = source.config if overrides is None else overrides.apply(source.config)
    scheme = scheme_for(quantisation.name, "paddle" if format == "paddle" else "pt", config, quantisation.options)
    return source, config, scheme


def _require_ranges(scheme: Scheme, quantiser: Quantiser, config: ModelConfig) -> None:
    """Raise ConfigError where the file keeps the ranges of inputs and the algorithm does not know one."""
    for matrix in scheme.every_matrix(config):
        if matrix.codec.needs_range and quantiser.input_range(matrix) is None:
            raise ConfigError(
                f"quantization: {scheme.name} with format: {scheme.format}: the file keeps the largest magnitude of "
                f"the inputs of {matrix.name}, which only calibration or training for the scheme measures: set "
                "quantization_calibration_path, or export a run with qat"
            )


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
        f"{report.scheme.name}: {count_of(len(report.errors), 'matrix', 'matrices')}, {count / 1e6:,.1f} M weights: "
        f"{report.scheme.method}; error |W' - W| / |W|: {', '.join(lost)}; read by {report.scheme.readers}; "
        f"{report.degrees}"
    )


def _log_rounding(source: ModelReader) -> None:
    """Log a line if weights that are not quantised lose precision."""
    kept = {source.dtype_of(logical) for logical in source.logicals if not logical.keep_fp32} - {"BF16"}
    if kept:
        names = ", ".join(sorted(kept))
        log.info(f"{source.path}: weights that are not quantised are rounded from {names} to bfloat16")
