"""Quantisation with calibration as the writer of a quantised model uses it: codes of gptq, awq, smoothquant or rtn."""

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.checkpoint.fingerprint import adapter_digest, weights_digest
from erniekit.checkpoint.model_io import WeightSource
from erniekit.config import Config
from erniekit.data.packed_batch import Modality
from erniekit.models.config import ModelConfig
from erniekit.models.weights import Logical
from erniekit.quantize.algorithm import Algorithm, AlgorithmOptions
from erniekit.quantize.calibration import Calibration, CalibrationSource, read_calibration
from erniekit.quantize.layer_pass import MatrixReport
from erniekit.quantize.run import CalibratedModel, calibrate
from erniekit.quantize.schemes import Matrix, Scheme
from erniekit.utils import log
from erniekit.utils.errors import DataError
from erniekit.utils.wording import count_of

# Beside the exported directory: the layers that are finished, until all are.
WORK_DIRECTORY = "export.calibration"


class CalibratedQuantiser:
    """The results of `run.calibrate` (quantiser.Quantiser)."""

    is_local = False

    def __init__(self, model: CalibratedModel, calibration: Calibration, algorithm: Algorithm) -> None:
        self.name: str = algorithm
        self._model, self._calibration = model, calibration

    def plain(self, logical: Logical, weight: np.ndarray) -> np.ndarray:
        """See Quantiser: norms and routers have what was folded into them."""
        folded = self._model.folded(logical)
        return weight if folded is None else folded

    def codes(self, matrix: Matrix, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See Quantiser."""
        return self._model.codes(matrix)

    def input_range(self, matrix: Matrix) -> float | None:
        """See Quantiser."""
        return self._reports[matrix.name].input_range

    def error(self, matrix: Matrix) -> float | None:
        """See Quantiser."""
        return self._reports[matrix.name].rms

    def measured(self) -> dict[str, Any] | None:
        """See Quantiser: the rows and tokens, and of every layer its seconds, the tokens of each expert, notes, and its
        matrices (see layer_pass.LayerReport).
        """
        layers = [asdict(report) for report in self._model.reports]
        return {"rows": len(self._calibration.batches), "tokens": self._calibration.num_tokens, "layers": layers}

    def finish(self) -> None:
        """See Quantiser."""
        self._model.finish()

    @cached_property
    def _reports(self) -> dict[str, MatrixReport]:
        return {matrix.name: matrix for report in self._model.reports for matrix in report.matrices}


def _require_pictures(calibration: Calibration, scheme: Scheme, config: ModelConfig, path: str) -> None:
    """Raise DataError where the file keeps ranges of inputs of the experts of pictures, and the data has none."""
    needing = (
        matrix.name
        for matrix in scheme.every_matrix(config)
        if matrix.codec.needs_range and matrix.place.role == "vision_experts"
    )
    name = next(needing, None)
    if name is not None and all((batch.modality == Modality.TEXT).all() for batch in calibration.batches):
        raise DataError(
            f"quantization_calibration_path: {path} has no pictures in {count_of(len(calibration.batches), 'row')}, "
            f"and a file of quantization: {scheme.name} with format: {scheme.format} keeps the largest magnitude of "
            f"the inputs of {name}. Hint: name records with pictures, or raise quantization_calibration_samples."
        )


def _changes_files(options: AlgorithmOptions, scheme: Scheme, config: ModelConfig) -> bool:
    """Whether anything in the files follows from the data: codes, scales that are searched, or ranges of inputs."""
    return options.algorithm != "rtn" or any(
        matrix.codec.needs_range or matrix.codec.spec.kind == "convolutional" or options.searches(matrix.codec.spec)
        for matrix in scheme.every_matrix(config)
    )


def needs_calibration(cfg: Config) -> bool:
    """Whether the configuration calibrates."""
    return cfg.quantization_algorithm != "rtn" or cfg.quantization_calibration_path is not None


def say_if_interrupted(output_dir: Path) -> None:
    """Log a warning if an interrupted calibration has left its layers, for an export that does not continue it."""
    work = output_dir / WORK_DIRECTORY
    if work.is_dir():
        size = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
        log.warning(
            f"{work} has the finished layers of an interrupted quantisation with calibration ({size / 1e6:,.1f} MB). "
            "This export does not use them: remove the directory, unless you continue that one"
        )


def calibrated(
    cfg: Config,
    model_dir: Path,
    adapter_dir: Path | None,
    config: ModelConfig,
    source: WeightSource,
    scheme: Scheme,
) -> CalibratedQuantiser:
    """Calibrate the model in `model_dir`, whose weights, with the adapter merged into them, `source` has.

    Layers are kept in WORK_DIRECTORY of output_dir until the model is written. Raises DataError and CheckpointError
    (see `read_calibration` and `calibrate`).
    """
    assert cfg.quantization_calibration_path is not None and cfg.output_dir is not None, "config/checks.py"
    data = CalibrationSource(
        cfg.quantization_calibration_path,
        cfg.quantization_calibration_type,
        cfg.quantization_calibration_samples,
        cfg.quantization_calibration_length,
    )
    calibration = read_calibration(cfg, data, model_dir, config, adapter_dir)
    _require_pictures(calibration, scheme, config, data.path)
    options = AlgorithmOptions(
        cfg.quantization_algorithm,  # type: ignore[arg-type]
        cfg.quantization_damping,
        cfg.quantization_act_order,
        cfg.quantization_clip_search,
        cfg.quantization_smoothing,
        cfg.quantization_calibrate_all_experts,
    )
    if options.all_experts and not config.moe_num_experts:
        log.info("quantization_calibrate_all_experts: no effect: the model has no experts")
    if not _changes_files(options, scheme, config):
        log.warning(
            f"quantization_calibration_path: quantization_algorithm: rtn writes {scheme.name} with format: "
            f"{scheme.format} as it does without data: only the errors of outputs in the report follow from it. Set "
            "quantization_algorithm: gptq, or remove the key"
        )
    identity = calibration.identity | {"weights": weights_digest(model_dir)}
    if adapter_dir is not None:
        identity["adapter"] = adapter_digest(adapter_dir)
    work = Path(cfg.output_dir) / WORK_DIRECTORY
    model = calibrate(config, source, calibration.batches, scheme, options, work, identity)
    return CalibratedQuantiser(model, calibration, options.algorithm)
