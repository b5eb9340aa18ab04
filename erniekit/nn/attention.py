"""Causal grouped-query attention over packed documents.

The plain-op path below is the reference and the CPU path: rotation, gathering by document, blocked causal products and
their adjoint in one autograd node. No [seq, seq] mask over packed rows is ever built: work grows with the sum of
squared document lengths, not with the row length squared.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, Protocol

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer

from erniekit.nn import blockwise, fused
from erniekit.nn.attention_mask import AttentionPlan
from erniekit.nn.cpu_ops import add_to_each_, softmax_, softmax_backward_
from erniekit.nn.dropout import AttentionDropout, LayerMasks
from erniekit.nn.linear import Linear
from erniekit.nn.rotary import Rotation


class AttentionContext(Protocol):
    """Attention context: which keys each query may attend to. Packed documents, or a growing conversation (KVCache)."""

    def attend(self, qkv: paddle.Tensor, layer: int) -> paddle.Tensor:
        """qkv [T, (H+2G)*d] before rotation -> context [T, H*d]."""
        ...


# Added to the score of a key that a query may not see: larger than any score, and finite, so that a row in which all is
# hidden stays finite too. The CPU's softmax gives it a weight of e^-64, which leaves nothing in fp32.
MASK_VALUE = -1e30
_BLOCK = 128  # query positions of a block: keys behind the block are skipped
_KEEP_WEIGHTS = (
    1024  # longest document whose softmax weights wait for the backward pass; longer ones compute them again
)


@dataclass(frozen=True)
class HeadLayout:
    """H query heads over G key/value heads of `dim`; each kv head serves `repeat` = H / G query heads."""

    num_heads: int
    num_kv_heads: int
    dim: int

    @property
    def repeat(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def total(self) -> int:
        return self.num_heads + 2 * self.num_kv_heads


@dataclass(frozen=True)
class _BucketRows:
    """A bucket of N documents of length L that see a prefix of up to F tokens (0: none) as rows of d numbers. Its
    queries stand block by block, [N, G, block, r] in each, its keys and values [N, G, F + L]: what one product needs
    lies together. r = H / G heads share a kv head.

    `fetch` [rows]: for queries, then keys, then values, their rows in the projection seen as [T*(H+2G), d].
    `fetch_grad` [queries]: their rows in the context's gradient seen as [T*H, d]. `keep` [queries, 1]: 0 where a query
    is padding, 1 elsewhere; None without padding. `hidden` [N, 1, 1, F + L]: added to the scores, it hides the padding
    before short prefixes; None without.
    """

    num_documents: int
    length: int
    num_prefix: int
    fetch: paddle.Tensor
    fetch_grad: paddle.Tensor
    keep: paddle.Tensor | None
    hidden: paddle.Tensor | None

    def blocks(self) -> list[tuple[int, int]]:
        """[start, stop) of each block of query positions."""
        return [(start, min(start + _BLOCK, self.length)) for start in range(0, self.length, _BLOCK)]


@dataclass(frozen=True)
class _Rows:
    """Every bucket's rows, and the way back: `merge` [T*H] finds each head's context in the buckets' queries one after
    another, `merge_grad` [T*(H+2G)] each head's gradient in the buckets' queries, keys and values. A shared prefix's
    keys and values have gradients in several places, `shared` [places][rows]; the rows' sums stand behind all buckets.

    A gather copies whole rows and is some fifty times faster on a CPU than the transpositions it stands for.
    """

    buckets: list[_BucketRows]
    merge: paddle.Tensor
    merge_grad: paddle.Tensor
    shared: list[paddle.Tensor]


def _rows_of(plan: AttentionPlan, heads: HeadLayout) -> _Rows:
    h, g, r, total = heads.num_heads, heads.num_kv_heads, heads.repeat, heads.total
    merge, merge_grad = np.empty(plan.num_tokens * h, np.int64), np.empty(plan.num_tokens * total, np.int64)
    buckets, num_queries, num_rows = [], 0, 0
    head, kv_head = np.arange(h).reshape(g, 1, r), h + np.arange(g).reshape(g, 1)
    again: list[tuple[np.ndarray, np.ndarray]] = []  # of prefixes: rows of the projection, where their gradients are
    for bucket in plan.buckets:
        tokens, real = bucket.tokens[:, None, :, None], bucket.real[:, None, :, None]
        spans = [slice(start, start + _BLOCK) for start in range(0, bucket.tokens.shape[1], _BLOCK)]
        query = np.concatenate([(tokens[:, :, span] * h + head).reshape(-1) for span in spans])
        query_real = np.concatenate([np.repeat(real[:, :, span], g, axis=1).reshape(-1).repeat(r) for span in spans])
        seen = np.concatenate([bucket.prefix, bucket.tokens], axis=1)
        key = (seen[:, None] * total + kv_head).reshape(-1)
        fetch = np.concatenate([query // h * total + query % h, key, key + g])
        own = _fetched(query_real, np.concatenate([bucket.prefix_real & False, bucket.real], axis=1), g)
        merge[query[query_real]] = num_queries + np.flatnonzero(query_real)
        merge_grad[fetch[own]] = num_rows + np.flatnonzero(own)
        if bucket.prefix.shape[1]:
            prefix = _fetched(query_real & False, np.concatenate([bucket.prefix_real, bucket.real & False], axis=1), g)
            again.append((fetch[prefix], num_rows + np.flatnonzero(prefix)))
        num_queries, num_rows = num_queries + len(query), num_rows + len(fetch)
        keep = None if query_real.all() else paddle.to_tensor(query_real.astype(np.float32)[:, None])
        hidden = None
        if not bucket.prefix_real.all():
            visible = np.concatenate([bucket.prefix_real, bucket.real | True], axis=1)
            hidden = paddle.to_tensor(np.where(visible, 0.0, MASK_VALUE).astype(np.float32)[:, None, None])
        count, length = bucket.tokens.shape
        fetches = paddle.to_tensor(fetch), paddle.to_tensor(query)
        buckets.append(_BucketRows(count, length, bucket.prefix.shape[1], *fetches, keep, hidden))
    shared = _shared_places(again, merge_grad, num_rows)
    return _Rows(buckets, paddle.to_tensor(merge), paddle.to_tensor(merge_grad), shared)


def _fetched(queries: np.ndarray, keys: np.ndarray, num_kv_heads: int) -> np.ndarray:
    """A mask of the queries [queries] and one of the seen tokens [N, F + L] as a mask of a bucket's `fetch`."""
    keys = np.repeat(keys[:, None], num_kv_heads, axis=1).reshape(-1)
    return np.concatenate([queries, keys, keys])


