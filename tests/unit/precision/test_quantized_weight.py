"""Products by weights in few bits against products by the dequantised weights."""

import numpy as np
import paddle
import pytest
from paddle.nn.quant import weight_quantize

from erniekit.moe.experts import StackedLinear
from erniekit.nn import fused
from erniekit.nn.linear import Linear
from erniekit.precision import quantized_weight
from erniekit.precision.packing import unpack_for_kernels
from erniekit.precision.quantized_weight import KernelMatrix, QuantizedWeight
from erniekit.precision.weight_only import INT4, INT8, NF4, Scheme, dequantise, quantise

SCHEMES = pytest.mark.parametrize("scheme", [INT8, INT4, NF4], ids=lambda scheme: scheme.name)


def filled(weight: np.ndarray, scheme: Scheme) -> QuantizedWeight:
    held = QuantizedWeight(weight.shape, scheme)
    for place, matrix in enumerate(weight if weight.ndim == 3 else [weight]):
        held.fill(place, matrix)
    return held


def close(ours: np.ndarray, expected: np.ndarray) -> None:
    """fp32 sums of up to 200 terms in another order: 1e-6 of the largest."""
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@SCHEMES
@pytest.mark.parametrize("shape", [(64, 9), (131, 40), (200, 64)], ids=str)
@pytest.mark.parametrize("block", [1 << 21, 1000], ids=["whole", "blocks"])
def test_linear(scheme: Scheme, shape: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantized_weight, "_BLOCK", block)
    random = np.random.default_rng(0)
    weight, x = random.normal(size=shape).astype(np.float32), random.normal(size=(2, 3, shape[0])).astype(np.float32)
    upstream = random.normal(size=(2, 3, shape[1])).astype(np.float32)
    layer = Linear(*shape, bias=True)
    layer.attach_product(filled(weight, scheme))
    assert [name for name, _ in layer.named_parameters()] == ["bias"] and list(layer.state_dict()) == ["bias"]
    assert not list(layer.named_buffers())
    x_t = paddle.to_tensor(x, stop_gradient=False)
    y = layer(x_t)
    (y * paddle.to_tensor(upstream)).sum().backward()
    dense = dequantise(*quantise(weight, scheme), scheme, shape[0])
    np.testing.assert_array_equal(layer.product.dense(), dense)
    close(y.numpy(), x @ dense)
    close(x_t.grad.numpy(), upstream @ dense.T)


@SCHEMES
@pytest.mark.parametrize("counts", [[2, 3, 1], [0, 6, 0], [3, 0, 3], [0, 0, 0]], ids=str)
def test_experts(scheme: Scheme, counts: list[int]):
    random = np.random.default_rng(1)
    weight = random.normal(size=(3, 70, 11)).astype(np.float32)
    rows, upstream = (random.normal(size=(sum(counts), width)).astype(np.float32) for width in (70, 11))
    layer = StackedLinear(3, 70, 11, 0.02)
    layer.attach_product(filled(weight, scheme))
    rows_t = paddle.to_tensor(rows, stop_gradient=False)
    y = layer(rows_t, counts)
    assert y.shape == [sum(counts), 11]
    if not sum(counts):
        return
    (y * paddle.to_tensor(upstream)).sum().backward()
    own = layer.product.dense()[np.repeat(np.arange(3), counts)]
    close(y.numpy(), np.einsum("ri,rio->ro", rows, own))
    close(rows_t.grad.numpy(), np.einsum("ro,rio->ri", upstream, own))


def test_nothing_is_kept_for_inputs_without_gradient():
    held = filled(np.ones((64, 4), np.float32), INT8)
    assert held(paddle.ones([2, 64])).stop_gradient


