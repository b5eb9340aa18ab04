"""A directory in 2 bits as FastDeploy reads it: tensors, config.json, and that our reader runs it."""

import json
import re
import shutil

import numpy as np
import paddle
import pytest
from support.safetensors_files import write
from support.tiny_models import tiny_model

from erniekit.build import load_model
from erniekit.checkpoint.model_io import save_model
from erniekit.checkpoint.model_reader import ModelReader
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.export.export import export_checkpoint
from erniekit.export.quantise import Quantisation
from erniekit.models.weights import EXPERTS, to_numpy
from erniekit.precision.convolutional_code import choose_scales, decode, encode, from_file
from erniekit.quantize.quantiser import RoundToNearest
from erniekit.quantize.schemes import Options
from erniekit.utils.errors import CheckpointError, ConfigError

SIZES = {"hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 128, "intermediate_size": 192}
SIZES |= {"num_hidden_layers": 4}
WANTED = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")
EXPERT = "ernie.layers.{}.mlp.experts.{}.{}"


def export(source, target, first_layers=2, format="paddle"):
    quantiser = RoundToNearest()
    how = Quantisation("wint2", Options(first_layers=first_layers), lambda source, scheme: quantiser)
    return export_checkpoint(source, target, format=format, quantisation=how, copy_tokenizer=False)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A model in bf16, and the same in 2 bits; layers 0 and 1 have experts in 4 bits, if any."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target") / "wint2"
    save_model(tiny_model("moe", **SIZES), source, dtype="bfloat16")
    export(source, target)
    return source, target


def test_tensors_are_those_that_fastdeploy_loads(directories):
    reader = Reader(directories[1], u16_is_bf16=True)
    config = json.loads((directories[1] / "config.json").read_text())
    inter, experts = config["moe_intermediate_size"], config["moe_num_experts"]
    for layer, expert in ((2, 0), (3, experts - 1)):
        for leaf, num_in, num_out in (("up_gate_proj", 128, 2 * inter), ("down_proj", inter, 128)):
            name = EXPERT.format(layer, expert, leaf)
            assert {part: tuple(reader.info(f"{name}.{part}")) for part in WANTED} == {
                "quant_weight": ("U8", (num_in // 4, num_out)),
                "weight_scale": ("U8", (num_in // 128, num_out)),
                "super_scales": ("BF16", (num_out,)),
                "code_scale": ("F32", (num_out,)),
                "code_zp": ("F32", (num_out,)),
            }
            assert f"{name}.weight" not in reader
    four = EXPERT.format(1, 0, "down_proj")
    assert tuple(reader.info(f"{four}.quant_weight")) == ("I8", (64, inter)) and f"{four}.code_zp" not in reader
    eight = "ernie.layers.3.self_attn.o_proj.quant_weight"
    assert reader.info(eight).dtype == "I8" and reader.info(eight).shape[0] == 128
    assert reader.info("ernie.layers.2.mlp.gate.weight").dtype == "F32"


def test_config_has_the_keys_of_the_published_model(directories):
    found = json.loads((directories[1] / "config.json").read_text())["quantization_config"]
    assert found == {
        "is_quantized": True,
        "quantization": "wint2",
        "dense_quant_type": "wint8",
        "moe_quant_type": "w4w2",
        "moe_quant_config": {
            "moe_w4_quant_config": {
                "quant_type": "wint4",
                "quant_granularity": "per_channel",
                "quant_start_layer": 0,
                "quant_end_layer": 1,
            },
            "moe_w2_quant_config": {
                "quant_type": "wint2",
                "quant_granularity": "pp_acc",
                "quant_group_size": 64,
                "quant_start_layer": 2,
                "quant_end_layer": 3,
            },
        },
    }


def test_it_is_read_as_the_weights_that_the_words_stand_for(directories):
    source, target = (ModelReader(directory) for directory in directories)
    tensors = Reader(directories[1], u16_is_bf16=True)
    assert target.quantised == "wint2"
    errors = {}
    for logical, other in zip(source.logicals, target.logicals, strict=True):
        weight, back = source.read(logical, as_fp32=True), target.read(other, as_fp32=True)
        if logical.index is None:
            continue
        layer = int(logical.param.split(".")[2])
        errors.setdefault(layer, []).append(np.linalg.norm(back - weight) / np.linalg.norm(weight))
        if layer >= 2:
            name = logical.paddle[0].name.removesuffix(".weight")
            stored = {part: tensors.read(f"{name}.{part}", as_fp32=part == "super_scales") for part in WANTED}
            np.testing.assert_array_equal(back, decode(*from_file(stored)).T)
            scales = choose_scales(np.ascontiguousarray(weight.T))
            np.testing.assert_array_equal(back.T, decode(encode(weight.T, scales), scales))
    assert 0.3 < np.mean(errors[2] + errors[3]) < 0.34 and max(errors[1]) < 0.17


def test_the_directory_runs(directories):
    """load_model, as eval and chat do: the logits of the model whose weights were replaced by hand, bit for bit."""
    model = tiny_model("moe", **SIZES)
    reader, parameters = ModelReader(directories[1]), dict(model.named_parameters())
    stacks = {}
    for logical in reader.logicals:
        if logical.param in parameters:
            stacks.setdefault(logical.param, []).append(reader.read(logical, as_fp32=True))
    for param, weights in stacks.items():
        stacked = np.stack(weights) if any(f".{kind}." in param for kind in EXPERTS) else weights[0]
        assert list(stacked.shape) == parameters[param].shape
        parameters[param].set_value(stacked)
    model.eval()
    ids = paddle.to_tensor(np.arange(5, 25)[None])
    loaded = load_model(directories[1])
    np.testing.assert_array_equal(to_numpy(loaded(ids)), to_numpy(model(ids)))


def test_what_cannot_have_2_bits_is_refused(directories, tmp_path):
    with pytest.raises(ConfigError, match=r"layout format: pt; set format: paddle"):
        export(directories[0], tmp_path / "a", format="pt")
    with pytest.raises(ConfigError, match=r"first 4, so nothing would have 2 bits: .* wint4/8"):
        export(directories[0], tmp_path / "b", first_layers=4)
    with pytest.raises(CheckpointError, match="quantised already"):
        export(directories[1], tmp_path / "c")
    save_model(tiny_model("moe", **SIZES | {"moe_intermediate_size": 64}), tmp_path / "narrow")
    with pytest.raises(ConfigError, match=r"experts\.0\.down_proj \[128, 64\]: 2-bit codes need a multiple of 128 inp"):
        export(tmp_path / "narrow", tmp_path / "d")
    save_model(tiny_model("dense", hidden_size=128), tmp_path / "dense")
    with pytest.raises(ConfigError, match="does not have: set quantization: wint4"):
        export(tmp_path / "dense", tmp_path / "e")
    assert not (tmp_path / "a").exists() and not (tmp_path / "e").exists()


def test_a_damaged_directory_is_refused(directories, tmp_path):
    """A tensor of the five that is missing is named."""
    missing = EXPERT.format(3, 0, "down_proj") + ".code_zp"
    reader = Reader(directories[1], u16_is_bf16=True)
    kept = {name: (reader.info(name).dtype, reader.read(name)) for name in reader.keys() if name != missing}  # noqa: SIM118
    (tmp_path / "damaged").mkdir()
    write(tmp_path / "damaged", kept)
    shutil.copy(directories[1] / "config.json", tmp_path / "damaged")
    with pytest.raises(CheckpointError, match=re.escape(f"{missing} missing")):
        ModelReader(tmp_path / "damaged")
