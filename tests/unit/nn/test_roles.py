"""Every parameter has one role, which its layer declares."""

import ast
import re

import pytest
from paddle import nn
from support.source_tree import REPOSITORY, read_package
from support.tiny_models import tiny_model

from erniekit.lora import LoraOptions, attach
from erniekit.models.decoder import router_options
from erniekit.moe.layer import MoELayer, MoESizes
from erniekit.nn.norm import RMSNorm
from erniekit.nn.roles import Component, ComponentLayer, Role, named_components, named_roles

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


class Tower(ComponentLayer):
    """A stand-in for a vision transformer."""

    component = Component.VISION_TRANSFORMER

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.LayerList([RMSNorm(4, 1e-5)])


def test_components_follow_the_layers_that_declare_them():
    """All below a tower belongs to it; of a two-modality layer, the vision experts and their router do."""
    model = tiny_model("moe")
    assert set(named_components(model).values()) == {Component.LANGUAGE}
    assert named_components(model).keys() == dict(model.named_parameters()).keys()
    sizes = MoESizes(8, (4, 2), num_experts=2, num_shared=1, bias=False, init_std=0.02)
    whole = nn.LayerDict({"tower": Tower(), "sparse": MoELayer(sizes, router_options(model.config))})
    assert named_components(whole) == {
        "tower.blocks.0.weight": Component.VISION_TRANSFORMER,
        "sparse.gate.weight": Component.LANGUAGE,
        "sparse.gate.weight_1": Component.VISION_EXPERTS,
        "sparse.experts.up_gate_proj.weight": Component.LANGUAGE,
        "sparse.experts.down_proj.weight": Component.LANGUAGE,
        "sparse.vision_experts.up_gate_proj.weight": Component.VISION_EXPERTS,
        "sparse.vision_experts.down_proj.weight": Component.VISION_EXPERTS,
        "sparse.shared_experts.up_gate_proj.weight": Component.LANGUAGE,
        "sparse.shared_experts.down_proj.weight": Component.LANGUAGE,
    }
    assert named_roles(whole)["tower.blocks.0.weight"] is Role.NORM


# Modules that describe files: the table of a model's weights, the names of two of them, and those of PEFT's files.
DESCRIBE_FILES = (
    "models.weights",
    "checkpoint.fingerprint",
    "checkpoint.peft_read",
    "checkpoint.peft_write",
    "checkpoint.adapter_config",
    "checkpoint.quantised_recognise",
)
VALUES = {"shared_experts"}  # a part of a model, as values of keys name it
ASKS_ABOUT_TEXT = {"startswith", "endswith", "removeprefix", "removesuffix", "compile", "match", "fullmatch", "search"}


def test_nobody_reads_a_meaning_out_of_a_parameter_s_name():
    """Outside the modules that describe files, no string of these packages names a module of the model, and none is
    compared with the end ".weight" or ".bias".
    """
    model = tiny_model("moe", **FULL)
    dense = tiny_model("dense", **FULL)
    words = {word for each in (model, dense) for name, _ in each.named_parameters() for word in name.split(".")}
    names = "|".join(sorted(word for word in words if "_" in word))
    named = re.compile(rf"(?<![A-Za-z0-9_])({names})(?![A-Za-z0-9_])|\.(norm|gate|experts|mlp|layers)\b")
    wrong = []
    for module in read_package(REPOSITORY).values():
        inner = module.name.removeprefix("erniekit.")
        if inner.partition(".")[0] not in ("precision", "training", "models", "checkpoint") or inner in DESCRIBE_FILES:
            continue
        texts = [(line, text) for line, text in strings_of(module.tree) if named.search(text) and text not in VALUES]
        for node in ast.walk(module.tree):
            asks = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if asks and node.func.attr in ASKS_ABOUT_TEXT:
                texts += [(line, text) for line, text in strings_of(node) if re.search(r"\.(weight|bias)", text)]
        wrong += [f"{module.shown}:{line}: {text!r}" for line, text in texts]
    assert not wrong, "\n" + "\n".join(wrong)


def strings_of(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, text) of every string below a node that is no docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    first = [node.body[0] for node in ast.walk(tree) if isinstance(node, documented) and node.body]
    docstrings = {id(statement.value) for statement in first if isinstance(statement, ast.Expr)}
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]
