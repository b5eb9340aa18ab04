"""Rotary position embedding over interleaved pairs (x[2j], x[2j+1]), as ERNIE 4.5 uses it (Su et al. 2021, arXiv
2104.09864, eq. 34).
"""

import numpy as np
import paddle


def inverse_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """theta^(-2j/head_dim) for j = 0, 1, ...: fp32 [head_dim/2], rounded as transformers and Paddle round it: the
    exponent, the power and its reciprocal are fp32 each. Published models were trained with these numbers; the last
    bit of a frequency moves an angle by 0.005 at position 100,000.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # numpy's own fp32 power is off by a bit now and then, and differs between processors.
    powers = np.power(np.float64(np.float32(theta)), exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1.0) / powers


def rotation_table(
    positions_T: np.ndarray, head_dim: int, theta: float, num_rotated: int, num_plain: int
) -> paddle.Tensor:
    """exp(i * position * theta^(-2j/head_dim)) for every head: complex64 [T, num_rotated + num_plain, head_dim/2].

    The `num_plain` last heads (the values in a fused q|k|v) get angle 0. Thus one complex product rotates a whole fused
    projection: no strided slice, no concatenation.
    """
    angles = positions_T.astype(np.float32)[:, None] * inverse_frequencies(head_dim, theta)[None, :]
    table = np.ones((len(positions_T), num_rotated + num_plain, head_dim // 2), dtype=np.complex64)
    table[:, :num_rotated] = (np.cos(angles) + 1j * np.sin(angles)).astype(np.complex64)[:, None, :]
    return paddle.to_tensor(table)


def rotate(x_THd: paddle.Tensor, table: paddle.Tensor, inverse: bool = False) -> paddle.Tensor:
    """Rotate x [T, heads, head_dim] by the table (by its conjugate if `inverse`, which is the adjoint). Computed in
    fp32, returned in x's dtype.
    """
    tokens, heads, head_dim = x_THd.shape
    pairs = paddle.as_complex(x_THd.astype("float32").reshape([tokens, heads, head_dim // 2, 2]))
    rotated = pairs * (paddle.conj(table) if inverse else table)
    return paddle.as_real(rotated).reshape([tokens, heads, head_dim]).astype(x_THd.dtype)
