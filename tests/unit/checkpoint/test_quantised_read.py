"""Quantised directories that are damaged, foreign or mixed up are refused with the tensors' names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.quantised import quantised_model, saved_model

from erniekit.checkpoint.dtypes import STORAGE
from erniekit.checkpoint.fingerprint import fingerprint
from erniekit.checkpoint.model_reader import ModelReader
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.checkpoint.safetensors_write import Writer
from erniekit.export.convert import convert
from erniekit.precision.codes import e4m3_to_fp32
from erniekit.utils.errors import CheckpointError

UP = "model.layers.0.mlp.up_proj"
Tensors = dict[str, tuple[str, np.ndarray]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each form of file."""
    root = tmp_path_factory.mktemp("sources")
    model = saved_model(root / "model", "dense")
    for name in ("wint4", "w8a8", "fp8"):
        quantised_model(model, root / name, name)
    quantised_model(model, root / "wint8-paddle", "wint8", "paddle")
    return root


def changed(source: Path, target: Path, change: Callable[[Tensors], None], **settings: Any) -> Path:
    """A copy of a directory with other tensors and other values in quantization_config."""
    reader = Reader(source)
    tensors = {name: (reader.info(name).dtype, reader.read(name)) for name in reader.keys()}  # noqa: SIM118
    change(tensors)
    plan = [(name, dtype, array.shape) for name, (dtype, array) in tensors.items()]
    with Writer(target, plan, metadata=reader.metadata) as writer:
        for name, (dtype, array) in tensors.items():
            writer.write(name, array.astype(STORAGE[dtype], copy=False))
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] |= settings
    (target / "config.json").write_text(json.dumps(config))
    return target


def without(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def with_tensor(name: str, dtype: str, shape: tuple[int, ...], value: float = 0) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = (dtype, np.full(shape, value, STORAGE[dtype]))

    return change


NAN = 0x7FC0  # of bf16
DAMAGED: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "no scale": ("wint4", without(f"{UP}.weight_scale"), f"{UP}.weight_scale missing"),
    "no size": ("wint4", without(f"{UP}.weight_shape"), f"{UP}.weight_shape missing"),
    "no codes": ("wint4", without(f"{UP}.weight_packed"), f"{UP}.weight_scale without the codes"),
    "wrong size": ("wint4", with_tensor(f"{UP}.weight_shape", "I64", (2,), 256), "do not fit weight_shape"),
    "short codes": ("wint4", with_tensor(f"{UP}.weight_packed", "I32", (256, 15)), f"{UP}: weight_packed"),
    "short scale": ("wint4", with_tensor(f"{UP}.weight_scale", "BF16", (255, 1)), r"weight_scale \[255, 1\], expected"),
    "codes of floats": ("wint4", with_tensor(f"{UP}.weight_packed", "F32", (256, 16)), "has type F32, expected I32"),
    "a stray tensor": ("wint4", with_tensor(f"{UP}.extra_scale", "F32", (1,)), "unexpected.*up_proj.extra_scale"),
    "order of activations": ("wint4", with_tensor(f"{UP}.weight_g_idx", "I32", (128,)), "weight_g_idx: groups in"),
    "not finite": ("wint4", with_tensor(f"{UP}.weight_scale", "BF16", (256, 1), NAN), f"{UP}: a code or a scale is"),
    "int8 without scale": ("w8a8", without(f"{UP}.weight_scale"), "unexpected|missing|not floating"),
    "int8 scale": (
        "w8a8",
        with_tensor(f"{UP}.weight_scale", "BF16", (3, 1)),
        r"incomplete or of another format: model.layers.0.mlp.up_proj: weight I8",
    ),
    "fp8 blocks": ("fp8", with_tensor(f"{UP}.weight_scale_inv", "F32", (3, 1)), r"\[3, 1\], expected \[2, 1\]"),
    "paddle scale": (
        "wint8-paddle",
        with_tensor("ernie.layers.0.mlp.down_proj.weight_scale", "BF16", (5,)),
        r"down_proj.weight_scale \[5\], expected \[128\]",
    ),
}


