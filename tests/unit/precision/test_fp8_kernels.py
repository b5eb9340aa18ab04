"""What Paddle's FP8 kernels are called with, and what is made of their results.

Paddle has these kernels on Hopper GPUs only. Here each is replaced by its documented arithmetic, which checks the sizes
and layouts that it is given; what comes out must be what the emulation computes.
"""

import numpy as np
import paddle
import pytest

from erniekit.precision import fp8_kernels
from erniekit.precision.fp8_emulated import Emulated, Recipe
from erniekit.precision.fp8_experts import Fp8Experts
from erniekit.precision.fp8_kernels import PaddleKernels
from erniekit.precision.fp8_product import Fp8Product
from erniekit.precision.fp8_tensor import Quantised, Tile, quantise

COUNTS = [130, 0, 3, 128]
ROWS, IN, OUT = sum(COUNTS), 256, 128


class Kernels:
    """Stands for paddle.incubate.nn.functional."""

    @staticmethod
    def fp8_quant_blockwise(
        x,
        input_transpose=False,
        output_scale_transpose=True,
        return_transpose_only=False,
        using_pow2_scale=True,
        quant_method="1x128",
    ):
        assert x.dtype in (paddle.bfloat16, paddle.float32) and x.ndim == 2
        assert not output_scale_transpose, "the package turns scales itself"
        assert x.shape[1] % 128 == 0
        if quant_method == "1x128":
            assert not input_transpose
            made = quantise(x, Tile(1, 128), pow2=using_pow2_scale)
            return made.codes, made.scales
        assert quant_method == "128x128" and x.shape[0] % 128 == 0
        made = quantise(x.T if input_transpose else x, Tile(128, 128), pow2=using_pow2_scale)
        assert input_transpose == return_transpose_only
        return made.codes, made.scales

    @staticmethod
    def fp8_gemm_blockwise(a, a_scale, b, b_scale, out_dtype, is_a_1d_scaled=True, is_b_1d_scaled=True):
        (m, k), (n, other) = a.shape, b.shape
        assert k == other and k % 128 == 0 and m % 128 == 0 and n % 128 == 0
        assert is_a_1d_scaled and a_scale.shape == [k // 128, m] and a_scale.is_contiguous()
        if not is_b_1d_scaled:  # the kernel reads rows of a multiple of four scales, whatever the shape says
            assert b_scale.shape == [n // 128, -(-k // 512) * 4] and b_scale.is_contiguous()
            b_scale = b_scale[:, : k // 128]
        assert b_scale.shape == ([k // 128, n] if is_b_1d_scaled else [n // 128, k // 128])
        left = Quantised(a, a_scale.T, Tile(1, 128)).dequantised()
        turned = b_scale.T if is_b_1d_scaled else b_scale
        right = Quantised(b, turned, Tile(1 if is_b_1d_scaled else 128, 128)).dequantised()
        return paddle.matmul(left, right, transpose_y=True).astype(out_dtype)

    @staticmethod
    def fused_transpose_split_quant(x, input_scales, tokens_per_expert, pow_2_scales=False):
        assert sum(tokens_per_expert) == x.shape[0] and all(count % 128 == 0 for count in tokens_per_expert)
        if input_scales is not None:
            assert input_scales.shape == [x.shape[0], x.shape[1] // 128]
            x = Quantised(x, input_scales, Tile(1, 128)).dequantised()
        codes, scales, begin = [], [], 0
        for count in tokens_per_expert:
            made = quantise(x[begin : begin + count].T, Tile(1, 128), pow2=pow_2_scales)
            codes.append(made.codes)
            scales.append(made.scales.T.contiguous())
            begin += count
        return codes, scales

    @staticmethod
    def fused_swiglu_weighted_bwd(o1, do2_s, probs):
        assert probs.dtype == paddle.float32 and probs.shape == [o1.shape[0], 1]
        return Emulated(Recipe("blockwise")).gated_backward(o1, do2_s, probs)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_kernels, "kernels", Kernels)


def tensors(*shapes: tuple[int, ...]) -> list[paddle.Tensor]:
    random = np.random.default_rng(0)
    made = [paddle.to_tensor(random.normal(size=shape).astype(np.float32)) for shape in shapes]
    for tensor in made:
        tensor.stop_gradient = False
    return made


def assert_equal(found: list[paddle.Tensor], expected: list[paddle.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        # Sums of some hundred numbers up to the largest of the result, in another order in fp32.
        atol = max(1e-4, 1e-6 * float(theirs.abs().max()))
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("pow2", [True, False])
@pytest.mark.parametrize("stores_fp8", [True, False])
@pytest.mark.parametrize("counts", [None, COUNTS], ids=["one matrix", "experts"])
def test_products_are_those_of_the_emulation(pow2: bool, stores_fp8: bool, counts: list[int] | None):
    results = []
    for backend in (PaddleKernels, Emulated):
        weight = (IN, OUT) if counts is None else (len(COUNTS), IN, OUT)
        x, w, dy = tensors((ROWS, IN), weight, (ROWS, OUT))
        y = Fp8Product(backend(Recipe("blockwise", pow2)), "FP8", stores_fp8)(x, w, counts)
        (y * dy).sum().backward()
        results.append([y, x.grad, w.grad])
    assert_equal(*results)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("again", [True, False])
def test_experts_are_those_of_the_emulation(weighted: bool, again: bool):
    results = []
    for backend in (PaddleKernels, Emulated):
        x, up_gate, down, weights, dy = tensors(
            (ROWS, IN), (len(COUNTS), IN, 2 * OUT), (len(COUNTS), OUT, IN), (ROWS, 1), (ROWS, IN)
        )
        block = Fp8Experts(backend(Recipe("blockwise")), True, again)
        y = block(x, up_gate, down, COUNTS, weights if weighted else None)
        (y * dy / 100).sum().backward()
        results.append([y, x.grad, up_gate.grad, down.grad, *([weights.grad] if weighted else [])])
    assert_equal(*results)


def test_sizes_that_are_no_multiples_of_a_block_are_refused():
    kernels = PaddleKernels(Recipe("blockwise"))
    assert kernels.refuses(256, 3584) == ""
    assert kernels.refuses(256, 448) == "[256, 448]: Paddle's kernels need multiples of 128"
