"""Adapters of a vision-language model from here in PEFT and from PEFT here: the same logits on pictures. Skipped where
torch or peft is absent.
"""

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from parity.support import VISION_CASE, Fixture, read_fixture
from parity.test_vision_live import vision_tool
from parity.test_vision_parity import logits_of
from support.adapters import randomize

import erniekit
from erniekit import lora
from erniekit.checkpoint.peft_attach import attach_stored, save_adapter
from erniekit.checkpoint.peft_read import read_adapter
from erniekit.models.decoder import CausalLM

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity
torch.set_num_threads(1)

TOLERANCE = 2e-5  # of the largest logit: both sides compute in fp32
NAMES = ("mixed", "video")
EXPERTS = [f"mlp.{kind}_moe.experts.{name}" for kind in ("text", "vision") for name in ("gate_up_proj", "down_proj")]
# Options of an adapter made here: the default, the vision transformer by pattern, by transformers' and by our names.
OURS: dict[str, dict[str, Any]] = {
    "default": {},
    "tower": {"targets": (r"model\.vision_model\..*",), "rslora": True},
    "transformers_paths": {"targets": (r"model\.(language_model\.layers\.\d+\.self_attn|vision_tower)\..*", "fc2")},
    "vision_experts": {"targets": ("vision_experts.gate_up_proj", "mlp.text_moe.experts.down_proj", "fc1")},
    "saved": {"targets": ("q_proj", "resampler_model.mlp"), "modules_to_save": ("embed_tokens", "norm")},
}
SIZE = {"r": 3, "lora_alpha": 6}
THEIRS: dict[str, dict[str, Any]] = {
    "experts": SIZE | {"target_modules": ["q_proj", "o_proj", "fc1", "fc2"], "target_parameters": EXPERTS},
    "one": SIZE | {"target_modules": ["shared_experts.down_proj"], "target_parameters": EXPERTS[3:]},
    "regex": SIZE | {"target_modules": r".*(vision_tower|resampler_model)\..*(qkv|proj|fc1|fc2)"},
}


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return read_fixture(VISION_CASE)


def theirs(fixture: Fixture) -> Any:
    return transformers.Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
        fixture.path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def real(logits: np.ndarray, fixture: Fixture, name: str) -> np.ndarray:
    """Without padding."""
    return logits[fixture.item(name)["attention_mask"] != 0]


def logits_there(model: Any, fixture: Fixture) -> list[np.ndarray]:
    with torch.no_grad():
        return [real(vision_tool().run_logits(model, fixture.item(name)).numpy(), fixture, name) for name in NAMES]


def logits_here(model: CausalLM, fixture: Fixture) -> list[np.ndarray]:
    with paddle.no_grad():
        return [real(logits_of(model, fixture.item(name)).numpy(), fixture, name) for name in NAMES]


def assert_same(ours: list[np.ndarray], other: list[np.ndarray]) -> None:
    for one, two in zip(ours, other, strict=True):
        assert np.abs(one - two).max() <= TOLERANCE * np.abs(two).max()


@pytest.mark.parametrize("name", OURS)
def test_ours_in_peft(fixture: Fixture, tmp_path: Path, name: str) -> None:
    model = erniekit.load_model(fixture.path)
    plain = logits_here(model, fixture)
    lora.attach(model, lora.LoraOptions(**{"rank": 3, "alpha": 4.0} | OURS[name]), tied=True)
    randomize(model)
    save_adapter(model, tmp_path / "adapter")
    ours = logits_here(model, fixture)
    assert np.abs(ours[0] - plain[0]).max() > 0.05
    assert_same(ours, logits_there(peft.PeftModel.from_pretrained(theirs(fixture), tmp_path / "adapter"), fixture))
    again = erniekit.load_model(fixture.path)
    attach_stored(again, read_adapter(tmp_path / "adapter", again.config, fixture.path))
    for one, two in zip(logits_here(again, fixture), ours, strict=True):
        assert np.array_equal(one, two)


@pytest.mark.parametrize("name", THEIRS)
def test_peft_here(fixture: Fixture, tmp_path: Path, name: str) -> None:
    model = peft.get_peft_model(theirs(fixture), peft.LoraConfig(task_type="CAUSAL_LM", **THEIRS[name]))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    there = logits_there(model.eval(), fixture)
    here = erniekit.load_model(fixture.path)
    attach_stored(here, read_adapter(tmp_path / "adapter", here.config, fixture.path))
    assert_same(logits_here(here, fixture), there)
    save_adapter(here, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(theirs(fixture), tmp_path / "again")
    assert_same(logits_there(again, fixture), there)
