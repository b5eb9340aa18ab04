"""`erniekit export`, with the report of what quantisation cost beside the weights (quantize/report.py)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from erniekit.checkpoint.dtypes import num_bytes
from erniekit.checkpoint.model_reader import ModelReader
from erniekit.config import Config
from erniekit.evaluate.run import measure
from erniekit.export.convert import Report
from erniekit.export.export import check_export, checkpoint_of, export, output_of
from erniekit.export.quantise import QuantisedReport
from erniekit.models.decoder import CausalLM
from erniekit.moe.layer import MoELayer, Routed
from erniekit.parallel.mesh import Mesh
from erniekit.quantize import report as reports


def export_and_report(cfg: Config) -> Report:
    """Export (see export.export), and of a quantised model write the report. With `quantization_eval`, the checkpoint
    and the exported directory itself are evaluated, in this process, as `erniekit eval` does.

    Raises UserError that names the key, file or line; what was exported before stays.
    """
    target, before = output_of(cfg) / "export", RouterWatch()
    evaluates = cfg.quantization_eval and cfg.quantization != "none"
    if evaluates:
        check_export(cfg)  # before minutes or hours of evaluation
    first = _evaluate(cfg, checkpoint_of(cfg), before) if evaluates else {}
    written = export(cfg)
    if not isinstance(written, QuantisedReport):
        return written
    report = reports.build(*_written(written, target), written.calibration)
    if evaluates:
        after = RouterWatch()
        report["evaluation"] = {
            "data": list(cfg.eval_dataset_path or cfg.input_dir),
            "before": first,
            "after": _evaluate(cfg, target, after),
        }
        routing = agreement(before, after)
        report |= {} if routing is None else {"routing": routing}
    reports.write(report, target)
    return written


def _written(written: QuantisedReport, target: Path) -> tuple[reports.Written, list[reports.MatrixLoss]]:
    """What reports.build takes."""
    scheme, logicals = written.scheme, ModelReader(target, keep_mtp=True, quiet=True).logicals
    stored = {
        matrix.name: sum(num_bytes(dtype, shape) for _, dtype, shape in matrix.codec.plan(matrix.name, matrix.shape))
        for logical in logicals
        for matrix in scheme.matrices(logical)
    }
    losses = [
        reports.MatrixLoss(
            error.name,
            error.place.layer,
            error.place.role,
            error.size,
            stored[error.name],
            error.squared,
            error.total,
        )
        for error in written.errors
    ]
    sizes = {logical: prod(logical.shape) for logical in logicals}
    in_bf16 = sum(size * (4 if logical.keep_fp32 else 2) for logical, size in sizes.items())
    weights = sum(sizes.values())
    facts = reports.Written(scheme.name, written.algorithm, scheme.format, weights, in_bf16, written.num_bytes)
    return facts, losses


def _evaluate(cfg: Config, directory: Path, watch: "RouterWatch") -> dict[str, Any]:
    """The results of `erniekit eval` for a directory. The weights are there, however a training would begin."""
    one = replace(
        cfg,
        checkpoint=str(directory),
        lora_path=None,
        quantization="none",
        continue_training=True,
        tensor_parallel_degree=1,
        pipeline_parallel_degree=1,
        virtual_pp_degree=1,
    )
    results, _ = measure(one, Mesh.single(), watch.on)
    return {name: value for name, value in results.items() if name != "model"}


class RouterWatch:
    """What the routers of a model choose while `on(model)` is entered.

    `choices`: by layer ("3.vision": of pictures) the experts of each token [T, K] in rising order,
    in the order of the data. They take 2 K bytes a token and layer.
    """

    def __init__(self) -> None:
        self.choices: dict[str, list[np.ndarray]] = {}

    @contextmanager
    def on(self, model: CausalLM) -> Iterator[None]:
        """Watch the sparse layers of `model`."""
        layers = model.model.layers
        hooks = [
            layers[number].mlp.register_forward_post_hook(self._hook(number))
            for number in layers.numbers
            if layers[number].sparse
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, number: int) -> Any:
        def note(layer: MoELayer, inputs: Any, outputs: tuple[Any, dict[int, Routed]]) -> None:
            for modality, routed in outputs[1].items():
                chosen = np.sort(routed.routing.experts.numpy().astype(np.uint16), axis=1)
                self.choices.setdefault(f"{number}.vision" if modality else str(number), []).append(chosen)

        return note


def agreement(before: RouterWatch, after: RouterWatch) -> dict[str, Any] | None:
    """How many tokens are sent to the same experts by both models; None without experts. See quantize/report.py."""
    same: dict[str, np.ndarray] = {}
    kept, choices = 0, 0
    for name, batches in before.choices.items():
        first, second = np.concatenate(batches), np.concatenate(after.choices[name])
        assert first.shape == second.shape, (name, first.shape, second.shape)
        same[name] = (first == second).all(axis=1)
        kept += int((first[:, :, None] == second[:, None, :]).sum())  # an expert is in a row at most once
        choices += first.size
    if not same:
        return None
    return {
        "tokens": max(len(tokens) for tokens in same.values()),
        "unchanged": float(np.concatenate(list(same.values())).mean()),
        "kept": kept / choices,
        "by_layer": {name: float(tokens.mean()) for name, tokens in same.items()},
    }
