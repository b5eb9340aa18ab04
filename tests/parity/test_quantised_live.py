"""Quantised directories in transformers and compressed-tensors themselves. Skipped where torch is absent."""

import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from parity.support import LOGIT_TOLERANCE
from support.tiny_models import tiny_model

from erniekit.build import load_model
from erniekit.checkpoint.model_io import save_model
from erniekit.export.export import export_checkpoint
from erniekit.export.quantise import Quantisation
from erniekit.quantize.quantiser import RoundToNearest
from erniekit.quantize.schemes import Options

torch = pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")
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
    quantisation = Quantisation(scheme, Options(), lambda source, scheme: RoundToNearest(search=False))
    export_checkpoint(path / "model", path / "export", copy_tokenizer=False, quantisation=quantisation)
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
