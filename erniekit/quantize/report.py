"""What a quantisation cost: `quantization_report.json`, and the picture of it (picture.py), in the exported directory.

    {"scheme", "algorithm", "layout": of the files,
     "weights": {"model", "quantised"}: how many there are,
     "bits_per_weight": {"quantised", "model"}: with scales; of the quantised matrices, and of all weights,
     "bytes": {"bf16", "quantised"}: of the weight files, in 16 bits and as they are,
     "error": {"all", "by_kind": {kind: error}, "by_layer": [{"layer", "kind", "error", "bits", "matrices",
               "worst": the matrix with the largest error, "worst_error"[, "output_error"]}]},
     "calibration": {"rows", "tokens", "seconds", "expert_tokens": {layer: the tokens of each expert; "3.vision": of
                     those of pictures}, "notes": what was treated otherwise than most}, where data was used,
     "evaluation": {"data", "before", "after"}: the metrics of `erniekit eval`, with quantization_eval: true,
     "routing": {"tokens", "unchanged", "kept", "by_layer": {layer: unchanged}}, likewise, of models with experts}

An error is |W' - W| / |W| over all the matrices that it is of (relative RMS); `output_error` is |XW' - XW| / |XW| for
calibration inputs X, the root mean square over these matrices. `unchanged` is the share of tokens whose
set of experts is the same before and after, over all sparse layers; `kept` the share of the chosen experts that stay.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erniekit.quantize import picture
from erniekit.utils import atomic, log

REPORT_FILE, PICTURE_FILE = "quantization_report.json", "quantization_report.png"
REPORT_FILES = (REPORT_FILE, PICTURE_FILE)


@dataclass(frozen=True)
class MatrixLoss:
    """A quantised matrix: its name, layer and kind (attention, experts, ...), the number of its weights, its bytes in
    the file, and the sums of (w' - w)^2 and of w^2.
    """

    name: str
    layer: int
    kind: str
    size: int
    num_bytes: int
    squared: float
    total: float


@dataclass(frozen=True)
class Written:
    """The files: scheme, algorithm, layout, the number of all weights and of those that are not quantised, and the
    bytes of the weight files, in bf16 and as they are.
    """

    scheme: str
    algorithm: str
    layout: str
    num_weights: int
    bf16_bytes: int
    num_bytes: int


def error_of(losses: Iterable[MatrixLoss]) -> float:
    """|W' - W| / |W| over matrices; 0 where all weights are 0."""
    losses = list(losses)
    total = sum(loss.total for loss in losses)
    return math.sqrt(sum(loss.squared for loss in losses) / total) if total else 0.0


def build(written: Written, losses: Sequence[MatrixLoss], calibration: dict[str, Any] | None = None) -> dict[str, Any]:
    """The report of an export, without the parts that an evaluation adds. `calibration`: see Quantiser.measured."""
    kinds = list(dict.fromkeys(loss.kind for loss in losses))
    layers = [] if calibration is None else calibration["layers"]
    outputs = {one["name"]: one["output_error"] for layer in layers for one in layer["matrices"]}
    quantised = sum(loss.size for loss in losses)
    report: dict[str, Any] = {
        "scheme": written.scheme,
        "algorithm": written.algorithm,
        "layout": written.layout,
        "weights": {"model": written.num_weights, "quantised": quantised},
        "bits_per_weight": {
            "quantised": _bits(losses),
            "model": round(8 * written.num_bytes / max(1, written.num_weights), 4),
        },
        "bytes": {"bf16": written.bf16_bytes, "quantised": written.num_bytes},
        "error": {
            "all": error_of(losses),
            "by_kind": {kind: error_of(loss for loss in losses if loss.kind == kind) for kind in kinds},
            "by_layer": _by_layer(losses, outputs),
        },
    }
    return report if calibration is None else report | {"calibration": _calibration(calibration)}


def _calibration(measured: dict[str, Any]) -> dict[str, Any]:
    """What quantiser.measured says, without what is in "error" already."""
    layers = measured["layers"]
    experts = {
        f"{layer['number']}.vision" if modality else str(layer["number"]): tokens
        for layer in layers
        for modality, tokens in layer["expert_tokens"].items()
    }
    notes = [
        *(f"layer {layer['number']}: {note}" for layer in layers for note in layer["notes"]),
        *(f"{one['name']}: {one['note']}" for layer in layers for one in layer["matrices"] if one["note"]),
    ]
    seconds = round(sum(layer["seconds"] for layer in layers), 2)
    return {name: measured[name] for name in ("rows", "tokens")} | {
        "seconds": seconds,
        "expert_tokens": experts,
        "notes": notes,
    }


def _by_layer(losses: Sequence[MatrixLoss], outputs: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """A row for each layer and kind. `outputs`: the errors of the matrices' outputs, where they are known."""
    places = sorted({(loss.layer, loss.kind) for loss in losses})
    rows: list[dict[str, Any]] = []
    for layer, kind in places:
        here = [loss for loss in losses if (loss.layer, loss.kind) == (layer, kind)]
        worst = max(here, key=lambda loss: error_of([loss]))
        rows.append(
            {
                "layer": layer,
                "kind": kind,
                "error": error_of(here),
                "bits": _bits(here),
                "matrices": len(here),
                "worst": worst.name,
                "worst_error": error_of([worst]),
            }
        )
        known = [error for loss in here if (error := outputs.get(loss.name)) is not None]
        if known:
            rows[-1]["output_error"] = math.sqrt(sum(error**2 for error in known) / len(known))
    return rows


def _bits(losses: Iterable[MatrixLoss]) -> float:
    """Bits of a weight, with scales."""
    losses = list(losses)
    return round(8 * sum(loss.num_bytes for loss in losses) / max(1, sum(loss.size for loss in losses)), 4)


def write(report: dict[str, Any], directory: Path) -> None:
    """Write the report and draw its picture, and log where they are. A picture that cannot be drawn is a warning."""
    atomic.write_text(directory / REPORT_FILE, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    try:
        with atomic.new_file(directory / PICTURE_FILE) as temporary:
            picture.draw(report, temporary)
    except Exception as error:  # the model is written and verified: the picture must not end the command
        log.warning(f"{PICTURE_FILE} could not be drawn: {error}")
        log.info(f"report: {directory / REPORT_FILE}")
    else:
        log.info(f"report: {directory / REPORT_FILE}, {PICTURE_FILE}")
