"""Bytes of the tensors that one rank keeps from step to step: parameters, gradients, optimizer state, and copies.

Nothing is estimated: the tensors are those of the stage's own layers, built without memory (build.outline), and their
sharding, gradients and state are what `parallel` gives for them. Paddle is needed for this; a formula over sizes would
do without it, but would be a second description of the model.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import paddle

from erniekit import lora
from erniekit.lora.layers import Adapter, LinearAdapter
from erniekit.models.decoder import CausalLM
from erniekit.models.parallelize import placements
from erniekit.models.pipeline_layout import parameter_chunks
from erniekit.models.products import held_weights
from erniekit.models.sharded_blocks import divided_entries
from erniekit.moe.experts import Experts
from erniekit.moe.layer import MoELayer
from erniekit.nn.attention import SelfAttention
from erniekit.nn.mlp import SwiGLU
from erniekit.nn.norm import RMSNorm
from erniekit.nn.roles import matrix_names
from erniekit.parallel.buckets import Bucket, Entry, item_bytes, plan_buckets
from erniekit.parallel.memory import gradient_bytes, state_bytes
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.zero import entries_of
from erniekit.plan.job import Job
from erniekit.plan.operations import FP32
from erniekit.precision.quantized_weight import QuantizedWeight


@dataclass(frozen=True)
class RankTensors:
    """What each rank of one pipeline stage keeps, in bytes; all ranks of a stage keep the same.

    `weights`: parameters and buffers by the part of the model that they belong to. `state`: of the optimizer, on the
    device; `offloaded`: in host memory. `reference`: a second model with which a loss compares, or the values of an
    adapter before training. `average`: the weights' moving average. `copies`: what an adapter remembers of its base.
    `trained`, `total`: numbers of parameters on this rank. `buckets`: what gradients and updated parameters are sent
    in; `entries`: the trained parameters.
    """

    weights: dict[str, int]
    gradients: int
    state: int
    offloaded: int
    reference: int
    average: int
    copies: int
    trained: int
    total: int
    entries: tuple[Entry, ...]
    buckets: tuple[Bucket, ...]

    @property
    def parameters(self) -> int:
        """Bytes of parameters and buffers."""
        return sum(self.weights.values())

    @property
    def resident(self) -> int:
        """Bytes that are there throughout a step, gradients excepted."""
        return self.parameters + self.state + self.reference + self.average + self.copies


def rank_tensors(job: Job, mesh: Mesh, model: CausalLM) -> RankTensors:
    """Count the tensors of a rank.

    Args:
        job: what is planned.
        mesh: the rank, see Mesh.outline.
        model: its part of the model without memory, with what is frozen marked as such.
    """
    divided = _divided(job, mesh, model)
    parameters = dict(model.named_parameters())
    chunks = {id(parameters[name]): entry.chunk * item_bytes(entry.dtype) for name, entry in divided.items()}
    weights = _weights(model, chunks)
    trained = {name: p for name, p in parameters.items() if not p.stop_gradient}
    where = placements(model, mesh, bool(job.cfg.sharding))
    one_moment = matrix_names(model) if job.cfg.optim == "muon" else ()
    units = {name: entry.unit for name, entry in divided.items()}
    entries = entries_of(trained, where, parameter_chunks(model, model.chunks), one_moment, units)
    state = state_bytes(entries.values(), moment_dtype=job.cfg.moment_dtype)
    waits = job.offloads_state and bool(entries)
    return RankTensors(
        weights=dict(weights),
        gradients=gradient_bytes(entries.values(), job.zero_stage, job.cfg.amp_master_grad),
        state=_largest_state(job, entries) if waits else state,
        offloaded=state if waits else 0,
        reference=sum(weights.values()) if job.has_second_model else _start_bytes(job, model, trained, chunks),
        average=0 if job.cfg.ema_decay is None else _average_bytes(model, divided),
        copies=_copied_bytes(model),
        trained=sum(_size(p) for p in trained.values()),
        total=_num_held(model) + sum(_size(p) for p in parameters.values()),
        entries=tuple(entries.values()),
        buckets=tuple(plan_buckets(list(entries.values()))),
    )


def _start_bytes(job: Job, model: CausalLM, trained: Mapping[str, paddle.Tensor], chunks: Mapping[int, int]) -> int:
    """The copy of the adapter of `lora_path` with which a loss compares (training/reference.py)."""
    if not (job.has_reference and job.cfg.lora_path and lora.state_of(model) is not None):
        return 0
    return sum(chunks.get(id(parameter), _bytes(parameter)) for parameter in trained.values())


def _num_held(model: CausalLM) -> int:
    """The number of weights that products hold."""
    return sum(prod(projection.weight_shape) for projection, _ in held_weights(model).values())


def _divided(job: Job, mesh: Mesh, model: CausalLM) -> dict[str, Entry]:
    """The weights that are divided between uses, by name."""
    return {entry.name: entry for entry in divided_entries(model, mesh)} if job.zero_stage == 3 else {}


def _largest_state(job: Job, entries: Mapping[str, Entry]) -> int:
    """Room for the state of the parameters that are updated at a time (training/state_storage.py)."""
    sizes = sorted(
        (state_bytes([entry], moment_dtype=job.cfg.moment_dtype) for entry in entries.values()), reverse=True
    )
    return sum(sizes[: 1 if job.cfg.tensorwise_offload_optimizer else 2])


def _average_bytes(model: CausalLM, divided: Mapping[str, Entry]) -> int:
    """The fp32 average of all that a checkpoint holds: parameters and buffers, or an adapter; of a divided one its
    chunk.
    """
    tensors = [(name, tensor) for name, tensor in model.named_parameters()]
    if lora.state_of(model) is None:
        tensors += list(model.named_buffers())
    else:
        tensors = [(name, tensor) for name, tensor in tensors if not tensor.stop_gradient]
    return sum(FP32 * (divided[name].chunk if name in divided else _size(tensor)) for name, tensor in tensors)


def _copied_bytes(model: CausalLM) -> int:
    """What an adapter remembers of its base: parameters that are trained whole, and the lengths of DoRA's columns."""
    state = lora.state_of(model)
    if state is None:
        return 0
    saved = [tensor for name, tensor in model.named_parameters() if name in state.saved]
    adapters = [layer for layer in model.sublayers() if isinstance(layer, LinearAdapter)]
    return sum(_bytes(tensor) for tensor in saved) + sum(adapter.missing_bytes for adapter in adapters)


