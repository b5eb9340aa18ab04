"""Keys and values kept between generation steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import paddle
from paddle import nn

from erniekit.nn import token_attention
from erniekit.nn.attention import MASK_VALUE, HeadLayout
from erniekit.nn.rotary import Rotary, Rotation
from erniekit.nn.token_attention import Slots, TokenAttention

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


@dataclass(frozen=True)
class NoteShape:
    """What layers note of each token: `width` numbers of a type in each of `columns` columns."""

    columns: int
    width: int
    dtype: type[np.unsignedinteger]


class KVCache:
    """Cached attention for B conversations that grow together: `begin_step`, then `attend` in each layer, then
    `end_step`. `heads` are those of this process: where tensor ranks share a model, each caches its own.

    Rows may differ in length: a step brings n tokens to each row, right-padded, of which `num_new[b]` are real. What
    padding wrote is hidden from every real query and overwritten by the row's next token. `lengths` int64 [B] counts
    each row's real tokens. `next_position` int64 [B] is the position of a row's next token of text: 1 + the largest
    position so far, on any axis. The tokens of an image share positions, so it is not always the length.

    Each layer has room for the `capacity` tokens of `num_places` rows, B of which are in use. Rows that join or leave
    are copied, the others stay where they are, until there is no room.

    With `notes`, numbers that layers have for each token are kept beside its keys and values, on the host.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        heads: HeadLayout,
        rotary: Rotary,
        capacity: int = 128,
        notes: NoteShape | None = None,
    ) -> None:
        self.heads = heads
        self.rotary = rotary
        self.capacity = capacity
        self.num_places = batch_size
        self.lengths = np.zeros(batch_size, dtype=np.int64)
        # The next position after each cached token; entries beyond a row's length are unused.
        self._next_positions = np.zeros((batch_size, capacity), dtype=np.int64)
        self._note_shape, self._notes = notes, _no_notes(notes, batch_size, capacity)
        # One flat [num_places * G * capacity, d] buffer a layer, so that a step scatters its rows in place instead of
        # copying the cache. Made by a layer's first step, in the type of its keys.
        self.keys: list[paddle.Tensor | None] = [None] * num_layers
        self.values: list[paddle.Tensor | None] = [None] * num_layers
        self._slots: dict[int, Slots] = {}  # the memory of the same by layer, where token_attention computes
        self._step: _Step | None = None

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def next_position(self) -> np.ndarray:
        """See the class."""
        last = self._next_positions[np.arange(self.batch_size), np.maximum(self.lengths - 1, 0)]
        return np.where(self.lengths > 0, last, 0)

    def begin_step(self, num_tokens: int, positions: np.ndarray | None = None) -> None:
        """Make room for `num_tokens` tokens a row, and what all layers need to know about them.

        positions: of these tokens, integers [B, n] or (time, height, width) [B, n, 3]; by default they are text and
        count on from `next_position`.
        """
        needed = int(self.lengths.max()) + num_tokens
        if needed > self.capacity:
            self._resize(self.num_places, _capacity_for(needed))
        places = self.lengths[:, None] + np.arange(num_tokens)  # [B, n]
        first = self.next_position
        if positions is None:
            positions = first[:, None] + np.arange(num_tokens)
        largest = positions if positions.ndim == 2 else positions.max(axis=-1)
        following = np.maximum(np.maximum.accumulate(largest, axis=1) + 1, first[:, None])
        self._next_positions[np.arange(self.batch_size)[:, None], places] = following
        self._step = _Step(self.heads, self.rotary, self.capacity, places, positions)

    @property
    def has_notes(self) -> bool:
        """Whether layers may note numbers."""
        return self._notes is not None

    def note(self, column: int, values_NW: np.ndarray, tokens: np.ndarray | None = None) -> None:
        """Note numbers in a column for the step's tokens with these numbers in [0, B*n) (None: for all)."""
        assert self._step is not None and self._notes is not None, "begin_step comes first, in a cache with notes"
        places = self._step.places
        numbers = np.arange(places.size) if tokens is None else tokens
        self._notes[numbers // places.shape[1], places.reshape(-1)[numbers], column] = values_NW

    def notes_of(self, row: int) -> np.ndarray:
        """A copy of what was noted of a row's tokens [length, columns, width]."""
        assert self._notes is not None, "a cache with notes"
        return self._notes[row, : self.lengths[row]].copy()

    def end_step(self, num_new: Sequence[int] | np.ndarray) -> None:
        """Advance each row by its number of real tokens [B]."""
        self.lengths = self.lengths + np.asarray(num_new, dtype=np.int64)
        self._step = None

    def attend(self, qkv: paddle.Tensor, layer: int) -> paddle.Tensor:
        """qkv [B*n, (H+2G)*d] of the step's tokens -> context [B*n, H*d] over all cached tokens and the step's own up
        to each query. Further tokens behind them, which fill up what tensor ranks share, get a context of zeros.
        """
        step = self._step
        assert step is not None, "begin_step comes first"
        keys, values = self._made(self.keys, layer, qkv.dtype), self._made(self.values, layer, qkv.dtype)
        if step.num_tokens == 1 and token_attention.applies(qkv):
            slots = self._slots.get(layer)
            if slots is None:
                slots = self._slots[layer] = Slots(keys, values, self.heads, self.capacity)
            return step.of_token.attend(qkv, slots)
        count = self.batch_size * step.num_tokens
        out = self._attend(step, qkv[:count] if qkv.shape[0] > count else qkv, keys, values)
        if qkv.shape[0] > count:
            out = paddle.concat([out, paddle.zeros([qkv.shape[0] - count, out.shape[1]], dtype=out.dtype)])
        return out

    def _attend(self, step: "_Step", qkv: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor) -> paddle.Tensor:
        heads, batch, n = self.heads, self.batch_size, step.num_tokens
        g, r, d = heads.num_kv_heads, heads.repeat, heads.dim
        z = step.rotation.apply(qkv.reshape([batch * n, heads.total, d]))
        q, k, v = z.split([heads.num_heads, g, g], axis=1)
        all_keys, all_values = self._store(step, keys, k), self._store(step, values, v)
        # Folding a kv head's queries into the row axis lets one product serve them all.
        q = q.reshape([batch, n, g, r, d]).transpose([0, 2, 1, 3, 4]).reshape([batch, g, n * r, d]) * d**-0.5
        parts = [_attend_block(q, all_keys, all_values, block, r) for block in step.blocks]
        out = parts[0] if len(parts) == 1 else paddle.concat(parts, axis=2)
        out = out.reshape([batch, g, n, r, d]).transpose([0, 2, 1, 3, 4])
        return out.reshape([batch * n, heads.num_heads * d])

    def truncate(self, length: int) -> None:
        """Forget every row's tokens but its first `length`."""
        self.lengths = np.minimum(self.lengths, length)

    def keep(self, rows: Sequence[int] | np.ndarray) -> None:
        """Keep these rows, in this order; the others leave the cache. Only rows that change their place are copied."""
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) > self.num_places:
            self._resize(len(rows), self.capacity)
        moved = np.flatnonzero(rows != np.arange(len(rows)))
        self._put(moved, self, rows[moved])
        self.lengths = self.lengths[rows]

    def add_rows(self, other: "KVCache", most: int | None = None) -> None:
        """Take the rows of another cache of the same model behind this one's. The other may be changed by it.

        most: rows for which room is made at once, where there is none; by default for those that there are.
        """
        batch, count = self.batch_size, other.batch_size
        capacity, needed = max(self.capacity, other.capacity), batch + count
        num_places = self.num_places
        if needed > num_places:
            num_places = needed if most is None else max(needed, min(most, 2 * needed))
        if (num_places, capacity) != (self.num_places, self.capacity):
            self._resize(num_places, capacity)
        if other.capacity < capacity:
            other._resize(other.num_places, capacity)
        self._put(np.arange(batch, needed), other, np.arange(count))
        self.lengths = np.concatenate([self.lengths, other.lengths])

    def copy(self, rows: Sequence[int]) -> "KVCache":
        """A cache of its own with these rows, in this order, and no more room than they need."""
        used = max(1, int(self.lengths[rows].max()))
        copied = KVCache(len(self.keys), len(rows), self.heads, self.rotary, used, self._note_shape)
        copied.lengths, copied._next_positions = self.lengths[rows], self._next_positions[rows, :used]
        copied._notes = None if self._notes is None else self._notes[rows, :used]
        index, (places, *shape) = paddle.to_tensor(np.asarray(rows, np.int64)), self._shape
        for target, source in ((copied.keys, self.keys), (copied.values, self.values)):
            for layer, old in enumerate(source):
                if old is not None:
                    kept = paddle.gather(old.reshape([places, -1]), index).reshape([-1, *shape])
                    target[layer] = kept[:, :, :used].reshape([-1, shape[-1]])
        return copied

    def begin_with(self, beginnings: "Sequence[tuple[KVCache, int] | None]", room: int) -> None:
        """Fill a cache that is still empty: row i begins with the first tokens of the first row of another cache of the
        model, `beginnings[i]` = (the cache, how many); None: with none. `room`: tokens that it is made for.
        """
        distinct = list(dict.fromkeys(beginnings))
        sources = [each for each in distinct if each is not None]
        used = max(count for _, count in sources)
        self.capacity = max(self.capacity, _capacity_for(max(used, room)))
        self.lengths = np.array([0 if each is None else each[1] for each in beginnings], dtype=np.int64)
        self._begin_host_arrays(beginnings)
        # Most rows begin alike, with what the chat template puts before a question.
        order = None if len(distinct) == self.num_places else paddle.to_tensor([*map(distinct.index, beginnings)])
        for layer in range(len(self.keys)):
            if sources[0][0].keys[layer] is not None:
                self.keys[layer] = self._begun([each and (each[0].keys[layer], *each) for each in distinct], order)
                self.values[layer] = self._begun([each and (each[0].values[layer], *each) for each in distinct], order)

    def _begin_host_arrays(self, beginnings: "Sequence[tuple[KVCache, int] | None]") -> None:
        """Positions and notes of the tokens that rows begin with."""
        self._next_positions = np.zeros((self.num_places, self.capacity), dtype=np.int64)
        self._notes = _no_notes(self._note_shape, self.num_places, self.capacity)
        for row, each in enumerate(beginnings):
            if each is None:
                continue
            source, count = each
            self._next_positions[row, :count] = source._next_positions[0, :count]
            if self._notes is not None and source._notes is not None:
                self._notes[row, :count] = source._notes[0, :count]

    def _begun(self, parts: Sequence[Any], order: paddle.Tensor | None) -> paddle.Tensor:
        """A layer's buffer that begins with (another cache's buffer, the cache, how many tokens) or with nothing."""
        used, (_, g, _, d) = int(self.lengths.max()), self._shape
        dtype = next(part[0].dtype for part in parts if part is not None)
        rows = []
        for part in parts:
            count = 0 if part is None else part[2]
            pieces = [] if part is None else [part[0].reshape(part[1]._shape)[:1, :, :count]]
            if count < used:
                pieces.append(paddle.zeros([1, g, used - count, d], dtype=dtype))
            rows.append(pieces[0] if len(pieces) == 1 else paddle.concat(pieces, axis=2))
        whole = rows[0] if len(rows) == 1 else paddle.concat(rows)
        if order is not None:
            whole = paddle.gather(whole, order)
        rest = paddle.zeros([self.num_places, g, self.capacity - used, d], dtype=dtype)
        return paddle.concat([whole, rest], axis=2).reshape([-1, d])

    @property
    def _shape(self) -> list[int]:
        """The shape of a layer's buffer."""
        return [self.num_places, self.heads.num_kv_heads, self.capacity, self.heads.dim]

    def _made(self, buffers: list[paddle.Tensor | None], layer: int, dtype: paddle.dtype) -> paddle.Tensor:
        """A layer's buffer."""
        buffer = buffers[layer]
        if buffer is None:
            places, g, capacity, d = self._shape
            buffer = buffers[layer] = paddle.zeros([places * g * capacity, d], dtype=dtype)
        return buffer

    def _store(self, step: "_Step", buffer: paddle.Tensor, x: paddle.Tensor) -> paddle.Tensor:
        """Write x [B*n, G, d] at the step's slots, in place -> the buffer of the B rows as [B, G, capacity, d]."""
        batch, g, d = self.batch_size, self.heads.num_kv_heads, self.heads.dim
        rows = x.reshape([batch, step.num_tokens, g, d]).transpose([0, 2, 1, 3]).reshape([-1, d])
        paddle.scatter_(buffer, step.slots, rows, overwrite=True)
        return buffer.reshape(self._shape)[:batch]

    def _put(self, places: np.ndarray, source: "KVCache", rows: np.ndarray) -> None:
        """Copy rows of a cache of the same capacity, maybe this one, to these places."""
        if not len(places):
            return
        self._next_positions[places] = source._next_positions[rows]
        if self._notes is not None and source._notes is not None:
            self._notes[places] = source._notes[rows]
        to, index, width = paddle.to_tensor(places), paddle.to_tensor(rows), int(np.prod(self._shape[1:]))
        for buffers, others in ((self.keys, source.keys), (self.values, source.values)):
            for layer, other in enumerate(others):
                if other is not None:
                    buffer = self._made(buffers, layer, other.dtype).reshape([-1, width])
                    moved = paddle.gather(other.reshape([-1, width]), index)
                    buffers[layer] = paddle.scatter_(buffer, to, moved, overwrite=True).reshape([-1, self.heads.dim])
        self._slots = {}

    def _resize(self, num_places: int, capacity: int) -> None:
        """Copy all rows' tokens into buffers of another size."""
        batch, used, (_, g, _, d) = self.batch_size, max(1, int(self.lengths.max(initial=0))), self._shape
        positions = np.zeros((num_places, capacity), dtype=np.int64)
        positions[:batch, :used] = self._next_positions[:batch, :used]
        self._next_positions = positions
        if self._notes is not None:
            notes, self._notes = self._notes, _no_notes(self._note_shape, num_places, capacity)
            assert self._notes is not None
            self._notes[:batch, :used] = notes[:batch, :used]
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                if old is None:
                    continue
                kept = old.reshape(self._shape)[:batch, :, :used]
                rest = paddle.zeros([batch, g, capacity - used, d], dtype=old.dtype)
                parts = [paddle.concat([kept, rest], axis=2).reshape([-1, d])]
                if num_places > batch:
                    parts.append(paddle.zeros([(num_places - batch) * g * capacity, d], dtype=old.dtype))
                buffers[layer] = parts[0] if len(parts) == 1 else paddle.concat(parts)
        self.num_places, self.capacity, self._slots = num_places, capacity, {}


