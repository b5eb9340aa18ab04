"""Bytes that one rank sends in a step, by the dimension of parallelism. The formulas are those of parallel/traffic.py,
which tests compare with the bytes that real steps send; here they are applied to the layers of a plan.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from erniekit.parallel.buckets import Entry, item_bytes, plan_buckets
from erniekit.parallel.placement import Placement
from erniekit.parallel.process_group import ALONE, Group
from erniekit.parallel.traffic import (
    StageLayers,
    TokenCounts,
    expert_parallel_bytes,
    gradient_sync_bytes,
    pipeline_bytes,
    tensor_parallel_bytes,
)
from erniekit.plan.layout import Layout, Run
from erniekit.plan.work import Layer


def _decoder(layer: Layer) -> bool:
    return layer.kind in ("dense", "sparse")


def tensor_bytes(layers: Sequence[Layer], layout: Layout, embedding: bool = False) -> Counter[str]:
    """Forward and backward pass of one microbatch, by collective; `embedding`: these layers follow the embedding."""
    if layout.tensor == 1:
        return Counter()
    decoder = [layer for layer in layers if _decoder(layer)]
    sparse = [layer for layer in decoder if layer.kind == "sparse"]
    stage = StageLayers(
        dense=len(decoder) - len(sparse),
        sparse=len(sparse),
        shared=sum(layer.shared for layer in sparse),
        has_embedding=embedding,
        has_head=any(layer.kind == "head" for layer in layers),
    )
    tokens = round(layout.rank_tokens)
    counts = TokenCounts(tokens, tokens, round(tokens * layout.supervised))
    hidden = layers[0].hidden if not decoder else decoder[0].hidden
    top_k = max((layer.top_k for layer in sparse), default=0)
    return tensor_parallel_bytes(
        stage, counts, layout.tensor, 0, hidden, top_k, layout.sequence_parallel, layout.element_bytes
    )


def distinct_groups(top_k: int, experts: int, groups: int) -> float:
    """How many of `groups` equal groups of experts have one of `top_k` distinct experts drawn evenly, on average."""
    if groups == 1 or top_k == 0:
        return float(groups)
    return groups * (1 - math.comb(experts - experts // groups, top_k) / math.comb(experts, top_k))


def expert_rows(layer: Layer, layout: Layout) -> tuple[float, float]:
    """Rows that a rank sends for one microbatch and way: (to other ranks of its host, to other hosts)."""
    ranks = layout.expert
    if layer.kind != "sparse" or ranks == 1:
        return 0.0, 0.0
    on_host = max(min(ranks, layout.gpus_per_node // layout.tensor), 1)
    hosts = ranks // on_host
    tokens = layout.rank_tokens / layout.tensor
    if not layout.deduplicated:
        rows = tokens * layer.top_k
        return rows * (on_host - 1) / ranks, rows * (ranks - on_host) / ranks
    to_ranks = tokens * distinct_groups(layer.top_k, layer.num_experts, ranks)
    to_hosts = tokens * distinct_groups(layer.top_k, layer.num_experts, hosts) if hosts > 1 else tokens
    if layer.top_hosts:
        to_hosts = min(to_hosts, tokens * layer.top_hosts)
    # A row crosses the network once for each host and is passed on there.
    return to_ranks * (ranks - hosts) / ranks, to_hosts * (hosts - 1) / hosts


def expert_bytes(layer: Layer, layout: Layout) -> int:
    """All-to-all of one sparse layer's forward and backward pass, and of the forward pass that is computed again."""
    rows = round(sum(expert_rows(layer, layout)))
    recomputed = layout.recomputed.dispatches > 0
    return expert_parallel_bytes(rows, rows, layer.hidden, recomputed, layout.element_bytes)


def transfer_bytes(layout: Layout, hidden: int) -> int:
    """One message between two pipeline stages."""
    tokens = round(layout.rank_tokens / (layout.tensor if layout.sequence_parallel else 1))
    return pipeline_bytes(0, 2, 1, tokens, hidden, layout.element_bytes)


