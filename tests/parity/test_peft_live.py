"""Adapters from here in PEFT and from PEFT here: the same logits. Skipped where torch or peft is absent."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import tiny_model

import erniekit
from erniekit import lora
from erniekit.checkpoint.adapter_io import attach_stored, save_adapter
from erniekit.models.decoder import CausalLM

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity
torch.set_num_threads(1)

TOLERANCE = 1e-5  # of the largest logit: both sides compute in fp32
IDS = np.arange(24).reshape(2, 12) * 5 % 61
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SHARED = tuple(name.replace("mlp.", "mlp.shared_experts.") for name in MLP)
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@pytest.fixture(params=["dense", "moe"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def base_dir(tmp_path: Path, kind: str, **changes: Any) -> Path:
    path = tmp_path / f"base-{kind}"
    erniekit.save_model(tiny_model(kind, **changes), path)
    return path


def theirs(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits_there(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()


def randomize(model: CausalLM, seed: int = 0) -> None:
    """Values of a trained adapter: nothing at its start, so that every factor counts."""
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        if not parameter.stop_gradient:
            noise = rng.standard_normal(parameter.shape, dtype=np.float32) * np.float32(0.2)
            parameter.set_value(parameter.numpy() * (0.5 if "magnitude" in parameter.name else 1.0) + noise)


def assert_same(ours: np.ndarray, other: np.ndarray) -> None:
    assert np.abs(ours - other).max() <= TOLERANCE * np.abs(other).max()


OPTIONS = {
    "default": {},
    "rslora": {"rslora": True, "rank": 6, "alpha": 5.0, "dropout": 0.1},
    "attention": {"targets": ("q_proj", "v_proj", "o_proj")},
    "pattern": {"targets": (r"model\.layers\.1\.self_attn\.(q|k)_proj", "down_proj")},
    "dora": {"dora": True, "targets": ("qkv_proj", "o_proj")},
    "saved": {"modules_to_save": ("embed_tokens", "norm", "input_layernorm")},
    "feed_forward": {"targets": ("up_gate_proj", "mlp.down_proj")},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_ours_in_peft(tmp_path: Path, kind: str, name: str) -> None:
    base = base_dir(tmp_path, kind)
    model = erniekit.load_model(base)
    plain = model(IDS).numpy()
    lora.attach(model, lora.LoraOptions(**{"rank": 4, "alpha": 8.0} | OPTIONS[name]), tied=True)
    randomize(model)
    save_adapter(model, tmp_path / "adapter", base=str(base))
    ours = model(IDS).numpy()
    assert np.abs(ours - plain).max() > 0.1
    there = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "adapter")
    assert_same(ours, logits_there(there))
    again = erniekit.load_model(base)
    attach_stored(again, tmp_path / "adapter", base)
    assert np.array_equal(again(IDS).numpy(), ours)


def peft_adapter(base: Path, path: Path, **options: Any) -> np.ndarray:
    """A random adapter made and saved by PEFT; its logits."""
    model = peft.get_peft_model(theirs(base), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=0.3 if parameter.ndim == 1 else 0.0, std=0.2)
    model.save_pretrained(path)
    return logits_there(model.eval())


PEFT_DENSE = {
    "list": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "gate_proj", "down_proj"]},
    "regex": {"r": 4, "lora_alpha": 3, "target_modules": r".*layers\.1\..*(k|o|up)_proj", "use_rslora": True},
    "all": {
        "r": 3,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {"1.mlp.up_proj": 20},
    },
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "gate_proj", "down_proj"], "use_dora": True},
    "saved": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["v_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}
PEFT_MOE = {
    "stacked": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": list(EXPERTS)},
    "one": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": [],
        "target_parameters": [EXPERTS[1]],
        "alpha_pattern": {"down_proj": 2},
    },
    "older_names": {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]},
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], "use_dora": True},
}


@pytest.mark.parametrize("name", [*(f"dense-{n}" for n in PEFT_DENSE), *(f"moe-{n}" for n in PEFT_MOE)])
def test_peft_here(tmp_path: Path, name: str) -> None:
    kind, _, case = name.partition("-")
    base = base_dir(tmp_path, kind)
    there = peft_adapter(base, tmp_path / "adapter", **(PEFT_DENSE if kind == "dense" else PEFT_MOE)[case])
    model = erniekit.load_model(base)
    attach_stored(model, tmp_path / "adapter", base)
    assert_same(model(IDS).numpy(), there)
    # And back again.
    save_adapter(model, tmp_path / "again", base=str(base))
    assert_same(logits_there(peft.PeftModel.from_pretrained(theirs(base), tmp_path / "again")), there)
