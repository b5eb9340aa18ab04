"""Paddle's fused GPU operators: where they take the place of plain operations, and the calls.

`applies` is the only place that chooses. Each call stands beside plain operations that compute the same, which are the
reference and the CPU path. The element types are those that Paddle 3.3 registers a GPU kernel for; others take the
plain operations. tests/gpu checks shapes and types of the calls with Paddle's own inference, and their values against
kernels written for that test. On a GPU they have never run: `fused_operators: false` turns them off.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import paddle
from paddle.incubate.nn import functional as incubate

MAX_EXPERTS = 64  # of moe_permute and moe_unpermute
MAX_CHOICES = 8
# Elements that moe_permute copies at a time, and of a head that flashmask_attention reads at a time.
_VECTOR = 8
_MAX_HEAD_DIM = 256  # of flashmask_attention


@dataclass(frozen=True)
class Operator:
    """An operator of Paddle: its name, the element types of its GPU kernel, and what it computes here."""

    name: str
    dtypes: tuple[str, ...]
    purpose: str


_HALVES = ("float16", "bfloat16")
RMS_NORM = Operator("fused_rms_norm_ext", ("float32", "bfloat16"), "RMSNorm of the decoder")
ROTARY = Operator("fused_rotary_position_embedding", ("float32", *_HALVES), "rotation of queries and keys, in float32")
SWIGLU = Operator("swiglu", ("float32", *_HALVES), "silu(gate) * up")
FLASH_MASK = Operator("flashmask_attention", _HALVES, "attention over packed documents")
GROUPED_PRODUCT = Operator("batched_gemm", ("float32", "bfloat16"), "products of all experts in one call")
PERMUTE = Operator("moe_permute", ("bfloat16",), "copies of tokens, sorted by expert")
UNPERMUTE = Operator("moe_unpermute", ("bfloat16",), "sum of each token's rows, in float32")
ADD_PRODUCT = Operator("fused_linear_param_grad_add", _HALVES, "gradient of the output head, summed in float32")
OPERATORS = (RMS_NORM, ROTARY, SWIGLU, FLASH_MASK, GROUPED_PRODUCT, PERMUTE, UNPERMUTE, ADD_PRODUCT)

_enabled = True


def enable(enabled: bool) -> None:
    """Use the fused operators where they apply, or, to look for a mistake in one of them, nowhere."""
    global _enabled
    _enabled = enabled


def are_enabled() -> bool:
    """Whether fused operators are used where they apply."""
    return _enabled


def applies(operator: Operator, x: paddle.Tensor) -> bool:
    """Whether `operator` computes with x: it is on a GPU, and the kernel has its element type."""
    return _enabled and x.place.is_gpu_place() and str(x.dtype).removeprefix("paddle.") in operator.dtypes


@lru_cache(maxsize=1)
def compute_capability() -> tuple[int, int] | None:
    """That of this process's GPU. None where Paddle is built without CUDA, and a test takes a CPU for a GPU."""
    return None if paddle.version.cuda() == "False" else tuple(paddle.device.cuda.get_device_capability())


def flash_mask_applies(qkv: paddle.Tensor, head_dim: int) -> bool:
    """Whether `flash_mask` computes with heads of this size. Its kernel needs compute capability 8.0 (Ampere)."""
    if head_dim % _VECTOR or head_dim > _MAX_HEAD_DIM or not applies(FLASH_MASK, qkv):
        return False
    return (compute_capability() or (8, 0)) >= (8, 0)


def permute_applies(x_TD: paddle.Tensor, num_experts: int, top_k: int) -> bool:
    """Whether `permute` and `unpermute` compute with these tokens."""
    fits = num_experts <= MAX_EXPERTS and top_k <= MAX_CHOICES and x_TD.shape[-1] % _VECTOR == 0
    return fits and applies(PERMUTE, x_TD)


