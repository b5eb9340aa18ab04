"""What each operation of the model's layers keeps for the backward pass, and what it takes while it runs, in bytes.

There is one list of operations for each layer, in the order of the forward pass, read off the layer's own projections
(their sizes on this rank, whether they are trained, their adapters). It has the two code paths that the layers have:
plain operations in fp32 on a CPU, where the numbers equal what Paddle's allocator counts (tools/plan_truth.py), and
fused kernels in 16 bits on a GPU, where they follow from what these kernels keep.

Legend: T tokens of a microbatch, S those of one tensor rank between projections (T / tensor ranks with sequence
parallelism), D model, Q = (heads + 2 kv heads) * head size, C = heads * head size, F width of a feed-forward layer,
E experts, K experts of a token, R rows of the experts of this rank, all on this rank. e: bytes of an element.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from erniekit.lora.layers import Adapter, LinearAdapter
from erniekit.moe.experts import Experts
from erniekit.nn.attention import HeadLayout
from erniekit.nn.blockwise import SHORTEST
from erniekit.nn.linear import Projection
from erniekit.precision.fp8_experts import Fp8Experts
from erniekit.precision.fp8_product import Fp8Product

_ATTENTION_BLOCK = 128  # query positions of one product, as in nn/attention.py
_KEEP_WEIGHTS = 1024  # longest document whose softmax weights are kept, as there
EXPANDED_ROTATION = 100_000_000  # largest table of rotations with a row for every head, as in nn/rotary.py
FP32, INT64 = 4, 8
FP8_ELEMENT = 1 + FP32 / 128  # a number in FP8 and its share of a scale


@dataclass(frozen=True)
class Operation:
    """One operation. `kept`: bytes from its forward pass to the end of its backward pass. `forward`, `backward`: the
    most that exists besides while it runs, its inputs and results included where nobody else keeps them. `gradient`:
    bytes of weight gradients that stay until the pass through the chunk has ended, beside the gradients that are kept
    from one microbatch to the next. `on_host`: bytes that wait in host memory from its forward to its backward pass.
    """

    kind: str
    kept: float
    forward: float = 0.0
    backward: float = 0.0
    gradient: float = 0.0
    on_host: float = 0.0


@dataclass(frozen=True)
class Device:
    """How this rank computes: `element` bytes of weights and activations; the code path of a CPU or a GPU; tokens of a
    microbatch, all of them and those of this rank between projections; `documents`: lengths of the documents of a
    microbatch, each of them a prompt and two answers where it is one of `pairs`; 16-bit gradients wait for the end of a
    pass and become fp32 then (`master_grad`). fp32 gradients wait for their exchange after the pass, as far as they are
    not among those that are kept: this part of a weight's and of an expert's. `context_ranks` share the tokens of each
    document, of which `tokens` are on this rank; keys and values go around a ring, or heads are exchanged for tokens.
    `widens`: products of 16-bit tensors are computed from copies in fp32.
    """

    element: int
    on_cpu: bool
    tokens: int
    own_tokens: int
    documents: tuple[int, ...]
    tensor_ranks: int = 1
    expert_ranks: int = 1
    master_grad: bool = True
    waiting: float = 0.0
    waiting_of_experts: float = 0.0
    pairs: bool = False
    context_ranks: int = 1
    is_ring: bool = False
    widens: bool = False

    @property
    def computed(self) -> int:
        """Bytes of an element within attention and SwiGLU: a CPU has fp32 kernels alone, whatever the weights are."""
        return FP32 if self.on_cpu else self.element

    @property
    def in_place(self) -> bool:
        """Whether operations between products are those of nn.cpu_ops in fp32."""
        return self.on_cpu and self.element == FP32

    @property
    def shares_tokens(self) -> bool:
        """Sequence parallelism."""
        return self.own_tokens < self.tokens

    def residual(self, width: int) -> float:
        """The residual stream, or its gradient."""
        return float(self.element * self.own_tokens * width)


def projection(
    device: Device, layer: Projection, rows: float, kind: str, keeps_input: bool = True, beside: float = 0.0
) -> Operation:
    """x W with its adapter. `keeps_input`: no operation before it has kept x. `beside`: what waits meanwhile in the
    backward pass.
    """
    e, num_in, num_out = device.element, layer.in_features, layer.out_features
    matrices = layer.num_experts or 1
    trained = layer.weight is not None and not layer.weight.stop_gradient
    weight = e * matrices * num_in * num_out if trained else 0
    kept = rows * num_in * _input_bytes(device, layer, keeps_input)
    forward, backward = e * rows * num_out, e * rows * (num_in + num_out)
    parts = _in_parts(device, layer)
    if parts:  # a list of parts, then one tensor; the same for the weights' gradients
        forward, backward = 2 * forward, backward + e * rows * num_in
    wide = num_out if device.on_cpu else 0
    if isinstance(layer.adapter, Adapter):
        ranks = sum(slot.rank for slot in layer.adapter.slots.values())
        kept += e * rows * ranks
        forward += e * rows * num_out
        backward += e * rows * (num_in + ranks)
        weight += 2 * e * matrices * ranks * (num_in + wide)
        if isinstance(layer.adapter, LinearAdapter) and layer.adapter.dora:  # what the length of columns multiplies
            kept += FP32 * rows * num_out
            forward += FP32 * rows * num_out
            backward += FP32 * rows * num_out
    if device.tensor_ranks > 1:  # a collective's copy
        forward += e * rows * num_out
        backward += e * rows * num_in
    waits = weight * _waiting(device, layer)
    return Operation(kind, kept, forward, backward + (2 if parts else 1) * weight + beside, waits)


def _waiting(device: Device, layer: Projection) -> float:
    """The part of a weight's gradient that waits for the end of the pass."""
    if device.master_grad and not device.on_cpu:
        return 1.0
    return device.waiting if layer.num_experts is None else device.waiting_of_experts


