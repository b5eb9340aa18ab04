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

from erniekit.nn.narrow import rounded

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
        return rounded(lambda wide: _Attention.apply(wide, self), qkv)

    def by_run(self, *tensors_PHd: paddle.Tensor) -> Iterator[list[paddle.Tensor]]:
        """The rows of each run of tensors [P, H, d], as [F, H, L, d]."""
        start = 0
        for frames, length in self._bounded_runs():
            stop = start + frames * length
            yield [x[start:stop].reshape([frames, length, *x.shape[1:]]).transpose([0, 2, 1, 3]) for x in tensors_PHd]
            start = stop

    def _bounded_runs(self) -> Iterator[tuple[int, int]]:
        """The runs, divided where one product of a run would be too large."""
        for frames, length in self.runs:
            largest = max(1, _MAX_SCORES // (self.num_heads * length * min(length, _QUERIES)))
            for first in range(0, frames, largest):
                yield min(largest, frames - first), length

    def rotate(self, x_PHd: paddle.Tensor, inverse: bool = False) -> paddle.Tensor:
        """Rotate the pairs (x[j], x[j + d/2]): here, unlike in the decoder, a pair lies half a head apart. In fp32."""
        first, second = x_PHd.astype("float32").chunk(2, axis=-1)
        sin = -self.sin if inverse else self.sin
        rotated = [first * self.cos - second * sin, second * self.cos + first * sin]
        return paddle.concat(rotated, axis=-1).astype(x_PHd.dtype)


class _Attention(PyLayer):
    """softmax(q k^T / sqrt(d)) v within each frame, of all runs at once: as separate nodes, every run would pass back
    gradients as long as the batch. The weights of large frames are computed again in the backward pass.
    """

    @staticmethod
    def forward(ctx, qkv: paddle.Tensor, mixer: FrameAttention) -> paddle.Tensor:
        num_patches, head_dim = qkv.shape[0], qkv.shape[1] // (3 * mixer.num_heads)
        q, k, v = qkv.reshape([num_patches, 3, mixer.num_heads, head_dim]).unbind(axis=1)
        q, k = mixer.rotate(q) * head_dim**-0.5, mixer.rotate(k)
        outputs, saved, ctx.kept = [], [], []
        for parts in mixer.by_run(q, k, v):
            out, kept = _forward(*parts)
            saved += [*parts, out]
            ctx.kept.append(kept)
            outputs.append(_joined(out))
        ctx.save_for_backward(*saved)
        ctx.mixer = mixer
        context = outputs[0] if len(outputs) == 1 else paddle.concat(outputs)
        return context.reshape([num_patches, mixer.num_heads * head_dim])

    @staticmethod
    def backward(ctx, dout: paddle.Tensor) -> paddle.Tensor:
        saved, mixer = ctx.saved_tensor(), ctx.mixer
        dout_PHd = dout.reshape([dout.shape[0], mixer.num_heads, -1])
        runs = []
        for number, (do,) in enumerate(mixer.by_run(dout_PHd)):
            scaled, k, v, out = saved[4 * number : 4 * number + 4]
            grads = _backward(scaled, k, v, out, ctx.kept[number], do)
            runs.append([_joined(each) for each in grads])
        ctx.kept = None
        dq, dk, dv = (parts[0] if len(parts) == 1 else paddle.concat(parts) for parts in map(list, zip(*runs)))
        dq = mixer.rotate(dq * dout_PHd.shape[-1] ** -0.5, inverse=True)
        grads_P3Hd = paddle.stack([dq, mixer.rotate(dk, inverse=True), dv], axis=1)
        return grads_P3Hd.reshape([dout.shape[0], 3 * dout.shape[1]])


def _joined(x_FHLd: paddle.Tensor) -> paddle.Tensor:
    """[F, H, L, d] -> [F*L, H, d]."""
    frames, heads, length, size = x_FHLd.shape
    return x_FHLd.transpose([0, 2, 1, 3]).reshape([frames * length, heads, size])


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
    return outputs[0] if len(outputs) == 1 else paddle.concat(outputs, axis=2), kept


def _backward(
    scaled: paddle.Tensor,
    k: paddle.Tensor,
    v: paddle.Tensor,
    out: paddle.Tensor,
    kept: list[paddle.Tensor | None],
    dout: paddle.Tensor,
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """dS = P * (dP - rowsum(dO * O)) (Dao et al. 2022, arXiv 2205.14135, appendix B.4): gradients of the scaled q, k
    and v.
    """
    dq: list[paddle.Tensor] = []
    dk: paddle.Tensor = None
    dv: paddle.Tensor = None
    for number, start in enumerate(range(0, scaled.shape[2], _QUERIES)):
        block = slice(start, start + _QUERIES)
        q, do = scaled[:, :, block], dout[:, :, block]
        p = kept[number]
        p = _weights(q, k) if p is None else p
        row_sum = (do * out[:, :, block]).astype("float32").sum(axis=-1, keepdim=True)
        ds = paddle.matmul(do, v, transpose_y=True).astype("float32").subtract_(row_sum).multiply_(p)
        ds, p = ds.astype(q.dtype), p.astype(q.dtype)
        dq.append(paddle.matmul(ds, k))
        more_k, more_v = paddle.matmul(ds, q, transpose_x=True), paddle.matmul(p, do, transpose_x=True)
        dk, dv = (more_k, more_v) if dk is None else (dk.add_(more_k), dv.add_(more_v))
    return dq[0] if len(dq) == 1 else paddle.concat(dq, axis=2), dk, dv


def _weights(q: paddle.Tensor, k: paddle.Tensor) -> paddle.Tensor:
    """Softmax weights of scaled queries [F, H, l, d] over all keys of their frame: fp32 [F, H, l, L]."""
    return nn.functional.softmax(paddle.matmul(q, k, transpose_y=True).astype("float32"), axis=-1)
