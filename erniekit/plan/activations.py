"""Activations of one pipeline stage: what each chunk of its layers keeps, and the most that exists at one time in a
step, following the stage's own list of actions.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import paddle

from erniekit.models.decoder import CausalLM, DecoderLayer
from erniekit.models.inputs import head_layout
from erniekit.moe.experts import Experts
from erniekit.moe.layer import MoELayer
from erniekit.nn import onednn
from erniekit.nn.attention import HeadLayout
from erniekit.nn.mlp import SwiGLU
from erniekit.parallel.pipeline_schedule import Forward
from erniekit.plan import operations as ops
from erniekit.plan.job import Job
from erniekit.plan.operations import FP32, INT64, Device, Operation
from erniekit.plan.vision_operations import vision_operations
from erniekit.precision.fp8_experts import Fp8Experts

Sizes = dict[str, float]  # bytes by kind of operation


@dataclass(frozen=True)
class StageActivations:
    """The activations of one stage: their largest sum at one time in a step, and what it consists of, by kind; and the
    bytes that one microbatch keeps in each chunk of the stage. `on_host`: the most that waits in host memory.
    """

    peak: float
    by_kind: dict[str, float]
    kept: tuple[float, ...]
    live_chunks: int
    on_host: float = 0.0


def device_of(job: Job) -> Device:
    """How a rank of the job computes."""
    ranks = job.degrees.tensor
    tokens = -(-job.rank_tokens // ranks) * ranks if job.sequence_parallel else job.rank_tokens
    half = paddle.float16 if job.cfg.compute_type == "fp16" else paddle.bfloat16
    return Device(
        element=job.element_bytes,
        on_cpu=job.on_cpu,
        tokens=tokens,
        own_tokens=tokens // ranks if job.sequence_parallel else tokens,
        documents=tuple(job.document_lengths * job.cfg.batch_size),
        tensor_ranks=ranks,
        expert_ranks=job.degrees.expert,
        master_grad=job.cfg.amp_master_grad and job.element_bytes == 2,
        waiting=_part_to_exchange(job, job.degrees.sharding),
        waiting_of_experts=_part_to_exchange(job, job.degrees.sharding // job.degrees.expert),
        pairs=job.has_pairs,
        context_ranks=job.degrees.context,
        is_ring=job.degrees.context > 1 and job.cfg.cp_comm_type == "p2p",
        widens=job.on_cpu and job.element_bytes == 2 and not onednn.is_available(half),
    )


def _part_to_exchange(job: Job, ranks: int) -> float:
    """The part of a weight's fp32 gradient that exists beside what is kept of it, while a backward pass runs: in ZeRO
    stage 2 a rank keeps its chunk, and a CPU sends whole gradients after the pass. Before the first exchange of a step
    there is no chunk yet.
    """
    if not (job.on_cpu and job.zero_stage == 2 and ranks > 1 and job.element_bytes == ops.FP32):
        return 0.0
    return 1.0 if job.num_microbatches > 1 else 1.0 - 1.0 / ranks


def stage_activations(job: Job, model: CausalLM, stage: int) -> StageActivations:
    """The activations of a stage; `model` is its part of the model, without memory."""
    chunks = stage_operations(job, model, stage)
    return _simulate(job, stage, chunks, _input_bytes(job, model))


def stage_operations(job: Job, model: CausalLM, stage: int) -> list[list[Operation]]:
    """The operations of each chunk of a stage, in the order of the forward pass."""
    device = device_of(job)
    chunks: list[list[Operation]] = []
    last = len(job.stages[stage]) - 1
    own_layers = iter(model.model.layers)  # the outline may be that of another stage with layers of the same kinds
    for number, layers in enumerate(job.stages[stage]):
        chunk = [_received(job, device)]
        if number == 0 and model.shard.has_embedding:
            pictures = float(job.picture_tokens * job.cfg.batch_size)
            again = "vision" in job.cfg.recomputed_modules
            vision = vision_operations(device, model, pictures, again, job.offloads_activations)
            chunk = [_entrance(job, device, model), *vision]
        for layer in layers:
            chunk += layer_operations(job, device, model, next(own_layers), layer)
        if number == last and model.shard.has_head:
            chunk += _behind_layers(job, device, model)
        chunks.append(chunk)
    return chunks


def _entrance(job: Job, device: Device, model: CausalLM) -> Operation:
    """The embedding. Its weight's gradient is as large as the weight."""
    embedding = model.model.embed_tokens
    assert embedding is not None
    rows = device.residual(job.model.hidden_size)
    trained = not embedding.weight.stop_gradient
    weight = device.element * embedding.weight.shape[0] * embedding.weight.shape[1] if trained else 0
    waits = weight if device.master_grad else weight * device.waiting
    return Operation("embedding", rows, rows, rows + weight, waits)


