"""The table of tensors against files that transformers wrote, against the published converter's rules, and by hand."""

import dataclasses

import numpy as np
import paddle
import pytest
from parity.support import CASES, paddle_file_tensors, read_fixture
from safetensors.numpy import load_file
from support.tiny_models import tiny_model
from support.tiny_vision import CONFIG as VISION_CONFIG

from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.weights import (
    detect_format,
    export_tensors,
    layer_matrices,
    logical_tensors,
    match_names,
    our_shapes,
)
from erniekit.nn.roles import matrix_names
from erniekit.utils.errors import CheckpointError


def pieces(config, format):
    return {piece.name: piece for logical in logical_tensors(config) for piece in logical.pieces(format)}


@pytest.fixture(params=CASES)
def case(request):
    fixture = read_fixture(request.param)
    tensors = load_file(fixture.path / "model.safetensors")
    return ModelConfig.from_dir(fixture.path), tensors, paddle_file_tensors(tensors, fixture.config)


def test_names_and_shapes_are_those_of_both_files(case):
    config, pt, paddle_file = case
    assert {name: piece.shape for name, piece in pieces(config, "pt").items()} == {k: v.shape for k, v in pt.items()}
    expected = {name: value.shape for name, value in paddle_file.items()}
    assert {name: piece.shape for name, piece in pieces(config, "paddle").items()} == expected
    assert detect_format(pt, "x") == "pt" and detect_format(paddle_file, "x") == "paddle"


def test_every_tensor_goes_both_ways_bit_for_bit(case):
    config, pt, paddle_file = case
    for logical in logical_tensors(config):
        from_pt = logical.from_file([pt[piece.name] for piece in logical.pt], "pt")
        from_paddle = logical.from_file((paddle_file[piece.name] for piece in logical.paddle), "paddle")
        assert from_pt.shape == logical.shape
        np.testing.assert_array_equal(from_pt, from_paddle)
        for format, file in (("pt", pt), ("paddle", paddle_file)):
            for piece, array in zip(logical.pieces(format), logical.to_file(from_pt, format), strict=True):
                assert array.flags.c_contiguous and array.shape == piece.shape
                np.testing.assert_array_equal(array, file[piece.name])


def test_only_router_and_correction_bias_stay_fp32(case):
    config, _, _ = case
    kept = {logical.param.split(".mlp.")[1] for logical in logical_tensors(config) if logical.keep_fp32}
    assert kept == ({"gate.weight", "moe_statics.e_score_correction_bias"} if config.moe_num_experts else set())


def tiny(**changes):
    values = {
        "model_type": "ernie4_5",
        "vocab_size": 7,
        "hidden_size": 4,
        "intermediate_size": 3,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 2,
    }
    return ModelConfig(**{**values, **changes})


def test_layouts_by_hand():
    config = tiny()
    by_param = {logical.param: logical for logical in logical_tensors(config)}
    qkv = by_param["model.layers.0.self_attn.qkv_proj.weight"]
    ours = np.arange(32, dtype=np.uint16).reshape(4, 8)  # columns: q0 q0 q1 q1 | k k | v v
    q, k, v = qkv.to_file(ours, "pt")
    np.testing.assert_array_equal(q, ours[:, :4].T)
    np.testing.assert_array_equal(k, ours[:, 4:6].T)
    np.testing.assert_array_equal(v, ours[:, 6:].T)
    (fused,) = qkv.to_file(ours, "paddle")
    np.testing.assert_array_equal(fused, ours)

    mha = tiny(num_key_value_heads=2, use_bias=True)
    by_param = {logical.param: logical for logical in logical_tensors(mha)}
    names = ["q0a", "q0b", "q1a", "q1b", "k0a", "k0b", "k1a", "k1b", "v0a", "v0b", "v1a", "v1b"]
    bias = np.array(names)
    (per_head,) = by_param["model.layers.0.self_attn.qkv_proj.bias"].to_file(bias, "paddle")
    order = ["q0a", "q0b", "k0a", "k0b", "v0a", "v0b", "q1a", "q1b", "k1a", "k1b", "v1a", "v1b"]
    assert per_head.tolist() == order
    gate, up = by_param["model.layers.0.mlp.up_gate_proj.bias"].to_file(np.array([1, 1, 1, 2, 2, 2]), "pt")
    assert gate.tolist() == [1, 1, 1] and up.tolist() == [2, 2, 2]


def test_the_head():
    names = {name for name in pieces(tiny(), "pt") if "lm_head" in name}
    assert names == set()
    untied = tiny(tie_word_embeddings=False)
    assert pieces(untied, "pt")["lm_head.weight"].shape == (7, 4)
    assert pieces(untied, "paddle")["lm_head.weight"].shape == (4, 7)


def moe(**changes):
    values = {
        "model_type": "ernie4_5_moe",
        "num_hidden_layers": 2,
        "moe_num_experts": 3,
        "moe_k": 2,
        "moe_intermediate_size": 5,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
        "num_nextn_predict_layers": 1,
    }
    return tiny(**{**values, **changes})


