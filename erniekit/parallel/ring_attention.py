"""Ring attention: context ranks pass keys and values around a ring, so that every rank's queries attend to those of all
ranks (Liu et al. 2023, arXiv 2310.01889), one block at a time. No rank ever has the keys of more than two ranks.

In the forward pass the keys and values of rank s are sent to s + 1, ..., s + C - 1. In the backward pass they take the
same way again, followed by their gradients, to which each rank adds its part and which return to s at the end. Only
tokens that another rank attends to are sent (parallel/context.py), so documents within one rank cost nothing.

Legend: C context ranks, t tokens of this rank, H heads, G key-value heads, d head size, m sent tokens of a rank.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle.autograd import PyLayer

from erniekit.nn.attention import HeadLayout
from erniekit.nn.attention_tiles import Queries
from erniekit.nn.cpu_ops import memory_of
from erniekit.nn.rotary import Rotation
from erniekit.parallel import comm
from erniekit.parallel.context import RingPlan, Tile
from erniekit.parallel.process_group import Group


@dataclass(frozen=True)
class RingAttention:
    """Attention of the tokens that this rank has of a batch (nn.attention.AttentionContext). `rotation`: of these
    tokens, and of the padding behind them, which sees nothing and is seen by nobody.
    """

    plan: RingPlan
    rotation: Rotation
    heads: HeadLayout
    group: Group

    def attend(self, qkv: paddle.Tensor, layer: int) -> paddle.Tensor:
        """qkv [t, (H+2G)*d] before rotation -> context [t, H*d]. All ranks of the group call it together."""
        assert qkv.dtype == paddle.float32 and qkv.place.is_cpu_place(), "config checks refuse other devices and dtypes"
        return _RingAttention.apply(qkv, self)


class _RingAttention(PyLayer):
    @staticmethod
    def forward(ctx: Any, qkv: paddle.Tensor, ring: RingAttention) -> paddle.Tensor:
        heads, num_tokens = ring.heads, qkv.shape[0]
        q, kv = _by_head(ring.rotation.apply(qkv.reshape([num_tokens, heads.total, heads.dim])), heads)
        out, lse = paddle.zeros_like(q), np.full(q.shape[:2], -np.inf, np.float32)
        queries = _queries(q, out, lse, heads)
        for source, block in _blocks_of_all_ranks(kv, ring):
            keys = memory_of(block)
            for tile in ring.plan.tiles[source]:
                queries.attend(*_keys_of(keys, tile), _rows_of(tile), tile.causal)
        ctx.ring, ctx.q, ctx.kv, ctx.out, ctx.lse = ring, q, kv, out, lse
        return _by_token(out, num_tokens, heads)

    @staticmethod
    def backward(ctx: Any, dout: paddle.Tensor) -> paddle.Tensor:
        ring, num_tokens = ctx.ring, dout.shape[0]
        saved = ctx.q, ctx.kv, ctx.out, ctx.lse
        ctx.ring = ctx.q = ctx.kv = ctx.out = ctx.lse = None
        do, _ = _by_head(dout.reshape([num_tokens, ring.heads.num_heads, ring.heads.dim]), ring.heads)
        dz = _joined(*_gradients(ring, do, *saved), num_tokens, ring.heads)
        del do, saved
        return ring.rotation.apply(dz, inverse=True).reshape([num_tokens, ring.heads.total * ring.heads.dim])


def _gradients(
    ring: RingAttention, do: paddle.Tensor, q: paddle.Tensor, kv: paddle.Tensor, out: paddle.Tensor, lse: np.ndarray
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """The gradients of this rank's rotated queries [G, t * r, d] and of its keys and values [2, G, t, d]."""
    heads, group, sent = ring.heads, ring.group, ring.plan.sent
    dq, dkv_own = paddle.zeros_like(q), paddle.zeros_like(kv)
    queries, of_queries = _queries(q, out, lse, heads), memory_of(dq)
    upstream = memory_of(do)
    delta = np.einsum("gtd,gtd->gt", upstream, memory_of(out))
    for source, block in _blocks_of_all_ranks(kv, ring):
        is_own, keys = source == group.index, memory_of(block)
        dkv = dkv_own if is_own else paddle.zeros_like(block)
        grads = memory_of(dkv)
        for tile in ring.plan.tiles[source]:
            pair, of_pair = _keys_of(keys, tile), _keys_of(grads, tile)
            queries.backward(*pair, _rows_of(tile), tile.causal, upstream, delta, of_queries, *of_pair)
        if is_own:
            continue
        if source != (group.index - 1) % group.size:  # the source's next rank is the first to have a gradient
            dkv = dkv.add_(comm.receive_from_previous(dkv.shape, group))
        comm.send_to_next(dkv, group)
    sent_rows = sent[group.index]
    if group.size > 1 and len(sent_rows):
        added = comm.receive_from_previous([2, heads.num_kv_heads, len(sent_rows), heads.dim], group)
        memory_of(dkv_own)[:, :, sent_rows] += memory_of(added)
    return dq, dkv_own


