"""Random configurations, both ways between this package and transformers itself. Skipped where torch is absent."""

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from parity.ours import logits_of, training_loss
from parity.support import LOGIT_TOLERANCE, assert_gradients_agree, load_tool, paddle_file_tensors
from safetensors.numpy import load_file, save_file

import erniekit
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.weights import export_tensors
from erniekit.moe.aux_losses import load_balance_loss
from erniekit.moe.router import RouterOptions

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
torch.set_num_threads(1)  # tiny tensors: more threads only wait for one another

SEEDS = range(12)


def random_config(seed: int) -> dict[str, Any]:
    """A random configuration: dense for seeds that 4 divides, else MoE with a random pattern of expert layers."""
    rng = np.random.default_rng(seed)
    layers = int(rng.integers(2, 6))
    values: dict[str, Any] = {
        "vocab_size": int(rng.integers(60, 120)),
        "hidden_size": int(rng.choice([24, 32])),
        "intermediate_size": int(rng.integers(5, 40)),
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": int(rng.choice([1, 2, 4])),
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5])),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(rng.choice([1e4, 5e5]))},
        "tie_word_embeddings": bool(rng.integers(2)),
        "use_bias": bool(rng.integers(2)),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if rng.integers(2):
        values["head_dim"] = int(rng.choice([2, 6, 10]))
    if seed % 4 == 0:
        values.setdefault("head_dim", None)
        return values
    experts = int(rng.integers(2, 9))
    start = int(rng.integers(0, layers - 1))
    return {
        **values,
        "moe_num_experts": experts,
        "moe_k": int(rng.integers(1, min(5, experts))),
        "moe_intermediate_size": int(rng.integers(3, 20)),
        "moe_num_shared_experts": int(rng.integers(0, 3)),
        "moe_layer_start_index": start,
        "moe_layer_end_index": int(rng.choice([-1, rng.integers(start + 1, layers)])),
        "moe_layer_interval": int(rng.choice([1, 1, 2])),
    }


def reference_model(seed: int) -> tuple[Any, dict[str, dict[str, np.ndarray]]]:
    """(transformers model, inputs) whose routing decisions are clear."""
    tool = load_tool("make_parity_fixtures")
    values = random_config(seed)
    inputs = tool.make_inputs(values["vocab_size"], seed)
    return tool.decided_model(values, seed, inputs, least_changed=0.01), inputs


def assert_same_logits(ours: paddle.nn.Layer, theirs: Any, inputs: dict[str, dict[str, np.ndarray]]) -> None:
    """On every input, at the positions that are not padding."""
    tool = load_tool("make_parity_fixtures")
    for name, item in inputs.items():
        real = item["segment_ids"] != 0
        with paddle.no_grad(), torch.no_grad():
            expected = tool.run_logits(theirs, item, tool.segment_mask(item["segment_ids"])).numpy()
            logits = logits_of(ours, item).numpy()
        np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=LOGIT_TOLERANCE, err_msg=name)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_transformers_saves_computes_the_same_here(seed: int, tmp_path: Path) -> None:
    tool = load_tool("make_parity_fixtures")
    theirs, inputs = reference_model(seed)
    theirs.save_pretrained(tmp_path)
    ours = erniekit.load_model(tmp_path)
    assert_same_logits(ours, theirs, inputs)

    item = inputs["packed"]
    loss = training_loss(ours, item)
    loss.backward()
    expected = tool.gradients_of(theirs, item, tool.segment_mask(item["segment_ids"]))
    assert_gradients_agree(dict(export_tensors(ours, "pt", "grad")), expected)


def random_model(seed: int, attempt: int) -> CausalLM:
    """A model of this package, random like those of `build_model`; MoE ones of even seeds carry a prediction depth."""
    values = random_config(seed)
    moe = "moe_num_experts" in values
    values["model_type"] = "ernie4_5_moe" if moe else "ernie4_5"
    values["num_nextn_predict_layers"] = int(moe and seed % 2 == 0)
    paddle.seed(1000 * attempt + seed)
    rng = np.random.default_rng(1000 * attempt + seed)
    model = CausalLM(ModelConfig.from_dict(values))
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        noise = rng.standard_normal(parameter.shape).astype(np.float32)
        if name.endswith("norm.weight"):
            parameter.set_value(paddle.to_tensor(1 + 0.3 * noise))
        elif name.endswith("e_score_correction_bias"):
            parameter.set_value(paddle.to_tensor(0.5 / values["moe_num_experts"] * noise))
        elif name.endswith(".bias"):
            parameter.set_value(paddle.to_tensor(0.3 * noise))
    return model