def _capacity_for(needed: int) -> int:
    """A quarter more than is needed: a step then rarely copies the cache, and little of it is empty."""
    return (needed + needed // 4 + 63) // 64 * 64


def _no_notes(shape: NoteShape | None, num_places: int, capacity: int) -> np.ndarray | None:
    return None if shape is None else np.zeros((num_places, capacity, shape.columns, shape.width), shape.dtype)


class _Step:
    """The n tokens that a step brings to each of B rows: where they go, `places` [B, n], and what layers derive from
    that and from their positions, each when it is first needed.
    """

    def __init__(
        self, heads: HeadLayout, rotary: Rotary, capacity: int, places: np.ndarray, positions: np.ndarray
    ) -> None:
        self.heads, self.rotary, self.capacity = heads, rotary, capacity
        self.places, self.positions = places, positions
        self.num_tokens = places.shape[1]

    @cached_property
    def of_token(self) -> TokenAttention:
        """The attention of a step of one token per row."""
        return TokenAttention(self.heads, self.rotary, self.places[:, 0], self.positions[:, 0])

    @cached_property
    def rotation(self) -> Rotation:
        """The rotation of all tokens [B*n]."""
        heads, flat = self.heads, self.positions.reshape(-1, *self.positions.shape[2:])
        return self.rotary.at(flat, heads.num_heads + heads.num_kv_heads, heads.num_kv_heads, row=self.num_tokens)

    @cached_property
    def slots(self) -> paddle.Tensor:
        """The rows of a flat buffer where the tokens of each kv head go [B*G*n]."""
        g = self.heads.num_kv_heads
        rows = np.arange(len(self.places) * g)[:, None] * self.capacity
        return paddle.to_tensor((rows + np.repeat(self.places, g, axis=0)).reshape(-1))

    @cached_property
    def blocks(self) -> list[_Block]:
        """The queries, at most _QUERY_BLOCK in each."""
        n = self.num_tokens
        return [self._block(start, min(start + _QUERY_BLOCK, n)) for start in range(0, n, _QUERY_BLOCK)]

    def _block(self, start: int, stop: int) -> _Block:
        lengths = self.places[:, 0]
        same = bool((lengths == lengths[0]).all())
        lengths = lengths[:1] if same else lengths
        seen, stop_key = int(lengths.min()) + start + 1, int(lengths.max()) + stop
        if seen == stop_key:
            return _Block(start, stop, seen, stop_key, None)
        visible = np.arange(seen, stop_key) <= (lengths[:, None] + np.arange(start, stop))[:, :, None]
        mask = np.where(visible, np.float32(0), np.float32(MASK_VALUE)).repeat(self.heads.repeat, axis=1)
        return _Block(start, stop, seen, stop_key, paddle.to_tensor(mask[:, None]))


def _attend_block(
    q: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, block: _Block, repeat: int
) -> paddle.Tensor:
    """q [B, G, n*r, d], keys and values [B, G, capacity, d] -> [B, G, (stop-start)*r, d]."""
    q = q[:, :, block.start * repeat : block.stop * repeat]
    scores = paddle.matmul(q, keys[:, :, : block.stop_key], transpose_y=True).astype("float32")
    if block.mask is not None:
        mask = paddle.concat([paddle.zeros([*block.mask.shape[:3], block.seen]), block.mask], axis=-1)
        scores = scores + mask
    weights = nn.functional.softmax(scores, axis=-1).astype(q.dtype)
    return paddle.matmul(weights, values[:, :, : block.stop_key])
