"""Routing against its formula: who is chosen, with what weight, and what the router learns from it."""

import numpy as np
import paddle
import pytest
from support.numeric import numeric_gradient

from erniekit.moe.layer import MoELayer, MoESizes, TokenInfo
from erniekit.moe.router import Gate, RouterOptions, route


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def weights_of(logits: np.ndarray, experts: np.ndarray, norm_min: float) -> np.ndarray:
    chosen = np.take_along_axis(softmax(logits), experts, axis=-1)
    return chosen / np.maximum(chosen.sum(-1, keepdims=True), norm_min)


def tensor(array: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(array.astype(np.float32), stop_gradient=False)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("norm_min", [1e-12, 0.6])
def test_weights_and_the_routers_gradient(top_k: int, norm_min: float):
    random = np.random.default_rng(0)
    logits, bias = random.normal(size=(9, 6)) * 2, random.normal(size=6) * 0.2
    upstream = random.normal(size=(9, top_k))
    logits_t = tensor(logits)
    routing = route(logits_t, paddle.to_tensor(bias.astype(np.float32)), RouterOptions(top_k, norm_min))
    expected = np.argsort(-(softmax(logits) + bias), axis=-1)[:, :top_k]
    np.testing.assert_array_equal(routing.experts.numpy(), expected)
    np.testing.assert_allclose(routing.probs.numpy(), softmax(logits), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(routing.weights.numpy(), weights_of(logits, expected, norm_min), rtol=1e-5)
    (routing.weights * tensor(upstream)).sum().backward()
    numeric = numeric_gradient(lambda x: weights_of(x, expected, norm_min), [logits], 0, upstream)
    np.testing.assert_allclose(logits_t.grad.numpy(), numeric, rtol=1e-3, atol=1e-5)


def test_the_correction_bias_changes_the_choice_and_not_the_weights():
    logits = np.zeros((3, 4))
    logits[:, 0] = 2.0
    bias = np.array([0.0, 0.0, 5.0, 3.0], dtype=np.float32)
    bias_t = paddle.to_tensor(bias, stop_gradient=False)
    routing = route(tensor(logits), bias_t, RouterOptions(2))
    assert routing.experts.numpy().tolist() == [[2, 3]] * 3
    np.testing.assert_allclose(routing.weights.numpy(), 0.5, rtol=1e-6)
    routing.weights.sum().backward()
    assert bias_t.grad is None


def test_the_losses_can_reach_the_router_through_probabilities_and_logits():
    logits = np.random.default_rng(1).normal(size=(5, 4))
    logits_t = tensor(logits)
    routing = route(logits_t, paddle.zeros([4]), RouterOptions(2))
    (routing.probs.square().sum() + routing.logits.square().sum()).backward()
    expected = numeric_gradient(lambda x: softmax(x) ** 2 + x**2, [logits], 0, np.ones((5, 4)))
    np.testing.assert_allclose(logits_t.grad.numpy(), expected, rtol=1e-3, atol=1e-5)


def test_the_gate_is_a_product_in_fp32():
    paddle.seed(0)
    gate = Gate(4, 3, 1)
    x = np.random.default_rng(2).normal(size=(5, 4)).astype(np.float32)
    assert gate(paddle.to_tensor(x).astype("bfloat16")).dtype == paddle.float32
    np.testing.assert_allclose(gate(paddle.to_tensor(x)).numpy(), x @ gate.weight.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_shared", [0, 2])
def test_the_sparse_layer_is_the_sum_over_chosen_and_shared_experts(num_shared: int):
    """Values and the gradient of x through router, experts and shared experts at once."""
    paddle.seed(0)
    layer = MoELayer(MoESizes(6, (5,), 4, num_shared, bias=False, init_std=0.5), RouterOptions(2))
    random = np.random.default_rng(3)
    layer.correction_bias.set_value(random.normal(size=(1, 4)).astype(np.float32) * 0.1)
    weights = {name: np.float64(value.numpy()) for name, value in layer.state_dict().items()}
    x, upstream = random.normal(size=(7, 6)), random.normal(size=(7, 6))

    def gated(row: np.ndarray, up_gate: np.ndarray, down: np.ndarray) -> np.ndarray:
        gate, up = np.split(row @ up_gate, 2, axis=-1)
        return (gate / (1 + np.exp(-gate)) * up) @ down

    def formula(x: np.ndarray) -> np.ndarray:
        logits = x @ weights["gate.weight"]
        experts = np.argsort(-(softmax(logits) + weights["moe_statics.e_score_correction_bias"]), axis=-1)[:, :2]
        shares = weights_of(logits, experts, 1e-12)
        out = np.zeros_like(x)
        for t, row in enumerate(x):
            for e, share in zip(experts[t], shares[t], strict=True):
                stack = [weights[f"experts.{name}.weight"][e] for name in ("up_gate_proj", "down_proj")]
                out[t] += share * gated(row, *stack)
        if num_shared:
            out += gated(x, weights["shared_experts.up_gate_proj.weight"], weights["shared_experts.down_proj.weight"])
        return out

    x_t = tensor(x)
    y, decisions = layer(x_t, TokenInfo([7]))
    routing = decisions[0].routing
    assert routing.experts.shape == [7, 2]
    np.testing.assert_allclose(y.numpy(), formula(x), rtol=1e-3, atol=1e-5)
    (y * tensor(upstream)).sum().backward()
    np.testing.assert_allclose(x_t.grad.numpy(), numeric_gradient(formula, [x], 0, upstream), rtol=1e-3, atol=1e-4)


def test_experts_with_small_logits_keep_their_order_and_weights():
    """Paddle's CPU softmax takes no logit for more than 64 below the largest: those would be equal."""
    logits = paddle.to_tensor([[100.0, 0.0, -10.0, 30.0], [0.0, -70.0, -90.0, -66.0]], stop_gradient=False)
    routing = route(logits, paddle.zeros([4]), RouterOptions(top_k=2))
    assert routing.experts.tolist() == [[0, 3], [0, 3]]
    np.testing.assert_allclose(routing.weights.numpy()[:, 1], np.exp([-70.0, -66.0]), rtol=1e-5)
    (routing.probs[1, 3] * 1e28).backward()
    assert logits.grad.numpy()[1, 3] == pytest.approx(np.exp(-66.0) * 1e28, rel=1e-4)
