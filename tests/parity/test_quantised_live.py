"""Quantised directories in transformers and compressed-tensors themselves. Skipped where torch is absent."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from parity.support import LOGIT_TOLERANCE
from support.quantised import quantised_model, saved_model
from support.tiny_models import tiny_model

from erniekit.build import load_model
from erniekit.checkpoint.model_io import save_model
from erniekit.models.config import ModelConfig
from erniekit.models.weights import export_tensors
from erniekit.precision.rounding import round_to
from erniekit.quantize import settings
from erniekit.quantize.settings import linear_modules

torch = pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")
from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.compressors.format import infer_module_format  # noqa: E402
from compressed_tensors.compressors.model_compressors.model_compressor import ModelCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config  # noqa: E402
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme  # noqa: E402
from compressed_tensors.quantization.utils.helpers import calculate_qparams  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

pytestmark = pytest.mark.parity
torch.set_num_threads(1)

SIZES = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16, "moe_intermediate_size": 96}
TOKENS = np.random.default_rng(0).integers(3, 61, (2, 24))
# transformers rounds a code times its scale to bf16, but not those of FP8. Our weights are rounded in the same way
# here, so that both sides have the same numbers. The logits, of magnitude 3, differ by the order of fp32 additions.
TOLERANCE = LOGIT_TOLERANCE


def quantised(path: Path, kind: str, scheme: str) -> Path:
    """A tiny model exported in a scheme."""
    save_model(tiny_model(kind, **SIZES), path / "model", dtype="bfloat16")
    quantised_model(path / "model", path / "export", scheme)
    return path / "export"


def our_logits(path: Path, dtype: str) -> np.ndarray:
    """Logits of the directory, its weights rounded to a type, products in fp32."""
    return load_model(path, dtype)(paddle.to_tensor(TOKENS)).numpy()


def in_transformers(path: Path) -> np.ndarray:
    """Logits of transformers, with weights dequantised to fp32 on loading."""
    settings = json.loads((path / "config.json").read_text())["quantization_config"]
    if settings["quant_method"] == "compressed-tensors":
        quantisation = transformers.CompressedTensorsConfig(dequantize=True)
    else:
        quantisation = transformers.FineGrainedFP8Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=quantisation
    )
    model = model.float().eval()  # experts stay in bf16 otherwise
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits.numpy()


LOADED = [(kind, scheme) for kind in ("dense", "moe") for scheme in ("wint4", "wint8", "fp8")]


@pytest.mark.parametrize(("kind", "scheme"), [*LOADED, ("moe", "wint4/8"), ("dense", "w8a8")])
def test_transformers_computes_the_same_logits(tmp_path: Path, kind: str, scheme: str):
    path = quantised(tmp_path, kind, scheme)
    ours = our_logits(path, "float32" if scheme == "fp8" else "bfloat16")
    np.testing.assert_allclose(in_transformers(path), ours, atol=TOLERANCE)
    assert np.abs(ours - our_logits(tmp_path / "model", "bfloat16")).max() > 100 * TOLERANCE  # quantised it is


def module_tree(tensors: dict[str, Any]) -> Any:
    """The modules of an unquantised -PT file: a Linear for each matrix but the embeddings, as vLLM has them."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        matrix, module = tensors.get(f"{path}.weight"), root
        is_linear = matrix is not None and matrix.dim() == 2 and "embed" not in path and leaf in ("weight", "bias")
        *parents, last = path.split(".")
        for part in parents:
            module = module._modules.setdefault(part, torch.nn.Module())
        if is_linear and last not in module._modules:
            rows, columns = matrix.shape
            linear = torch.nn.Linear(columns, rows, bias=f"{path}.bias" in tensors, dtype=torch.bfloat16)
            module.add_module(last, linear)
        module = module._modules.setdefault(last, torch.nn.Module())
        module._parameters[leaf] = torch.nn.Parameter(torch.empty_like(tensor), requires_grad=False)
    return root


ROUTER = ".mlp.gate.weight"
COMPRESSED = [
    *(("dense", scheme, {"use_bias": True, "tie_word_embeddings": True}) for scheme in ("wint4", "wint8", "w8a8")),
    ("dense", "w8a8", {"architectures": ["Ernie4_5ForSequenceClassification"], "num_labels": 1}),  # a reward model
    *(("moe", scheme, {"num_nextn_predict_layers": 1}) for scheme in ("wint4", "wint8", "wint4/8", "w8a8")),
]


