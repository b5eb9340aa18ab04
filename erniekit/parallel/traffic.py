"""Bytes that one rank sends in a step, by formula from sizes alone: no tensor and no Paddle. What a rank really sends
is counted by parallel/traffic_counter.py; the memory it needs is in parallel/memory.py.

Bytes of several operations come as a Counter by kind of operation. Host values (counts, norms, messages) are counted as
"host" and left out of the formulas unless they are named.

Legend: n ranks, D hidden size, K experts of a token; of a microbatch t tokens (filling included), r real tokens and m
tokens with loss; b bytes of an element of the activations.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from erniekit.parallel.buckets import Bucket, is_eager, item_bytes
from erniekit.parallel.traffic_counter import all_gather_bytes, all_reduce_bytes, reduce_scatter_bytes

FLOAT32, INT64, FLOAT64 = 4, 8, 8  # bytes of an element


# Data parallelism and ZeRO


def gradient_sync_bytes(
    buckets: Iterable[Bucket], zero_stage: int, num_microbatches: int, master_grad: bool, num_ranks: int
) -> Counter[str]:
    """Gradients, their norm and parameters in one step. ZeRO stages 2 and 3 reduce-scatter every bucket after every
    microbatch, the others once a step; all stages but 0 all-gather the updated chunks (Rajbhandari et al. 2020, arXiv
    1910.02054, section 7), but for divided weights, which are gathered when they are used (`weight_gather_bytes`).
    Ranks that hold the same chunk all-reduce it.

    `master_grad`: gradients of 16-bit parameters are sent in fp32. The norm is one fp64 number of each of `num_ranks`.
    """
    sent: Counter[str] = Counter(host=all_gather_bytes(FLOAT64, num_ranks))
    for bucket in buckets:
        p = bucket.placement
        row = bucket.width * item_bytes(bucket.gradient_dtype(master_grad))
        times = num_microbatches if is_eager(p, zero_stage) else 1
        sent["reduce_scatter"] += times * reduce_scatter_bytes(p.shard.size * row, p.shard.size)
        for group in (p.replica, p.partial, p.ends):
            sent["all_reduce"] += all_reduce_bytes(row, group.size)
        if not bucket.unit:
            sent["all_gather"] += all_gather_bytes(bucket.columns * item_bytes(bucket.entries[0].dtype), p.shard.size)
    return sent


def weight_gather_bytes(buckets: Iterable[Bucket], num_passes: int) -> int:
    """All-gathers of ZeRO stage 3: of the blocks' weights, whether or not they are trained, for each pass through them.
    A microbatch has a forward and a backward pass, and a reference one forward pass more. A block in front of the first
    trained parameter has no backward pass.
    """
    return num_passes * sum(
        all_gather_bytes(bucket.columns * item_bytes(bucket.entries[0].dtype), bucket.placement.shard.size)
        for bucket in buckets
    )


# Tensor and sequence parallelism


@dataclass(frozen=True)
class StageLayers:
    """What one pipeline stage holds: `dense` and `sparse` layers, `shared` of the sparse ones with shared experts, the
    embedding, the head.
    """

    dense: int
    sparse: int = 0
    shared: int = 0
    has_embedding: bool = True
    has_head: bool = True


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of one microbatch: `total` with the filling, `real` without it, `supervised` those with a label."""

    total: int
    real: int
    supervised: int


