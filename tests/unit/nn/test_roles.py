"""Every parameter has one role, which its layer declares."""

import pytest
from paddle import nn
from support.tiny_models import tiny_model

from erniekit.lora import LoraOptions, attach
from erniekit.nn.roles import Role, named_roles

# The last parts of a parameter's name, without numbers and a part's letter, and its role.
ROLES = {
    "embed_tokens.weight": Role.EMBEDDING,
    "lm_head.weight": Role.HEAD,
    "lm_head.bias": Role.BIAS,
    "norm.weight": Role.NORM,
    "input_layernorm.weight": Role.NORM,
    "post_attention_layernorm.weight": Role.NORM,
    "qkv_proj.weight": Role.PROJECTION,
    "qkv_proj.bias": Role.BIAS,
    "o_proj.weight": Role.PROJECTION,
    "o_proj.bias": Role.BIAS,
    "up_gate_proj.weight": Role.PROJECTION,
    "up_gate_proj.bias": Role.BIAS,
    "down_proj.weight": Role.PROJECTION,
    "down_proj.bias": Role.BIAS,
    "gate.weight": Role.ROUTER,
    "moe_statics.e_score_correction_bias": Role.ROUTER_BIAS,
    "mtp_emb_norm.weight": Role.NORM,
    "mtp_hidden_norm.weight": Role.NORM,
    "mtp_linear_proj.weight": Role.PROJECTION,
    "adapter.A": Role.ADAPTER_A,
    "adapter.B": Role.ADAPTER_B,
    "adapter.magnitude": Role.SCALE,
    "adapter._squares": Role.SCALE,
}
FULL = {"use_bias": True, "tie_word_embeddings": False, "num_nextn_predict_layers": 1}
CASES = {
    "dense": ("dense", {}, None),
    "dense, biases, MTP": ("dense", FULL, None),
    "MoE": ("moe", {}, None),
    "MoE, tied with a biased head": ("moe", {"use_bias": True, "tie_word_embeddings": True}, None),
    "MoE, biases, MTP": ("moe", FULL, None),
    "DoRA": ("dense", {}, LoraOptions(rank=2, dora=True)),
    "LoRA of a MoE with MTP": ("moe", FULL, LoraOptions(rank=2)),
}


def kind_of(name: str) -> str:
    words = [word for word in name.split(".") if not word.isdigit()][-2:]
    layer, own = words
    return f"{layer}.{own.rpartition('_')[0] or own if layer == 'adapter' and own != '_squares' else own}"


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_and_buffer_has_the_role_that_it_plays(case):
    kind, changes, lora = CASES[case]
    model = tiny_model(kind, **changes)
    if lora is not None:
        attach(model, lora)
    roles = named_roles(model)
    assert roles.keys() == dict([*model.named_parameters(), *model.named_buffers()]).keys()
    assert roles == {name: ROLES[kind_of(name)] for name in roles}


def test_a_layer_that_declares_nothing_is_named():
    with pytest.raises(AssertionError, match=r"Linear declares no role for its parameter weight \(1\)"):
        named_roles(nn.Sequential(nn.ReLU(), nn.Linear(2, 3)))