def _blocks_of_all_ranks(kv: paddle.Tensor, ring: RingAttention) -> Any:
    """Yields (source, keys and values [2, G, m, d]) of every rank, this one's first, with all of its tokens."""
    group, sent = ring.group, ring.plan.sent
    block = kv
    for step in range(group.size):
        source = (group.index - step) % group.size
        if step:
            block = comm.receive_from_previous([2, ring.heads.num_kv_heads, len(sent[source]), ring.heads.dim], group)
        if step < group.size - 1:
            # Passed on before it is used, so that the next rank does not wait for this one's products.
            comm.send_to_next(block if step else _sent_rows(kv, sent[source]), group)
        yield source, block


def _sent_rows(kv: paddle.Tensor, rows: np.ndarray) -> paddle.Tensor:
    """This rank's keys and values that are sent [2, G, m, d]."""
    return kv if len(rows) == kv.shape[2] else paddle.to_tensor(memory_of(kv)[:, :, rows])


def _rows_of(tile: Tile) -> slice:
    return slice(tile.query, tile.query + tile.queries)


def _keys_of(block: np.ndarray, tile: Tile) -> tuple[np.ndarray, np.ndarray]:
    span = slice(tile.key, tile.key + tile.keys)
    return block[0, :, span], block[1, :, span]


def _queries(q: paddle.Tensor, out: paddle.Tensor, lse: np.ndarray, heads: HeadLayout) -> Queries:
    return Queries(memory_of(q), memory_of(out), lse, heads.repeat, heads.dim**-0.5)


def _by_head(z: paddle.Tensor, heads: HeadLayout) -> tuple[paddle.Tensor, paddle.Tensor]:
    """[t, H (+ 2G), d] -> queries [G, t * r, d], and keys and values [2, G, t, d] if there are any."""
    tokens, total, dim = z.shape
    g, z = heads.num_kv_heads, z.contiguous()
    memory = memory_of(z)
    q = paddle.empty([g, tokens * heads.repeat, dim], dtype="float32")
    memory_of(q).reshape(g, tokens, heads.repeat, dim)[:] = (
        memory[:, : heads.num_heads].reshape(tokens, g, heads.repeat, dim).transpose(1, 0, 2, 3)
    )
    kv = paddle.empty([2 if total > heads.num_heads else 0, g, tokens, dim], dtype="float32")
    if total > heads.num_heads:
        memory_of(kv)[:] = memory[:, heads.num_heads :].reshape(tokens, 2, g, dim).transpose(1, 2, 0, 3)
    return q, kv


def _by_token(out: paddle.Tensor, num_tokens: int, heads: HeadLayout) -> paddle.Tensor:
    """[G, t * r, d] -> [t, H * d]."""
    result = paddle.empty([num_tokens, heads.num_heads * heads.dim], dtype="float32")
    by_head = memory_of(out).reshape(heads.num_kv_heads, num_tokens, heads.repeat, heads.dim).transpose(1, 0, 2, 3)
    memory_of(result).reshape(by_head.shape)[:] = by_head
    return result


def _joined(dq: paddle.Tensor, dkv: paddle.Tensor, num_tokens: int, heads: HeadLayout) -> paddle.Tensor:
    """The adjoint of `_by_head`: [t, H + 2G, d]."""
    g, r, dim = heads.num_kv_heads, heads.repeat, heads.dim
    dz = paddle.empty([num_tokens, heads.total, dim], dtype="float32")
    memory = memory_of(dz)
    memory[:, : heads.num_heads] = (
        memory_of(dq).reshape(g, num_tokens, r, dim).transpose(1, 0, 2, 3).reshape(num_tokens, -1, dim)
    )
    memory[:, heads.num_heads :] = memory_of(dkv).transpose(2, 0, 1, 3).reshape(num_tokens, -1, dim)
    return dz
