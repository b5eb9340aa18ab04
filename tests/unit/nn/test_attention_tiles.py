"""Attention whose keys come in parts, against one softmax in float64."""

import itertools

import numpy as np
import pytest

from erniekit.nn import attention_tiles, onednn
from erniekit.nn.attention_tiles import Queries

SCALE = 0.3


@pytest.fixture(params=[True, False], ids=["onednn", "numpy"])
def library(request, monkeypatch):
    """With oneDNN, and as on a machine without it."""
    if not request.param:
        monkeypatch.setattr(onednn, "is_available", lambda dtype: False)
    elif not onednn.is_available(attention_tiles.paddle.float32):
        pytest.skip("no oneDNN")


@pytest.mark.parametrize(("length", "repeat", "blocks"), [(5, 1, 512), (300, 2, 512), (90, 3, 16)])
def test_parts_together_are_the_whole(monkeypatch, library, length: int, repeat: int, blocks: int):
    """Two early parts that are seen whole, and the queries' own, in which each sees the tokens up to itself."""
    monkeypatch.setattr(attention_tiles, "_BLOCK_ROWS", blocks)
    monkeypatch.setattr(attention_tiles, "_BLOCK_KEYS", blocks)
    rng = np.random.default_rng(0)
    groups, dim, parts = 2, 8, (40, 7, length)
    q = rng.standard_normal((groups, length * repeat, dim)) * 3
    k, v = (rng.standard_normal((groups, sum(parts), dim)) * 3 for _ in range(2))
    do = rng.standard_normal(q.shape)

    scores = np.einsum("gqd,gkd->gqk", q, k) * SCALE
    token = np.arange(length).repeat(repeat)
    scores[:, np.arange(sum(parts)) > 47 + token[:, None]] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = p @ v
    ds = p * (np.einsum("gqd,gkd->gqk", do, v) - (do * out).sum(-1, keepdims=True)) * SCALE
    expected = out, ds @ k, ds.transpose(0, 2, 1) @ q, p.transpose(0, 2, 1) @ do

    q32, k32, v32, do32 = (np.ascontiguousarray(x, np.float32) for x in (q, k, v, do))
    lse = np.full(q.shape[:2], -np.inf, np.float32)
    queries = Queries(q32, np.zeros_like(q32), lse, repeat, SCALE)
    ends = np.cumsum([0, *parts])
    tiles = [(slice(a, b), b == ends[-1]) for a, b in itertools.pairwise(ends)]
    for span, causal in reversed(tiles):
        queries.attend(k32[:, span], v32[:, span], slice(0, length), causal)
    delta = (do32 * queries.out).sum(-1)
    dq, dk, dv = np.zeros_like(q32), np.zeros_like(k32), np.zeros_like(v32)
    for span, causal in tiles:
        queries.backward(
            k32[:, span], v32[:, span], slice(0, length), causal, do32, delta, dq, dk[:, span], dv[:, span]
        )
    for ours, right in zip((queries.out, dq, dk, dv), expected, strict=True):
        assert np.abs(ours - right).max() < 2e-5 * np.abs(right).max()


def test_scores_of_any_size_stay_finite(library):
    """Blocks whose scores are far below those of others weigh nothing, and none makes a NaN."""
    q = np.full((1, 4, 2), 30.0, np.float32)
    k = np.concatenate([np.full((1, 3, 2), -30.0, np.float32), np.full((1, 4, 2), 30.0, np.float32)], axis=1)
    v = np.arange(14, dtype=np.float32).reshape(1, 7, 2)
    queries = Queries(q, np.zeros_like(q), np.full((1, 4), -np.inf, np.float32), 1, 1.0)
    queries.attend(k[:, :3], v[:, :3], slice(0, 4), False)
    queries.attend(k[:, 3:], v[:, 3:], slice(0, 4), True)
    assert np.allclose(queries.out[0], [v[0, 3 : 4 + i].mean(axis=0) for i in range(4)])
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    do = np.ones_like(q)
    delta = (do * queries.out).sum(-1)
    queries.backward(k[:, :3], v[:, :3], slice(0, 4), False, do, delta, dq, dk[:, :3], dv[:, :3])
    assert np.isfinite(dq).all() and not dv[:, :3].any()
