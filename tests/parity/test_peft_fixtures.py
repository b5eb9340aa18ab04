"""Adapters that PEFT wrote (tools/make_peft_fixture.py) give PEFT's logits here; torch is not needed."""

from pathlib import Path

import numpy as np
import pytest

import erniekit
from erniekit import lora
from erniekit.export.export import export_checkpoint

FIXTURES = Path(__file__).parent / "peft"
TOLERANCE = 1e-5  # of the largest logit: both sides compute in fp32


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_peft_adapters(name: str, tmp_path: Path) -> None:
    directory = FIXTURES / name
    arrays = np.load(directory / "logits.npz")
    bound = TOLERANCE * np.abs(arrays["logits"]).max()
    assert np.abs(arrays["logits"] - arrays["plain"]).max() > 1e3 * bound
    model = erniekit.load_model(directory / "base", adapter=directory / "adapter")
    assert np.abs(model(arrays["ids"]).numpy() - arrays["logits"]).max() < bound
    with lora.disabled(model):
        assert np.abs(model(arrays["ids"]).numpy() - arrays["plain"]).max() < bound
    export_checkpoint(directory / "base", tmp_path / "merged", adapter_dir=directory / "adapter")
    merged = erniekit.load_model(tmp_path / "merged")
    assert np.abs(merged(arrays["ids"]).numpy() - arrays["logits"]).max() < bound