def _in_parts(device: Device, layer: Projection) -> bool:
    """Whether the experts' products are tensors of their own before they are one."""
    return layer.num_experts is not None and not device.in_place


def _input_bytes(device: Device, layer: Projection, keeps_input: bool) -> float:
    """Bytes of each number of a projection's input, as it is kept. FP8 products keep it for a weight that is trained
    alone, in FP8 with a scale for 128 numbers where asked, and adapters beside them in 16 bits.
    """
    plain = device.element if keeps_input else 0.0
    if not isinstance(layer.product, Fp8Product):
        return plain
    of_adapter = plain if isinstance(layer.adapter, Adapter) else 0.0
    if layer.weight is None or layer.weight.stop_gradient:
        return of_adapter
    return FP8_ELEMENT + of_adapter if layer.product.stores_fp8 else plain


def fp8_experts(device: Device, experts: Experts, block: Fp8Experts, rows: float, beside: float) -> Operation:
    """Routed experts in FP8 as one step, which keeps its input (in FP8) for the gradients of the weights, and gate and
    up, or the input alone.
    """
    e, width, inner = device.element, experts.up_gate_proj.in_features, experts.down_proj.in_features
    matrices = experts.up_gate_proj.num_experts or 1
    assert experts.up_gate_proj.weight is not None  # FP8 products have parameters
    trained = not experts.up_gate_proj.weight.stop_gradient
    keeps_input = trained or block.recomputes_up_gate
    kept = rows * width * (FP8_ELEMENT if block.stores_fp8 else e) if keeps_input else 0.0
    kept += 0 if block.recomputes_up_gate else 2 * e * rows * inner
    weight = 3.0 * e * matrices * width * inner if trained else 0.0
    forward = FP8_ELEMENT * rows * (width + inner) + e * rows * (3 * inner + width)
    backward = e * rows * (5 * inner + 2 * width) + FP8_ELEMENT * rows * (width + 2 * inner) + weight + beside
    if device.on_cpu:  # the emulation differentiates SwiGLU in fp32: six values and the four terms of a seventh
        forward = max(forward, e * rows * width + FP32 * rows * 5 * inner)
        backward = max(backward, FP32 * rows * 10 * inner + e * rows * (inner + 2 * width) + beside)
    return Operation("experts", kept, kept + forward, backward, weight if device.master_grad else 0.0)


def norm(device: Device, width: int, tokens: float, kind: str = "norms", beside: float = 0.0) -> Operation:
    """RMSNorm keeps one number a token; its input is kept as part of the residual stream."""
    row = device.element * tokens * width
    wide = FP32 * tokens * width
    return Operation(kind, FP32 * tokens, max(row, wide) + (0 if device.on_cpu else row), 3 * wide + beside)


def add(device: Device, width: int, kind: str) -> Operation:
    """A sum that continues the residual stream."""
    return Operation(kind, device.residual(width), device.residual(width), device.residual(width))