def _received(job: Job, device: Device) -> Operation:
    """The input that a chunk receives from the stage before, and the gradient that it sends back."""
    rows = device.residual(job.model.hidden_size)
    return Operation("pipeline transfers", rows, rows, 2 * rows)


def layer_operations(job: Job, device: Device, model: CausalLM, layer: DecoderLayer, number: int) -> list[Operation]:
    """One decoder layer with what is recomputed in it; `number`: which one it is in the whole model. Where its weights
    are divided (ZeRO stage 3), they are whole while it computes, and in the backward pass so are their gradients.
    """
    if not job.divides_layers:
        return _layer_operations(job, device, model, layer, number)
    weights = device.element * sum(float(p.size) for p in layer.parameters())
    gradients = device.element * sum(float(p.size) for p in layer.parameters() if not p.stop_gradient)
    return [
        replace(operation, forward=operation.forward + weights, backward=operation.backward + weights + gradients)
        for operation in _layer_operations(job, replace(device, master_grad=False), model, layer, number)
    ]


def _layer_operations(job: Job, device: Device, model: CausalLM, layer: DecoderLayer, number: int) -> list[Operation]:
    width = job.model.hidden_size
    modules = frozenset() if number in job.cfg.no_recompute_layers else job.cfg.recomputed_modules
    attention = _attention(job, device, model, layer)
    feed_forward = _feed_forward(job, device, layer, modules)
    first, second = ops.norm(device, width, device.own_tokens), ops.norm(device, width, device.own_tokens)
    row, offloads = device.residual(width), job.offloads_activations
    if "layer" in modules:
        inside = [first, *attention, ops.add(device, width, "attention"), second, *feed_forward]
        # the input is the residual stream, which the operation before has kept
        again = ops.recomputed(inside, ops.Saved(row, 0.0, offloads), row, "recomputed layers")
        return [again, ops.add(device, width, "recomputed layers")]
    normed = ops.Saved(row, row, offloads)
    if "attention" in modules:
        attention = [ops.recomputed(attention, normed, row, "attention")]
    elif "core_attn" in modules:
        made = attention[0].forward
        core = ops.recomputed(attention[1:2], ops.Saved(made, made, offloads), 0.0, "attention")
        attention = [attention[0], core, *attention[2:]]
    if ("moe" if layer.sparse else "mlp") in modules:
        feed_forward = [ops.recomputed(feed_forward, normed, row, "experts" if layer.sparse else "feed-forward")]
    middle = ops.add(device, width, "attention")
    return [first, *attention, middle, second, *feed_forward, ops.add(device, width, "feed-forward")]


def _attention(job: Job, device: Device, model: CausalLM, layer: DecoderLayer) -> list[Operation]:
    beside = device.residual(job.model.hidden_size)
    attention = layer.self_attn
    heads = head_layout(job.model, model.shard)
    return [
        ops.projection(device, attention.qkv_proj, device.tokens, "attention", beside=beside),
        ops.attention(device, heads, beside),
        ops.projection(device, attention.o_proj, device.tokens, "attention"),
    ]


def _feed_forward(job: Job, device: Device, layer: DecoderLayer, modules: frozenset[str]) -> list[Operation]:
    beside = device.residual(job.model.hidden_size)
    if isinstance(layer.mlp, SwiGLU):
        return _swiglu(device, layer.mlp, device.tokens, "feed-forward", beside)
    return _sparse(job, device, layer.mlp, beside, modules)


def _swiglu(
    device: Device, block: SwiGLU, rows: float, kind: str, beside: float, keeps_input: bool = True
) -> list[Operation]:
    return [
        ops.projection(device, block.up_gate_proj, rows, kind, keeps_input, beside),
        ops.swiglu(device, block.up_gate_proj, rows, kind, beside),
        ops.projection(device, block.down_proj, rows, kind, beside=beside if device.shares_tokens else 0.0),
    ]