def test_bytes():
    held = filled(np.ones((3, 128, 10), np.float32), INT4)
    assert held.num_bytes(None) == 3 * INT4.num_bytes(128, 10) == 3 * 10 * (64 + 2 * 4)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A device that passes for a GPU, whose kernel is replaced by what it computes, in fp32."""
    calls = []

    def weight_only_linear(x, weight, bias=None, weight_scale=None, weight_dtype="int8", arch=None, group_size=-1):
        bits = int(weight_dtype.removeprefix("int"))
        codes = unpack_for_kernels(weight.numpy(), bits).T.astype(np.float32)
        assert weight.dtype == paddle.int8 and weight_scale.dtype == paddle.bfloat16 and bias is None
        size = codes.shape[0] if group_size == -1 else group_size
        assert weight_scale.shape == (
            [codes.shape[1]] if group_size == -1 else [codes.shape[0] // size, codes.shape[1]]
        )
        scales = weight_scale.astype("float32").numpy().reshape(-1, codes.shape[1]).repeat(size, axis=0)
        calls.append(weight_dtype)
        return paddle.matmul(x, paddle.to_tensor(codes * scales))

    monkeypatch.setattr(quantized_weight, "weight_only_linear", weight_only_linear)
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    return calls


@pytest.mark.parametrize("scheme", [INT8, INT4], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("block", [1 << 21, 5000], ids=["whole", "blocks"])
def test_the_gpu_kernel_gets_codes_and_scales_of_every_group(
    scheme: Scheme, block: int, gpu: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Forward by the kernel, backward by plain operations, both by the weight that `dense` gives, which is that of
    weight_only but for scales in bf16.
    """
    monkeypatch.setattr(quantized_weight, "_BLOCK", block)
    random = np.random.default_rng(0)
    weight, x = random.normal(size=(192, 128)).astype(np.float32), random.normal(size=(3, 192)).astype(np.float32)
    weight[64:128] *= 100  # groups differ in their scales
    upstream = random.normal(size=(3, 128)).astype(np.float32)
    held = filled(weight, scheme)
    x_t = paddle.to_tensor(x, stop_gradient=False)
    y = held(x_t)
    (y * paddle.to_tensor(upstream)).sum().backward()
    dense = held.dense()
    assert gpu == [scheme.name]
    close(y.numpy(), x @ dense)
    close(x_t.grad.numpy(), upstream @ dense.T)
    fused.enable(False)
    try:
        close(held(x_t).numpy(), x @ dense)
    finally:
        fused.enable(True)
    assert gpu == [scheme.name], "plain operations call no kernel"
    plain = dequantise(*quantise(weight, scheme), scheme, 192)
    step = np.abs(weight).reshape(-1, scheme.group or 192, 128).max(axis=1).repeat(scheme.group or 192, axis=0)
    assert (np.abs(dense - plain) <= step * (2**-8 + 1.01 / scheme.levels[-1])).all()
    assert (np.abs(dense - plain) > step / 2 / scheme.levels[-1]).mean() < 0.05


@pytest.mark.parametrize("scheme", [INT8, INT4], ids=lambda scheme: scheme.name)
def test_codes_and_scales_are_those_of_paddles_quantiser(scheme: Scheme, gpu: list[str]):
    """On a CPU, where it knows groups. It divides by scales that are not yet rounded to bf16, so that codes at a border
    differ by one.
    """
    weight = np.random.default_rng(0).normal(size=(192, 128)).astype(np.float32)
    weight = paddle.to_tensor(weight).astype("bfloat16")
    [ours] = filled(weight.astype("float32").numpy(), scheme).quantized_tensors()
    theirs, scales = weight_quantize(weight, algo=f"weight_only_{scheme.name}", arch=80, group_size=scheme.group or -1)
    assert ours["codes"].shape == theirs.shape and ours["scales"].shape == scales.shape
    np.testing.assert_allclose(ours["scales"].astype("float32").numpy(), scales.astype("float32").numpy(), rtol=2**-7)
    codes = [unpack_for_kernels(made.numpy(), scheme.bits).astype(int) for made in (ours["codes"], theirs)]
    distance = np.abs(codes[0] - codes[1])
    assert distance.max() <= 1 and (distance > 0).mean() < (0.02 if scheme is INT4 else 0.25)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("shape", "scheme", "capability", "fits"),
    [
        ((128, 64), INT4, None, True),
        ((128, 64), INT8, (9, 0), True),
        ((128, 64), INT8, (10, 0), False),
        ((128, 64), INT8, (7, 5), False),
        ((96, 64), INT8, None, False),
        ((128, 48), INT8, None, False),
        ((128, 64), NF4, None, False),
    ],
)
def test_which_matrices_the_gpu_kernel_takes(
    shape: tuple[int, int], scheme: Scheme, capability: tuple[int, int] | None, fits: bool, monkeypatch
):
    monkeypatch.setattr(fused, "compute_capability", lambda: capability)
    assert isinstance(QuantizedWeight(shape, scheme).matrices[0], KernelMatrix) is fits


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("scheme", [INT8, INT4], ids=lambda scheme: scheme.name)
def test_the_gpu_kernel_gets_no_weight_that_is_not_finite(scheme: Scheme):
    weight = np.ones((128, 64), np.float32)
    weight[100, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        filled(weight, scheme)
