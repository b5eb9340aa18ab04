"""Attention within frames against the plain formula, and its gradient against Paddle's own."""

import numpy as np
import paddle
import pytest
from support.host_reads import counted

from erniekit.nn import blockwise, frame_attention
from erniekit.nn.frame_attention import FrameAttention, frame_runs

HEADS, DIM = 2, 4
GRID = np.array([[1, 2, 4], [2, 4, 2], [1, 2, 2], [4, 2, 2]])  # 8, 8, 8, 4, 4, 4, 4, 4 patches
RNG = np.random.default_rng(0)
# Frames of this size would be batched products. Blocks of all queries of a frame, of a few, and weights made again.
BLOCKWISE = [
    {"SHORTEST": 1},
    {"SHORTEST": 5, "BLOCK_SCORES": 24},
    {"SHORTEST": 1, "BLOCK_SCORES": 1, "_KEEP_WEIGHTS": 4},
]


def test_neighbouring_frames_of_equal_size_are_one_run():
    assert frame_runs(GRID) == [(3, 8), (5, 4)]
    assert frame_runs(np.array([[1, 2, 2], [1, 2, 4], [1, 2, 2]])) == [(1, 4), (1, 8), (1, 4)]


def plain(qkv: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor) -> paddle.Tensor:
    """Frame by frame, with a whole mask."""
    num = qkv.shape[0]
    q, k, v = qkv.reshape([num, 3, HEADS, DIM]).unbind(axis=1)

    def rotated(x: paddle.Tensor) -> paddle.Tensor:
        half = paddle.concat([-x[..., DIM // 2 :], x[..., : DIM // 2]], axis=-1)
        return x * paddle.concat([cos, cos], axis=-1) + half * paddle.concat([sin, sin], axis=-1)

    frames = np.repeat(np.arange(8), [8, 8, 8, 4, 4, 4, 4, 4])
    mask = paddle.to_tensor(np.where(frames[:, None] == frames, 0.0, -np.inf).astype(np.float32))
    scores = paddle.einsum("qhd,khd->hqk", rotated(q), rotated(k)) * DIM**-0.5 + mask
    return paddle.einsum("hqk,khd->qhd", paddle.nn.functional.softmax(scores), v).reshape([num, HEADS * DIM])


@pytest.mark.parametrize(
    "limits", [{}, {"_QUERIES": 3}, {"_KEEP_WEIGHTS": 4}, {"_MAX_SCORES": 1, "_QUERIES": 5}, *BLOCKWISE]
)
def test_value_and_gradient(limits, monkeypatch):
    """Also where a frame's queries come in blocks, its weights are computed again, or runs are divided."""
    for name, value in limits.items():
        monkeypatch.setattr(blockwise if hasattr(blockwise, name) else frame_attention, name, value)
    num = int(GRID.prod(axis=1).sum())
    angles = RNG.normal(size=(num, 1, DIM // 2)).astype(np.float32)
    cos, sin = paddle.to_tensor(np.cos(angles)), paddle.to_tensor(np.sin(angles))
    weights = paddle.to_tensor(RNG.normal(size=(num, HEADS * DIM)).astype(np.float32))
    values = RNG.normal(size=(num, 3 * HEADS * DIM)).astype(np.float32)
    found = []
    for attend in (FrameAttention(frame_runs(GRID), cos, sin, HEADS).attend, lambda x: plain(x, cos, sin)):
        qkv = paddle.to_tensor(values, stop_gradient=False)
        out = attend(qkv)
        (out * weights).sum().backward()
        found.append((out.numpy(), qkv.grad.numpy()))
    for mine, expected in zip(*found, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=2e-6)


def test_nothing_is_read_from_the_device():
    cos, sin = paddle.ones([44, 1, DIM // 2]), paddle.zeros([44, 1, DIM // 2])
    qkv = paddle.ones([44, 3 * HEADS * DIM])
    qkv.stop_gradient = False
    with counted() as transfers:
        FrameAttention(frame_runs(GRID), cos, sin, HEADS).attend(qkv).sum().backward()
    assert not transfers.reads and transfers.uploads