def _sparse(job: Job, device: Device, layer: MoELayer, beside: float, modules: frozenset[str]) -> list[Operation]:
    """Routers, experts and shared experts. Tokens are assumed to be spread evenly over the experts of their modality;
    where there are two modalities, each has its tokens copied.
    """
    width, has_shared = job.model.hidden_size, layer.shared_experts is not None
    whole = device.element * device.tokens * width
    vision = job.picture_tokens * job.cfg.batch_size // device.context_ranks
    result: list[Operation] = []
    if job.model.vision is None:
        result.append(Operation("experts", whole))  # the layer's normed input
        result += _routed(job, device, layer, layer.experts, beside, "experts" in modules)
    else:
        result.append(Operation("experts", whole if has_shared else 0.0))
        for experts, tokens in ((layer.experts, device.tokens - vision), (layer.vision_experts, vision)):
            if tokens:
                copied = device.element * tokens * width
                result.append(Operation("experts", copied, copied, 2 * copied + beside))
                result += _routed(job, replace(device, tokens=tokens), layer, experts, beside, "experts" in modules)
        result.append(Operation("experts", 0.0, 2 * whole, 2 * whole + beside))  # all tokens in their order again
    if layer.shared_experts is not None:
        # Tensor ranks give them a copy of their own.
        own = device.tensor_ranks > 1
        shared = _swiglu(device, layer.shared_experts, device.tokens, "shared experts", 2 * beside, keeps_input=own)
        if "shared_experts" in modules:
            row = device.residual(width)
            # Their input is also that of the routed experts, and stays on the device for these.
            shared = [ops.recomputed(shared, ops.Saved(row, row if own else 0.0), row, "shared experts")]
        result += shared
    return result


def _routed(
    job: Job, device: Device, layer: MoELayer, experts: Experts, beside: float, recomputes: bool
) -> list[Operation]:
    """The way of `device.tokens` tokens through one router and its experts."""
    width, top_k = job.model.hidden_size, job.model.moe_k
    rows = device.tokens * top_k / device.tensor_ranks
    products = _experts(device, experts, rows, beside)
    if recomputes:
        size = device.element * rows * width
        products = [ops.recomputed(products, ops.Saved(size, size, job.offloads_activations), size, "experts")]
    return [
        ops.routing(device, width, ops.Router(layer.sizes.num_experts, top_k), beside),
        ops.dispatched(device, width, rows, beside),
        *products,
        ops.combined(device, width, rows, beside, keeps_rows=not experts.takes_weights),
    ]


def _experts(device: Device, experts: Experts, rows: float, beside: float) -> list[Operation]:
    adapted = experts.up_gate_proj.adapter is not None or experts.down_proj.adapter is not None
    if isinstance(experts.block, Fp8Experts) and not adapted:
        return [ops.fp8_experts(device, experts, experts.block, rows, beside)]
    return [
        ops.projection(_alone(device), experts.up_gate_proj, rows, "experts", beside=beside),
        ops.swiglu(device, experts.up_gate_proj, rows, "experts", beside),
        ops.projection(_alone(device), experts.down_proj, rows, "experts", beside=beside),
    ]


def _alone(device: Device) -> Device:
    """The device for what is not divided over tensor ranks."""
    return replace(device, tensor_ranks=1)


def _behind_layers(job: Job, device: Device, model: CausalLM) -> list[Operation]:
    """Final norm, output head with its loss, and multi-token prediction."""
    width = job.model.hidden_size
    normed = ops.norm(device, width, device.own_tokens, "output head")
    from_teacher = _head(job, device, model, _divergence_logits(job)) if job.is_distilled else None
    if from_teacher is not None and job.cfg.method.options:  # no other loss
        return [normed, from_teacher]
    result = [normed, _head(job, device, model)]
    for block in model.model.mtp_block if job.mtp_depths else ():
        tokens = device.own_tokens
        joined = Operation(
            "multi-token prediction", device.element * tokens * 4 * width, device.element * tokens * 2 * width
        )
        recomputes = job.cfg.recompute and job.cfg.use_recompute_mtp
        inside = layer_operations(job, device, model, block, -1 if recomputes else job.model.num_hidden_layers)
        result += [joined, *ops.with_kind(inside, "multi-token prediction")]
        result += [normed, _head(job, device, model)]
    return result if from_teacher is None else [*result, normed, from_teacher]


