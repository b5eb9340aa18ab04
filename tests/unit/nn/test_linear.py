"""The bias of a projection against Paddle's own addition and its gradient."""

import numpy as np
import paddle
import pytest

from erniekit.nn.linear import Linear, add_bias


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (0, 3)])
def test_value_and_gradients_are_those_of_an_addition(shape: tuple[int, ...]):
    random = np.random.default_rng(0)
    y, bias, upstream = (random.normal(size=size).astype(np.float32) for size in (shape, shape[-1], shape))
    results = []
    for function in (add_bias, paddle.add):
        tensors = [paddle.to_tensor(each, stop_gradient=False) for each in (y, bias)]
        out = function(*tensors)
        (out * paddle.to_tensor(upstream)).sum().backward()
        results.append([out.numpy(), *(each.grad.numpy() for each in tensors)])
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


def test_a_frozen_bias_gets_no_gradient_and_lets_that_of_the_product_through():
    layer = Linear(3, 2, bias=True)
    layer.bias.stop_gradient = True
    layer(paddle.ones([4, 3])).sum().backward()
    assert layer.bias.grad is None
    np.testing.assert_array_equal(layer.weight.grad.numpy(), np.full([3, 2], 4.0, np.float32))


def test_a_trained_bias_behind_a_frozen_matrix_gets_its_gradient():
    layer = Linear(3, 2, bias=True)
    layer.weight.stop_gradient = True
    layer(paddle.ones([4, 3])).sum().backward()
    np.testing.assert_array_equal(layer.bias.grad.numpy(), [4.0, 4.0])