def _shared_places(
    again: list[tuple[np.ndarray, np.ndarray]], merge_grad: np.ndarray, num_rows: int
) -> list[paddle.Tensor]:
    """Where the gradients of shared prefixes' rows are: [places][rows], of which the first is the prefix's own; row
    `num_rows` of the gradients is zero, for those with fewer. `merge_grad` is turned to the sums, which follow it.
    """
    if not again:
        return []
    rows, places = (np.concatenate(parts) for parts in zip(*again, strict=True))
    order = np.argsort(rows, kind="stable")
    rows, places = rows[order], places[order]
    targets, first, counts = np.unique(rows, return_index=True, return_counts=True)
    column = np.arange(len(rows)) - np.repeat(first, counts)
    table = np.full((1 + int(counts.max()), len(targets)), num_rows, np.int64)
    table[0] = merge_grad[targets]
    table[1 + column, np.repeat(np.arange(len(targets)), counts)] = places
    merge_grad[targets] = num_rows + 1 + np.arange(len(targets))
    return [paddle.to_tensor(line) for line in table]


@lru_cache(maxsize=64)
def _causal_mask(start: int, stop: int, repeat: int) -> paddle.Tensor:
    """[(stop - start) * repeat, stop] fp32: 0 where key <= query, MASK_VALUE after it. Query rows run position by
    position, `repeat` heads each.
    """
    visible = np.arange(stop) <= np.arange(start, stop)[:, None]
    return paddle.to_tensor(np.where(visible, 0.0, MASK_VALUE).astype(np.float32).repeat(repeat, axis=0))


def _probabilities(
    q: paddle.Tensor, k: paddle.Tensor, start: int, stop: int, repeat: int, bucket: _BucketRows
) -> paddle.Tensor:
    """Softmax weights of query positions [start, stop) over the prefix and keys [0, stop): [N, G, (stop-start)*r,
    F + stop] in fp32. q [N, G, (stop-start)*r, d] comes scaled.
    """
    seen = bucket.num_prefix + stop
    scores = paddle.matmul(q, k[:, :, :seen], transpose_y=True)
    mask = _causal_mask(start, stop, repeat)
    if bucket.num_prefix:
        mask = nn.functional.pad(mask, [0, 0, bucket.num_prefix, 0])
    if bucket.hidden is not None:
        scores = scores.add_(bucket.hidden[..., :seen])
    return softmax_(add_to_each_(scores, mask))


