"""The gated block against its formula."""

import numpy as np
import paddle
import pytest
from support.numeric import numeric_gradient

from erniekit.moe.experts import StackedLinear
from erniekit.nn.linear import Linear
from erniekit.nn.mlp import SwiGLU, gated, swiglu


def formula(gate_up: np.ndarray) -> np.ndarray:
    gate, up = np.split(gate_up, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize("shape", [(5, 6), (1, 2), (2, 3, 8)])
def test_values_and_gradients_follow_the_formula(shape: tuple[int, ...]):
    random = np.random.default_rng(0)
    x, upstream = random.normal(size=shape) * 4, random.normal(size=(*shape[:-1], shape[-1] // 2))
    x_t = paddle.to_tensor(x.astype(np.float32), stop_gradient=False)
    y = swiglu(x_t)
    np.testing.assert_allclose(y.numpy(), formula(x), rtol=1e-4, atol=1e-5)
    (y * paddle.to_tensor(upstream.astype(np.float32))).sum().backward()
    np.testing.assert_allclose(x_t.grad.numpy(), numeric_gradient(formula, [x], 0, upstream), rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(x_t.numpy(), x.astype(np.float32))


def test_large_gates_saturate_without_nan():
    x = np.array([[-200.0, -30.0, 30.0, 200.0, 1.0, 2.0, 3.0, 4.0]])
    x_t = paddle.to_tensor(x.astype(np.float32), stop_gradient=False)
    y = swiglu(x_t)
    y.sum().backward()
    np.testing.assert_allclose(y.numpy(), [[0.0, 0.0, 90.0, 800.0]], atol=1e-5)
    np.testing.assert_allclose(x_t.grad.numpy(), [[0.0, 0.0, 3.0, 4.0, 0.0, 0.0, 30.0, 200.0]], atol=1e-5)


def test_the_kernel_for_other_devices_means_the_same():
    x = np.random.default_rng(1).normal(size=(4, 10)).astype(np.float32)
    kernel = paddle.nn.functional.swiglu(paddle.to_tensor(x)).numpy()
    np.testing.assert_allclose(swiglu(paddle.to_tensor(x)).numpy(), kernel, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_the_block_is_up_gate_and_down(bias: bool):
    paddle.seed(0)
    block = SwiGLU(6, 4, bias=bias, init_std=0.5)
    if bias:
        block.up_gate_proj.bias.set_value(np.arange(8, dtype=np.float32))
        block.down_proj.bias.set_value(np.arange(6, dtype=np.float32))
    weights = {name: np.float64(p.numpy()) for name, p in block.named_parameters()}
    x = np.random.default_rng(2).normal(size=(3, 6))
    hidden = formula(x @ weights["up_gate_proj.weight"] + weights.get("up_gate_proj.bias", 0.0))
    expected = hidden @ weights["down_proj.weight"] + weights.get("down_proj.bias", 0.0)
    np.testing.assert_allclose(block(paddle.to_tensor(x.astype(np.float32))).numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [None, [3, 0, 4], [7, 0, 0], [2, 4, 1]], ids=str)
@pytest.mark.parametrize("frozen", ["", "rows", "weight"])
def test_gate_and_up_as_products_of_their_own(counts: list[int] | None, frozen: str, monkeypatch: pytest.MonkeyPatch):
    """The same values and gradients as from one product that is divided."""
    paddle.seed(0)
    projection = Linear(6, 8, init_std=0.5) if counts is None else StackedLinear(3, 6, 8, 0.5)
    projection.weight.stop_gradient = frozen == "weight"
    x, upstream = (np.random.default_rng(n).normal(size=(7, n)).astype(np.float32) for n in (6, 4))
    results = []
    for lone in (True, False):
        if not lone:
            monkeypatch.setattr(type(projection), "lone_weight", None)
        rows = paddle.to_tensor(x, stop_gradient=frozen == "rows")
        y = gated(projection, rows, counts)
        (y * paddle.to_tensor(upstream)).sum().backward()
        results.append((y, rows.grad, projection.weight.grad))
        projection.weight.clear_grad()
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_what_is_attached_to_a_projection_is_not_left_out():
    projection = Linear(6, 8, bias=True, init_std=0.5)
    assert projection.lone_weight is None
    plain = Linear(6, 8)
    assert plain.lone_weight is plain.weight
    plain.adapter = paddle.nn.Identity()
    assert plain.lone_weight is None
    plain.adapter, plain.gather_input = None, lambda x: x
    assert plain.lone_weight is None