def rms_norm(x: paddle.Tensor, weight_D: paddle.Tensor, epsilon: float) -> paddle.Tensor:
    """weight * x / rms(x) over the last axis, with fp32 inside. The result has the weight's element type."""
    return incubate.fused_rms_norm_ext(x, weight_D, epsilon)[0]


def rotate(x_THd: paddle.Tensor, cos_1T1d: paddle.Tensor, sin_1T1d: paddle.Tensor) -> paddle.Tensor:
    """Neighbouring pairs of x [T, heads, d] turned by the angles of their token. The kernel reads both tables in the
    element type of x. The angles of a long text need fp32, so x is fp32.
    """
    turned, _, _ = incubate.fused_rotary_position_embedding(x_THd.unsqueeze(0), sin=sin_1T1d, cos=cos_1T1d)
    return turned.squeeze(0)


def swiglu(gate_up: paddle.Tensor) -> paddle.Tensor:
    """silu(gate) * up for gate | up [..., 2F]."""
    return paddle.nn.functional.swiglu(gate_up)


def flash_mask(
    q_1THd: paddle.Tensor,
    k_1TGd: paddle.Tensor,
    v_1TGd: paddle.Tensor,
    ends_11T1: paddle.Tensor,
    dropout: float = 0.0,
    seed: int = 0,
) -> paddle.Tensor:
    """Causal attention in which query i sees key j where j <= i < ends[j]: [1, T, H, d]. `ends` is int32. `dropout`:
    the share of weights that are dropped, by a mask that follows from `seed`, and not from Paddle's generator.
    """
    attention = paddle.nn.functional.flashmask_attention
    # The kernel takes the seed, and how many numbers have been drawn, from the host's memory.
    drawn = paddle.to_tensor([seed, 0], dtype="int64", place=paddle.CPUPlace()) if dropout else None
    return attention(
        q_1THd,
        k_1TGd,
        v_1TGd,
        startend_row_indices=ends_11T1,
        dropout=dropout,
        causal=True,
        fixed_seed_offset=drawn,
    )


def grouped_product(
    left: paddle.Tensor,
    right: paddle.Tensor,
    counts: Sequence[int],
    transpose_left: bool = False,
    transpose_right: bool = False,
) -> paddle.Tensor:
    """The products of E groups of rows that lie one after another: rows [R, a] times W [E, a, b] (or its transpose), or
    with `transpose_left` rows [R, a] and rows [R, b] -> [E, a, b].
    """
    return incubate.batched_gemm(left, right, list(counts), transpose_left, transpose_right)


def permute(
    x_TD: paddle.Tensor, experts_TK: paddle.Tensor, weights_TK: paddle.Tensor, counts: Sequence[int]
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """Copies of tokens sorted by expert, tokens in order within an expert.

    experts: int32, -1 for a pair that is left out. weights: fp32. counts: the rows of each expert.

    Returns:
        rows [R, D]; the row of each token and expert, int32 [T, E], -1 where there is none; the weight of each row,
        fp32 [R, 1].
    """
    made = paddle.nn.functional.moe_permute(x_TD, None, experts_TK, weights_TK, len(counts), list(counts), 1)
    return made[0], made[1], made[2].reshape([-1, 1])


def unpermute(
    rows_RD: paddle.Tensor, row_of_TE: paddle.Tensor, experts_TK: paddle.Tensor, weights_R1: paddle.Tensor
) -> paddle.Tensor:
    """The sum of each token's rows [T, D], in fp32 and rounded once."""
    num_tokens, num_experts = row_of_TE.shape
    made = paddle.nn.functional.moe_unpermute(rows_RD, row_of_TE, experts_TK, weights_R1, num_tokens, num_experts)
    return made[0]


def add_product(left: paddle.Tensor, right: paddle.Tensor, total: paddle.Tensor | None) -> paddle.Tensor:
    """total + left^T right for 16-bit [R, a] and [R, b]: fp32 [a, b], never rounded to 16 bits. `total` is changed."""
    return paddle._C_ops.fused_linear_param_grad_add(left, right, total, None, True, False)[0]