def _split_queries(flat: paddle.Tensor, bucket: _BucketRows, heads: HeadLayout) -> list[paddle.Tensor]:
    """Query rows [queries, d] -> block by block [N, G, block*r, d]. Rows already lie so: nothing is copied."""
    n, g, r = bucket.num_documents, heads.num_kv_heads, heads.repeat
    parts, begin = [], 0
    for start, stop in bucket.blocks():
        end = begin + n * g * (stop - start) * r
        parts.append(flat[begin:end].reshape([n, g, (stop - start) * r, heads.dim]))
        begin = end
    return parts


def _is_blockwise(bucket: _BucketRows, rows: paddle.Tensor) -> bool:
    return bucket.num_prefix == 0 and blockwise.applies(bucket.length, rows)


def _heads(
    rows: paddle.Tensor, num_queries: int, num_keys: int, bucket: _BucketRows, heads: HeadLayout
) -> blockwise.Heads:
    """The heads of a bucket without prefixes, block by block; `rows` are its queries, keys and values."""
    units, blocks, first = bucket.num_documents * heads.num_kv_heads, [], 0
    for start, stop in bucket.blocks():
        count = (stop - start) * heads.repeat
        mask = _causal_corner(stop - start, heads.repeat)
        blocks.append(blockwise.Block(first, count, count, stop, mask))
        first += units * count
    k_end = num_queries + num_keys
    q, k, v = rows[:num_queries], rows[num_queries:k_end], rows[k_end:]
    return blockwise.Heads(q, k, v, blocks, units, heads.dim**-0.5)


@lru_cache(maxsize=64)
def _causal_corner(length: int, repeat: int) -> np.ndarray:
    """What hides later tokens among the last `length` keys of a block: fp32 [length * repeat, length]."""
    return _causal_mask(0, length, repeat).numpy()


class _DocumentAttention(PyLayer):
    """qkv [T, (H+2G)*d] -> context [T, H*d], rotation included. `masks`: the dropout of the weights, if any.

    From 16-bit projections it computes what a GPU's fused kernel does: queries, keys and values are rounded to 16 bits
    after the rotation, and the weights and the gradients of the scores before the products that take them; scores,
    softmax and sums are fp32.
    """

    @staticmethod
    def forward(
        ctx, qkv: paddle.Tensor, rotation: Rotation, rows: _Rows, heads: HeadLayout, masks: LayerMasks | None
    ) -> paddle.Tensor:
        num_tokens, g, d = qkv.shape[0], heads.num_kv_heads, heads.dim
        z = rotation.apply(qkv.reshape([num_tokens, heads.total, d])).reshape([num_tokens * heads.total, d])
        z, dtype = z.astype("float32"), qkv.dtype
        saved: list[Any] = []
        outputs: list[paddle.Tensor] = []
        for number, bucket in enumerate(rows.buckets):
            fetched = paddle.gather(z, bucket.fetch)
            num_queries = bucket.num_documents * bucket.length * heads.num_heads
            shape = [bucket.num_documents, g, bucket.num_prefix + bucket.length, d]
            num_keys = shape[0] * g * shape[2]
            if masks is None and dtype == paddle.float32 and _is_blockwise(bucket, z):
                single = _heads(fetched, num_queries, num_keys, bucket, heads)
                outputs.append(single.attend(keep=shape[2] <= _KEEP_WEIGHTS))
                saved.append(single)
                continue
            queries = _split_queries(fetched[:num_queries] * d**-0.5, bucket, heads)
            k = fetched[num_queries : num_queries + num_keys].reshape(shape)
            v = fetched[num_queries + num_keys :].reshape(shape)
            weights, parts = [], []
            for q, (start, stop) in zip(queries, bucket.blocks(), strict=True):
                p = _probabilities(q, k, start, stop, heads.repeat, bucket)
                mask = None if masks is None else masks.block(number, start, stop)
                weights.append((p, mask) if shape[2] <= _KEEP_WEIGHTS else None)
                p = p if mask is None else p * mask
                parts.append(paddle.matmul(_as_stored(p, dtype), v[:, :, : bucket.num_prefix + stop]))
            saved.append((queries, k, v, weights))
            outputs += [part.reshape([-1, d]) for part in parts]
        ctx.rotation, ctx.rows, ctx.heads, ctx.masks, ctx.saved = rotation, rows, heads, masks, saved
        return paddle.gather(_join(outputs), rows.merge).reshape([num_tokens, heads.num_heads * d]).astype(dtype)

    @staticmethod
    def backward(ctx, dout: paddle.Tensor) -> paddle.Tensor:
        rows, heads = ctx.rows, ctx.heads
        num_tokens, d, dtype = dout.shape[0], heads.dim, dout.dtype
        dout = dout.reshape([num_tokens * heads.num_heads, d]).astype("float32")
        grads: list[paddle.Tensor] = []
        for number, (bucket, saved) in enumerate(zip(rows.buckets, ctx.saved, strict=True)):
            do = paddle.gather(dout, bucket.fetch_grad)
            if bucket.keep is not None:
                # Padding positions have copies of token 0, whose gradient must not be counted.
                do = do.multiply_(bucket.keep)
            if isinstance(saved, blockwise.Heads):
                grads.append(saved.backward(do))
                continue
            block = None if ctx.masks is None else partial(ctx.masks.block, number)
            queries, k, v, weights = saved
            made = _bucket_backward(do, queries, k, v, weights, bucket, heads, block, dtype)
            grads += [grad.reshape([-1, d]) for grad in made]
        ctx.saved = None
        dz = paddle.gather(_with_sums(grads, rows.shared), rows.merge_grad).reshape([num_tokens, heads.total, d])
        return ctx.rotation.apply(dz.astype(dtype), inverse=True).reshape([num_tokens, heads.total * d])