@pytest.mark.parametrize(("kind", "scheme", "changes"), COMPRESSED)
def test_compressed_tensors_reads_our_files(tmp_path: Path, kind: str, scheme: str, changes: dict[str, Any]):
    """compressed-tensors applies config.json to the modules of the model. Our file has just the tensors that it then
    expects, in their shapes and types, and what it makes of them is what we read, in bf16.
    """
    source = saved_model(tmp_path / "model", kind, **changes)
    quantised_model(source, tmp_path / "q", scheme, search=True)
    said = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    compressor = ModelCompressor(QuantizationConfig.model_validate(said))
    modules = module_tree(load_file(source / "model.safetensors"))
    apply_quantization_config(modules, compressor.quantization_config, run_compressed=True, show_progress=False)
    compressor.compress_model(modules)
    stored = load_file(tmp_path / "q" / "model.safetensors")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in stored.items()} == {
        name: (tensor.shape, torch.float32 if name.endswith(ROUTER) else tensor.dtype)
        for name, tensor in modules.state_dict().items()
    }
    modules.load_state_dict(stored)
    compressor.decompress_model(modules)
    restored = modules.state_dict()
    for name, weight in export_tensors(load_model(tmp_path / "q")):
        ours = weight if restored[name].dtype == torch.float32 else round_to(weight, "bf16")
        np.testing.assert_array_equal(ours, restored[name].float().numpy())


PRESETS = ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK")
BY_TENSOR = {"strategy": "tensor", "group_size": None}
FORMS: list[tuple[str, dict[str, Any]]] = [
    *((preset, {}) for preset in PRESETS),
    ("W4A16", BY_TENSOR),
    ("W4A16_ASYM", BY_TENSOR),
    ("W8A16", BY_TENSOR),
    ("FP8_BLOCK", {"block_structure": [64, 32]}),
]


def scales_and_zeros(weight: Any, args: Any) -> tuple[Any, Any]:
    """Scales and zero points of compressed-tensors' own rule, from the least and largest weight of each tile."""
    rows, columns = {
        "tensor": tuple(weight.shape),
        "channel": (1, weight.shape[1]),
        "group": (1, args.group_size),
        "block": tuple(args.block_structure or ()),
    }[args.strategy]
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    tiles = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scales, zeros = calculate_qparams(tiles.amin((1, 3)), tiles.amax((1, 3)), args)
    return (scales.flatten(), zeros.flatten()) if args.strategy == "tensor" else (scales, zeros)


@pytest.mark.parametrize(("preset", "changes"), FORMS)
def test_files_of_compressed_tensors_are_read(tmp_path: Path, preset: str, changes: dict[str, Any]):
    """Every matrix of a sparse model is compressed by compressed-tensors itself, as llm-compressor does; ours equals
    what it decompresses, which is rounded to bf16. `changes`: of the preset's weights.
    """
    source = saved_model(tmp_path / "model")
    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.weights = QuantizationArgs(**scheme.weights.model_dump() | changes)
    form = infer_module_format(torch.nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(form.value)
    tensors, expected = load_file(source / "model.safetensors"), {}
    for name in linear_modules(ModelConfig.from_dir(source), quantised=True):
        weight = tensors.pop(f"{name}.weight")
        scales, zeros = scales_and_zeros(weight, scheme.weights)
        state = {"weight": weight, "weight_scale": scales.to(torch.bfloat16), "weight_zero_point": zeros}
        if scheme.input_activations is not None and not scheme.input_activations.dynamic:
            state["input_scale"] = torch.ones(1)
        packed = compressor.compress(state, scheme)
        expected[f"{name}.weight"] = compressor.decompress(packed, scheme)["weight"].float().numpy()
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in packed.items()}
    (tmp_path / "q").mkdir()
    save_file(tensors, tmp_path / "q" / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    group = json.loads(scheme.model_dump_json()) | {"format": form.value}
    config["quantization_config"] = settings.compressed(ModelConfig.from_dir(source), [group], form.value)
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    read = dict(export_tensors(load_model(tmp_path / "q")))
    for name, weight in expected.items():
        np.testing.assert_array_equal(round_to(read[name], "bf16"), weight)
