"""AdamW against numpy in float64; which parameter gets which rule."""

import numpy as np
import paddle
import pytest
from support.host_reads import counted
from support.optimizer_state import state_arrays
from support.tiny_models import tiny_model
from support.vision_directories import vision_config

from erniekit.config import Config
from erniekit.lora import LoraOptions, attach
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.moe.layer import MoELayer, MoESizes
from erniekit.moe.router import RouterOptions
from erniekit.parallel.zero import ShardedParameters
from erniekit.training.adamw import AdamW, ParamRule, parameter_rules


def parameter(values):
    p = paddle.create_parameter([len(values)], "float32")
    p.set_value(np.asarray(values, np.float32))
    return p


def adamw(p, rules):
    return AdamW(ShardedParameters.single([("w", p)]), rules, 0.9, 0.95, 1e-8)


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
        optimizer.step({"w": p.grad}, 1e-2)
    # fp32 against fp64: a few units in the last place of numbers of size 1
    np.testing.assert_allclose(p.numpy(), reference_adamw(start, gradients, 1e-2 * ratio, decay), atol=2e-6)


def test_a_step_is_seen_by_what_is_derived_from_the_parameter():
    """Paddle's kernel leaves inplace_version as it is; what is cached for a weight relies on it."""
    p = parameter([1.0, 2.0])
    optimizer = adamw(p, {"w": ParamRule(1.0, 0.0)})
    give_gradient(p, [1.0, 1.0])
    before = p.inplace_version
    optimizer.step({"w": p.grad}, 0.1)
    assert p.inplace_version > before


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
            optimizer.step({"w": p.grad}, 1e-2)
    second = parameter(first.numpy())
    three = adamw(second, rules)
    for key, array in state_arrays(two).items():
        three.load_state_array(key, array)
    for gradient in gradients[2:]:
        for p, optimizer in ((whole, one), (second, three)):
            give_gradient(p, gradient)
            optimizer.step({"w": p.grad}, 1e-2)
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
    adamw(p, {"w": ParamRule(1.0, 0.5)}).step({}, 0.1)
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


def rules(kind, cfg, lora=False, **changes):
    """The rules of a tiny model by parameter, if asked with adapters."""
    model = tiny_model(kind, **changes)
    if lora:
        attach(model, LoraOptions(rank=2, dora=kind == "dense"))
    return parameter_rules(model, cfg)


def test_layerwise_rates_grow_from_the_embedding_to_the_head():
    found = rules(
        "dense",
        Config(layerwise_lr_decay_bound=0.5),
        tie_word_embeddings=False,
        num_hidden_layers=4,
        num_nextn_predict_layers=1,
    )
    depths = {
        "model.embed_tokens.weight": 0,
        "model.layers.0.mlp.down_proj.weight": 1,
        "model.layers.3.input_layernorm.weight": 4,
        "model.norm.weight": 5,
        "model.mtp_block.0.mlp.down_proj.weight": 5,
        "model.mtp_emb_norm.0.weight": 5,
        "lm_head.weight": 6,
    }
    assert {name: found[name].lr_ratio for name in depths} == {
        name: 0.5 + 0.5 * depth / 6 for name, depth in depths.items()
    }


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("lora", [False, True])
def test_norms_biases_and_magnitudes_are_not_decayed(kind, lora):
    found = rules(kind, Config(weight_decay=0.1), lora, use_bias=True, tie_word_embeddings=False)
    plain = {name for name, rule in found.items() if rule.weight_decay == 0.0}
    assert plain == {name for name in found if "norm" in name or name.endswith("bias") or ".magnitude" in name}
    assert {rule.weight_decay for rule in found.values()} == {0.0, 0.1}
    assert any(".magnitude" in name for name in plain) == (lora and kind == "dense")


def test_routers_and_second_factors_have_their_own_rates():
    found = rules("moe", Config(moe_gate_lr_ratio=0.01, lora_plus_scale=4.0), lora=True)
    assert {name for name, rule in found.items() if rule.lr_ratio == 0.01} == {"model.layers.1.mlp.gate.weight"}
    fast = {name for name, rule in found.items() if rule.lr_ratio == 4.0}
    assert (
        fast == {name for name in found if ".adapter.B" in name}
        and "model.layers.1.mlp.experts.down_proj.adapter.B" in fast
    )
    assert {rule.lr_ratio for rule in found.values()} == {0.01, 1.0, 4.0}


def test_rates_of_one_ratio_are_one_tensor_a_step_and_nothing_is_uploaded():
    parameters = [(name, parameter([1.0, 2.0])) for name in "abc"]
    optimizer = AdamW(
        ShardedParameters.single(parameters),
        {name: ParamRule(0.5 if name == "c" else 1.0, 0.0) for name in "abc"},
        0.9,
        0.95,
        1e-8,
    )
    for _, p in parameters:
        give_gradient(p, [1.0, -1.0])
    with counted() as transfers:
        optimizer.step({name: p.grad for name, p in parameters}, 1e-2)
    assert not transfers.reads and not transfers.uploads


def test_the_routers_of_both_modalities_have_the_routers_rate():
    model = tiny_model("moe")
    model.model.layers[1].mlp = MoELayer(MoESizes(8, (6, 4), 4, 1, bias=False, init_std=0.02), RouterOptions(2))
    found = parameter_rules(model, Config(moe_gate_lr_ratio=0.01))
    slow = {name for name, rule in found.items() if rule.lr_ratio == 0.01}
    assert slow == {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.weight_1"}
    assert "model.layers.1.mlp.vision_experts.down_proj.weight" in found


def vision_rates(**keys: object) -> dict[str, float]:
    model = CausalLM(ModelConfig.from_dict(vision_config()))
    return {name: rule.lr_ratio for name, rule in parameter_rules(model, Config(**keys)).items()}


@pytest.mark.parametrize(
    ("keys", "first"),
    [({"vit_lr_ratio": 0.5}, 0.5), ({"visual_ld": 0.25}, 0.25), ({"vit_lr_ratio": 0.5, "visual_ld": 0.25}, 0.5)],
)
def test_the_vision_transformers_rate_decays_by_block(keys, first):
    """Two blocks: the last has the whole rate, and so has the norm behind it."""
    rates = vision_rates(**keys)
    for name, rate in rates.items():
        below = ("model.vision_model.blocks.0.", "model.vision_model.patch_embed.")
        assert rate == (first if name.startswith(below) else 1.0), name


def test_the_resampler_and_every_router_have_rates_of_their_own():
    rates = vision_rates(resampler_lr_ratio=0.3, moe_gate_lr_ratio=0.01)
    resampler = {name for name, rate in rates.items() if rate == 0.3}
    assert resampler == {name for name in rates if name.startswith("model.resampler_model.")}
    routers = {name for name, rate in rates.items() if rate == 0.01}
    assert routers == {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.weight_1"}