def tensor_parallel_bytes(
    layers: StageLayers,
    tokens: TokenCounts,
    num_ranks: int,
    index: int,
    hidden_size: int,
    top_k: int = 0,
    sequence_parallel: bool = False,
    element_bytes: int = FLOAT32,
) -> Counter[str]:
    """Forward and backward pass of one microbatch over n tensor ranks, of which this is number `index` (Shoeybi et al.
    2019, arXiv 1909.08053, section 3; Korthikanti et al. 2022, arXiv 2205.05198, section 4.2).

    A column-split projection needs whole rows and adds up their gradients, a row-split one adds up its results: two
    exchanges of [t, D] for each of the two such pairs of a layer (attention; dense feed-forward or shared experts). The
    embedding is one more, the head another (where a token has loss), with 3 fp32 numbers a token of loss for the
    softmax over a divided vocabulary. Routed experts exchange their result [t, D], the gradients of their input [r, D]
    and of the weights [r, K] fp32; the first rank broadcasts which experts it chose.

    Without sequence parallelism every exchange of [t, D] is an all-reduce. With it each is an all-gather one way and a
    reduce-scatter the other, and the routers gather their input as well.
    """
    if num_ranks == 1:
        return Counter()
    row = hidden_size * element_bytes
    pairs = 2 * layers.dense + layers.sparse + layers.shared
    ends = layers.has_embedding + (layers.has_head and tokens.supervised > 0)
    softmax = 3 * FLOAT32 * tokens.supervised * layers.has_head
    routed = layers.sparse * tokens.real * (row + top_k * FLOAT32)
    chosen = layers.sparse * tokens.real * top_k * INT64
    sent: Counter[str] = Counter(broadcast=chosen if index == 0 else 0)
    exchanged = (2 * pairs + layers.sparse + ends) * tokens.total * row
    if not sequence_parallel:
        sent["all_reduce"] = all_reduce_bytes(exchanged + routed + softmax, num_ranks)
        return sent
    for_routers = layers.sparse * tokens.total * row
    sent["all_gather"] = all_gather_bytes((exchanged + for_routers) // num_ranks, num_ranks)
    sent["reduce_scatter"] = reduce_scatter_bytes(exchanged, num_ranks)
    sent["all_reduce"] = all_reduce_bytes(routed + softmax, num_ranks)
    return sent


# Expert parallelism


def expert_parallel_bytes(
    rows_sent: int,
    rows_received: int,
    hidden_size: int,
    recomputed: bool = False,
    element_bytes: int = FLOAT32,
    takes_weights: bool = False,
) -> int:
    """All-to-all of one sparse layer's forward and backward pass (Lepikhin et al. 2020, arXiv 2006.16668, section 3).
    A token's row goes to its expert and comes back, and its gradient goes the same ways: a pass sends the rows that are
    for other ranks, and returns those that came from them. A recomputed layer has a second forward pass. Where experts
    take the rows' routing weights, these go out in fp32 and their gradients come back.
    """
    forward_passes = 2 if recomputed else 1
    rows = (forward_passes + 1) * (rows_sent + rows_received) * hidden_size * element_bytes
    return rows + (forward_passes * rows_sent + rows_received) * FLOAT32 if takes_weights else rows


# Context parallelism


def ring_bytes(
    sent_tokens: Sequence[int], index: int, kv_width: int, num_layers: int = 1, recomputed: bool = False
) -> int:
    """Keys and values around a ring of C ranks in the forward and the backward pass of `num_layers` layers, fp32 (Liu
    et al. 2023, arXiv 2310.01889, section 3). A pass sends on the block of every rank but the next one's; backward the
    gradients of every other rank's block follow them. A recomputed layer has a second forward pass.

    Args:
        sent_tokens: the tokens of each rank that another one needs, [C].
        index: the place of this rank among them.
        kv_width: the numbers of one token's keys, G * d of one tensor rank.
    """
    count, total = len(sent_tokens), sum(sent_tokens)
    passed_on, of_others = total - sent_tokens[(index + 1) % count], total - sent_tokens[index]
    blocks = (3 if recomputed else 2) * passed_on + of_others
    return num_layers * blocks * 2 * kv_width * FLOAT32 if count > 1 else 0


def head_exchange_bytes(
    tokens: Sequence[int],
    index: int,
    qkv_width: int,
    out_width: int,
    num_layers: int = 1,
    recomputed: bool = False,
    element_bytes: int = FLOAT32,
) -> int:
    """All-to-all before and after attention of `num_layers` layers (Jacobs et al. 2023, arXiv 2309.14509, section 3.1):
    each of C ranks gets 1 / C of the heads of all tokens, and gives back what it computed for the tokens of others;
    gradients go the same ways backward.

    Args:
        tokens: of each rank, [C].
        qkv_width, out_width: the numbers of one token's queries, keys and values, and of its result, of all heads.
    """
    count, own = len(tokens), tokens[index]
    there, back = own * (count - 1), sum(tokens) - own  # rows of 1 / C of the heads
    forward = there * qkv_width + back * out_width
    backward = there * out_width + back * qkv_width
    return num_layers * ((2 if recomputed else 1) * forward + backward) * element_bytes // count


def load_balance_bytes(num_rows: int, num_experts: int, num_ranks: int) -> int:
    """The counts of each expert's tokens in each row that a router's balancing loss sums over context ranks, fp32."""
    return all_reduce_bytes(num_rows * num_experts * FLOAT32, num_ranks)


# Pictures that data ranks divide


def picture_bytes(
    patches_sent: int,
    patch_features: int,
    features_sent: int,
    features_received: int,
    hidden_size: int,
    trained: bool = True,
    element_bytes: int = FLOAT32,
) -> int:
    """All-to-all of one microbatch whose pictures are encoded on other data ranks. The pixels of a patch, a byte each,
    go to the rank that encodes it, and the features of its tokens [D] come back. Their gradients return to where the
    features came from, if the vision transformer or the resampler is trained. Sent and received: to and from others.
    """
    rows = features_sent + (features_received if trained else 0)
    return patches_sent * patch_features + rows * hidden_size * element_bytes


# Pipeline parallelism


def pipeline_bytes(
    stage: int, num_stages: int, num_chunks: int, num_tokens: int, hidden_size: int, element_bytes: int = FLOAT32
) -> int:
    """Sends of one microbatch: [t, D] goes forward from every chunk of the model but the last, its gradient back from
    every chunk but the first (Narayanan et al. 2021, arXiv 2104.04473, section 2.2). `num_tokens`: those of one tensor
    rank, t / n with sequence parallelism.
    """
    chunks = [chunk * num_stages + stage for chunk in range(num_chunks)]
    crossings = sum((chunk < num_stages * num_chunks - 1) + (chunk > 0) for chunk in chunks)
    return crossings * num_tokens * hidden_size * element_bytes
