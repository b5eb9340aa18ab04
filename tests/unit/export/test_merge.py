"""Merging on disk: the adapter's function in weights of any layout and float type."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.adapters import attach_random
from support.streaming import model_of_many_tensors, peak_bytes
from support.tiny_models import tiny_model

import erniekit
from erniekit import lora
from erniekit.checkpoint import dtypes
from erniekit.checkpoint.peft_attach import save_adapter
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.export.export import export_checkpoint
from erniekit.export.split import split_checkpoint
from erniekit.utils.errors import CheckpointError

IDS = np.arange(20).reshape(2, 10) * 3 % 61
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {"modules_to_save": ("embed_tokens", "norm")}),
    "dora": ("dense", {"dora": True}),
    "moe": ("moe", {}),
    "some": ("moe", {"targets": ("k_proj", r".*\.1\.mlp\.experts\.down_proj")}),
}


def make(tmp_path: Path, kind: str, options: dict[str, Any], dtype: str = "float32") -> Any:
    """A base and an adapter on disk; the model in memory."""
    erniekit.save_model(tiny_model(kind), tmp_path / "base", dtype=dtype)
    model = erniekit.load_model(tmp_path / "base")
    attach_random(model, **options)
    save_adapter(model, tmp_path / "adapter")
    return model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("format", ["pt", "paddle"])
def test_merged_equals_adapter(tmp_path: Path, case: str, format: Any) -> None:
    model = make(tmp_path, *CASES[case])
    adapted = model(IDS).numpy()
    export_checkpoint(tmp_path / "base", tmp_path / "merged", format, adapter_dir=tmp_path / "adapter")
    merged = erniekit.load_model(tmp_path / "merged")(IDS).numpy()
    assert np.abs(merged - adapted).max() < 1e-5 * np.abs(adapted).max()
    lora.merge(model)  # in memory, the same weights
    assert np.abs(model(IDS).numpy() - merged).max() < 1e-5 * np.abs(adapted).max()


def test_a_bfloat16_base_is_rounded_once(tmp_path: Path) -> None:
    """W is widened, the sum is taken in fp32, and the result is the bfloat16 nearest to it."""
    model = make(tmp_path, "dense", {}, dtype="bfloat16")
    export_checkpoint(tmp_path / "base", tmp_path / "merged", adapter_dir=tmp_path / "adapter")
    lora.merge(model)
    reader, name = Reader(tmp_path / "merged"), "model.layers.0.mlp.down_proj.weight"
    assert reader.info(name).dtype == "BF16"
    exact = dict(model.named_parameters())[name].numpy().T
    nearest = dtypes.to_fp32(dtypes.convert(np.ascontiguousarray(exact), "F32", "BF16"), "BF16")
    found = reader.read(name, as_fp32=True)
    # numpy's and Paddle's sums differ in the last bit of fp32, which moves a value across a rounding edge now and then.
    assert (found != nearest).mean() < 1e-3
    untouched = Reader(tmp_path / "base").read("model.norm.weight")
    assert np.array_equal(reader.read("model.norm.weight"), untouched)


def test_the_base_stays_and_splitting_an_adapter_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "dense", {})
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    export_checkpoint(tmp_path / "base", tmp_path / "merged", adapter_dir=tmp_path / "adapter")
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    with pytest.raises(CheckpointError, match="`erniekit export` merges it"):
        split_checkpoint(tmp_path / "adapter", tmp_path / "split")


def test_memory_holds_a_few_tensors_and_the_adapter_whatever_the_model(tmp_path: Path) -> None:
    """So an export needs no ranks: the base is never whole in memory."""
    total, largest = model_of_many_tensors(tmp_path / "base")
    model = erniekit.load_model(tmp_path / "base")
    lora.attach(model, lora.LoraOptions(rank=2, alpha=4.0), tied=True)
    save_adapter(model, tmp_path / "adapter")
    adapter = sum(parameter.size * 4 for parameter in model.parameters() if not parameter.stop_gradient)
    del model
    target = tmp_path / "merged"
    peak = peak_bytes(lambda: export_checkpoint(tmp_path / "base", target, adapter_dir=tmp_path / "adapter"))
    assert total > 4 * largest and peak < 2.2 * largest + 2 * adapter, (peak, largest, adapter, total)