def swiglu(device: Device, up_gate: Projection, rows: float, kind: str, beside: float = 0.0) -> Operation:
    """silu(gate) * up: gate and up are kept, its result by the product that follows."""
    e, weight = device.element, up_gate.lone_weight
    block = device.computed * rows * up_gate.out_features / 2
    if device.in_place and weight is not None:  # one step with the products: all their gradients beside gate and up
        of_weight = 0.0 if weight.stop_gradient else e * float(weight.size)
        gradients = 3 * block + e * rows * up_gate.in_features + of_weight
        return Operation(kind, 2 * block, 3 * block, gradients + beside)
    if device.on_cpu:  # gate and up are gathered; the gradients of both, one by one and joined
        return Operation(kind, 2 * block, 5 * block, 5 * block + beside)
    return Operation(kind, 2 * block, 3 * block, 3 * block + beside)


def attention(device: Device, heads: HeadLayout, beside: float) -> Operation:
    """Causal attention within documents, with the rotation of queries and keys."""
    wide = device.computed * device.tokens * heads.total * heads.dim
    narrow = device.computed * device.tokens * heads.num_heads * heads.dim
    if device.is_ring:
        return _ring(device, wide, narrow, beside)
    if device.context_ranks > 1:
        return _exchanged_heads(device, heads, wide, narrow, beside)
    if not device.on_cpu:  # FlashMask keeps q, k, v and the logarithm of each sum; the rotation is one kernel
        lengths = FP32 * device.tokens * heads.num_heads
        return Operation("attention", wide + lengths, 2 * wide + narrow, 3 * wide + 2 * narrow + beside)
    scores, kept, last, before = _scores(device, heads.num_heads)
    values = device.computed * (heads.total - heads.num_heads) * heads.dim * device.tokens
    if (
        device.in_place and max(device.documents) >= SHORTEST
    ):  # block by block: nothing is scaled, results are one tensor
        forward, in_products = 3 * wide + 2 * narrow + kept, 3 * narrow + values
        # the weights are gone when the gradients are put into the order of the tokens and rotated back
        in_rotation = 2 * narrow + 4 * wide - kept
        return Operation("attention", wide + kept, forward, max(in_products, in_rotation) + beside)
    # rotated, fetched in the order of documents, scaled; blocks of results
    forward = 2 * wide + (wide + 2 * narrow) + kept + last + (0 if scores == kept else before) - last * (kept > 0)
    done = 1 - last / max(scores, 1)
    # with 16 bits: the gradient of a block's weights, that of its scores and its weights, both rounded through 16 bits
    of_block = last + before if device.element == FP32 else 3.5 * last
    in_blocks = narrow * (2 + done) + values * 1.5 + of_block
    if not kept:
        in_blocks += last + max(before, last)
    in_rotation = 2 * narrow + 4 * wide
    return Operation("attention", wide + narrow + kept, forward, max(in_blocks, in_rotation) + beside)


def _ring(device: Device, wide: float, narrow: float, beside: float) -> Operation:
    """Queries, keys and values, and the result, are kept; beside them are the keys and values of one other rank, or of
    two where they pass through, and their gradients.
    """
    block, visitors = wide - narrow, 2 if device.context_ranks > 2 else 1
    forward = max(3 * wide, 2 * wide + narrow + max(visitors * block, narrow))
    in_ring = 3 * narrow + block + (visitors + 1) * block
    return Operation("attention", wide + narrow, forward, max(in_ring, 2 * narrow + 2 * wide) + beside)