def _divergence_logits(job: Job) -> int:
    """How many tensors of the size of the logits exist at one time in losses/distillation.py: log p and log r, p and r,
    and what their divergence is made of, which is more of a mixture.
    """
    beta = job.cfg.gkd_beta if job.cfg.method.options else 0.0
    return {0.0: 7, 1.0: 8}.get(beta, 9)


def _head(job: Job, device: Device, model: CausalLM, divergence_logits: int = 0) -> Operation:
    """Logits chunk by chunk with the loss. Next-token losses and divergences from a teacher, which take
    `divergence_logits` of the size of the logits at one time, form the gradients in the forward pass; preference losses
    compute the logits again in the backward pass.
    """
    if model.score is not None:  # one row of each answer
        return Operation("output head", 0.0, FP32 * job.model.hidden_size, 0.0)
    head = model.output_head()
    width, vocabulary = job.model.hidden_size, head.vocab_size
    labelled, rows = device.tokens * job.supervised_share, job.head_rows
    several = labelled > rows
    logits = FP32 * rows * vocabulary
    weight = FP32 * width * vocabulary if not head.weight.stop_gradient else 0.0
    gathered = device.element * labelled * width
    gradients = FP32 * labelled * width
    # fp32 logits and probabilities, beside the probabilities of the chunk before; on a GPU also the 16-bit logits
    last = FP32 * min(rows, labelled - rows) * vocabulary
    chunk = max(2 * logits, logits + 2 * last) if several else 2 * logits
    if divergence_logits:  # beside the terms and the gradient of the chunk before
        chunk = max(divergence_logits * logits, several * (2 * logits + divergence_logits * last))
    chunk += 0 if device.on_cpu else logits / 2
    # the gradient of the logits, also in 16 bits where the head has these, and that of the weight by this chunk
    narrow = 0.0 if device.element == FP32 else logits * device.element / FP32
    narrow += logits if device.widens else 0.0
    products = logits + narrow + 3 * FP32 * rows * width + weight + (3 * logits if divergence_logits else 0.0)
    # beside the gradient of the weight by the chunks before
    most = gathered + gradients + max(chunk, products) + (weight if several else 0.0)
    # A gradient of a weight that is also the embedding waits for the other one, which is the last of the pass.
    is_shared = job.model.tie_word_embeddings and model.shard.has_embedding
    waits = device.element / FP32 * weight if device.master_grad else weight * (1.0 if is_shared else device.waiting)
    if job.cfg.method.options and not divergence_logits:
        return Operation("output head", gathered, gathered + chunk, most, waits)
    normed = device.element * device.tokens * width
    return Operation("output head", gathered + gradients + weight, most, gradients + 2 * normed, waits)


def teacher_bytes(job: Job, model: CausalLM) -> float:
    """The states in front of the output head that a teacher gives for all microbatches of a step before its first
    pass; `model` is the part of a stage.
    """
    if not (job.is_distilled and model.shard.has_head):
        return 0.0
    return job.element_bytes * job.labelled_tokens * job.model.hidden_size * job.num_microbatches