def test_our_shapes_are_the_model_s():
    shapes = our_shapes(moe())
    assert shapes["model.layers.1.mlp.experts.up_gate_proj.weight"] == (3, 4, 10)
    assert shapes["model.layers.1.mlp.experts.down_proj.weight"] == (3, 5, 4)
    assert shapes["model.layers.1.mlp.shared_experts.up_gate_proj.weight"] == (4, 20)
    assert shapes["model.layers.1.mlp.gate.weight"] == (4, 3)
    assert shapes["model.mtp_linear_proj.0.weight"] == (8, 4)
    assert "model.layers.0.mlp.up_gate_proj.weight" in shapes and "model.layers.0.mlp.gate.weight" not in shapes


def test_mtp_names_with_and_without_prefix():
    logicals = logical_tensors(moe())
    for format in ("pt", "paddle"):
        names = [piece.name for logical in logicals for piece in logical.pieces(format)]
        bare = [name.split(".", 1)[1] if "mtp_" in name else name for name in names]
        match = match_names(logicals, bare, format)
        assert not match.missing and not match.unexpected and match.stored == dict(zip(names, bare, strict=True))
        match = match_names(logicals, [*names[1:], "new.weight"], format)
        assert match.missing == names[:1] and match.unexpected == ["new.weight"]


def test_unknown_layouts_are_refused():
    both = ["ernie.layers.0.self_attn.qkv_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(CheckpointError, match="both"):
        detect_format(both, "file")
    # Paddle's memory layout under Hugging Face's prefix: columns grouped by key/value head, not what either file has.
    with pytest.raises(CheckpointError, match="neither"):
        detect_format(["model.layers.0.self_attn.qkv_proj.weight"], "file")


class StandIn(paddle.nn.Layer):
    """A layer with the parameters that the table asks for, under their names."""

    def __init__(self, config, seed=0):
        super().__init__()
        self.config = config
        rng = np.random.default_rng(seed)
        for name, shape in our_shapes(config).items():
            owner = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in owner._sub_layers:
                    owner.add_sublayer(part, paddle.nn.Layer())
                owner = owner._sub_layers[part]
            value = paddle.to_tensor(rng.standard_normal(shape).astype(np.float32))
            if leaf == "e_score_correction_bias":
                owner.register_buffer(leaf, value)
            else:
                initializer = paddle.nn.initializer.Assign(value)
                owner.add_parameter(leaf, owner.create_parameter(list(shape), default_initializer=initializer))


@pytest.mark.parametrize("format", ["pt", "paddle"])
def test_export_of_parameters_and_gradients(format):
    config = moe(tie_word_embeddings=False)
    model = StandIn(config)
    parameters = dict(export_tensors(model, format))
    assert {name: value.shape for name, value in parameters.items()} == {
        name: piece.shape for name, piece in pieces(config, format).items()
    }
    assert all(value.dtype == np.float32 for value in parameters.values())

    # The gradient of 0.5 * |p|^2 is p, so that gradients must come out exactly as the parameters do.
    used = [p for name, p in model.named_parameters() if "mtp_" not in name]
    sum((p * p).sum() * 0.5 for p in used).backward()
    gradients = dict(export_tensors(model, format, "grad"))
    biases = {name for name in parameters if name.endswith("e_score_correction_bias")}
    assert gradients.keys() == parameters.keys() - biases
    for name, gradient in gradients.items():
        expected = np.zeros_like(parameters[name]) if "mtp_" in name else parameters[name]
        np.testing.assert_array_equal(gradient, expected)


def test_export_values():
    model = StandIn(moe())
    exported = dict(export_tensors(model))
    ours = {name: p.numpy() for name, p in model.named_parameters()}
    stacked = ours["model.layers.1.mlp.experts.up_gate_proj.weight"]
    np.testing.assert_array_equal(exported["model.layers.1.mlp.experts.2.up_proj.weight"], stacked[2, :, 5:].T)
    np.testing.assert_array_equal(exported["model.embed_tokens.weight"], ours["model.embed_tokens.weight"])


def test_bfloat16_parameters_come_out_as_float32():
    model = StandIn(dataclasses.replace(tiny(), vocab_size=3))
    before = dict(export_tensors(model))
    model.to(dtype="bfloat16")
    for name, value in export_tensors(model):
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, before[name], rtol=2**-8)


@pytest.mark.parametrize("kind", ["dense", "moe", "multi-token prediction", "untied with biases", "vision"])
def test_the_matrices_of_the_table_are_the_projections_of_the_model(kind):
    """`erniekit check`, which does not import Paddle, counts by the table what Muon updates by roles."""
    if kind == "vision":
        model = CausalLM(ModelConfig.from_dict(VISION_CONFIG))
    elif kind == "multi-token prediction":
        model = tiny_model("moe", num_nextn_predict_layers=1)
    elif kind == "untied with biases":
        model = tiny_model("dense", use_bias=True, tie_word_embeddings=False)
    else:
        model = tiny_model(kind)
    names = matrix_names(model)
    assert set(layer_matrices(model.config)) == set(names)
    assert all(our_shapes(model.config)[name] == tuple(dict(model.named_parameters())[name].shape) for name in names)
