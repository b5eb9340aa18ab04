"""Rotary position embedding over interleaved pairs (x[2j], x[2j+1]), as ERNIE 4.5 uses it (Su et al. 2021, arXiv
2104.09864, eq. 34).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import paddle

from erniekit.nn import fused
from erniekit.nn.frequencies import RopeScaling, scaled_frequencies

# A table with a row for every head lets one complex product rotate a fused projection. Paddle's CPU product is six
# times slower where it has to broadcast over heads, so such a table is made there up to this size.
MAX_EXPANDED_BYTES = 100_000_000
_BLOCK = 256  # tokens whose table is expanded at once where the whole would be larger than that; fits a CPU's cache
_ITEM_BYTES = np.dtype(np.complex64).itemsize


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of a model: the same for training, evaluation and the cache of generation.

    `time_frequencies`: in a model with positions (time, height, width), how many of the lowest frequencies turn with
    time; the others alternate between height and width, beginning with height. 0: a model of text alone. `scaling`: of
    models for longer texts, see nn/frequencies.py; not with positions (time, height, width).
    """

    head_dim: int
    theta: float
    time_frequencies: int = 0
    scaling: RopeScaling | None = None

    def at(
        self,
        positions: np.ndarray,
        num_rotated: int,
        num_plain: int = 0,
        row: int | None = None,
        own: np.ndarray | None = None,
    ) -> "Rotation":
        """The rotation of T tokens at `positions`, integers [T] or (time, height, width) [T, 3], for projections of
        num_rotated + num_plain heads, of which the last (the values in a fused q|k|v) are left as they are. `row`: the
        tokens of a row, where each row is a part of one text. `own`: the numbers of the tokens that it is for, if these
        are not all.
        """
        table = self.table(positions, row)[:, None]
        table = table if own is None else table[own]
        if _is_expanded(len(table), num_rotated + num_plain, self.head_dim):
            expanded = np.ones((len(table), num_rotated + num_plain, self.head_dim // 2), dtype=np.complex64)
            expanded[:, :num_rotated] = table
            table = expanded
        return Rotation(paddle.to_tensor(table), num_rotated, num_plain)

    def table(self, positions: np.ndarray, row: int | None = None) -> np.ndarray:
        """exp(i * position * frequency) of T tokens, times the factor of a scaling: complex64 [T, head_dim/2];
        `positions` and `row` as in `at`.
        """
        assert self.scaling is None or positions.ndim == 1
        count = int(positions.max(initial=0)) + 1
        if self.scaling is None and positions.ndim == 1 and len(positions) >= 2 * count:
            return self.table(np.arange(count))[positions]  # short documents: copying is faster than sines and cosines
        frequencies = scaled_frequencies(self.head_dim, self.theta, self.scaling, positions, row)
        angles = self._of_frequencies(positions.astype(np.float32)) * frequencies
        table = (np.cos(angles) + 1j * np.sin(angles)).astype(np.complex64)
        if self.scaling is not None:
            table *= np.float32(self.scaling.attention_factor)
        return table

    def _of_frequencies(self, positions: np.ndarray) -> np.ndarray:
        """The position that each frequency turns with: [T, 1] or [T, head_dim/2]."""
        if positions.ndim == 1:
            return positions[:, None]
        if positions.shape[1:] != (3,) or not self.time_frequencies:
            expected = "[T] or [T, 3]" if self.time_frequencies else "[T], as for every model of text alone"
            raise ValueError(f"positions: expected the shape {expected}; got {list(positions.shape)}")
        axes = 1 + np.arange(self.head_dim // 2) % 2
        axes[len(axes) - self.time_frequencies :] = 0
        return positions[:, axes]


def _is_expanded(num_tokens: int, num_heads: int, head_dim: int) -> bool:
    return paddle.get_device() == "cpu" and num_tokens * num_heads * head_dim // 2 * _ITEM_BYTES <= MAX_EXPANDED_BYTES


def table_bytes(num_tokens: int, num_heads: int, head_dim: int) -> int:
    """The size of the table that a Rotation of T tokens holds, on the device in use."""
    rows = num_heads if _is_expanded(num_tokens, num_heads, head_dim) else 1
    of_fused = 0 if paddle.get_device() == "cpu" else 2 * num_tokens * head_dim * 4  # cosines and sines, see _cos_sin
    return num_tokens * rows * head_dim // 2 * _ITEM_BYTES + of_fused


@dataclass(frozen=True)
class Rotation:
    """exp(i * position * frequency) of T tokens, times the factor of a scaling, as all layers use it: `table` complex64
    [T, 1, head_dim/2], the same for every head; or [T, heads, head_dim/2] with ones for the heads that are not rotated,
    where that is faster and small.
    """

    table: paddle.Tensor
    num_rotated: int
    num_plain: int

    def apply(self, x_THd: paddle.Tensor, inverse: bool = False) -> paddle.Tensor:
        """Rotate x [T, heads, head_dim] by the table (by its conjugate if `inverse`, which is the adjoint). Computed in
        fp32, returned in x's dtype.
        """
        if fused.applies(fused.ROTARY, x_THd):
            turned = self.turn(x_THd[:, : self.num_rotated], inverse)
            return turned if not self.num_plain else paddle.concat([turned, x_THd[:, self.num_rotated :]], axis=1)
        tokens, heads, head_dim = x_THd.shape
        pairs = paddle.as_complex(x_THd.astype("float32").reshape([tokens, heads, head_dim // 2, 2]))
        table = self._conjugate if inverse else self.table
        if table.shape[1] == heads:
            rotated = pairs * table
        elif x_THd.place.is_cpu_place():
            rotated = self._by_blocks(pairs, table)
        else:
            rotated = paddle.concat([pairs[:, : self.num_rotated] * table, pairs[:, self.num_rotated :]], axis=1)
        return paddle.as_real(rotated).reshape([tokens, heads, head_dim]).astype(x_THd.dtype)

    def turn(self, x_THd: paddle.Tensor, inverse: bool = False) -> paddle.Tensor:
        """Rotate every head of x by the fused operator. Tables in 16 bits would turn by angles that are off by up to
        0.004, so the product is fp32.
        """
        cos, sin = self._cos_sin
        return fused.rotate(x_THd.astype("float32"), cos, -sin if inverse else sin).astype(x_THd.dtype)

    @cached_property
    def _conjugate(self) -> paddle.Tensor:
        """Made once a microbatch, for all layers."""
        return paddle.conj(self.table)

    @cached_property
    def _cos_sin(self) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Each number twice, for both of a pair: fp32 [1, T, 1, head_dim]. Made once a microbatch, for all layers."""
        both = [
            part[:, :1].repeat_interleave(2, axis=-1).unsqueeze(0) for part in (self.table.real(), self.table.imag())
        ]
        return both[0], both[1]

    def _by_blocks(self, pairs: paddle.Tensor, table: paddle.Tensor) -> paddle.Tensor:
        """pairs [T, heads, head_dim/2] times the table, expanded for a block of tokens at a time."""
        tokens, heads, half = pairs.shape
        one = paddle.to_tensor(np.tile(np.array([1, 0], np.float32), half)[None])
        parts = []
        for start in range(0, tokens, _BLOCK):
            block = table[start : start + _BLOCK]
            # The gather copies whole rows, and is many times faster than Paddle's expand.
            rows = paddle.concat([one, paddle.as_real(block).reshape([-1, 2 * half])])
            expanded = paddle.gather(rows, self._row_of_head[: block.shape[0] * heads]).reshape([-1, heads, half, 2])
            parts.append(pairs[start : start + _BLOCK] * paddle.as_complex(expanded))
        return parts[0] if len(parts) == 1 else paddle.concat(parts)

    @cached_property
    def _row_of_head(self) -> paddle.Tensor:
        """[block * heads]: for each head of each token of a block, 1 + the token, or 0 for a head that stays."""
        rows = np.repeat(np.arange(1, _BLOCK + 1)[:, None], self.num_rotated + self.num_plain, axis=1)
        rows[:, self.num_rotated :] = 0
        return paddle.to_tensor(rows.reshape(-1))
