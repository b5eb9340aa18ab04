"""Adapter files: what is written is what is read, for the model they belong to and for no other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.adapters import attach_random
from support.tiny_models import tiny_model

import erniekit
from erniekit import lora
from erniekit.checkpoint.adapter_config import base_of
from erniekit.checkpoint.fingerprint import fingerprint, weights_digest
from erniekit.checkpoint.model_dir import find_checkpoint
from erniekit.checkpoint.peft_attach import attach_stored, load_adapter, save_adapter
from erniekit.checkpoint.peft_read import read_adapter
from erniekit.models.decoder import CausalLM
from erniekit.utils.errors import CheckpointError

IDS = np.arange(20).reshape(2, 10) * 3 % 61


@pytest.fixture(params=["dense", "moe"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def adapted(kind: str, **options: Any) -> CausalLM:
    """A tiny model with a random adapter."""
    return attach_random(tiny_model(kind), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rslora": True, "dropout": 0.25},
        {"targets": (r"model\.layers\.1\..*o_proj", "q_proj")},
        {"targets": ("qkv_proj",), "dora": True},
        {"modules_to_save": ("embed_tokens", "norm")},
        {"targets": ("down_proj",)},
    ],
)
def test_written_and_read(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    model = adapted(kind, **options)
    save_adapter(model, tmp_path)
    again = tiny_model(kind)
    state = attach_stored(again, read_adapter(tmp_path, again.config))
    before = lora.state_of(model)
    assert before is not None and state.slots == before.slots and set(state.saved) == set(before.saved)
    assert (state.options.rslora, state.options.dora) == (before.options.rslora, before.options.dora)
    own, other = dict(model.named_parameters()), dict(again.named_parameters())
    assert own.keys() == other.keys()
    assert all(np.array_equal(own[name].numpy(), other[name].numpy()) for name in own)
    assert [p.stop_gradient for p in own.values()] == [p.stop_gradient for p in other.values()]
    assert np.array_equal(model(IDS).numpy(), again(IDS).numpy())


def test_adapter_config_has_short_names_where_layers_are_alike(tmp_path: Path) -> None:
    """Short names where all layers are alike, as a person would have written them for PEFT."""
    save_adapter(adapted("dense"), tmp_path / "dense")
    content = json.loads((tmp_path / "dense" / "adapter_config.json").read_text())
    assert sorted(content["target_modules"]) == sorted(
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
        + ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    )
    assert (content["r"], content["lora_alpha"], content["rank_pattern"]) == (3, 4, {})
    save_adapter(adapted("moe"), tmp_path / "moe")
    content = json.loads((tmp_path / "moe" / "adapter_config.json").read_text())
    assert {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} <= set(content["target_parameters"])
    assert not any("mlp" in name for name in content["target_modules"])


def edit(path: Path, **changes: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"bias": "all"}, "bias: 'all'"),
        ({"init_lora_weights": "pissa_niter_16"}, "changed weights"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias: True"),
        ({"monteclora_config": {"a": 1}}, "monteclora_config"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"use_newest_lora": True}, "use_newest_lora: True: an option that is not known here"),
        ({"r": "8"}, r"adapter_config\.json: r: must be an integer"),
        ({"lora_alpha": "16"}, "lora_alpha: must be a number"),
        ({"use_dora": "no"}, "use_dora: must be true or false"),
        ({"alpha_pattern": [1]}, "alpha_pattern: must be an object"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: '\\(' is not a regular expression"),
        ({"target_modules": "(a+)+$"}, "target_modules: .*too complicated a pattern"),
        ({"target_modules": ".*a.*b.*c.*d"}, "target_modules: .*too complicated a pattern"),
        ({"target_modules": [1]}, "target_modules: must be a list of names"),
        ({"r": 2}, r"self_attn\.q_proj: rank 3, and adapter_config\.json says 2"),
        ({"rank_pattern": {"o_proj": 5}}, r"2 of another size: \S*o_proj: rank 3, and adapter_config\.json says 5"),
        ({"modules_to_save": ["embed_tokens"]}, r"1 missing: embed_tokens \(modules_to_save\)"),
        ({"base_model_name_or_path": 7}, "base_model_name_or_path: must be text"),
    ],
)
def test_other_kinds_of_adapters_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    model = adapted("dense")
    save_adapter(model, tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path, model.config)


def test_options_that_change_nothing_here(tmp_path: Path) -> None:
    model = adapted("dense")
    save_adapter(model, tmp_path)
    expected = read_adapter(tmp_path, model.config).tensors
    later = {"use_newer_lora": False, "newer_config": None, "loftq_config": {}, "revision": "main", "eva_config": None}
    edit(tmp_path, init_lora_weights="gaussian", qalora_group_size=16, megatron_core="megatron.core", **later)
    edit(tmp_path, target_modules=r".*\.layers\.\d+\.self_attn\.(q|k|v|o)_proj", inference_mode=False)
    assert read_adapter(tmp_path, model.config).tensors.keys() == expected.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.update({name: tensors[name][0]}), r"of another size: .*lora_A"),
        (lambda tensors, name: tensors.update({name: tensors[name][:0]}), r"of another size: .*lora_A"),
        (
            lambda tensors, name: tensors.update({name.replace("A.weight", "A.default.weight"): tensors[name]}),
            "not in this model: .*lora_A",
        ),
        (lambda tensors, name: tensors.update({name: tensors[name] * np.nan}), "q_proj.lora_A.weight has values that"),
        (
            lambda tensors, name: tensors.update({"base_model.model.lm_head.lora_A.weight": tensors[name]}),
            "(?s)lm_head.lora_A.weight.*Adapters of embeddings, head and routers are not applied here",
        ),
    ],
)
def test_damaged_factors_are_refused(tmp_path: Path, change: Callable[..., None], message: str) -> None:
    model = adapted("dense")
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors, next(name for name in tensors if name.endswith("q_proj.lora_A.weight")))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path, model.config)


def test_modules_that_are_not_saved_whole_here_are_named(tmp_path: Path) -> None:
    """As PEFT writes modules_to_save: [down_proj], on the very model that is named."""
    model = adapted("dense")
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.mlp.down_proj.weight"] = np.zeros((32, 64), np.float32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    edit(tmp_path, modules_to_save=["down_proj"])
    with pytest.raises(CheckpointError, match=r"(?s)mlp\.down_proj\.weight.*nor modules_to_save other than .*lm_head"):
        read_adapter(tmp_path, model.config)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_hidden_layers": 1}, "not in this model: base_model.model.model.layers.1"),
        ({"num_hidden_layers": 3}, "missing: model.layers.2.self_attn.q_proj"),
        ({"intermediate_size": 40}, "of another size: model.layers.0.mlp.gate_proj"),
        ({"num_key_value_heads": 4}, r"k_proj: A \[3, 32\], B \[16, 3\]; here 32 in, 32 out"),
    ],
)
def test_another_base_is_refused_with_the_difference(tmp_path: Path, other: dict[str, int], message: str) -> None:
    save_adapter(adapted("dense"), tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path, tiny_model("dense", **other).config)


def test_a_lost_tensor_is_named(tmp_path: Path, kind: str) -> None:
    model = adapted(kind)
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("o_proj.lora_B.weight"))
    del tensors[name]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="o_proj: has only A"):
        read_adapter(tmp_path, model.config)


def test_a_fingerprint_is_that_of_the_weights(tmp_path: Path, kind: str) -> None:
    """Whatever layout and float type hold them."""
    model = tiny_model(kind)
    prints = set()
    for name, options in {"pt": {}, "paddle": {"format": "paddle"}, "bf16": {"dtype": "bfloat16"}}.items():
        erniekit.save_model(model, tmp_path / name, **options)
        prints.add(fingerprint(tmp_path / name))
    erniekit.save_model(tiny_model(kind, seed=4), tmp_path / "other")
    assert len(prints) == 1 and fingerprint(tmp_path / "other") not in prints


def test_a_digest_is_of_every_weight(tmp_path: Path, kind: str) -> None:
    """Also of those that the fingerprint, which reads two tensors, leaves out."""
    model = tiny_model(kind)
    for name in ("one", "same", "other"):
        if name == "other":
            norm = model.model.norm.weight
            norm.set_value(norm + 1.0)
        erniekit.save_model(model, tmp_path / name)
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    assert weights_digest(one) == weights_digest(same) != weights_digest(other)
    assert fingerprint(one) == fingerprint(other)


def test_other_weights_of_the_same_size_are_refused(tmp_path: Path) -> None:
    model = adapted("dense")
    state = lora.state_of(model)
    assert state is not None
    for name, seed in (("base", 3), ("other", 4)):
        erniekit.save_model(tiny_model("dense", seed=seed), tmp_path / name)
    state.base, state.base_fingerprint = str(tmp_path / "base"), fingerprint(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    loaded = erniekit.load_model(tmp_path / "base", adapter=tmp_path / "adapter")
    assert np.array_equal(loaded(IDS).numpy(), model(IDS).numpy())
    with pytest.raises(CheckpointError, match=f"it was trained on {tmp_path}/base .*{tmp_path}/other"):
        erniekit.load_model(tmp_path / "other", adapter=tmp_path / "adapter")
    assert base_of(tmp_path / "adapter", None) == tmp_path / "base"


def test_resuming_with_another_adapter_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted("dense"), tmp_path)
    with pytest.raises(CheckpointError, match=r"rank 3, scaling 1.33333.*\n.*rank 2, scaling 1.33333"):
        load_adapter(adapted("dense", rank=2, alpha=8 / 3), tmp_path)
    same = adapted("dense")
    load_adapter(same, tmp_path)


def test_a_model_with_an_adapter_is_not_saved_as_if_it_had_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="merge"):
        erniekit.save_model(adapted("dense"), tmp_path / "x")


def test_embeddings_trained_apart_from_a_tied_head(tmp_path: Path) -> None:
    model = adapted("dense", modules_to_save=("embed_tokens",))
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.lm_head.weight" in tensors  # PEFT looks for both
    edit(tmp_path, ensure_weight_tying=False)
    with pytest.raises(CheckpointError, match="ensure_weight_tying: true"):
        read_adapter(tmp_path, model.config)


def test_a_run_is_found_by_its_adapter(tmp_path: Path) -> None:
    save_adapter(adapted("dense"), tmp_path / "checkpoint-3")
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    save_adapter(adapted("dense"), tmp_path)
    assert find_checkpoint(tmp_path) == tmp_path
    erniekit.save_model(tiny_model("dense"), tmp_path)
    with pytest.raises(CheckpointError, match="both a model and an adapter"):
        find_checkpoint(tmp_path)


def test_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no adapter"):
        erniekit.load_model(_saved(tmp_path), adapter=tmp_path / "nothing")


def _saved(tmp_path: Path) -> Path:
    erniekit.save_model(tiny_model("dense"), tmp_path / "base")
    return tmp_path / "base"
