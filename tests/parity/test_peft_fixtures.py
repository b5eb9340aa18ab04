"""Adapters that PEFT wrote (tools/make_peft_fixture.py) give PEFT's logits here; torch is not needed."""

from pathlib import Path

import numpy as np
import pytest
from parity.support import VISION_CASE, read_fixture
from parity.test_vision_parity import logits_of

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


def test_a_peft_adapter_of_a_vision_language_model(tmp_path: Path) -> None:
    """On experts of both modalities, attention, shared experts, the resampler and the vision transformer."""
    fixture = read_fixture(VISION_CASE)
    adapter, expected = FIXTURES / "vl_moe" / "adapter", np.load(FIXTURES / "vl_moe" / "logits.npz")
    export_checkpoint(fixture.path, tmp_path / "merged", adapter_dir=adapter)
    attached, merged = erniekit.load_model(fixture.path, adapter=adapter), erniekit.load_model(tmp_path / "merged")
    for name, logits in expected.items():
        item = fixture.item(name)
        real = item["attention_mask"] != 0
        plain, bound = item["logits"][real], TOLERANCE * np.abs(logits).max()
        assert np.abs(logits[real] - plain).max() > 1e3 * bound
        for model in (attached, merged):
            assert np.abs(logits_of(model, item).numpy()[real] - logits[real]).max() < 2 * bound
        with lora.disabled(attached):
            assert np.abs(logits_of(attached, item).numpy()[real] - plain).max() < 2 * bound
