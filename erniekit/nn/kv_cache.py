"""Keys and values kept between generation steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import nn

from erniekit.nn.attention import MASK_VALUE, HeadLayout
from erniekit.nn.rotary import Rotary

_QUERY_BLOCK = 256  # query positions whose scores are alive at once


@dataclass(frozen=True)
class _Block:
    """Query positions [start, stop) of a step. Keys below `seen` are visible to all of them, keys from `stop_key` on to
    none; in between, `mask` [1 or B, 1, (stop - start) * repeat, stop_key - seen] is 0 where the key is visible and
    MASK_VALUE elsewhere (None: nothing is in between).
    """

    start: int
    stop: int
    seen: int
    stop_key: int
    mask: paddle.Tensor | None


class KVCache:
    """Cached attention for B conversations that grow together: `begin_step`, then `attend` in each layer, then
    `end_step`. `heads` are those of this process: where tensor ranks share a model, each caches its own.

    Rows may differ in length: a step brings n tokens to each row, right-padded, of which `num_new[b]` are real. What
    padding wrote is hidden from every real query and overwritten by the row's next token. `lengths` int64 [B] counts
    each row's real tokens. `next_position` int64 [B] is the position of a row's next token of text: 1 + the largest
    position so far, on any axis. The tokens of an image share positions, so it is not always the length.
    """

    def __init__(
        self, num_layers: int, batch_size: int, heads: HeadLayout, rotary: Rotary, capacity: int = 128
    ) -> None:
        self.heads = heads
        self.rotary = rotary
        self.capacity = capacity
        self.lengths = np.zeros(batch_size, dtype=np.int64)
        # The next position after each cached token; entries beyond a row's length are unused.
        self._next_positions = np.zeros((batch_size, capacity), dtype=np.int64)
        # One flat [B * G * capacity, d] buffer a layer, so that a step scatters its rows in place instead of copying
        # the cache. Made by a layer's first step, in the type of its keys.
        self.keys: list[paddle.Tensor | None] = [None] * num_layers
        self.values: list[paddle.Tensor | None] = [None] * num_layers

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def next_position(self) -> np.ndarray:
        """See the class."""
        last = np.take_along_axis(self._next_positions, np.maximum(self.lengths - 1, 0)[:, None], axis=1)[:, 0]
        return np.where(self.lengths > 0, last, 0)

    def begin_step(self, num_tokens: int, positions: np.ndarray | None = None) -> None:
        """Make room for, and compute the rotations and masks of, `num_tokens` tokens a row.

        positions: of these tokens, integers [B, n] or (time, height, width) [B, n, 3]; by default they are text and
        count on from `next_position`.
        """
        needed = int(self.lengths.max()) + num_tokens
        if needed > self.capacity:
            # A quarter more than needed: a step then rarely copies the cache, and little of what attention reads is
            # empty.
            self._resize(np.arange(self.batch_size), (needed + needed // 4 + 63) // 64 * 64)
        heads, batch = self.heads, self.batch_size
        places = self.lengths[:, None] + np.arange(num_tokens)  # [B, n]
        first = self.next_position
        if positions is None:
            positions = first[:, None] + np.arange(num_tokens)
        largest = positions if positions.ndim == 2 else positions.max(axis=-1)
        following = np.maximum(np.maximum.accumulate(largest, axis=1) + 1, first[:, None])
        np.put_along_axis(self._next_positions, places, following, axis=1)
        self._rotation = self.rotary.at(
            positions.reshape(batch * num_tokens, *positions.shape[2:]),
            heads.num_heads + heads.num_kv_heads,
            heads.num_kv_heads,
            row=num_tokens,
        )
        rows = np.arange(batch * heads.num_kv_heads)[:, None] * self.capacity
        self._slots = paddle.to_tensor((rows + np.repeat(places, heads.num_kv_heads, axis=0)).reshape(-1))
        self._num_tokens = num_tokens
        self._blocks = [
            self._block(start, min(start + _QUERY_BLOCK, num_tokens)) for start in range(0, num_tokens, _QUERY_BLOCK)
        ]

    def end_step(self, num_new: Sequence[int] | np.ndarray) -> None:
        """Advance each row by its number of real tokens [B]."""
        self.lengths = self.lengths + np.asarray(num_new, dtype=np.int64)

    def attend(self, qkv: paddle.Tensor, layer: int) -> paddle.Tensor:
        """qkv [B*n, (H+2G)*d] of the step's tokens -> context [B*n, H*d] over all cached tokens and the step's own up
        to each query. Further tokens behind them, which fill up what tensor ranks share, get a context of zeros.
        """
        heads, batch, n = self.heads, self.batch_size, self._num_tokens
        g, r, d = heads.num_kv_heads, heads.repeat, heads.dim
        num_filling = qkv.shape[0] - batch * n
        qkv = qkv[: batch * n] if num_filling else qkv
        z = self._rotation.apply(qkv.reshape([batch * n, heads.total, d]))
        q, k, v = z.split([heads.num_heads, g, g], axis=1)
        all_keys, all_values = self._store(self.keys, layer, k), self._store(self.values, layer, v)
        # Folding a kv head's queries into the row axis lets one product serve them all.
        q = q.reshape([batch, n, g, r, d]).transpose([0, 2, 1, 3, 4]).reshape([batch, g, n * r, d]) * d**-0.5
        parts = [self._attend_block(q, all_keys, all_values, block) for block in self._blocks]
        out = parts[0] if len(parts) == 1 else paddle.concat(parts, axis=2)
        out = out.reshape([batch, g, n, r, d]).transpose([0, 2, 1, 3, 4])
        out = out.reshape([batch * n, heads.num_heads * d])
        if num_filling:
            out = paddle.concat([out, paddle.zeros([num_filling, out.shape[1]], dtype=out.dtype)])
        return out

    def truncate(self, length: int) -> None:
        """Forget every row's tokens but its first `length`."""
        self.lengths = np.minimum(self.lengths, length)

    def keep(self, rows: Sequence[int] | np.ndarray) -> None:
        """Keep these rows, in this order; the others leave the cache."""
        self._resize(np.asarray(rows, dtype=np.int64), self.capacity)
        self.lengths = self.lengths[rows]

    def copy(self, rows: Sequence[int]) -> "KVCache":
        """A cache of its own with these rows, in this order."""
        copied = KVCache(len(self.keys), self.batch_size, self.heads, self.rotary, self.capacity)
        copied.lengths, copied._next_positions = self.lengths, self._next_positions
        copied.keys, copied.values = list(self.keys), list(self.values)
        copied.keep(rows)  # which copies
        return copied

    @classmethod
    def joined(cls, caches: "Sequence[KVCache]") -> "KVCache":
        """The rows of several caches of one model in one cache, in their order. The caches may be changed by it."""
        first, capacity = caches[0], max(cache.capacity for cache in caches)
        for cache in caches:
            if cache.capacity < capacity:
                cache._resize(np.arange(cache.batch_size), capacity)
        whole = cls(len(first.keys), sum(cache.batch_size for cache in caches), first.heads, first.rotary, capacity)
        whole.lengths = np.concatenate([cache.lengths for cache in caches])
        whole._next_positions = np.concatenate([cache._next_positions for cache in caches])
        whole.keys = [cls._stacked(caches, [cache.keys[layer] for cache in caches]) for layer in range(len(first.keys))]
        whole.values = [
            cls._stacked(caches, [cache.values[layer] for cache in caches]) for layer in range(len(first.keys))
        ]
        return whole

    @staticmethod
    def _stacked(caches: "Sequence[KVCache]", parts: Sequence[paddle.Tensor | None]) -> paddle.Tensor | None:
        """One layer's buffers of caches of equal capacity, behind one another; a cache that has none has no tokens."""
        present = [part for part in parts if part is not None]
        if not present:
            return None
        width, dtype = present[0].shape[1], present[0].dtype
        sizes = [cache.batch_size * cache.heads.num_kv_heads * cache.capacity for cache in caches]
        filled = [
            paddle.zeros([size, width], dtype=dtype) if part is None else part
            for part, size in zip(parts, sizes, strict=True)
        ]
        return paddle.concat(filled)

    def _block(self, start: int, stop: int) -> _Block:
        same = bool((self.lengths == self.lengths[0]).all())
        lengths = self.lengths[:1] if same else self.lengths
        seen, stop_key = int(lengths.min()) + start + 1, int(lengths.max()) + stop
        if seen == stop_key:
            return _Block(start, stop, seen, stop_key, None)
        visible = np.arange(seen, stop_key) <= (lengths[:, None] + np.arange(start, stop))[:, :, None]
        mask = np.where(visible, np.float32(0), np.float32(MASK_VALUE)).repeat(self.heads.repeat, axis=1)
        return _Block(start, stop, seen, stop_key, paddle.to_tensor(mask[:, None]))

    def _attend_block(
        self, q: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, block: _Block
    ) -> paddle.Tensor:
        """q [B, G, n*r, d], keys and values [B, G, capacity, d] -> [B, G, (stop-start)*r, d]."""
        repeat = self.heads.repeat
        q = q[:, :, block.start * repeat : block.stop * repeat]
        scores = paddle.matmul(q, keys[:, :, : block.stop_key], transpose_y=True).astype("float32")
        if block.mask is not None:
            mask = paddle.concat([paddle.zeros([*block.mask.shape[:3], block.seen]), block.mask], axis=-1)
            scores = scores + mask
        weights = nn.functional.softmax(scores, axis=-1).astype(q.dtype)
        return paddle.matmul(weights, values[:, :, : block.stop_key])

    def _store(self, buffers: list[paddle.Tensor | None], layer: int, x: paddle.Tensor) -> paddle.Tensor:
        """Write x [B*n, G, d] at the step's slots, in place -> the layer's buffer as [B, G, capacity, d]."""
        batch, g, d = self.batch_size, self.heads.num_kv_heads, self.heads.dim
        buffer = buffers[layer]
        if buffer is None:
            buffer = buffers[layer] = paddle.zeros([batch * g * self.capacity, d], dtype=x.dtype)
        rows = x.reshape([batch, self._num_tokens, g, d]).transpose([0, 2, 1, 3]).reshape([-1, d])
        paddle.scatter_(buffer, self._slots, rows, overwrite=True)
        return buffer.reshape([batch, g, self.capacity, d])

    def _resize(self, rows: np.ndarray, capacity: int) -> None:
        """Copy these rows' tokens into buffers of another capacity."""
        batch, g, d = self.batch_size, self.heads.num_kv_heads, self.heads.dim
        used = max(1, int(self.lengths[rows].max()))
        index = paddle.to_tensor(rows)
        kept_positions = self._next_positions[rows, :used]
        self._next_positions = np.pad(kept_positions, ((0, 0), (0, capacity - used)))
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                if old is None:
                    continue
                kept = paddle.gather(old.reshape([batch, g, self.capacity, d])[:, :, :used], index)
                rest = paddle.zeros([len(rows), g, capacity - used, d], dtype=old.dtype)
                buffers[layer] = paddle.concat([kept, rest], axis=2).reshape([-1, d])
        self.capacity = capacity