def read_all(path: Path) -> None:
    reader = ModelReader(path)
    for logical in reader.logicals:
        reader.read(logical, as_fp32=True)


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(sources: Path, tmp_path: Path, case: str):
    source, change, message = DAMAGED[case]
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        read_all(changed(sources / source, tmp_path / "m", change))


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("wint4", {"quant_method": "gptq"}, "method 'gptq' are not read here, only compressed-tensors"),
        ("wint4", {"quant_method": "fp8", "weight_block_size": [128, 128]}, "quantised \\(fp8\\), and no tensor is"),
        (
            "wint4",
            {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "symmetric": False}}}},
            "symmetric: false, and no matrix has its weight_zero_point",
        ),
        (
            "wint4",
            {"format": "nvfp4-pack-quantized"},
            "in this form .* quantization_config: format: 'nvfp4-pack-quantized'",
        ),
        (
            "wint4",
            {"format": "mixed-precision", "config_groups": {"group_0": {"format": "mxfp4-pack-quantized"}}},
            "mxfp4",
        ),
        (
            "wint4",
            {"config_groups": {"group_0": {"weights": {"num_bits": 2}}}},
            "group_0: weights of the type 'int' in 2",
        ),
        (
            "wint4",
            {"transform_config": {"config_groups": {"R4": {"apply": [{"location": "input"}]}}}},
            "transform_config",
        ),
        ("fp8", {"weight_block_size": [128]}, "weight_block_size \\[128\\].* Use the bfloat16 checkpoint"),
        ("fp8", {"weight_block_size": None}, "weight_block_size None.* Use the bfloat16 checkpoint"),
        ("fp8", {"quant_method": None}, "method None"),
        ("wint8-paddle", {"quantization": "wint4"}, "expected"),
        ("wint8-paddle", {"quantization": "mix_quant", "dense_quant_type": "fp4"}, "not read here: .* type 'fp4'"),
        ("wint8-paddle", {"quantization": "mix_quant", "moe_quant_type": "w4a8"}, "is_permuted: true"),
    ],
)
def test_config_json_of_another_kind(sources: Path, tmp_path: Path, source: str, settings: Any, message: str):
    with pytest.raises(CheckpointError, match=message):
        read_all(changed(sources / source, tmp_path / "m", lambda tensors: None, **settings))


def up_proj(path: Path) -> np.ndarray:
    """The first dense layer's up_proj [out, in], as it is read."""
    reader = ModelReader(path)
    name = "model.layers.0.mlp.up_gate_proj.weight"
    weight = reader.read(next(logical for logical in reader.logicals if logical.param == name), as_fp32=True)
    return weight[:, weight.shape[1] // 2 :].T


@pytest.mark.parametrize("zero", [None, 3])
def test_one_scale_of_a_whole_packed_matrix(sources: Path, tmp_path: Path, zero: int | None):
    """As compressed-tensors writes the strategy "tensor": one scale, and one zero that is not packed."""

    def change(tensors: Tensors) -> None:
        with_tensor(f"{UP}.weight_scale", "BF16", (1,), 0x3F00)(tensors)  # 0.5
        if zero is not None:
            with_tensor(f"{UP}.weight_zero_point", "I8", (1,), zero)(tensors)

    path = changed(sources / "wint4", tmp_path / "m", change)
    words = Reader(path).read(f"{UP}.weight_packed").view(np.uint32)
    codes = np.stack([words >> 4 * place & 15 for place in range(8)], axis=-1).reshape(len(words), -1).astype(int) - 8
    np.testing.assert_array_equal(up_proj(path), 0.5 * (codes - (zero or 0)))


def test_blocks_of_the_size_that_config_json_names(sources: Path, tmp_path: Path):
    """compressed-tensors' E4M3 in blocks of 64 x 32."""
    scales = 2.0 ** np.random.default_rng(0).integers(-3, 3, (4, 4)).astype(np.float32)

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_inv")]:  # an E4M3 scale for a matrix elsewhere
            del tensors[name]
            with_tensor(name.removesuffix("_inv"), "F32", (1,), 1)(tensors)
        tensors[f"{UP}.weight_scale"] = ("F32", scales)

    groups = {"group_0": {"weights": {"type": "float", "strategy": "block", "block_structure": [64, 32]}}}
    method = {"quant_method": "compressed-tensors", "config_groups": groups}
    path = changed(sources / "fp8", tmp_path / "m", change, **method)
    codes = e4m3_to_fp32(Reader(path).read(f"{UP}.weight"))
    np.testing.assert_array_equal(up_proj(path), codes * scales.repeat(64, axis=0).repeat(32, axis=1))


def test_tensors_that_only_an_engine_uses_are_named(sources: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    change = with_tensor(f"{UP}.input_scale", "F32", (1,))
    read_all(changed(sources / "w8a8", tmp_path / "m", change))
    assert "1 tensor is not read, because activations are not quantised here: " + UP in caplog.text


def test_a_quantised_config_without_quantised_tensors(sources: Path, tmp_path: Path):
    config = json.loads((sources / "wint4" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(sources / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"says that the weights are quantised .*, and no tensor is"):
        ModelReader(tmp_path)


def test_quantised_tensors_without_a_quantised_config(sources: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text((sources / "model" / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(sources / "wint4" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)missing: .*unexpected: .*weight_packed"):
        ModelReader(tmp_path)


@pytest.mark.parametrize("size", [0.3, 0.9])
def test_a_truncated_file(sources: Path, tmp_path: Path, size: float):
    whole = (sources / "wint4" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: int(size * len(whole))])
    (tmp_path / "config.json").write_text((sources / "wint4" / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"truncated|too short"):
        ModelReader(tmp_path)


def test_a_fingerprint_is_that_of_what_the_codes_stand_for(sources: Path, tmp_path: Path) -> None:
    """So training begins from every form, and an adapter is refused by weights in another one."""
    forms = {name: fingerprint(sources / name) for name in ("model", "wint4", "w8a8", "fp8", "wint8-paddle")}
    assert len(set(forms.values())) == len(forms)
    convert(sources / "w8a8", tmp_path / "wide", "paddle", dtype="float32")
    assert fingerprint(tmp_path / "wide") == forms["w8a8"]
