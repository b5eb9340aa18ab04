"""Scaled rotary positions beside transformers: frequencies, and logits of a model that transformers reads from ours."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.tiny_models import tiny_model

from erniekit import load_model
from erniekit.checkpoint.model_io import save_model
from erniekit.export.convert import convert
from erniekit.models.config import ModelConfig
from erniekit.nn.frequencies import scaled_frequencies

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
LENGTH = 32  # max_position_embeddings
CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "yarn, betas": {"type": "yarn", "factor": 8.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    "yarn, mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn, attention_factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.9},
}


def model_with(path: Path, scaling: dict[str, Any]) -> Path:
    model = tiny_model("dense", max_position_embeddings=LENGTH, rope_theta=1e4)
    save_model(model, path)
    values = json.loads((path / "config.json").read_text())
    del values["rope_parameters"]
    (path / "config.json").write_text(json.dumps(values | {"rope_scaling": scaling}))
    return path


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [20, 50])
def test_logits_are_those_of_transformers(tmp_path: Path, case: str, tokens: int):
    """Also with a text longer than the original length, and after both conversions. 1e-4: fp32 on logits of up to
    7, of which yarn has 5e-5 and the default positions 1e-5.
    """
    path = model_with(tmp_path / "m", CASES[case])
    convert(path, tmp_path / "p", "paddle")
    convert(tmp_path / "p", tmp_path / "h", "pt")
    ids = np.random.default_rng(0).integers(5, 60, (1, tokens))
    results = []
    for directory in (path, tmp_path / "h"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.no_grad():
            results.append(theirs(torch.from_numpy(ids)).logits.numpy())
    np.testing.assert_array_equal(results[0], results[1])
    for directory in (path, tmp_path / "p", tmp_path / "h"):
        with paddle.no_grad():
            found = load_model(directory)(ids).numpy()
        print(f"{case}, {tokens} tokens: {np.abs(found - results[0]).max():.1e} of {np.abs(found).max():.1f}")
        np.testing.assert_allclose(found, results[0], atol=1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if case != "default"])
def test_frequencies(tmp_path: Path, case: str):
    """1e-6 relative: the order of fp32 operations."""
    path = model_with(tmp_path / "m", CASES[case])
    config = ModelConfig.from_dir(path)
    theirs = transformers.AutoConfig.from_pretrained(path)
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[case.partition(",")[0]]
    expected, factor = init(theirs, "cpu", seq_len=50)
    found = scaled_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, np.arange(50))
    np.testing.assert_allclose(np.broadcast_to(found, (50, config.head_dim // 2))[3], expected.numpy(), rtol=1e-6)
    assert config.rope_scaling is not None and config.rope_scaling.attention_factor == pytest.approx(factor, rel=1e-12)