def trained_entries(
    layers: Sequence[Layer], layout: Layout, embedding: int = 0, with_frozen: bool = False
) -> list[Entry]:
    """Two parameters that stand for all trained weights of a stage on one rank: of experts and of the rest; on demand
    also for the frozen ones.
    """
    dense, experts = float(embedding) / layout.tensor, 0.0
    for layer in layers:
        for product in layer.products:
            if not product.trained and not with_frozen:
                continue
            elements = product.parameters / layout.shards(product)
            if product.experts > 1:
                experts += elements
            else:
                dense += elements
    ranks = layout.data * layout.context
    shard = min(layout.sharding * layout.context, ranks)
    of_experts = max(ranks // layout.expert, 1)
    dtype = "float32" if layout.element_bytes == 4 else "bfloat16"
    of_expert_shard = min(max(shard // layout.expert, 1), of_experts)
    entries = (
        Entry("dense", (round(dense),), dtype, _placement(ranks, shard)),
        Entry("experts", (round(experts),), dtype, _placement(of_experts, of_expert_shard)),
    )
    return [entry for entry in entries if entry.size]


def _placement(ranks: int, shard: int) -> Placement:
    def group(size: int) -> Group:
        return Group(tuple(range(size)), 0)

    return Placement(group(ranks), group(shard), group(ranks // shard), ALONE, ALONE, ranks)


def data_bytes(entries: Sequence[Entry], layout: Layout) -> Counter[str]:
    """Gradients and updated weights of one step. ZeRO stage 3 divides the weights as well: for each microbatch they are
    gathered twice and their gradients reduce-scattered (Rajbhandari et al. 2020, section 7).
    """
    master = layout.gradient_bytes == 4
    if layout.zero_stage < 3:
        sent = gradient_sync_bytes(plan_buckets(entries), layout.zero_stage, layout.microbatches, master, 1)
        del sent["host"]
        return sent
    times = layout.microbatches
    share = [(entry, (entry.placement.shard.size - 1) / entry.placement.shard.size) for entry in entries]
    gathered = sum(entry.size * item_bytes(entry.dtype) * part for entry, part in share)
    scattered = sum(entry.size * item_bytes(entry.gradient_dtype(master)) * part for entry, part in share)
    return Counter(all_gather=round(2 * times * gathered), reduce_scatter=round(times * scattered))


def stage_data_bytes(layers: Sequence[Layer], layout: Layout, embedding: int = 0) -> Counter[str]:
    """Gradients and weights of a stage in one step. Where only decoder layers are divided, everything else is exchanged
    as in stage 2, and frozen weights of these layers are gathered, too. Passes ahead of the step gather once.
    """
    if layout.zero_stage < 3 or not layout.blocks_alone:
        return data_bytes(trained_entries(layers, layout, embedding), layout)
    blocks, others = [x for x in layers if _decoder(x)], [x for x in layers if not _decoder(x)]
    sent = data_bytes(trained_entries(others, layout, embedding), replace(layout, zero_stage=2))
    sent["reduce_scatter"] += data_bytes(trained_entries(blocks, layout), layout)["reduce_scatter"]
    twice = data_bytes(trained_entries(blocks, layout, with_frozen=True), layout)["all_gather"]
    sent["all_gather"] += round(twice * (1 + layout.passes_ahead / 2))
    return sent


def num_exchanges(layers: Sequence[Layer], layout: Layout) -> int:
    """Collectives of each kind in a step, of which each has its latency; where they overlap, one."""
    if layout.zero_stage < 3 or not layout.blocks_alone:
        return 1
    return 2 * layout.microbatches * sum(_decoder(layer) for layer in layers)


def step_bytes(run: Run, stage: int) -> Counter[str]:
    """What one rank of a stage sends in a step, by dimension: tensor, expert, pipeline, data."""
    layout, layers = run.layout, run.stage(stage)
    first = stage == 0
    times = layout.microbatches
    sent: Counter[str] = Counter()
    sent["tensor"] = times * sum(tensor_bytes(layers, layout, first).values())
    sent["expert"] = times * sum(expert_bytes(layer, layout) for layer in layers if layer.kind == "sparse")
    tokens = round(layout.rank_tokens / (layout.tensor if layout.sequence_parallel else 1))
    hidden = run.work.hidden
    sent["pipeline"] = times * pipeline_bytes(
        stage, layout.pipeline, layout.chunks, tokens, hidden, layout.element_bytes
    )
    sent["data"] = sum(stage_data_bytes(layers, layout, run.work.embedding if first else 0).values())
    return +sent
