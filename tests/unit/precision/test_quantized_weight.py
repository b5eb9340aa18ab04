"""Products by weights in few bits against products by the dequantised weights."""

import numpy as np
import paddle
import pytest

from erniekit.moe.experts import StackedLinear
from erniekit.nn.linear import Linear
from erniekit.precision import quantized_weight
from erniekit.precision.quantized_weight import QuantizedWeight
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
