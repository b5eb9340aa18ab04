"""AdamW against numpy in float64; which parameter gets which rule."""

import numpy as np
import paddle
import pytest
from support.optimizer_state import state_arrays

from erniekit.config import Config
from erniekit.parallel.grad_sync import GradientSync
from erniekit.training.adamw import AdamW, ParamRule, layer_depth, rule_for


def parameter(values):
    p = paddle.create_parameter([len(values)], "float32")
    p.set_value(np.asarray(values, np.float32))
    return p


def adamw(p, rules):
    return AdamW(GradientSync.single([("w", p)]), rules, 0.9, 0.95, 1e-8)


def give_gradient(p, gradient):
    p.clear_gradient()
    (p * paddle.to_tensor(np.asarray(gradient, np.float32))).sum().backward()


def reference_adamw(w, gradients, lr, decay, beta1=0.9, beta2=0.95, eps=1e-8):
    """Loshchilov & Hutter, algorithm 2, in float64."""
    w, m, v = np.asarray(w, np.float64), 0.0, 0.0
    for t, g in enumerate(np.asarray(gradients, np.float64), start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        w = w - lr * decay * w
        w = w - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    return w


@pytest.mark.parametrize(("ratio", "decay"), [(1.0, 0.0), (1.0, 0.1), (0.25, 0.1)])
def test_steps_match_the_published_algorithm(ratio, decay):
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=6), rng.normal(size=(5, 6))
    p = parameter(start)
    optimizer = adamw(p, {"w": ParamRule(ratio, decay)})
    for gradient in gradients:
        give_gradient(p, gradient)
        optimizer.step(1e-2)
    # fp32 against fp64: a few units in the last place of numbers of size 1
    np.testing.assert_allclose(p.numpy(), reference_adamw(start, gradients, 1e-2 * ratio, decay), atol=2e-6)


def test_state_goes_out_and_back_in_bit_for_bit():
    rng = np.random.default_rng(1)
    start, gradients = rng.normal(size=4), rng.normal(size=(4, 4))
    rules = {"w": ParamRule(1.0, 0.1)}
    whole, first = parameter(start), parameter(start)
    one = adamw(whole, rules)
    two = adamw(first, rules)
    for gradient in gradients[:2]:
        for p, optimizer in ((whole, one), (first, two)):
            give_gradient(p, gradient)
            optimizer.step(1e-2)
    second = parameter(first.numpy())
    three = adamw(second, rules)
    for key, array in state_arrays(two).items():
        three.load_state_array(key, array)
    for gradient in gradients[2:]:
        for p, optimizer in ((whole, one), (second, three)):
            give_gradient(p, gradient)
            optimizer.step(1e-2)
    assert whole.numpy().tobytes() == second.numpy().tobytes()


def test_state_of_another_shape_is_refused():
    optimizer = adamw(parameter([1.0, 2.0]), {"w": ParamRule(1.0, 0.0)})
    assert optimizer.state_shapes() == {"w/moment1": (2,), "w/moment2": (2,), "w/beta1_pow": (1,), "w/beta2_pow": (1,)}
    with pytest.raises(ValueError, match=r"w/moment1: shape \(3,\), not \(2,\)"):
        optimizer.load_state_array("w/moment1", np.zeros(3, np.float32))
    with pytest.raises(KeyError):
        optimizer.load_state_array("v/moment1", np.zeros(2, np.float32))


def test_a_parameter_without_gradient_is_left_alone():
    p = parameter([1.0, 2.0])
    adamw(p, {"w": ParamRule(1.0, 0.5)}).step(0.1)
    assert p.numpy().tolist() == [1.0, 2.0]


def test_master_copies_follow_weights_that_were_loaded_later():
    p = paddle.zeros([2], dtype="bfloat16")
    p.stop_gradient = False
    optimizer = adamw(p, {"w": ParamRule(1.0, 0.0)})
    p.set_value(paddle.to_tensor([1.0, -2.0]).astype("bfloat16"))
    optimizer.reset()
    assert optimizer.state["w"]["master"].numpy().tolist() == [1.0, -2.0]


def test_frozen_parameters_have_no_state():
    p = parameter([1.0])
    p.stop_gradient = True
    assert adamw(p, {"w": ParamRule(1.0, 0.0)}).state == {}


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("model.embed_tokens.weight", 0),
        ("model.layers.0.mlp.down_proj.weight", 1),
        ("model.layers.11.input_layernorm.weight", 12),
        ("model.norm.weight", 13),
        ("model.mtp_block.0.mlp.down_proj.weight", 13),
        ("lm_head.weight", 14),
    ],
)
def test_depth_grows_from_the_embedding_to_the_head(name, depth):
    assert layer_depth(name, num_layers=12) == depth


def test_layerwise_rates_run_from_the_bound_to_one():
    cfg = Config(layerwise_lr_decay_bound=0.5)
    ratios = [
        rule_for(n, cfg, 12).lr_ratio for n in ("model.embed_tokens.weight", "model.layers.6.x", "lm_head.weight")
    ]
    assert ratios == pytest.approx([0.5, 0.75, 1.0])


def test_norms_and_biases_are_not_decayed_and_every_gate_has_its_own_rate():
    cfg = Config(weight_decay=0.1, moe_gate_lr_ratio=0.01)
    assert rule_for("model.layers.3.input_layernorm.weight", cfg, 4).weight_decay == 0.0
    assert rule_for("model.layers.3.self_attn.qkv_proj.bias", cfg, 4).weight_decay == 0.0
    assert rule_for("model.embed_tokens.weight", cfg, 4).weight_decay == 0.1
    for layer in range(4):
        assert rule_for(f"model.layers.{layer}.mlp.gate.weight", cfg, 4).lr_ratio == 0.01
    assert rule_for("model.layers.0.mlp.up_gate_proj.weight", cfg, 4).lr_ratio == 1.0


def test_an_adapters_factors_have_their_own_rates_and_its_magnitude_no_decay():
    cfg = Config(weight_decay=0.1, lora_plus_scale=4.0)
    prefix = "model.layers.0.self_attn.qkv_proj.adapter."
    rules = {own: rule_for(prefix + own, cfg, 4) for own in ("A_q", "B_q", "magnitude_q")}
    assert {own: rule.lr_ratio for own, rule in rules.items()} == {"A_q": 1.0, "B_q": 4.0, "magnitude_q": 1.0}
    assert {own: rule.weight_decay for own, rule in rules.items()} == {"A_q": 0.1, "B_q": 0.1, "magnitude_q": 0.0}
