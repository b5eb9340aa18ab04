"""Full attention within each image and video frame, over patches that lie one frame behind the other.

Nothing is padded: neighbouring frames of equal size are one batched product. Legend: P patches, H heads, d head size, F
frames, L patches of a frame.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import paddle
from paddle.autograd import PyLayer

from erniekit.nn import blockwise
from erniekit.nn.cpu_ops import add_, multiply, multiply_, softmax_, softmax_backward_, subtract_
from erniekit.nn.narrow import rounded

_QUERIES = 1024  # query patches of a frame whose scores exist at once
_MAX_SCORES = 1 << 26  # scores of one product: neighbouring frames are joined up to this size
_KEEP_WEIGHTS = 1024  # patches of the largest frame whose softmax weights wait for the backward pass


def frame_runs(grid_N3: np.ndarray) -> list[tuple[int, int]]:
    """(number of frames, patches of each) of neighbouring frames of equal size, in order. grid [N, 3]: frames, rows and
    columns of patches of each image and video.
    """
    runs: list[tuple[int, int]] = []
    for frames, height, width in grid_N3.tolist():
        if runs and runs[-1][1] == height * width:
            runs[-1] = (runs[-1][0] + frames, height * width)
        else:
            runs.append((frames, height * width))
    return runs


@dataclass(frozen=True)
class FrameAttention:
    """Attention of a batch of frames: `runs` as in frame_runs; `cos` and `sin` fp32 [P, 1, d/2] of the angles that
    queries and keys are rotated by.

    Inside, the heads of each run lie as its products take them, [F, H, L, d], one run behind the other: [P*H, d]. A
    gather of whole rows brings them there and back, which on a CPU is many times faster than transpositions.
    """

    runs: Sequence[tuple[int, int]]
    cos: paddle.Tensor
    sin: paddle.Tensor
    num_heads: int

    def attend(self, qkv: paddle.Tensor) -> paddle.Tensor:
        """q|k|v [P, 3*H*d] before rotation -> context [P, H*d]."""
        return rounded(lambda wide: _Attention.apply(wide, self), qkv)

    def by_run(self, *tensors: paddle.Tensor) -> Iterator[list[paddle.Tensor]]:
        """The rows of each run of tensors [P*H, d], as [F, H, L, d]. Nothing is copied."""
        start = 0
        for frames, length in self._bounded_runs():
            stop = start + frames * length * self.num_heads
            yield [x[start:stop].reshape([frames, self.num_heads, length, x.shape[-1]]) for x in tensors]
            start = stop

    def _bounded_runs(self) -> Iterator[tuple[int, int]]:
        """The runs, divided where one product of a run would be too large."""
        for frames, length in self.runs:
            largest = max(1, _MAX_SCORES // (self.num_heads * length * min(length, _QUERIES)))
            for first in range(0, frames, largest):
                yield min(largest, frames - first), length

    @cached_property
    def order(self) -> np.ndarray:
        """[P*H]: the number p * H + h of each row in the order of the runs."""
        parts, start = [], 0
        for frames, length in self._bounded_runs():
            patches = start + np.arange(frames * length).reshape(frames, 1, length)
            parts.append((patches * self.num_heads + np.arange(self.num_heads)[:, None]).reshape(-1))
            start += frames * length
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def _fetched(self) -> np.ndarray:
        first = self.order + self.order // self.num_heads * (2 * self.num_heads)
        return np.concatenate([first + part * self.num_heads for part in range(3)])

    @cached_property
    def fetch(self) -> paddle.Tensor:
        """[3*P*H]: for queries, then keys, then values, their rows in q|k|v seen as [P*3*H, d]."""
        return paddle.to_tensor(self._fetched())

    @cached_property
    def fetch_context(self) -> paddle.Tensor:
        """[P*H]: the rows of the context seen as [P*H, d]."""
        return paddle.to_tensor(self.order)

    @cached_property
    def merge_context(self) -> paddle.Tensor:
        """The inverse of `fetch_context`."""
        return paddle.to_tensor(np.argsort(self.order))

    @cached_property
    def merge(self) -> paddle.Tensor:
        """The inverse of `fetch`."""
        return paddle.to_tensor(np.argsort(self._fetched()))

    @cached_property
    def _factors(self) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        """The cosines and sines of the rows [P*H, d] (sines are negative in the first half), and the numbers [2*P*H] of
        the half rows that swap the halves of each row.
        """
        patch = paddle.to_tensor(self.order // self.num_heads)
        tables = [paddle.concat(pair, axis=-1).squeeze(1) for pair in ([self.cos, self.cos], [-self.sin, self.sin])]
        other = np.arange(2 * len(self.order)).reshape(-1, 2)[:, ::-1].reshape(-1)
        cos, sin = (paddle.gather(table, patch) for table in tables)
        return cos, sin, paddle.to_tensor(other)

    def rotate(self, rows: paddle.Tensor, inverse: bool = False) -> paddle.Tensor:
        """Rotate the pairs (x[j], x[j + d/2]) of rows [P*H, d]: here, unlike in the decoder, a pair lies half a head
        apart. In fp32.
        """
        cos, sin, other = self._factors
        x = rows.astype("float32")
        halves = multiply_(paddle.gather(x.reshape([-1, x.shape[1] // 2]), other).reshape(x.shape), sin)
        turned = multiply(x, cos)
        return (subtract_(turned, halves) if inverse else add_(turned, halves)).astype(rows.dtype)


class _Attention(PyLayer):
    """softmax(q k^T / sqrt(d)) v within each frame, of all runs at once: as separate nodes, every run would pass back
    gradients as long as the batch. The weights of large frames are computed again in the backward pass.
    """

    @staticmethod
    def forward(ctx, qkv: paddle.Tensor, attention: FrameAttention) -> paddle.Tensor:
        num_patches, num_rows = qkv.shape[0], qkv.shape[0] * attention.num_heads
        head_dim = qkv.shape[1] // (3 * attention.num_heads)
        rows = paddle.gather(qkv.reshape([3 * num_rows, head_dim]), attention.fetch)
        q = attention.rotate(rows[:num_rows]).scale_(head_dim**-0.5)
        k = attention.rotate(rows[num_rows : 2 * num_rows])
        outputs, saved, ctx.kept = [], [], []
        for parts in attention.by_run(q, k, rows[2 * num_rows :]):
            length = parts[0].shape[2]
            if blockwise.applies(length, *parts):
                kept: Any = _heads(*parts)
                out = kept.attend(keep=length <= _KEEP_WEIGHTS)
            else:
                out, kept = _forward(*parts)
            saved += parts
            ctx.kept.append(kept)
            outputs.append(out.reshape([-1, head_dim]))
        ctx.save_for_backward(*saved)
        ctx.attention = attention
        context = paddle.gather(_join(outputs), attention.merge_context)
        return context.reshape([num_patches, attention.num_heads * head_dim])

    @staticmethod
    def backward(ctx, dout: paddle.Tensor) -> paddle.Tensor:
        saved, attention = ctx.saved_tensor(), ctx.attention
        head_dim = dout.shape[1] // attention.num_heads
        dout_rows = paddle.gather(dout.reshape([-1, head_dim]), attention.fetch_context)
        runs = []
        for number, (do,) in enumerate(attention.by_run(dout_rows)):
            kept = ctx.kept[number]
            if isinstance(kept, blockwise.Heads):
                every, count = kept.backward(do), math.prod(kept.q.shape) // head_dim
                grads = every[:count], every[count : 2 * count], every[2 * count :]
            else:
                scaled, k, v = saved[3 * number : 3 * number + 3]
                grads = _backward(scaled, k, v, kept, do)
            runs.append([grad.reshape([-1, head_dim]) for grad in grads])
        ctx.kept = None
        dq, dk, dv = (_join(list(parts)) for parts in zip(*runs, strict=True))
        dq = attention.rotate(dq, inverse=True).scale_(head_dim**-0.5)
        grads = paddle.concat([dq, attention.rotate(dk, inverse=True), dv])
        return paddle.gather(grads, attention.merge).reshape([dout.shape[0], 3 * dout.shape[1]])


def _join(parts: list[paddle.Tensor], axis: int = 0) -> paddle.Tensor:
    return parts[0] if len(parts) == 1 else paddle.concat(parts, axis=axis)


def _heads(scaled: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor) -> blockwise.Heads:
    """The heads of a run of frames [F, H, L, d], block by block."""
    frames, heads, length = scaled.shape[:3]
    rows = max(1, blockwise.BLOCK_SCORES // length)
    starts = range(0, length, rows)
    blocks = [blockwise.Block(start, length, min(rows, length - start), length) for start in starts]
    return blockwise.Heads(scaled, k, v, blocks, frames * heads)


def _forward(
    scaled: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor
) -> tuple[paddle.Tensor, list[paddle.Tensor | None]]:
    """Attention of q / sqrt(d), k, v [F, H, L, d], a block of queries at a time, and the blocks' weights where they are
    kept.
    """
    outputs, kept = [], []
    for start in range(0, scaled.shape[2], _QUERIES):
        p = _weights(scaled[:, :, start : start + _QUERIES], k)
        outputs.append(paddle.matmul(p.astype(v.dtype), v))
        kept.append(p if scaled.shape[2] <= _KEEP_WEIGHTS else None)
    return _join(outputs, axis=2), kept


def _backward(
    scaled: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor, kept: list[paddle.Tensor | None], dout: paddle.Tensor
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Gradients of the scaled q, k and v."""
    dq: list[paddle.Tensor] = []
    dk: paddle.Tensor = None
    dv: paddle.Tensor = None
    for number, start in enumerate(range(0, scaled.shape[2], _QUERIES)):
        block = slice(start, start + _QUERIES)
        q, do = scaled[:, :, block], dout[:, :, block]
        p = kept[number]
        p = _weights(q, k) if p is None else p
        ds = softmax_backward_(paddle.matmul(do, v, transpose_y=True).astype("float32"), p)
        ds, p = ds.astype(q.dtype), p.astype(q.dtype)
        dq.append(paddle.matmul(ds, k))
        # Transposing the wide matrix of scores takes a CPU twice as long as the product: dK^T = Q^T dS, dV^T = dO^T P.
        more_k, more_v = paddle.matmul(q, ds, transpose_x=True), paddle.matmul(do, p, transpose_x=True)
        if len(kept) > 1 and q.dtype != paddle.float32:  # a sum in 16 bits would lose more with every block
            more_k, more_v = more_k.astype("float32"), more_v.astype("float32")
        dk, dv = (more_k, more_v) if dk is None else (dk.add_(more_k), dv.add_(more_v))
    if dk.dtype != k.dtype:
        dk, dv = dk.astype(k.dtype), dv.astype(v.dtype)
    return _join(dq, axis=2), dk.transpose([0, 1, 3, 2]), dv.transpose([0, 1, 3, 2])


def _weights(q: paddle.Tensor, k: paddle.Tensor) -> paddle.Tensor:
    """Softmax weights of scaled queries [F, H, l, d] over all keys of their frame: fp32 [F, H, l, L]."""
    return softmax_(paddle.matmul(q, k, transpose_y=True).astype("float32"))
