"""Attention of one new token in each of B conversations over their cached keys and values, on a CPU.

A decoding step consists of many small operations, and starting them would take most of its time. Here each layer
takes about ten: numpy on the memory of the tensors, which starts in a microsecond and needs no second thread, and two
calls of MKL for the products of all rows and heads, each over its row's own length.

Legend: B rows, H query heads over G key/value heads of d numbers, r = H / G.
"""

import numpy as np
import paddle

from erniekit.nn import decoding, mkl
from erniekit.nn.attention import MASK_VALUE, HeadLayout
from erniekit.nn.rotary import Rotary


def applies(qkv: paddle.Tensor) -> bool:
    """Whether this module computes with a projection."""
    return (
        qkv.dtype == paddle.float32
        and qkv.place.is_cpu_place()
        and decoding.is_running()
        and qkv.is_contiguous()
        and mkl.is_available()
    )


class Slots:
    """The memory of one layer's keys and values, flat tensors [S * G * capacity, d] of fp32. Row b of a batch has place
    b of the S.
    """

    def __init__(self, keys: paddle.Tensor, values: paddle.Tensor, heads: HeadLayout, capacity: int) -> None:
        shape = (-1, heads.num_kv_heads, capacity, heads.dim)
        self.values = np.from_dlpack(values).reshape(shape)
        self.key_pairs = np.from_dlpack(keys).reshape(shape).view(np.complex64)
        count, size = len(self.values) * heads.num_kv_heads, capacity * heads.dim
        self.key_places = mkl.addresses(keys.data_ptr(), count, size)
        self.value_places = mkl.addresses(values.data_ptr(), count, size)


class TokenAttention:
    """One step of B rows, used by every layer: `places` [B] is where each row's new token goes, which is also the
    number of tokens before it, and `positions` [B] or [B, 3] are those of its rotation.
    """

    def __init__(self, heads: HeadLayout, rotary: Rotary, places: np.ndarray, positions: np.ndarray) -> None:
        self.heads, self._places, self._rows = heads, places, np.arange(len(places))
        batch, g, r, d = len(places), heads.num_kv_heads, heads.repeat, heads.dim
        self._turn = rotary.table(positions)[:, None]  # [B, 1, d/2]
        self._turn_scaled = self._turn * np.float32(d**-0.5)
        lengths = places + 1
        longest = int(lengths.max())
        self._queries = np.empty((batch, heads.num_heads, d // 2), np.complex64)
        # Zeros, because the products write a row's own length only, and what is behind it is hidden by adding to it.
        self._scores = np.zeros((batch, g * r, longest), np.float32)
        self._hidden = None
        if (lengths != longest).any():
            behind = np.arange(longest) >= lengths[:, None]
            self._hidden = np.where(behind, np.float32(MASK_VALUE), np.float32(0))[:, None]
        count, each = batch * g, np.repeat(lengths, g)
        self._score = mkl.Products(r, each, d, (d, d, longest), transpose_y=True)
        self._mix = mkl.Products(r, d, each, (longest, d, d), transpose_y=False)
        self._query_places = mkl.addresses(mkl.address_of(self._queries), count, r * d)
        self._score_places = mkl.addresses(mkl.address_of(self._scores), count, r * longest)

    def attend(self, qkv: paddle.Tensor, slots: Slots) -> paddle.Tensor:
        """qkv [B + filling, (H+2G)*d] before rotation -> context [B + filling, H*d], zeros for what fills up. Writes
        the keys and values of the new tokens to `slots`.
        """
        heads, batch = self.heads, len(self._rows)
        all_heads = np.from_dlpack(qkv)[:batch].reshape(batch, heads.total, heads.dim)
        pairs, queries = all_heads.view(np.complex64), heads.num_heads
        np.multiply(pairs[:, :queries], self._turn_scaled, out=self._queries)
        keys = pairs[:, queries : queries + heads.num_kv_heads] * self._turn
        slots.key_pairs[self._rows, :, self._places] = keys
        slots.values[self._rows, :, self._places] = all_heads[:, queries + heads.num_kv_heads :]
        scores, count = self._scores, batch * heads.num_kv_heads
        self._score.run(self._query_places, slots.key_places, self._score_places)
        if self._hidden is not None:
            scores += self._hidden
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        make = paddle.empty if len(qkv) == batch else paddle.zeros
        out = make([len(qkv), heads.num_heads * heads.dim], dtype=qkv.dtype)
        self._mix.run(
            self._score_places, slots.value_places, mkl.addresses(out.data_ptr(), count, heads.repeat * heads.dim)
        )
        return out