def _as_stored(values: paddle.Tensor, dtype: paddle.dtype) -> paddle.Tensor:
    """fp32 values rounded to a dtype, in fp32."""
    return values.astype(dtype).astype("float32")


def _join(parts: list[paddle.Tensor]) -> paddle.Tensor:
    return parts[0] if len(parts) == 1 else paddle.concat(parts, axis=0)


def _with_sums(grads: list[paddle.Tensor], shared: list[paddle.Tensor]) -> paddle.Tensor:
    """The buckets' gradients one after another, then a row of zeros and the sums over the places of `shared`."""
    if not shared:
        return _join(grads)
    every = _join([*grads, paddle.zeros([1, grads[0].shape[1]], dtype=grads[0].dtype)])
    total = paddle.gather(every, shared[0])
    for places in shared[1:]:
        total = total.add_(paddle.gather(every, places))
    return paddle.concat([every, total], axis=0)


def _bucket_backward(
    do: paddle.Tensor,
    queries: list[paddle.Tensor],
    k: paddle.Tensor,
    v: paddle.Tensor,
    weights: list[tuple[paddle.Tensor, paddle.Tensor | None] | None],
    bucket: _BucketRows,
    heads: HeadLayout,
    mask_of: Callable[[int, int], paddle.Tensor] | None,
    dtype: paddle.dtype,
) -> list[paddle.Tensor]:
    """Adjoint of blocked attention, the weights dropped by `mask_of`. Returns the blocks' dq, then dk and dv."""
    dq_parts, dk, dv = [], None, None
    blocks = zip(queries, weights, _split_queries(do, bucket, heads), bucket.blocks(), strict=True)
    for q, saved, do_b, (start, stop) in blocks:
        if saved is None:
            p, mask = _probabilities(q, k, start, stop, heads.repeat, bucket), mask_of and mask_of(start, stop)
        else:
            p, mask = saved
        seen = bucket.num_prefix + stop
        dp = paddle.matmul(do_b, v[:, :, :seen], transpose_y=True)
        ds = _as_stored(softmax_backward_(dp if mask is None else dp.multiply_(mask), p), dtype)
        p = p if mask is None else p * mask
        dq_parts.append(paddle.matmul(ds, k[:, :, :seen]).scale_(heads.dim**-0.5))
        # dK^T = Q^T dS and dV^T = dO^T P: transposing the wide matrix would take a CPU as long as the product.
        dk = _accumulate(dk, paddle.matmul(q, ds, transpose_x=True), seen)
        dv = _accumulate(dv, paddle.matmul(do_b, _as_stored(p, dtype), transpose_x=True), seen)
    assert dk is not None and dv is not None, "a document without tokens"
    return [*dq_parts, dk.transpose([0, 1, 3, 2]), dv.transpose([0, 1, 3, 2])]


