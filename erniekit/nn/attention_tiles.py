"""Attention on a CPU whose keys come in several parts: the results of the parts are merged by the logarithms of their
sums, and the backward pass needs nothing of a part but these.

softmax over all keys of p_a v_a, where part b has its own softmax and lse_b = log sum exp(scores): the whole is
sum_b exp(lse_b - lse) * softmax_b v, lse = log sum_b exp(lse_b) (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao
2023, arXiv 2307.08691, section 3.1). Scores exist a block at a time, in the processor's cache.

Legend: G key-value heads, T tokens, r = H / G heads that share one, S keys, d head size. Everything is fp32.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import paddle

from erniekit.nn import cpu_ops, onednn
from erniekit.nn.gemm import gemm

_BLOCK_ROWS = 512  # query rows of a block
_BLOCK_KEYS = 512  # keys of a block: 1 MB of scores
_MASK_VALUE = np.float32(-1e30)
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Queries:
    """The queries of some tokens and what is known of their attention so far: `q` and `out` [G, T * r, d], token by
    token with r heads each, and `lse` [G, T * r], -inf where no key has been seen. `repeat` is r; scores are scaled.
    """

    q: np.ndarray
    out: np.ndarray
    lse: np.ndarray
    repeat: int
    scale: float

    def attend(self, k: np.ndarray, v: np.ndarray, query: slice, causal: bool) -> None:
        """Merge what the tokens `query` see of keys and values [G, S, d] into `out` and `lse`: all of them; or, if
        `causal`, token i sees the first i + 1, and there are as many keys as tokens.
        """
        scratch = _scratch()
        for head in range(len(self.q)):
            for rows, keys, corner in _blocks(query, k.shape[1], self.repeat, causal):
                q, k_block, v_block = self.q[head, rows], k[head, keys], v[head, keys]
                p = _part(scratch[0], q, k_block)
                lse = _weigh(p, q, k_block, self.scale, corner)
                part = np.empty_like(q)
                _product(False, False, p, v_block, part)
                _merge(self.out[head, rows], self.lse[head, rows], part, lse)

    def backward(
        self,
        k: np.ndarray,
        v: np.ndarray,
        query: slice,
        causal: bool,
        do: np.ndarray,
        delta: np.ndarray,
        dq: np.ndarray,
        dk: np.ndarray,
        dv: np.ndarray,
    ) -> None:
        """Add the gradients of `attend`'s share to dq [G, T * r, d], dk and dv [G, S, d], once `out` and `lse` are
        complete. do [G, T * r, d]: the gradient of `out`; delta [G, T * r]: sum over d of do * out.
        """
        scratch = _scratch()
        for head in range(len(self.q)):
            for rows, keys, corner in _blocks(query, k.shape[1], self.repeat, causal):
                q, do_rows, k_block, v_block = self.q[head, rows], do[head, rows], k[head, keys], v[head, keys]
                p, ds = (_part(buffer, q, k_block) for buffer in scratch)
                # p is the softmax of this block alone; `share` is the block's part of the whole. It goes to the
                # narrow side of every product.
                lse = _weigh(p, q, k_block, self.scale, corner)
                share = np.exp(lse - self.lse[head, rows])[:, None]
                _product(True, False, p, do_rows * share, dv[head, keys], beta=1.0)
                ds[:] = -delta[head, rows, None]
                _product(False, True, do_rows, v_block, ds, beta=1.0)
                np.multiply(ds, p, out=ds)
                part = np.empty_like(q)
                _product(False, False, ds, k_block, part)
                dq[head, rows] += part * (share * np.float32(self.scale))
                _product(True, False, ds, q * share, dk[head, keys], alpha=self.scale, beta=1.0)


def _blocks(query: slice, num_keys: int, repeat: int, causal: bool) -> list[tuple[slice, slice, np.ndarray | None]]:
    """Rows of queries, keys, and what is added to the scores of the diagonal's blocks."""
    size = max(_BLOCK_ROWS // repeat, 1)
    result: list[tuple[slice, slice, np.ndarray | None]] = []
    for begin in range(query.start, query.stop, size):
        end = min(begin + size, query.stop)
        rows, seen = slice(begin * repeat, end * repeat), begin - query.start if causal else num_keys
        for key in range(0, seen, _BLOCK_KEYS):
            result.append((rows, slice(key, min(key + _BLOCK_KEYS, seen)), None))
        if causal:
            result.append((rows, slice(seen, seen + end - begin), _corner(end - begin, repeat)))
    return result


@lru_cache(maxsize=64)
def _corner(length: int, repeat: int) -> np.ndarray:
    """[length * repeat, length] fp32: 0 where key <= query, a value that hides the key elsewhere."""
    hidden = np.arange(length) > np.arange(length)[:, None]
    return np.where(hidden, _MASK_VALUE, np.float32(0)).repeat(repeat, axis=0)


def _weigh(p: np.ndarray, q: np.ndarray, k: np.ndarray, scale: float, corner: np.ndarray | None) -> np.ndarray:
    """Write the softmax weights over these keys to p [rows, keys]; returns log sum exp(scores) [rows]."""
    if corner is None:
        _product(False, True, q, k, p, alpha=scale)
    else:
        p[:] = corner
        _product(False, True, q, k, p, alpha=scale, beta=1.0)
    rows = np.arange(len(p))
    largest = p.argmax(axis=1)
    scores = p[rows, largest]
    _softmax_(p, scores)
    # The largest weight is exp(score - lse), and never small.
    return scores - np.log(p[rows, largest])


def _softmax_(scores: np.ndarray, largest: np.ndarray) -> None:
    if onednn.is_available(paddle.float32):
        cpu_ops.softmax_rows_(scores)
        return
    np.exp(scores - largest[:, None], out=scores)
    scores /= scores.sum(axis=1, keepdims=True)


def _merge(out: np.ndarray, lse: np.ndarray, part: np.ndarray, lse_of_part: np.ndarray) -> None:
    """Merge a part's result [rows, d] into `out`, and its lse [rows] into `lse`, in place."""
    total = np.logaddexp(lse, lse_of_part)
    out *= np.exp(lse - total)[:, None]
    out += part * np.exp(lse_of_part - total)[:, None]
    lse[:] = total


def _product(
    transpose_x: bool,
    transpose_y: bool,
    x: np.ndarray,
    y: np.ndarray,
    out: np.ndarray,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> None:
    """out = alpha x y + beta out for matrices whose rows are contiguous."""
    if onednn.is_available(paddle.float32):
        inner = x.shape[0] if transpose_x else x.shape[1]
        rows, columns = out.shape
        matrices = _matrix(x), _matrix(y), _matrix(out)
        gemm(transpose_x, transpose_y, rows, columns, inner, *matrices, alpha, beta)
        return
    result = np.matmul(x.T if transpose_x else x, y.T if transpose_y else y) * np.float32(alpha)
    out[:] = result if beta == 0.0 else result + np.float32(beta) * out


def _matrix(array: np.ndarray) -> tuple[int, int]:
    """Address, and numbers from one row to the next."""
    assert array.dtype == np.float32 and (array.strides[1] == _FLOAT or array.shape[1] == 1)
    return array.__array_interface__["data"][0], array.strides[0] // _FLOAT


def _scratch() -> tuple[np.ndarray, np.ndarray]:
    """Room for two blocks of scores."""
    return np.empty(_BLOCK_ROWS * _BLOCK_KEYS, np.float32), np.empty(_BLOCK_ROWS * _BLOCK_KEYS, np.float32)


def _part(buffer: np.ndarray, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    return buffer[: len(q) * len(k)].reshape(len(q), len(k))