def _exchanged_heads(device: Device, heads: HeadLayout, wide: float, narrow: float, beside: float) -> Operation:
    """Attention of all tokens with some of the heads, between two exchanges, which copy what they send."""
    ranks = device.context_ranks
    alone = replace(device, tokens=device.tokens * ranks, context_ranks=1)
    inside = attention(alone, HeadLayout(heads.num_heads // ranks, heads.num_kv_heads // ranks, heads.dim), 0.0)
    forward, backward = max(4 * wide, 2 * wide + inside.forward), max(4 * wide, inside.backward + narrow)
    return Operation("attention", inside.kept, forward, backward + beside)


def _scores(device: Device, num_heads: int) -> tuple[float, float, float, float]:
    """Bytes of softmax weights on a CPU: of all blocks of queries, of those that are kept, of the last block of the
    longest documents, and of the block before it.
    """
    total = kept = 0.0
    longest = max(device.documents)
    of_longest: list[float] = []
    for length in device.documents:
        blocks: list[int] = []
        for own, prefix in _sequences(length, device.pairs):
            of_sequence = [
                min(_ATTENTION_BLOCK, own - start) * (prefix + min(start + _ATTENTION_BLOCK, own))
                for start in range(0, own, _ATTENTION_BLOCK)
            ]
            size = float(FP32 * num_heads * sum(of_sequence))
            total += size
            kept += size if prefix + own <= _KEEP_WEIGHTS else 0.0
            blocks += of_sequence
        if length == longest and not of_longest:
            of_longest = [float(FP32 * num_heads * block) for block in blocks]
    several = sum(length == longest for length in device.documents)
    last = of_longest[-1] * several
    before = of_longest[-2] * several if len(of_longest) > 1 else 0.0
    return total, kept, last, before


def _sequences(length: int, pairs: bool) -> list[tuple[int, int]]:
    """(tokens of its own, tokens before these that it also sees) of what attends to itself in a document: all of it, or
    a prompt and two answers, which are assumed to be of the same length.
    """
    third = length // 3
    return [(length - 2 * third, 0), *[(third, length - 2 * third)] * 2] if pairs else [(length, 0)]


@dataclass(frozen=True)
class Router:
    """A sparse layer's sizes: experts in all, and experts of a token."""

    num_experts: int
    top_k: int


def routing(device: Device, width: int, router: Router, beside: float) -> Operation:
    """Router, softmax and the tables by which rows find their experts. Beside 16-bit weights the router's fp32 input is
    kept.
    """
    tokens = device.tokens
    table = tokens * router.num_experts * FP32
    pairs = tokens * router.top_k
    kept = 3 * table + pairs * (3 * FP32 + 5 * INT64)
    kept += 0 if device.element == FP32 else FP32 * tokens * width
    return Operation("experts", kept, 2 * table, 4 * table + FP32 * tokens * width + beside)


def dispatched(device: Device, width: int, rows: float, beside: float) -> Operation:
    """Rows copied to their experts, which the first product keeps; over several expert ranks they are sent."""
    block = device.element * rows * width
    sent = 2 * block if device.expert_ranks > 1 else 0.0
    return Operation("experts", 0.0, block + sent, block + sent + 2 * device.element * device.tokens * width + beside)


def combined(device: Device, width: int, rows: float, beside: float, keeps_rows: bool = True) -> Operation:
    """The weighted sum of each token's rows, which are kept for the gradient of the weights, unless these were applied
    within the experts.
    """
    block = device.element * rows * width
    sent = 2 * block if device.expert_ranks > 1 else 0.0
    tokens = device.element * device.tokens * width
    forward = 2 * block + 2 * tokens + sent
    kept = (block if keeps_rows else 0.0) + FP32 * rows
    return Operation("experts", kept, forward, 2 * block + FP32 * rows * width + tokens + sent + beside)


@dataclass(frozen=True)
class Saved:
    """The input of operations that run again: `size` bytes, of which `kept` are kept for them alone (0 where another
    operation has kept the input anyway); `offloaded`: it waits in host memory.
    """

    size: float
    kept: float
    offloaded: bool = False


def recomputed(operations: Sequence[Operation], saved: Saved, result: float, kind: str) -> Operation:
    """Operations that keep only their input and run again in the backward pass, where their result of `result` bytes
    exists twice: what the first pass gave to others has a gradient. An input that is offloaded leaves the device, by
    whatever operation it was kept, and comes back for the backward pass.
    """
    kept, peak = 0.0, 0.0
    for operation in operations:
        peak = max(peak, kept + operation.forward, kept + operation.kept)
        kept += operation.kept
    waiting = kept
    for operation in reversed(operations):
        peak = max(peak, waiting + operation.backward)
        waiting -= operation.kept
    forward = max(max(operation.forward, operation.kept) for operation in operations)
    leaves = saved.size if saved.offloaded else 0.0
    gradient = sum(operation.gradient for operation in operations)
    return Operation(kind, saved.kept - leaves, forward, peak + 2 * result + leaves, gradient, leaves)


def with_kind(operations: Sequence[Operation], kind: str) -> list[Operation]:
    """The same operations under one kind, for the report."""
    return [replace(operation, kind=kind) for operation in operations]
