"""Attention on a CPU, a head and a block of queries at a time, so that the scores of a block stay in the cache between
the products and the softmax. All products are written where they belong; nothing is copied or transposed.

The batched products of nn/attention.py and nn/frame_attention.py compute the same. They are the reference, and faster
for short sequences. Legend: U heads of sequences ("units"), S keys of one, R query rows of all, d head size.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import paddle

from erniekit.nn import cpu_ops
from erniekit.nn.gemm import gemm

SHORTEST = 128  # keys; below, calls take longer than products
BLOCK_SCORES = 1 << 18  # scores of a block: 1 MB
_FLOAT = 4  # bytes


class Block(NamedTuple):
    """Queries of every unit that see the same keys: `rows` of them from row `first` of q [R, d] on for unit 0, `step`
    rows later for the next unit. They see the unit's first `seen` keys; to the scores of the last of these `mask`
    [rows, masked keys] is added, if there is one. The last block of a list sees all keys.
    """

    first: int
    step: int
    rows: int
    seen: int
    mask: np.ndarray | None = None


def applies(num_keys: int, *tensors: paddle.Tensor) -> bool:
    """Whether sequences of this length are computed here: on a CPU that has oneDNN, in fp32."""
    return num_keys >= SHORTEST and all(cpu_ops.applies(x) for x in tensors)


class Heads:
    """The heads of sequences of one length: q [R, d] as `blocks` say, k and v [U*S, d], all contiguous."""

    def __init__(
        self,
        q: paddle.Tensor,
        k: paddle.Tensor,
        v: paddle.Tensor,
        blocks: Sequence[Block],
        num_units: int,
        scale: float = 1.0,
    ) -> None:
        self.q, self.k, self.v, self.blocks = q, k, v, blocks
        self.num_units, self.dim, self.scale = num_units, q.shape[-1], scale
        self.num_keys = blocks[-1].seen
        self._kept: list[paddle.Tensor] = []

    def attend(self, keep: bool) -> paddle.Tensor:
        """softmax(scale * q k^T + mask) v, as q lies. `keep`: the weights wait for `backward`, which otherwise computes
        them again.
        """
        out, scratch, self._kept = cpu_ops.unfilled_like(self.q), self._scratch(), []
        out_at, (_, values) = out.data_ptr(), self._addresses
        for unit in range(self.num_units):
            v = self._of_unit(values, unit)
            for block in self.blocks:
                if keep:
                    self._kept.append(cpu_ops.unfilled([block.rows, block.seen], self.q))
                p = cpu_ops.memory_of(self._kept[-1]) if keep else _part(scratch, block)
                self._weigh(p, block, unit)
                gemm(False, False, block.rows, self.dim, block.seen, _matrix(p), v, self._queries(out_at, block, unit))
        return out

    def backward(self, dout: paddle.Tensor) -> paddle.Tensor:
        """The gradients of q, k and v from that of the result, one behind another, each as its tensor lies:
        [R + 2*U*S, d].
        """
        num_queries, num_keys = math.prod(self.q.shape) // self.dim, self.num_units * self.num_keys
        grads = cpu_ops.unfilled([num_queries + 2 * num_keys, self.dim], self.q)
        starts = (row * self.dim * _FLOAT for row in (0, num_queries, num_queries + num_keys))
        dq, dk, dv = (grads.data_ptr() + start for start in starts)
        first, second, dim = self._scratch(), self._scratch(), self.dim
        for unit in range(self.num_units):
            k, v, dk_unit, dv_unit = (self._of_unit(x, unit) for x in (*self._addresses, dk, dv))
            total = 0.0  # the last block writes the gradients of all keys, the others add to theirs
            for number in reversed(range(len(self.blocks))):
                block = self.blocks[number]
                rows, seen, ds = block.rows, block.seen, _part(first, block)
                q, do = self._queries(self.q.data_ptr(), block, unit), self._queries(dout.data_ptr(), block, unit)
                if self._kept:
                    p = cpu_ops.memory_of(self._kept[unit * len(self.blocks) + number])
                else:
                    p = _part(second, block)
                    self._weigh(p, block, unit)
                gemm(False, True, rows, seen, dim, do, v, _matrix(ds))
                cpu_ops.softmax_backward_rows_(ds, p)
                gemm(False, False, rows, dim, seen, _matrix(ds), k, self._queries(dq, block, unit), self.scale)
                gemm(True, False, seen, dim, rows, _matrix(ds), q, dk_unit, self.scale, total)
                gemm(True, False, seen, dim, rows, _matrix(p), do, dv_unit, 1.0, total)
                total = 1.0
        self._kept = []
        return grads

    def _weigh(self, p: np.ndarray, block: Block, unit: int) -> None:
        """Write the softmax weights of a block [rows, seen] to p."""
        q, k = self._queries(self.q.data_ptr(), block, unit), self._of_unit(self._addresses[0], unit)
        free = block.seen
        if block.mask is not None:
            free -= block.mask.shape[1]
            masked, keys = p[:, free:], (k[0] + _FLOAT * free * self.dim, self.dim)
            masked[:] = block.mask
            gemm(False, True, block.rows, block.seen - free, self.dim, q, keys, _matrix(masked), self.scale, 1.0)
        if free:
            gemm(False, True, block.rows, free, self.dim, q, k, _matrix(p), self.scale)
        cpu_ops.softmax_rows_(p)

    @property
    def _addresses(self) -> tuple[int, int]:
        """The addresses of k and v."""
        return self.k.data_ptr(), self.v.data_ptr()

    def _queries(self, address: int, block: Block, unit: int) -> tuple[int, int]:
        """The queries of a block in a tensor that lies as q does, from its address on."""
        return address + _FLOAT * (block.first + unit * block.step) * self.dim, self.dim

    def _of_unit(self, address: int, unit: int) -> tuple[int, int]:
        return address + _FLOAT * unit * self.num_keys * self.dim, self.dim

    def _scratch(self) -> np.ndarray:
        return np.empty(max(block.rows * block.seen for block in self.blocks), np.float32)


def _part(scratch: np.ndarray, block: Block) -> np.ndarray:
    return scratch[: block.rows * block.seen].reshape(block.rows, block.seen)


def _matrix(array: np.ndarray) -> tuple[int, int]:
    """Address, and numbers from one row to the next."""
    return array.__array_interface__["data"][0], array.strides[0] // _FLOAT
