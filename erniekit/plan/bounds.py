"""Lower bounds of the memory of a layout, for comparing many of them without a plan of each.

Trained weights, gradients and state are sums over sizes; what a layer keeps for the backward pass is added up over the
operations of one layer of each kind, which is made once for each tensor and expert degree.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from erniekit.models.decoder import CausalLM
from erniekit.parallel.buckets import item_bytes
from erniekit.parallel.memory import gradient_bytes, state_bytes
from erniekit.plan.activations import device_of, layer_operations
from erniekit.plan.collectives import trained_entries
from erniekit.plan.job import Job
from erniekit.plan.layout import Run

# One layer of each kind of a job's model, without memory: training/outline.py.
LayerOutline = Callable[[Job], CausalLM | None]


class LayerBytes(NamedTuple):
    """What one layer keeps of a microbatch, and what its backward pass takes at most, with what it keeps then."""

    kept: float
    backward: float


class LeastMemory:
    """Lower bounds of the memory of layouts of one job, whose model and data are the same.

    Args:
        outline: makes the layers; None: what they keep counts as the residual stream alone.
    """

    def __init__(self, outline: LayerOutline | None = None) -> None:
        self._outline = outline
        self._models: dict[tuple[object, ...], CausalLM | None] = {}
        self._layers: dict[tuple[object, ...], dict[bool, LayerBytes]] = {}

    def of(self, job: Job, run: Run) -> float:
        """Bytes that the fullest stage needs at least, when it begins its first backward pass: weights, gradients and
        state that are trained, what the layers keep of all microbatches that it has computed by then, and what the last
        layer's backward pass takes.
        """
        resident: dict[tuple[object, ...], float] = {}
        of_kind = self._of_layers(job, run)
        most = 0.0
        for stage in range(run.layout.pipeline):
            layers = run.stage(stage)
            alike = (stage == 0, *(id(layer) for layer in layers))
            if alike not in resident:
                resident[alike] = _resident(job, run, stage)
            chunks = [[of_kind[job.model.is_moe_layer(layer)] for layer in chunk] for chunk in run.numbers[stage]]
            # Before its first backward pass, a stage has computed at least one microbatch for each stage behind it.
            waiting = min(run.layout.microbatches, run.layout.pipeline - stage)
            kept = waiting * len(chunks) * min(sum(layer.kept for layer in chunk) for chunk in chunks)
            last = chunks[-1][-1]
            most = max(most, resident[alike] + kept + max(last.backward - last.kept, 0.0))
        return most

    def _of_layers(self, job: Job, run: Run) -> dict[bool, LayerBytes]:
        """What a layer takes, by whether it is sparse."""
        cfg, degrees = job.cfg, job.degrees
        divided = degrees.tensor, degrees.expert, job.sequence_parallel
        key = *divided, cfg.batch_size, cfg.recomputed_modules if cfg.recompute else None, job.offloads_activations
        if key not in self._layers:
            if divided not in self._models:
                self._models[divided] = None if self._outline is None else self._outline(job)
            self._layers[key] = _layer_bytes(job, self._models[divided], run)
        return self._layers[key]


def _layer_bytes(job: Job, model: CausalLM | None, run: Run) -> dict[bool, LayerBytes]:
    device = device_of(job)
    if model is None:
        row = 0.0 if job.offloads_activations else device.residual(run.work.hidden)
        return dict.fromkeys((False, True), LayerBytes(row, row))
    found = {}
    for layer in model.model.layers:
        number = next(n for n in range(job.model.num_hidden_layers) if job.model.is_moe_layer(n) == layer.sparse)
        kept = backward = 0.0
        for operation in layer_operations(job, device, model, layer, number):
            kept += operation.kept
            backward = max(backward, kept + operation.backward)
        found[layer.sparse] = LayerBytes(kept, backward)
    return found


def _resident(job: Job, run: Run, stage: int) -> float:
    """Weights of a stage's products that are trained, their gradients and state; nothing where parts are frozen."""
    if job.cfg.freeze_config or job.cfg.frozen_parameters:
        return 0.0
    layout = run.layout
    embedding = run.work.embedding if stage == 0 and not job.is_lora else 0
    entries = trained_entries(run.stage(stage), layout, embedding)
    if job.cfg.optim == "muon":  # embeddings have two moments, too, but a bound is from below
        entries = [replace(entry, num_moments=1) for entry in entries]
    divided = layout.zero_stage == 3
    weights = sum((entry.chunk if divided else entry.size) * item_bytes(entry.dtype) for entry in entries)
    gradients = gradient_bytes(entries, layout.zero_stage, layout.gradient_bytes == 4)
    state = 0 if layout.offload_optimizer else state_bytes(entries, moment_dtype=job.cfg.moment_dtype)
    return weights + gradients + state
