"""Reading the parity fixtures, and the comparisons that the parity tests share. tools/make_parity_fixtures.py documents
and rebuilds the fixtures.
"""

import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "parity" / "fixtures"
# Of text; the vision-language fixture (VISION_CASE) has other inputs: see tools/make_vision_fixtures.py.
VISION_CASE = "vl_moe"
CASES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir() and path.name != VISION_CASE)
INPUTS = ("plain", "right_pad", "left_pad", "offset", "gaps", "packed")
WITH_GRADIENTS = ("right_pad", "left_pad", "packed")

# Two float32 implementations that add in different orders: logits of a few units agree to about 1e-5.
LOGIT_TOLERANCE = 5e-5
# Norm of the difference over norm of the reference, tensor by tensor.
GRADIENT_TOLERANCE = 1e-4
# A router that selects one expert gives it the weight p / p = 1, so its gradient is zero in exact arithmetic and
# rounding noise of about 5e-8 here and there, which no relative tolerance can compare. Every other gradient of the
# fixtures is exactly zero (an expert without tokens) or ten thousand times larger.
GRADIENT_NOISE = 5e-7


@dataclass(frozen=True)
class Fixture:
    """One tiny checkpoint and what transformers computes from it."""

    path: Path
    config: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def item(self, name: str) -> dict[str, np.ndarray]:
        """The input called `name` and its results, without the prefix; gradients as grad/<checkpoint name>."""
        prefix = name + "/"
        return {key.removeprefix(prefix): value for key, value in self.arrays.items() if key.startswith(prefix)}

    def gradients(self, name: str) -> dict[str, np.ndarray]:
        """Checkpoint name -> gradient of the mean loss of the input called `name`."""
        prefix = f"{name}/grad/"
        return {key.removeprefix(prefix): value for key, value in self.arrays.items() if key.startswith(prefix)}


@cache
def read_fixture(name: str) -> Fixture:
    """A fixture by its directory's name."""
    path = FIXTURES / name
    with np.load(path / "reference.npz") as archive:
        arrays = dict(archive)
    return Fixture(path, json.loads((path / "config.json").read_text()), arrays)


def load_tool(name: str) -> ModuleType:
    """Import tools/`name`.py, which is a script and not part of the package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def gradient_errors(
    ours: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """name -> (relative error, absolute error) in the 2-norm, for every reference gradient; names and shapes must
    agree.

    Ours may name more than the reference: tensors that the reference does not train on this loss (correction biases,
    multi-token prediction), all zero.
    """
    missing = reference.keys() - ours.keys()
    assert not missing, f"no gradient under the names {sorted(missing)}"
    for name in ours.keys() - reference.keys():
        assert "mtp_" in name or name.endswith("e_score_correction_bias"), f"{name} is not a name of the checkpoint"
        assert not ours[name].any(), f"{name} should have no gradient on this loss"
    errors: dict[str, tuple[float, float]] = {}
    for name, expected in reference.items():
        assert ours[name].shape == expected.shape, f"{name}: {ours[name].shape}, expected {expected.shape}"
        absolute = float(np.linalg.norm(np.float64(ours[name]) - np.float64(expected)))
        errors[name] = (absolute / max(float(np.linalg.norm(expected)), 1e-30), absolute)
    return errors


def assert_gradients_agree(ours: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> None:
    """Every reference gradient within GRADIENT_TOLERANCE of its norm, or both rounding noise around an exact zero."""
    errors = gradient_errors(ours, reference)
    wrong = {
        name: f"relative {relative:.1e}, absolute {absolute:.1e}"
        for name, (relative, absolute) in errors.items()
        if relative > GRADIENT_TOLERANCE and absolute > GRADIENT_NOISE
    }
    assert not wrong, f"{len(wrong)} of {len(errors)} gradients differ: {wrong}"


def _per_head(parts: list[np.ndarray], head_dim: int) -> np.ndarray:
    """Interleave q, k, v (last axis H * head_dim each) head by head: [..., H, 3 * head_dim] flattened."""
    heads = [part.reshape(*part.shape[:-1], -1, head_dim) for part in parts]
    return np.concatenate(heads, -1).reshape(*parts[0].shape[:-1], -1)


def paddle_file_tensors(pt: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a -PT file as a -Paddle file holds them, written from the published converter's rules and not from
    this package's table: prefix `ernie.`, projections [in, out], q|k|v and gate|up joined on the output axis, q|k|v
    head by head where there are as many key/value heads as query heads.
    """
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    multi_head = config["num_key_value_heads"] == config["num_attention_heads"]
    out: dict[str, np.ndarray] = {}
    for name, value in pt.items():
        keep = value.ndim < 2 or "embed_tokens" in name or name.endswith("e_score_correction_bias")
        out[name.replace("model.", "ernie.", 1)] = value if keep else value.T
    for name in [name for name in out if ".q_proj." in name]:
        parts = [out.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        joined = _per_head(parts, head_dim) if multi_head else np.concatenate(parts, -1)
        out[name.replace("q_proj", "qkv_proj")] = joined
    for name in [name for name in out if ".gate_proj." in name]:
        parts = [out.pop(name), out.pop(name.replace("gate_proj", "up_proj"))]
        out[name.replace("gate_proj", "up_gate_proj")] = np.concatenate(parts, -1)
    return {name: np.ascontiguousarray(value) for name, value in out.items()}