def _weights(model: CausalLM, chunks: Mapping[int, int]) -> Counter[str]:
    """Bytes of parameters, buffers and held weights by part of the model. `chunks`: of what a rank has of those that
    are divided, by identity.
    """
    parts: Counter[str] = Counter()

    def visit(layer: paddle.nn.Layer, around: str) -> None:
        part = _part(model, layer) or around
        own = [*layer.named_parameters(include_sublayers=False), *layer.named_buffers(include_sublayers=False)]
        parts[part] += sum(chunks.get(id(tensor), _bytes(tensor)) for _, tensor in own)
        if isinstance(layer, QuantizedWeight):
            *stacked, num_in, num_out = layer.shape
            parts[part] += prod(stacked) * layer.scheme.num_bytes(num_in, num_out)
        for child in layer.children():
            visit(child, part)

    visit(model, "other")
    return Counter({part: size for part, size in parts.items() if size})


def _part(model: CausalLM, layer: paddle.nn.Layer) -> str | None:
    """The part of the model that a layer begins; None: that of the layer around it."""
    decoder = model.model
    by_identity = {
        id(decoder.embed_tokens): "embedding",
        id(model.lm_head): "output head",
        id(decoder.vision_model): "vision transformer",
        id(decoder.resampler_model): "resampler",
        id(decoder.mtp_linear_proj): "multi-token prediction",
    }
    by_type: tuple[tuple[type, str], ...] = (
        (Adapter, "adapters"),
        (SelfAttention, "attention"),
        (Experts, "experts"),
        (MoELayer, "routers"),
        (SwiGLU, "feed-forward"),
        (RMSNorm, "norms"),
    )
    found = by_identity.get(id(layer))
    return found or next((part for kind, part in by_type if isinstance(layer, kind)), None)


def _size(tensor: paddle.Tensor) -> int:
    return prod(tensor.shape)


def _bytes(tensor: paddle.Tensor) -> int:
    return _size(tensor) * tensor.element_size()
