"""Random vision-language models, both ways between this package and transformers. Skipped where torch is absent."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import paddle
import pytest
from parity.ours import mean_cross_entropy
from parity.support import LOGIT_TOLERANCE, ROOT, assert_gradients_agree, load_tool
from parity.test_vision_parity import logits_of

import erniekit
from erniekit.models.weights import export_tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
torch.set_num_threads(1)

SEEDS = range(6)


def vision_tool() -> ModuleType:
    """tools/make_vision_fixtures.py, which imports its neighbour."""
    if str(ROOT / "tools") not in sys.path:
        sys.path.append(str(ROOT / "tools"))
    return load_tool("make_vision_fixtures")


def random_model(seed: int) -> tuple[Any, dict[str, dict[str, np.ndarray]]]:
    """(transformers model, inputs) whose routing decisions are clear."""
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(2, 5))
    first = int(rng.integers(0, layers - 1))
    time = int(rng.choice([1, 2, 3]))
    heads = int(rng.choice([1, 2]))
    text = {
        "num_hidden_layers": layers,
        "mlp_layer_types": ["dense"] * first + ["sparse"] * (layers - first),
        "num_key_value_heads": int(rng.choice([1, 2, 4])),
        "head_dim": 2 * (time + 4),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, time]},
        "moe_intermediate_size": [int(rng.integers(4, 16)), int(rng.integers(2, 8))],
        "moe_num_experts": int(rng.integers(4, 7)),
        "moe_k": int(rng.integers(1, 4)),
        "moe_num_shared_experts": int(rng.integers(0, 3)),
        "tie_word_embeddings": True,
        "use_bias": bool(rng.integers(2)),
    }
    vision = {
        "depth": int(rng.integers(1, 4)),
        "num_heads": heads,
        "hidden_size": 8 * heads,
        "intermediate_size": int(rng.integers(5, 30)),
        "patch_size": int(rng.choice([2, 3])),
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5])),
    }
    tool = vision_tool()
    inputs = tool.make_inputs(seed, vision["patch_size"] ** 2 * 3)
    for attempt in range(50):
        model = tool.build_model(seed + 1000 * attempt, {"text": text, "vision": vision})
        if tool.routing_is_decided(model, inputs, least_changed=0.0):
            return model, inputs
    raise AssertionError(f"no model near seed {seed} has decided routing")


@pytest.mark.parametrize("seed", SEEDS)
def test_loaded_from_transformers_gives_its_logits_and_gradients(seed: int, tmp_path: Path) -> None:
    tool = vision_tool()
    theirs, inputs = random_model(seed)
    theirs.save_pretrained(tmp_path)
    ours = erniekit.load_model(tmp_path)
    for item in inputs.values():
        real = item["attention_mask"] != 0
        with torch.no_grad():
            expected = tool.run_logits(theirs, item).numpy()
        with paddle.no_grad():
            found = logits_of(ours, item).numpy()
        np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=LOGIT_TOLERANCE)
    item = inputs["mixed"]
    mean_cross_entropy(logits_of(ours, item), item["labels"]).backward()
    assert_gradients_agree(dict(export_tensors(ours, "pt", "grad")), tool.named_gradients(theirs, item))


@pytest.mark.parametrize("weights_format", ["pt", "paddle"])
@pytest.mark.parametrize("seed", SEEDS[:3])
def test_an_exported_directory_loads_in_transformers(seed: int, weights_format: str, tmp_path: Path) -> None:
    tool = vision_tool()
    theirs, inputs = random_model(seed)
    theirs.save_pretrained(tmp_path / "theirs")
    erniekit.save_model(erniekit.load_model(tmp_path / "theirs"), tmp_path / "ours", format=weights_format)
    if weights_format == "paddle":  # transformers reads -PT: the way there and back
        erniekit.save_model(erniekit.load_model(tmp_path / "ours"), tmp_path / "pt", format="pt")
    again, report = transformers.Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
        tmp_path / ("ours" if weights_format == "pt" else "pt"),
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(report.values()), report
    for item in inputs.values():
        with torch.no_grad():
            expected, found = tool.run_logits(theirs, item), tool.run_logits(again.eval(), item)
        np.testing.assert_array_equal(found.numpy(), expected.numpy())
