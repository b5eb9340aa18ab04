"""Seconds of one layer on one rank, by kind of work: the larger of the time of its FLOPs and of its bytes (a roofline),
with the efficiencies of the hardware table.

Kinds: products, attention, elementwise, quantise (casts to FP8), accumulate (gradients added up over microbatches),
tensor and expert (collectives), offload (inputs of recomputed modules to host memory and back), launches (where the
host cannot launch kernels as fast as the device runs them).
"""

from collections import defaultdict
from collections.abc import Sequence

from erniekit.plan.collectives import expert_rows, tensor_bytes
from erniekit.plan.hardware import GIGA, Hardware
from erniekit.plan.layout import Layout
from erniekit.plan.work import Core, Layer, Product

Seconds = dict[str, float]  # by kind of work

# FlashAttention's backward pass has 5 products where the forward pass has 2; papers give its speed in these FLOPs.
BACKWARD_CORE = 2.5
# Elementwise kernels of the backward pass read gradients as well as what the forward pass read.
BACKWARD_ELEMENTWISE = 2.0
# Without FlashAttention, bytes of each score that softmax, mask and dropout read and write in 16 bits, forward.
SCORE_BYTES = 13
# Kernels of the forward pass besides the products, with fused operators; the backward pass has twice as many.
KERNELS, SPARSE_KERNELS = 14, 24


def product_precision(product: Product, layout: Layout) -> str:
    """The precision in which a product is computed."""
    if layout.precision in ("bf16", "fp32") or product.part in layout.fp8_parts:
        return layout.precision
    return "bf16"


def product_seconds(product: Product, layout: Layout, card: Hardware, weight_gradient: bool = False) -> float:
    """One of the three products of a microbatch: forward, the input's gradient, or the weight's gradient."""
    tokens = layout.rank_tokens
    rows = tokens * product.rows
    inputs, outputs, experts = float(product.inputs), float(product.outputs), float(product.experts)
    if product.experts > 1:
        experts /= layout.expert * layout.tensor
        rows /= layout.tensor
    elif product.tensor_split == "inputs":
        inputs /= layout.tensor
    elif product.tensor_split == "outputs":
        outputs /= layout.tensor
    if not rows:
        return 0.0
    precision = product_precision(product, layout)
    table = "bf16" if precision == "fp32" else precision
    efficiency = card.efficiency.product[table] * card.efficiency.of_size(min(rows / experts, inputs, outputs))
    if product.experts > 1:
        efficiency *= card.efficiency.grouped[table]
    if weight_gradient:
        efficiency *= card.efficiency.weight_gradient[table]
    computing = 2 * rows * inputs * outputs / (card.peak(precision) * efficiency)
    moved = layout.element_bytes * (rows * (inputs + outputs) + experts * inputs * outputs)
    return max(computing, moved / card.memory_bandwidth)


def quantise_seconds(product: Product, layout: Layout, card: Hardware, backward: bool = False) -> float:
    """Casts of a product's input (forward) or output gradient (backward) to FP8, by rows and by columns: 16 bits are
    read, and 8 written twice. With scales of blocks the columns are a second pass over the input.
    """
    precision = product_precision(product, layout)
    if precision not in ("fp8", "fp8_blockwise"):
        return 0.0
    rows = layout.rank_tokens * product.rows
    split, features = ("outputs", product.outputs) if backward else ("inputs", product.inputs)
    divided = layout.tensor if product.tensor_split in (split, "experts") else 1
    moved = 8.0 if precision == "fp8_blockwise" else 4.0
    return moved * rows * features / divided / card.memory_bandwidth


def core_seconds(core: Core, layout: Layout, card: Hardware, backward: bool = False) -> float:
    """Attention between its projections for one microbatch."""
    flops = core.flops(list(layout.lengths)) * layout.rank_tokens / layout.tensor
    if not layout.flash_attention:
        area = flops / (core.query_size + core.value_size) / 2 * 2  # the full square, without the features
        moved = area * SCORE_BYTES * (BACKWARD_ELEMENTWISE if backward else 1)
        computing = 2 * flops * (2 if backward else 1) / (card.half_peak * 0.5 * card.efficiency.product["bf16"])
        return computing + moved / card.memory_bandwidth
    peak = card.peak(layout.precision) if layout.precision == "fp32" else card.half_peak
    if backward:
        return BACKWARD_CORE * flops / (peak * card.efficiency.attention["backward"])
    return flops / (peak * card.efficiency.attention["forward"])


def elementwise_seconds(layer: Layer, layout: Layout, card: Hardware) -> float:
    """Norms, rotation, activation and residual sums of one microbatch, forward. Without sequence parallelism the tensor
    ranks repeat what is as wide as the hidden size.
    """
    whole = 0.0 if layout.sequence_parallel or layer.kind == "head" else min(10.0 * layer.hidden, layer.values)
    values = whole + (layer.values - whole) / layout.tensor
    fused = layout.deduplicated  # such kernels sort the rows while they send them
    permuting = card.efficiency.memory / card.efficiency.permute if not fused else 1.0
    values += layer.permuted / layout.tensor * permuting
    return values * layout.element_bytes * layout.rank_tokens / card.memory_bandwidth


