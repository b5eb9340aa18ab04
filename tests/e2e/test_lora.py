"""LoRA as a user runs it: train, resume, export, evaluate, continue; each step from the last one's files."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import erniekit
from erniekit import config
from erniekit.checkpoint.model_dir import is_adapter
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.evaluate.run import evaluate
from erniekit.export.export import export
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.init import init_weights
from erniekit.utils.errors import CheckpointError, ConfigError

IDS = np.arange(1, 25).reshape(2, 12)


@pytest.fixture(params=["dense", "moe"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def lora_keys(workspace: Path, kind: str, **more: Any) -> dict[str, Any]:
    """Keys of a LoRA run on a model of this kind, to which weights are added."""
    directory = workspace / kind
    if not (directory / "model.safetensors").exists():
        model = CausalLM(ModelConfig.from_dir(directory))
        init_weights(model, 5)
        erniekit.save_model(model, directory)
    return {
        "model_name_or_path": str(directory),
        "continue_training": True,
        "fine_tuning": "LoRA",
        "output_dir": str(workspace / "out"),
        "lora_rank": 4,
        "learning_rate": 2e-2,
    } | more


def train(workspace: Path, **keys: Any) -> Any:
    return erniekit.train(str(workspace / "run.yaml"), **keys)


def tensors(path: Path) -> dict[str, np.ndarray]:
    reader = Reader(path / "adapter_model.safetensors")
    return {name: reader.read(name) for name in reader.keys()}  # noqa: SIM118 no mapping


def load(workspace: Path, command: str, **keys: Any) -> config.Config:
    return config.load(str(workspace / "run.yaml"), keys, command=command)


def test_train_export_and_evaluate(workspace: Path, kind: str) -> None:
    keys = lora_keys(workspace, kind, max_steps=12, save_steps=6, weight_decay=0.01)
    result = train(workspace, **keys)
    out = workspace / "out"
    assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]
    # A checkpoint is as small as its adapter.
    assert is_adapter(out) and is_adapter(out / "checkpoint-6")
    weights = list(out.rglob("model*.safetensors"))
    assert weights and all(path.parent.name == "optimizer" for path in weights)
    states = Reader(out / "checkpoint-6" / "optimizer").keys()
    assert states and all(".adapter." in name for name in states)
    adapted = erniekit.load_model(workspace / kind, adapter=out)(IDS).numpy()
    base = erniekit.load_model(workspace / kind)(IDS).numpy()
    assert np.abs(adapted - base).max() > 0.1 * np.abs(base).max()

    for format in ("pt", "paddle"):
        cfg = load(workspace, "export", **keys, format=format)
        export(cfg)
        merged = erniekit.load_model(out / "export")(IDS).numpy()
        assert np.abs(merged - adapted).max() < 1e-5 * np.abs(adapted).max()
    with_adapter = evaluate(load(workspace, "eval", **keys))
    assert with_adapter["model"] == str(out)
    merged_keys = {"checkpoint": str(out / "export"), "eval_output": str(workspace / "merged")}
    assert evaluate(load(workspace, "eval", **merged_keys))["loss"] == pytest.approx(with_adapter["loss"], rel=1e-5)
    # The same adapter by lora_path, with an output_dir that holds nothing.
    other = keys | {"output_dir": str(workspace / "other"), "lora_path": str(out)}
    assert evaluate(load(workspace, "eval", **other))["loss"] == pytest.approx(with_adapter["loss"], rel=1e-6)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.2, "recompute": True}, {"use_dora": True}, {"ema_decay": 0.9}])
def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(
    workspace: Path, kind: str, options: dict[str, Any]
) -> None:
    if kind == "moe" and "use_dora" in options:
        options = options | {"lora_target_modules": "qkv_proj,o_proj"}
    saved = {"modules_to_save": "norm"}
    keys = lora_keys(workspace, kind, max_steps=6, save_steps=3, neftune=True, **options, **saved)
    train(workspace, **keys | {"output_dir": str(workspace / "whole")})
    shutil.copytree(workspace / "whole" / "checkpoint-3", workspace / "out" / "checkpoint-3")
    resumed = train(workspace, **keys)
    assert len(resumed.history) >= 3
    for directory in ("", "checkpoint-6", *(["ema"] if "ema_decay" in options else [])):
        one, two = tensors(workspace / "whole" / directory), tensors(workspace / "out" / directory)
        assert one.keys() == two.keys()
        assert all(np.array_equal(one[name], two[name]) for name in one)


def test_recomputing_changes_nothing(workspace: Path, kind: str) -> None:
    keys = lora_keys(workspace, kind, max_steps=3, lora_dropout=0.3)
    plain = train(workspace, **keys)
    recomputed = train(workspace, **keys, recompute=True, overwrite_output_dir=True)
    assert [r["loss"] for r in plain.history[-3:]] == pytest.approx(
        [r["loss"] for r in recomputed.history[-3:]], rel=1e-6
    )


def test_lora_path_goes_on_with_its_adapter(workspace: Path) -> None:
    first = lora_keys(workspace, "dense", lora_rank=3, lora_alpha=5, lora_target_modules="q_proj,down_proj")
    train(workspace, **first, max_steps=4)
    second = lora_keys(workspace, "dense", lora_path=str(workspace / "out"), output_dir=str(workspace / "second"))
    again = train(workspace, **second | {"max_steps": 1, "learning_rate": 0.0})
    one, two = tensors(workspace / "out"), tensors(workspace / "second")
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert json.loads((workspace / "second" / "adapter_config.json").read_text())["r"] == 3
    assert len(again.history) == 1


def test_router_and_base_stay_as_they_are(workspace: Path) -> None:
    keys = lora_keys(workspace, "moe", moe_use_aux_free=True, max_steps=3)
    before = (workspace / "moe" / "model.safetensors").read_bytes()
    result = train(workspace, **keys)
    assert (workspace / "moe" / "model.safetensors").read_bytes() == before
    assert result.history


def test_what_cannot_be_is_refused(workspace: Path) -> None:
    keys = lora_keys(workspace, "dense")
    with pytest.raises(ConfigError, match="did you mean gate_proj"):
        train(workspace, **keys, lora_target_modules="gatex_proj")
    with pytest.raises(ConfigError, match="router is not adapted"):
        train(workspace, **keys, lora_target_modules="q_proj,mlp.gate")
    with pytest.raises(ConfigError, match="lm_head: the head of this model is its embeddings"):
        train(workspace, **keys, modules_to_save="lm_head")
    with pytest.raises(ConfigError, match="continue_training: fine_tuning: LoRA"):
        train(workspace, **keys | {"continue_training": False})
    with pytest.raises(ConfigError, match="num_nextn_predict_layers"):
        train(workspace, **keys, num_nextn_predict_layers=1)
    with pytest.raises(ConfigError, match="lora_path"):
        train(workspace, **keys | {"fine_tuning": "Full", "lora_path": "x"})
    train(workspace, **keys, max_steps=1)
    with pytest.raises(CheckpointError, match="holds another run"):
        train(workspace, **keys | {"fine_tuning": "Full"})
    with pytest.raises(CheckpointError, match="lora_rank: 4 there, 8 here"):
        train(workspace, **keys | {"lora_rank": 8}, max_steps=2)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        evaluate(load(workspace, "eval", **lora_keys(workspace, "moe")))
    other = ModelConfig.from_dir(workspace / "dense")
    model = CausalLM(other)
    init_weights(model, 6)
    erniekit.save_model(model, workspace / "dense2")
    shutil.copy(workspace / "dense" / "tokenizer.json", workspace / "dense2")
    with pytest.raises(CheckpointError, match="fingerprint"):
        evaluate(load(workspace, "eval", **keys | {"model_name_or_path": str(workspace / "dense2")}))
    with pytest.raises(CheckpointError, match="set lora_path to it"):
        evaluate(load(workspace, "eval", model_name_or_path=str(workspace / "out"), output_dir=str(workspace / "new")))
    with pytest.raises(CheckpointError, match="set lora_path to it"):
        train(workspace, **keys | {"model_name_or_path": str(workspace / "out"), "output_dir": str(workspace / "new")})
    with pytest.raises(CheckpointError, match="holds a model, and this run writes an adapter"):
        train(workspace, **keys | {"output_dir": str(workspace / "dense2")})
