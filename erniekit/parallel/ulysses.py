"""Attention whose context ranks exchange heads for tokens (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv 2309.14509).

Before attention an all-to-all gives each of C ranks all tokens of 1 / C of the heads, and another one afterwards gives
it all heads of its own tokens again. In between is the attention of a single process. Legend: T tokens of the batch, t
of this rank, H heads, G key-value heads, d head size.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import paddle

from erniekit.nn.attention import HeadLayout, PackedAttention
from erniekit.nn.narrow import concat
from erniekit.nn.permute import permute
from erniekit.parallel import comm
from erniekit.parallel.context import ContextShard


@dataclass(frozen=True)
class UlyssesAttention:
    """Attention of the tokens that this rank has of a batch (nn.attention.AttentionContext). `heads`: all heads of this
    rank outside attention; `packed`: attention of all T tokens with 1 / C of these.
    """

    shard: ContextShard
    heads: HeadLayout
    packed: PackedAttention

    @cached_property
    def _order(self) -> np.ndarray:
        """The numbers of the tokens as they arrive, rank by rank [T]."""
        return np.concatenate(self.shard.by_rank)

    def attend(self, qkv: paddle.Tensor, layer: int) -> paddle.Tensor:
        """qkv [t, (H+2G)*d] before rotation -> context [t, H*d]. All ranks of the group call it together."""
        shard, heads, dim = self.shard, self.heads, self.heads.dim
        num_ranks, num_rows, num_tokens = shard.group.size, qkv.shape[0], len(shard.tokens)
        if not sum(shard.row_lengths):  # the batch of a rank whose data have ended: padding alone
            return qkv[:, : heads.num_heads * dim] * 0.0
        own, everyone = [num_tokens] * num_ranks, [len(tokens) for tokens in shard.by_rank]
        real = qkv if num_rows == num_tokens else qkv[:num_tokens]
        q, k, v = (
            part.reshape([num_tokens, num_ranks, count // num_ranks * dim])
            for part, count in zip(
                real.split([n * dim for n in (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)], axis=1),
                (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads),
                strict=True,
            )
        )
        by_rank = concat([q, k, v], axis=2).transpose([1, 0, 2]).reshape([num_ranks * num_tokens, -1])
        arrived = permute(comm.exchange_rows(by_rank, own, everyone, shard.group), np.argsort(self._order))
        out = permute(self.packed.attend(arrived, layer), self._order)
        back = comm.exchange_rows(out, everyone, own, shard.group).reshape([num_ranks, num_tokens, -1])
        result = back.transpose([1, 0, 2]).reshape([num_tokens, heads.num_heads * dim])
        if num_rows == num_tokens:
            return result
        return concat([result, paddle.zeros([num_rows - num_tokens, result.shape[1]], dtype=result.dtype)], axis=0)