def tensor_seconds(layers: Sequence[Layer], layout: Layout, card: Hardware, embedding: bool = False) -> float:
    """Tensor-parallel collectives of a forward pass, or of a backward pass."""
    sent = tensor_bytes(layers, layout, embedding)
    spans = layout.spans_hosts(layout.tensor)
    seconds = 0.0
    for kind, of_kind in sent.items():
        table = "all_reduce" if kind == "all_reduce" else "all_gather"
        rate, latency = card.link(table, layout.tensor, spans)
        seconds += of_kind / rate + 4 * len(layers) * latency * (table == "all_gather" or not layout.sequence_parallel)
    return seconds / 2


def expert_seconds(layer: Layer, layout: Layout, card: Hardware) -> float:
    """Dispatch and combine of one sparse layer: a forward pass, or a backward pass."""
    on_host, to_hosts = expert_rows(layer, layout)
    if not on_host + to_hosts:
        return 0.0
    row = layer.hidden * layout.element_bytes * (0.76 if layout.fp8_dispatch else 1.0)  # 1.03 bytes one way, 2 back
    kind = "dispatch" if layout.deduplicated else "all_to_all"
    rate, latency = card.link(kind, min(layout.expert, layout.gpus_per_node), False)
    seconds = on_host * row / rate + latency
    if to_hosts:
        rate, latency = card.link(kind, layout.expert, True)
        seconds = max(seconds, to_hosts * row / rate + latency)  # both links are busy at the same time
    return 2 * seconds


def launch_seconds(layer: Layer, layout: Layout, card: Hardware) -> float:
    """Host time of a forward pass."""
    kernels = KERNELS + len(layer.products) + (SPARSE_KERNELS if layer.kind == "sparse" else 0)
    return kernels * card.launch_seconds


def layer_forward(layer: Layer, layout: Layout, card: Hardware, embedding: bool = False) -> Seconds:
    """Seconds of a forward pass of one microbatch, by kind."""
    spent: Seconds = defaultdict(float)
    spent["products"] = sum(product_seconds(product, layout, card) for product in layer.products)
    spent["quantise"] = sum(quantise_seconds(product, layout, card) for product in layer.products)
    spent["attention"] = sum(core_seconds(core, layout, card) for core in layer.cores)
    spent["elementwise"] = elementwise_seconds(layer, layout, card)
    return _with_exposed(spent, layer, layout, card, 1.0, embedding)


def layer_backward(
    layer: Layer, layout: Layout, card: Hardware, embedding: bool = False, recomputed: bool = True
) -> Seconds:
    """Seconds of a backward pass of one microbatch, by kind, with what the layer computes again (`recomputed`)."""
    spent: Seconds = defaultdict(float)
    for product in layer.products:
        spent["products"] += product_seconds(product, layout, card)
        spent["quantise"] += quantise_seconds(product, layout, card, backward=True)
        if product.trained:
            spent["products"] += product_seconds(product, layout, card, weight_gradient=True)
            if layout.microbatches > 1 and layout.zero_stage < 3:
                moved = 2 * layout.gradient_bytes * product.parameters / layout.shards(product)
                spent["accumulate"] += moved / card.memory_bandwidth
    spent["attention"] = sum(core_seconds(core, layout, card, backward=True) for core in layer.cores)
    spent["elementwise"] = BACKWARD_ELEMENTWISE * elementwise_seconds(layer, layout, card)
    again = layout.recomputed
    passes = 1.0
    if recomputed and layer.kind in ("dense", "sparse"):
        spent["recompute"] = (
            sum(again.share(p.part) * product_seconds(p, layout, card) for p in layer.products)
            + again.core * sum(core_seconds(core, layout, card) for core in layer.cores)
            + again.elementwise * elementwise_seconds(layer, layout, card)
        )
        feed_forward = again.dispatches if layer.kind == "sparse" else again.share("mlp")
        passes += (again.attention + feed_forward) / 2 if max(again.attention, feed_forward) == 1 else 0.0
    exposed = _with_exposed(spent, layer, layout, card, passes, embedding)
    if recomputed and layout.offload_activations and layer.kind in ("dense", "sparse"):
        exposed["offload"] = offload_seconds(layer, layout, card)
    return exposed


def offload_seconds(layer: Layer, layout: Layout, card: Hardware) -> float:
    """Inputs of a layer's recomputed modules to host memory and back, while nothing else runs."""
    ranks = layout.tensor if layout.sequence_parallel else 1
    moved = 2 * layout.recomputed.saved_values(layer) * layout.element_bytes * layout.rank_tokens / ranks
    return moved / (card.pcie_gb_s * GIGA)


def _with_exposed(
    spent: Seconds, layer: Layer, layout: Layout, card: Hardware, passes: float, embedding: bool
) -> Seconds:
    """Adds the collectives that products do not hide, and the time that the device waits for launches."""
    computing = sum(spent.values())
    products = spent["products"]
    tensor = passes * tensor_seconds([layer], layout, card, embedding)
    expert = passes * expert_seconds(layer, layout, card)
    spent["tensor"] = max(tensor - products, 0.0) if layout.overlap_tensor else tensor
    spent["expert"] = max(expert - computing, 0.0) if layout.overlap_expert else expert
    launches = launch_seconds(layer, layout, card) * (2 if spent["accumulate"] or passes > 1 else 1)
    spent["launches"] = max(launches - sum(spent.values()), 0.0)
    return {kind: seconds for kind, seconds in spent.items() if seconds}