@pytest.mark.parametrize("seed", SEEDS)
def test_what_this_package_saves_computes_the_same_in_transformers(seed: int, tmp_path: Path) -> None:
    tool = load_tool("make_parity_fixtures")
    inputs = tool.make_inputs(random_config(seed)["vocab_size"], seed)
    for attempt in range(20):
        ours = random_model(seed, attempt)
        shards = "30KB" if seed % 2 else "5GB"
        erniekit.save_model(ours, tmp_path / str(attempt), format="pt", max_shard_size=shards)
        theirs = tool.load_again(tmp_path / str(attempt))  # stops at any missing, unexpected or misshapen tensor
        if tool.routing_is_decided(theirs, inputs, least_changed=0.0):
            break
    else:
        pytest.fail("no attempt gave decided routing")
    ours.eval()
    assert_same_logits(ours, theirs, inputs)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_paddle_layout_is_the_published_one(seed: int, tmp_path: Path) -> None:
    model = random_model(seed, attempt=0)
    for weights_format in ("pt", "paddle"):
        erniekit.save_model(model, tmp_path / weights_format, format=weights_format)
    saved = load_file(tmp_path / "paddle" / "model.safetensors")
    expected = paddle_file_tensors(load_file(tmp_path / "pt" / "model.safetensors"), vars(model.config))
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(saved[name], value, err_msg=name)
    again = dict(export_tensors(erniekit.load_model(tmp_path / "paddle"), "pt", "param"))
    for name, value in export_tensors(model, "pt", "param"):
        np.testing.assert_array_equal(again[name], value, err_msg=name)


@pytest.mark.parametrize("seed", [1, 8])
def test_a_head_that_differs_from_the_tied_embeddings_is_used(seed: int, tmp_path: Path) -> None:
    theirs, inputs = reference_model(seed)
    assert theirs.config.tie_word_embeddings
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_logits(erniekit.load_model(tmp_path), load_tool("make_parity_fixtures").load_again(tmp_path), inputs)


def test_bfloat16_files_mean_the_same_both_ways(tmp_path: Path) -> None:
    tool = load_tool("make_parity_fixtures")
    theirs, inputs = reference_model(7)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    ours, again = erniekit.load_model(tmp_path / "theirs"), tool.load_again(tmp_path / "theirs")
    assert tool.routing_is_decided(again, inputs, least_changed=0.0)
    assert_same_logits(ours, again, inputs)

    erniekit.save_model(ours, tmp_path / "ours", dtype="bfloat16")
    theirs_of_ours = tool.load_again(tmp_path / "ours")
    assert_same_logits(erniekit.load_model(tmp_path / "ours"), theirs_of_ours, inputs)
    own_dtype = tool.load_again(tmp_path / "ours", dtype="auto")
    found = {name: parameter.dtype for name, parameter in own_dtype.named_parameters()}
    fp32 = {name for name, dtype in found.items() if dtype == torch.float32}
    assert set(found.values()) == {torch.float32, torch.bfloat16}
    assert all(".mlp.gate." in name for name in fp32), "only the router and its correction bias stay in float32"


def test_load_balance_loss_of_one_row() -> None:
    from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import load_balancing_loss_func

    logits = np.random.default_rng(0).standard_normal((37, 6)).astype(np.float32)
    expected = load_balancing_loss_func((torch.from_numpy(logits),), 6, 2).item()
    probs = paddle.nn.functional.softmax(paddle.to_tensor(logits), axis=-1)
    assert load_balance_loss(probs, RouterOptions(2), [37]).item() / 37 == pytest.approx(expected, rel=1e-6)
