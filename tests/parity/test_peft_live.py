"""Adapters from here in PEFT and from PEFT here: the same logits. Skipped where torch or peft is absent."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.tiny_models import tiny_model

import erniekit
from erniekit import lora
from erniekit.checkpoint.peft_attach import attach_stored, save_adapter
from erniekit.checkpoint.peft_read import read_adapter
from erniekit.checkpoint.peft_write import adapter_entries
from erniekit.models.decoder import CausalLM

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity
torch.set_num_threads(1)

TOLERANCE = 1e-5  # of the largest logit: both sides compute in fp32
IDS = np.arange(24).reshape(2, 12) * 5 % 61
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
    save_adapter(model, tmp_path / "adapter")
    ours = model(IDS).numpy()
    assert np.abs(ours - plain).max() > 0.1
    there = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "adapter")
    assert_same(ours, logits_there(there))
    again = erniekit.load_model(base)
    attach_stored(again, read_adapter(tmp_path / "adapter", again.config, base))
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


SIZE = {"r": 4, "lora_alpha": 8}
PEFT_DENSE = {
    "list": SIZE | {"target_modules": ["q_proj", "gate_proj", "down_proj"]},
    "regex": SIZE | {"target_modules": r".*layers\.1\..*(k|o|up)_proj", "use_rslora": True},
    "all": SIZE
    | {"target_modules": "all-linear", "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"1.mlp.up_proj": 20}},
    "dora": SIZE | {"target_modules": ["q_proj", "gate_proj", "down_proj"], "use_dora": True},
    "saved": SIZE | {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}
PEFT_MOE = {
    "stacked": SIZE | {"target_modules": ["q_proj"], "target_parameters": list(EXPERTS)},
    "one": SIZE | {"target_modules": [], "target_parameters": [EXPERTS[1]], "alpha_pattern": {"down_proj": 2}},
    "older_names": SIZE | {"target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]},
    "dora": SIZE | {"target_modules": ["q_proj", "o_proj"], "use_dora": True},
}


@pytest.mark.parametrize("name", [*(f"dense-{n}" for n in PEFT_DENSE), *(f"moe-{n}" for n in PEFT_MOE)])
def test_peft_here(tmp_path: Path, name: str) -> None:
    kind, _, case = name.partition("-")
    base = base_dir(tmp_path, kind)
    there = peft_adapter(base, tmp_path / "adapter", **(PEFT_DENSE if kind == "dense" else PEFT_MOE)[case])
    model = erniekit.load_model(base)
    attach_stored(model, read_adapter(tmp_path / "adapter", model.config, base))
    assert_same(model(IDS).numpy(), there)
    # And back again.
    save_adapter(model, tmp_path / "again")
    assert_same(logits_there(peft.PeftModel.from_pretrained(theirs(base), tmp_path / "again")), there)


def older_file(base: Path, path: Path) -> None:
    """An adapter as PEFT wrote it when every expert was a module, with r = 2 and alpha = 6."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(4)
    sizes = {"gate_proj": (32, 16), "up_proj": (32, 16), "down_proj": (16, 32)}
    tensors = {}
    for expert in range(4):
        for half, (num_in, num_out) in sizes.items():
            prefix = f"base_model.model.model.layers.1.mlp.experts.{expert}.{half}"
            tensors[f"{prefix}.lora_A.weight"] = rng.standard_normal((2, num_in), np.float32) * 0.3
            tensors[f"{prefix}.lora_B.weight"] = rng.standard_normal((num_out, 2), np.float32) * 0.3
    path.mkdir()
    save_file({name: array.astype(np.float32) for name, array in tensors.items()}, path / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "bias": "none"}
    content |= {"target_modules": ["gate_proj", "up_proj", "down_proj"], "base_model_name_or_path": str(base)}
    (path / "adapter_config.json").write_text(json.dumps(content))


def test_a_file_with_a_module_an_expert(tmp_path: Path) -> None:
    base = base_dir(tmp_path, "moe")
    older_file(base, tmp_path / "adapter")
    there = logits_there(peft.PeftModel.from_pretrained(theirs(base), tmp_path / "adapter"))
    model = erniekit.load_model(base)
    attach_stored(model, read_adapter(tmp_path / "adapter", model.config, base))
    assert_same(model(IDS).numpy(), there)


@pytest.mark.parametrize(("kind", "dora"), [("dense", False), ("dense", True), ("moe", False)])
def test_gradients_of_an_adapter(tmp_path: Path, kind: str, dora: bool) -> None:
    """Of a random linear function of the logits, with DoRA's norm held constant as PEFT does."""
    base = base_dir(tmp_path, kind)
    model = erniekit.load_model(base)
    state = lora.attach(model, lora.LoraOptions(rank=4, alpha=8.0, dora=dora))
    randomize(model)
    save_adapter(model, tmp_path / "adapter")
    there = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "adapter", is_trainable=True).eval()
    weights = np.random.default_rng(2).standard_normal((*IDS.shape, 61)).astype(np.float32)
    (model(IDS) * paddle.to_tensor(weights)).sum().backward()
    (there(torch.from_numpy(IDS)).logits * torch.from_numpy(weights)).sum().backward()
    theirs_by_name = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in there.named_parameters()
        if parameter.grad is not None
    }
    ours = {name: parameter.grad.numpy() for name, parameter in model.named_parameters() if not parameter.stop_gradient}
    entries = adapter_entries(state, model.config)
    assert len(entries) == len(ours) == len(theirs_by_name)
    for entry in entries:
        gradient = entry.to_file(ours[entry.param])
        other = theirs_by_name.get(entry.name, theirs_by_name.get(f"{entry.name}.weight"))
        assert np.abs(gradient - other).max() <= 2e-5 * max(np.abs(other).max(), 1.0), entry.name
