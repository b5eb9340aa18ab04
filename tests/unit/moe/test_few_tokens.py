"""The sparse layer of a decoding step against the plain one."""

import numpy as np
import paddle
import pytest

from erniekit.moe import few_tokens
from erniekit.moe.layer import MoELayer, MoESizes, TokenInfo
from erniekit.moe.router import RouterOptions, route
from erniekit.nn import decoding

OPTIONS = [
    RouterOptions(2),
    RouterOptions(3, act="sigmoid", norm_min=1e-6),
    RouterOptions(2, grouped=True),
    RouterOptions(8),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_the_router_chooses_and_weighs_alike(options: RouterOptions, scale: float):
    random = np.random.default_rng(0)
    logits = (random.normal(size=(9, 8)) * scale).astype(np.float32)
    bias = random.normal(size=8).astype(np.float32)
    experts, weights = few_tokens.route(logits, bias, options)
    expected = route(paddle.to_tensor(logits), paddle.to_tensor(bias), options)
    order, other = np.argsort(experts, axis=1), np.argsort(expected.experts.numpy(), axis=1)
    np.testing.assert_array_equal(
        np.take_along_axis(experts, order, 1), np.take_along_axis(expected.experts.numpy(), other, 1)
    )
    found, wanted = np.take_along_axis(weights, order, 1), np.take_along_axis(expected.weights.numpy(), other, 1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)  # fp32 powers of two libraries


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("num_tokens", [1, 7])
@pytest.mark.parametrize("takes_weights", [False, True])
def test_a_layer_gives_what_it_gives_outside_a_decoding_step(
    options: RouterOptions, num_tokens: int, takes_weights: bool, monkeypatch: pytest.MonkeyPatch
):
    paddle.seed(0)
    layer = MoELayer(MoESizes(16, (24,), 8, 1, False, 0.5), options)
    layer.correction_bias.set_value(paddle.randn([1, 8]))
    layer.experts.takes_weights = takes_weights
    layer.eval()
    x, tokens = paddle.randn([num_tokens, 16]), TokenInfo([num_tokens])
    with paddle.no_grad():
        expected, routed = layer(x, tokens)
    assert routed
    calls: list[int] = []
    run = few_tokens.run
    monkeypatch.setattr(few_tokens, "run", lambda *args: calls.append(1) or run(*args))
    with decoding.running():
        found, _ = layer(x, tokens)
        all_text, _ = layer(x, TokenInfo([num_tokens], np.zeros(num_tokens, np.int64)))
    assert len(calls) == 2
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(all_text.numpy(), found.numpy())