def _input_bytes(job: Job, model: CausalLM) -> float:
    """What one microbatch's inputs take: token numbers, the table of rotations, and on a CPU the places of rows."""
    tokens, heads, context = job.rank_tokens, head_layout(job.model, model.shard), job.degrees.context
    is_ring = context > 1 and job.cfg.cp_comm_type == "p2p"
    if context > 1 and not is_ring:
        tokens, heads = (
            context * tokens,
            HeadLayout(heads.num_heads // context, heads.num_kv_heads // context, heads.dim),
        )
    table = tokens * heads.dim * FP32
    if not job.on_cpu:
        return tokens * INT64 + table
    expanded = table * heads.total
    places = 0 if is_ring else INT64 * tokens * (2 * heads.total + 2 * heads.num_heads)
    return tokens * INT64 + (expanded if expanded <= ops.EXPANDED_ROTATION else table) + places


def _simulate(job: Job, stage: int, chunks: Sequence[Sequence[Operation]], inputs: float) -> StageActivations:
    """Run through a step's passes, and through the operations of each pass."""
    live = _Live([_by_kind(chunk) for chunk in chunks], inputs)
    forward, backward = [_forward_peak(chunk) for chunk in chunks], [_backward_peak(chunk) for chunk in chunks]
    most = representative_microbatches(job)
    for action in job.passes(stage, most):
        if isinstance(action, Forward):
            live.microbatches.add(action.microbatch)
            live.reach(forward[action.chunk], live.chunks.total() + 1)
            live.chunks[action.chunk] += 1
        else:
            live.chunks[action.chunk] -= 1
            live.reach(backward[action.chunk], live.chunks.total() + 1)
            if action.chunk == 0:
                live.microbatches.discard(action.microbatch)
    shown = {kind: size for kind, size in live.shown.items() if size}
    kept = tuple(sum(kinds.values()) for kinds in live.kinds)
    on_host = sum(operation.on_host for chunk in chunks for operation in chunk) / len(chunks)
    return StageActivations(live.peak, shown, kept, live.num_chunks, on_host * live.max_chunks)


def representative_microbatches(job: Job) -> int:
    """Microbatches of a step whose peaks are those of the whole step: after the warm-up, which takes less than twice as
    many microbatches as there are stages, it repeats itself after as many as there are stages.
    """
    period = job.degrees.pipeline
    return 3 * period if job.num_chunks == 1 else 4 * period + job.num_microbatches % period


class _Live:
    """What is kept while a step runs: passes of chunks by number of the chunk, and microbatches; the peak so far, what
    it consisted of, and how many chunks it held.
    """

    def __init__(self, kinds: list[Sizes], inputs: float) -> None:
        self.kinds, self.inputs = kinds, inputs
        self._totals = [sum(sizes.values()) for sizes in kinds]
        self.chunks: Counter[int] = Counter()
        self.microbatches: set[int] = set()
        self.peak, self.num_chunks, self.max_chunks = 0.0, 0, 0
        self.shown: Sizes = {}

    def reach(self, beside: Sizes, num_chunks: int) -> None:
        """A pass takes `beside`, by kind, in addition to what is kept."""
        self.max_chunks = max(self.max_chunks, num_chunks)
        kept = sum(count * self._totals[number] for number, count in self.chunks.items())
        now = self.inputs * len(self.microbatches) + kept + sum(beside.values())
        if now <= self.peak:
            return
        self.peak, self.num_chunks = now, num_chunks
        sizes: Sizes = {"inputs": self.inputs * len(self.microbatches)}
        for number, count in self.chunks.items():
            sizes = _sum(sizes, {kind: count * size for kind, size in self.kinds[number].items()})
        self.shown = _sum(sizes, beside)


def _sum(first: Sizes, second: Sizes) -> Sizes:
    return {kind: first.get(kind, 0.0) + second.get(kind, 0.0) for kind in {**first, **second}}


def _by_kind(chunk: Sequence[Operation]) -> Sizes:
    found: Sizes = {}
    for operation in chunk:
        found[operation.kind] = found.get(operation.kind, 0.0) + operation.kept
    return found


def _forward_peak(chunk: Sequence[Operation]) -> Sizes:
    """What exists when one forward pass through a chunk takes most, by kind."""
    found: Sizes = {}
    total = peak = 0.0
    for number, operation in enumerate(chunk):
        now = max(operation.forward, operation.kept)
        if total + now > peak:
            peak, found = total + now, _sum(_by_kind(chunk[:number]), {operation.kind: now})
        total += operation.kept
    return found


def _backward_peak(chunk: Sequence[Operation]) -> Sizes:
    """What exists when one backward pass through a chunk takes most, by kind, with the gradients of weights that wait
    for its end.
    """
    found: Sizes = {}
    total, peak, gradients = sum(operation.kept for operation in chunk), 0.0, 0.0
    for number, operation in reversed(list(enumerate(chunk))):
        if total + operation.backward + gradients > peak:
            peak = total + operation.backward + gradients
            now = {operation.kind: operation.backward, "waiting gradients": gradients}
            found = _sum(_by_kind(chunk[: number + 1]), now)
        total -= operation.kept
        gradients += operation.gradient
    return found
