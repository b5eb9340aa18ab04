"""RMSNorm and LayerNorm against their formulas."""

import numpy as np
import paddle
import pytest
from support.numeric import numeric_gradient

from erniekit.nn import norm
from erniekit.nn.norm import LayerNorm, RMSNorm, layer_norm, rms_norm
from erniekit.utils import runtime

EPSILON = 1e-5


def formula(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)


def tensor(array: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(array.astype(np.float32), stop_gradient=False)


@pytest.mark.parametrize("shape", [(5, 8), (1, 8), (300, 12), (2, 3, 8)])
def test_values_and_gradients_follow_the_formula(shape: tuple[int, ...]):
    random = np.random.default_rng(0)
    x, weight, upstream = random.normal(size=shape), random.normal(size=shape[-1]), random.normal(size=shape)
    x[0] *= 100.0  # rows of very different size share nothing
    x_t, weight_t = tensor(x), tensor(weight)
    y = rms_norm(x_t, weight_t, EPSILON)
    np.testing.assert_allclose(y.numpy(), formula(x, weight), rtol=2e-6, atol=1e-6)
    (y * tensor(upstream)).sum().backward()
    np.testing.assert_allclose(
        weight_t.grad.numpy(), numeric_gradient(formula, [x, weight], 1, upstream), rtol=1e-4, atol=1e-4
    )
    if x.size < 500:
        np.testing.assert_allclose(
            x_t.grad.numpy(), numeric_gradient(formula, [x, weight], 0, upstream), rtol=1e-4, atol=1e-5
        )


def test_the_plain_formula_for_other_devices_is_the_same():
    random = np.random.default_rng(0)
    x, weight, upstream = random.normal(size=(5, 8)), random.normal(size=8), random.normal(size=(5, 8))
    results = []
    for function in (norm._plain, rms_norm):
        x_t, weight_t = tensor(x), tensor(weight)
        y = function(x_t, weight_t, EPSILON)
        (y * tensor(upstream)).sum().backward()
        results.append((y.numpy(), x_t.grad.numpy(), weight_t.grad.numpy()))
    for plain, ours in zip(*results, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6)


def test_both_ways_of_the_cpu_are_the_same(monkeypatch: pytest.MonkeyPatch):
    """oneDNN's, and products with vectors where it is not available."""
    random = np.random.default_rng(2)
    # A gradient of one sign: the term that layer normalisation has too many is then as large as the others.
    x, weight, upstream = (
        random.normal(size=(40, 16)) + 1.0,
        random.normal(size=16),
        random.uniform(1, 2, size=(40, 16)),
    )
    results = []
    for available in (True, False):
        if not available:
            monkeypatch.setattr(norm.cpu_ops, "applies", lambda tensor: False)
        x_t, weight_t = tensor(x), tensor(weight)
        y = rms_norm(x_t, weight_t, EPSILON)
        (y * tensor(upstream)).sum().backward()
        results.append((y.numpy(), x_t.grad.numpy(), weight_t.grad.numpy()))
    for ours, expected in zip(*results, strict=True):
        # A few roundings of numbers up to 10, and sums of 40 of them, in fp32.
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_the_bits_of_a_gradient_do_not_depend_on_how_many_threads_there_were_before():
    random = np.random.default_rng(3)
    x, weight = random.normal(size=(59, 32)), random.normal(size=32)

    def gradient() -> bytes:
        x_t, weight_t = tensor(x), tensor(weight)
        (rms_norm(x_t, weight_t, EPSILON) * x_t).sum().backward()
        return weight_t.grad.numpy().tobytes()

    before = runtime.threads_in_use()
    try:
        runtime.set_threads(1)
        gradient()
        runtime.set_threads(2)
        after_one = gradient()
        norm.cpu_norm._layer_norm_backward.cache_clear()
        assert gradient() == after_one
    finally:
        runtime.set_threads(before or None)


def test_a_row_of_zeros_stays_zero_and_its_gradient_finite():
    x, weight = tensor(np.zeros((2, 4))), tensor(np.ones(4))
    y = rms_norm(x, weight, EPSILON)
    y.sum().backward()
    assert not y.numpy().any()
    np.testing.assert_allclose(x.grad.numpy(), EPSILON**-0.5, rtol=1e-5)


def test_what_is_frozen_gets_no_gradient_and_the_other_still_does():
    x, weight = tensor(np.ones((3, 4))), paddle.ones([4])
    rms_norm(x, weight, EPSILON).square().sum().backward()
    assert weight.grad is None and x.grad is not None
    x, weight = paddle.ones([3, 4]), tensor(np.ones(4))
    rms_norm(x, weight, EPSILON).square().sum().backward()
    assert x.grad is None and weight.grad is not None


def test_backward_leaves_its_inputs_alone():
    """The same x feeds the residual stream, and the same dy may reach other consumers."""
    random = np.random.default_rng(1)
    x, weight = random.normal(size=(6, 8)), random.normal(size=8)
    x_t, weight_t = tensor(x), tensor(weight)
    y = rms_norm(x_t, weight_t, EPSILON)
    (y * y + y + x_t * x_t).sum().backward()
    np.testing.assert_array_equal(x_t.numpy(), x.astype(np.float32))
    expected = numeric_gradient(
        lambda a, b: formula(a, b) ** 2 + formula(a, b) + a * a, [x, weight], 0, np.ones((6, 8))
    )
    np.testing.assert_allclose(x_t.grad.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_the_layer_starts_as_plain_normalisation():
    x = np.random.default_rng(2).normal(size=(4, 16))
    y = RMSNorm(16, EPSILON)(tensor(x)).numpy()
    np.testing.assert_allclose(y, formula(x, np.ones(16)), rtol=1e-5, atol=1e-6)


def test_bfloat16_input_keeps_its_dtype_and_fp32_statistics():
    x = np.random.default_rng(3).normal(size=(4, 64))
    x_t = paddle.to_tensor(x.astype(np.float32)).astype("bfloat16")
    y = rms_norm(x_t, paddle.ones([64], dtype="bfloat16"), EPSILON)
    assert y.dtype == paddle.bfloat16
    rounded = x_t.astype("float32").numpy().astype(np.float64)
    np.testing.assert_allclose(y.astype("float32").numpy(), formula(rounded, np.ones(64)), rtol=1e-2)


@pytest.mark.parametrize("shape", [(5, 8), (1, 8), (300, 12), (2, 3, 8)])
def test_layer_norm_and_its_gradients_are_those_of_paddles_kernel(shape: tuple[int, ...]):
    random = np.random.default_rng(4)
    x, upstream = random.normal(3.0, 2.0, shape), random.normal(size=shape)
    x[0] *= 100.0
    weight, bias = random.normal(size=shape[-1]), random.normal(size=shape[-1])
    results = []
    for function in (layer_norm, lambda x, w, b, eps: paddle.nn.functional.layer_norm(x, shape[-1], w, b, eps)):
        tensors = tensor(x), tensor(weight), tensor(bias)
        y = function(*tensors, EPSILON)
        (y * tensor(upstream)).sum().backward()
        np.testing.assert_array_equal(tensors[0].numpy(), x.astype(np.float32))
        results.append((y.numpy(), *(each.grad.numpy() for each in tensors)))
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_layer_norm_gives_gradients_to_what_is_trained_alone(trained: int):
    arguments = [
        paddle.to_tensor(np.arange(12, dtype=np.float32).reshape(3, 4) ** 2),
        paddle.ones([4]),
        paddle.ones([4]),
    ]
    arguments[trained].stop_gradient = False
    layer_norm(*arguments, EPSILON).square().sum().backward()
    assert [each.grad is not None for each in arguments] == [number == trained for number in range(3)]


def test_the_layer_norm_layer_has_mean_0_and_deviation_1_at_first():
    y = LayerNorm(64, EPSILON)(tensor(np.random.default_rng(5).normal(7.0, 3.0, (4, 64)))).numpy()
    np.testing.assert_allclose(y.mean(axis=1), 0.0, atol=1e-5)
    np.testing.assert_allclose(y.std(axis=1), 1.0, rtol=1e-4)