def _accumulate(total: paddle.Tensor | None, part: paddle.Tensor, seen: int) -> paddle.Tensor:
    """Add a block's key gradient [N, G, d, seen] to the running one [N, G, d, <=seen]; `seen` grows block by block."""
    if total is None:
        return part
    pad = paddle.zeros([*part.shape[:3], seen - total.shape[3]], dtype=part.dtype)
    return paddle.concat([total, pad], axis=3).add_(part)


def last_rows(plan: AttentionPlan) -> np.ndarray:
    """For each token, the first later one that no longer sees it: int [T]."""
    ends = np.cumsum(np.bincount(plan.document_of_token))
    return ends[plan.last_reader[plan.document_of_token]]


def _flash_attention(
    qkv: paddle.Tensor, rotation: Rotation, ends_11T1: paddle.Tensor, heads: HeadLayout, rate: float, seed: int
) -> paddle.Tensor:
    """The same through Paddle's FlashMask kernel (GPU, 16-bit): all rows as one, key j hidden from the row at which j's
    document ends, or its last branch if it is a shared prefix.

    The kernel draws the masks of its dropout (`rate`) from `seed`: they differ from those of nn.dropout, and they
    change with packing and with the layout.
    """
    num_tokens = qkv.shape[0]
    num_rotated = heads.num_heads + heads.num_kv_heads
    qk, v = qkv.reshape([num_tokens, heads.total, heads.dim]).split([num_rotated, heads.num_kv_heads], axis=1)
    q, k = rotation.turn(qk).split([heads.num_heads, heads.num_kv_heads], axis=1)
    out = fused.flash_mask(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), ends_11T1, rate, seed)
    return out.reshape([num_tokens, heads.num_heads * heads.dim])


@dataclass(frozen=True)
class PackedAttention:
    """Attention of a training or evaluation batch: every token sees the earlier tokens of its own document, and those
    of the prefix that its document branches from. `dropout`: that of a training step, if it has any.
    """

    plan: AttentionPlan
    rotation: Rotation
    heads: HeadLayout
    dropout: AttentionDropout | None = None

    @cached_property
    def _rows(self) -> _Rows:
        """Found once a batch, for all layers."""
        return _rows_of(self.plan, self.heads)

    @cached_property
    def _ends(self) -> paddle.Tensor:
        """For each key, the first later query that no longer sees it: int32 [1, 1, T, 1]. Uploaded once a batch."""
        return paddle.to_tensor(last_rows(self.plan).astype(np.int32)).reshape([1, 1, -1, 1])

    def attend(self, qkv: paddle.Tensor, layer: int) -> paddle.Tensor:
        """qkv [T, (H+2G)*d] before rotation -> context [T, H*d]. `layer` decides about dropout alone."""
        dropout, heads = self.dropout, self.heads
        if fused.flash_mask_applies(qkv, heads.dim):
            rate, seed = (0.0, 0) if dropout is None else (dropout.rate_of(layer), dropout.seed_of(layer))
            return _flash_attention(qkv, self.rotation, self._ends, heads, rate, seed)
        masks = None if dropout is None else dropout.masks(layer, self.plan, heads.num_heads, heads.num_kv_heads)
        return _DocumentAttention.apply(qkv, self.rotation, self._rows, heads, masks)


class SelfAttention(nn.Layer):
    """Fused q|k|v projection, an attention context that decides which keys a query sees, output projection."""

    def __init__(self, hidden_size: int, heads: HeadLayout, bias: bool = False, init_std: float = 0.02) -> None:
        super().__init__()
        parts = {
            "q": heads.num_heads * heads.dim,
            "k": heads.num_kv_heads * heads.dim,
            "v": heads.num_kv_heads * heads.dim,
        }
        self.qkv_proj = Linear(
            hidden_size,
            heads.total * heads.dim,
            bias=bias,
            parts=parts,
            split="column",
            init_std=init_std,
            head_dim=heads.dim,
        )
        self.o_proj = Linear(heads.num_heads * heads.dim, hidden_size, bias=bias, split="row", init_std=init_std)

    def forward(self, x_TD: paddle.Tensor, context: AttentionContext, layer: int) -> paddle.Tensor:
        """[T, D] -> [T, D]."""
        return self.o_proj(self.core(self.qkv_proj(x_TD), context, layer))

    def core(self, qkv: paddle.Tensor, context: AttentionContext, layer: int) -> paddle.Tensor:
        """Attention between the projections: [T, (H+2G)*d] -> [T, H*d]."""
        return context.attend(qkv, layer)
