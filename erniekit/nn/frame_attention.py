"""Full attention within each image and video frame, over patches that lie one frame behind the other.

Nothing is padded and nothing is gathered: neighbouring frames of equal size are one batched product. Legend: P patches,
H heads, d head size, F frames, L patches of a frame.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer

_QUERIES = 1024  # query patches of a frame whose scores exist at once
_MAX_SCORES = 1 << 26  # scores of one product: neighbouring frames are joined up to this size
_KEEP_WEIGHTS = 256  # patches of the largest frame whose softmax weights wait for the backward pass


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
    """

    runs: Sequence[tuple[int, int]]
    cos: paddle.Tensor
    sin: paddle.Tensor
    num_heads: int

    def attend(self, qkv: paddle.Tensor) -> paddle.Tensor:
        """q|k|v [P, 3*H*d] before rotation -> context [P, H*d]."""
        num_patches, head_dim = qkv.shape[0], qkv.shape[1] // (3 * self.num_heads)
        q, k, v = qkv.reshape([num_patches, 3, self.num_heads, head_dim]).unbind(axis=1)
        q, k = self._rotate(q), self._rotate(k)
        outputs, start = [], 0
        for frames, length in self._bounded_runs():
            stop = start + frames * length
            shape = [frames, length, self.num_heads, head_dim]
            parts = [x[start:stop].reshape(shape).transpose([0, 2, 1, 3]) for x in (q, k, v)]
            context = _Attention.apply(*parts).transpose([0, 2, 1, 3])
            outputs.append(context.reshape([frames * length, self.num_heads * head_dim]))
            start = stop
        return outputs[0] if len(outputs) == 1 else paddle.concat(outputs)

    def _bounded_runs(self) -> Iterator[tuple[int, int]]:
        """The runs, divided where one product of a run would be too large."""
        for frames, length in self.runs:
            largest = max(1, _MAX_SCORES // (self.num_heads * length * min(length, _QUERIES)))
            for first in range(0, frames, largest):
                yield min(largest, frames - first), length

    def _rotate(self, x_PHd: paddle.Tensor) -> paddle.Tensor:
        """Rotate the pairs (x[j], x[j + d/2]): here, unlike in the decoder, a pair lies half a head apart. In fp32."""
        first, second = x_PHd.astype("float32").chunk(2, axis=-1)
        rotated = [first * self.cos - second * self.sin, second * self.cos + first * self.sin]
        return paddle.concat(rotated, axis=-1).astype(x_PHd.dtype)


class _Attention(PyLayer):
    """softmax(q k^T / sqrt(d)) v for q, k, v [F, H, L, d], a block of queries at a time. The weights of large frames
    are computed again in the backward pass.
    """

    @staticmethod
    def forward(ctx, q: paddle.Tensor, k: paddle.Tensor, v: paddle.Tensor) -> paddle.Tensor:
        scaled = q * q.shape[-1] ** -0.5
        outputs, kept = [], []
        for start in range(0, q.shape[2], _QUERIES):
            p = _weights(scaled[:, :, start : start + _QUERIES], k)
            outputs.append(paddle.matmul(p.astype(v.dtype), v))
            kept.append(p if q.shape[2] <= _KEEP_WEIGHTS else None)
        out = outputs[0] if len(outputs) == 1 else paddle.concat(outputs, axis=2)
        ctx.save_for_backward(scaled, k, v, out)
        ctx.kept = kept
        return out

    @staticmethod
    def backward(ctx, dout: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        """dS = P * (dP - rowsum(dO * O)) (Dao et al. 2022, arXiv 2205.14135, appendix B.4)."""
        scaled, k, v, out = ctx.saved_tensor()
        dq, dk, dv = [], paddle.zeros_like(k), paddle.zeros_like(v)
        for number, start in enumerate(range(0, scaled.shape[2], _QUERIES)):
            block = slice(start, start + _QUERIES)
            q, do = scaled[:, :, block], dout[:, :, block]
            p = _weights(q, k) if ctx.kept[number] is None else ctx.kept[number]
            row_sum = (do * out[:, :, block]).astype("float32").sum(axis=-1, keepdim=True)
            ds = paddle.matmul(do, v, transpose_y=True).astype("float32").subtract_(row_sum).multiply_(p)
            ds, p = ds.astype(q.dtype), p.astype(q.dtype)
            dq.append(paddle.matmul(ds, k) * q.shape[-1] ** -0.5)
            dk = dk.add_(paddle.matmul(ds, q, transpose_x=True))
            dv = dv.add_(paddle.matmul(p, do, transpose_x=True))
        ctx.kept = None
        return dq[0] if len(dq) == 1 else paddle.concat(dq, axis=2), dk, dv


def _weights(q: paddle.Tensor, k: paddle.Tensor) -> paddle.Tensor:
    """Softmax weights of scaled queries [F, H, l, d] over all keys of their frame: fp32 [F, H, l, L]."""
    return nn.functional.softmax(paddle.matmul(q, k, transpose_y=True).astype("float32"), axis=-1)
