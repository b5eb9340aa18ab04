"""Multi-token prediction against the float64 numpy model: transformers does not implement it, so this is its only
judge.

The forward pass is compared number by number, the gradients by finite differences of the numpy loss. The numpy model
itself is held to the properties that define the method: what a position may see, and which positions count.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from parity.numpy_model import IGNORE, NumpyModel, mean_loss, token_losses
from parity.ours import Item, mean_cross_entropy, training_loss
from parity.support import GRADIENT_NOISE, LOGIT_TOLERANCE, read_fixture
from safetensors.numpy import load_file, save_file

import erniekit
from erniekit.models.inputs import packed_inputs
from erniekit.models.mtp import predict_ahead
from erniekit.models.weights import export_tensors
from erniekit.nn.attention_mask import next_in_document

FACTOR = 0.3
# Base fixture and number of depths; all but moe_mtp get their prediction tensors here.
MODELS = {"moe_mtp": 1, "dense_untied": 2, "dense_mha": 1, "dense_bias": 1, "moe_untied": 3}


def mtp_tensors(config: dict[str, Any], depths: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random prediction tensors under their file names, -PT layout."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    linears = {f"self_attn.{name}_proj": (keys, hidden) for name in "kv"}
    linears |= {"self_attn.q_proj": (queries, hidden), "self_attn.o_proj": (hidden, queries)}
    linears |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    out: dict[str, np.ndarray] = {}
    for d in range(depths):
        norms = [f"model.mtp_block.{d}.{name}_layernorm" for name in ("input", "post_attention")]
        norms += [f"model.mtp_{name}_norm.{d}" for name in ("emb", "hidden")]
        out |= {f"{name}.weight": 1 + 0.3 * rng.standard_normal(hidden) for name in norms}
        out[f"model.mtp_linear_proj.{d}.weight"] = 0.2 * rng.standard_normal((hidden, 2 * hidden))
        for name, shape in linears.items():
            out[f"model.mtp_block.{d}.{name}.weight"] = 0.2 * rng.standard_normal(shape)
            if config["use_bias"]:
                out[f"model.mtp_block.{d}.{name}.bias"] = 0.3 * rng.standard_normal(shape[0])
    return {name: value.astype(np.float32) for name, value in out.items()}


def make_model(name: str, directory: Path) -> NumpyModel:
    """Write a checkpoint with prediction tensors to `directory`; the numpy model of the same weights."""
    fixture = read_fixture(name)
    config = {**fixture.config, "num_nextn_predict_layers": MODELS[name]}
    tensors = load_file(fixture.path / "model.safetensors")
    if name != "moe_mtp":
        tensors |= mtp_tensors(config, MODELS[name], np.random.default_rng(5))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return NumpyModel(config, tensors)


def item_of(name: str, kind: str) -> Item:
    """The stored input `kind` of a fixture."""
    return {key: read_fixture(name).item(kind)[key] for key in ("input_ids", "position_ids", "segment_ids", "labels")}


def ordered(item: Item) -> list[np.ndarray]:
    """As the numpy model takes them."""
    return [item[key] for key in ("input_ids", "position_ids", "segment_ids", "labels")]


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    """Every model in turn."""
    return str(request.param)


def test_labels_are_shifted_once_more_a_depth_and_end_with_the_document(tmp_path: Path) -> None:
    model = make_model("dense_untied", tmp_path)
    ids = np.array([[11, 12, 13, 14, 21, 22, 31, 0]])
    segments = np.array([[1, 1, 1, 1, 2, 2, 3, 0]])
    labels = np.array([[12, 13, 14, 2, 22, 2, 2, IGNORE]])  # every document ends with token 2
    positions = np.array([[0, 1, 2, 3, 0, 1, 0, 0]])
    first, second = model.mtp(ids, positions, segments, labels)
    assert first.labels.tolist() == [[13, 14, 2, IGNORE, 2, IGNORE, IGNORE, IGNORE]]
    assert second.labels.tolist() == [[14, 2, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE]]


@pytest.mark.parametrize("kind", ["packed", "left_pad"])
def test_a_document_predicts_the_same_packed_and_alone(name: str, kind: str, tmp_path: Path) -> None:
    model, item = make_model(name, tmp_path), item_of(name, kind)
    together = model.mtp(*ordered(item))
    for row, segment in {(b, s) for b in range(2) for s in set(item["segment_ids"][b].tolist()) - {0}}:
        own = item["segment_ids"][row] == segment
        alone = model.mtp(*ordered({key: value[row : row + 1, own] for key, value in item.items()}))
        for joint, single in zip(together, alone, strict=True):
            counted = single.labels[0] != IGNORE
            np.testing.assert_array_equal(joint.labels[row, own], single.labels[0])
            np.testing.assert_allclose(joint.logits[row, own][counted], single.logits[0, counted], rtol=0, atol=1e-10)


def ours_ahead(model: paddle.nn.Layer, item: Item) -> list[tuple[paddle.Tensor, np.ndarray]]:
    """(logits [B, S, V], labels [B, S]) of each depth, and of the main path first, from this package."""
    ids, positions, segments, labels = ordered(item)
    inputs = packed_inputs(model, ids, segments, positions)
    hidden = model.model(inputs)
    out = [(model.head(hidden.normed).reshape([*ids.shape, -1]), labels)]
    for depth, normed_TD in enumerate(predict_ahead(model.model, hidden, inputs)):
        target, valid = next_in_document(inputs.attention.plan.document_of_token, 1 + depth)
        shifted = np.where(valid, labels.reshape(-1)[target], IGNORE)
        out.append((model.head(normed_TD).reshape([*ids.shape, -1]), shifted.reshape(ids.shape)))
    return out


@pytest.mark.parametrize("kind", ["plain", "left_pad", "gaps", "packed"])
def test_forward_equals_numpy(name: str, kind: str, tmp_path: Path) -> None:
    expected, item = make_model(name, tmp_path), item_of(name, kind)
    with paddle.no_grad():
        depths = ours_ahead(erniekit.load_model(tmp_path), item)[1:]
    assert len(depths) == MODELS[name]
    for (logits, labels), depth in zip(depths, expected.mtp(*ordered(item)), strict=True):
        np.testing.assert_array_equal(labels, depth.labels)
        counted = labels != IGNORE
        assert counted.any()
        np.testing.assert_allclose(logits.numpy()[counted], depth.logits[counted], rtol=0, atol=LOGIT_TOLERANCE)


def total_loss(model: paddle.nn.Layer, item: Item) -> paddle.Tensor:
    """Main loss + FACTOR * mean over depths, from logits with Paddle's own cross-entropy."""
    losses = [mean_cross_entropy(logits, labels) for logits, labels in ours_ahead(model, item)]
    return losses[0] + FACTOR * sum(losses[1:]) / (len(losses) - 1)


LOSSES: dict[str, Callable[[paddle.nn.Layer, Item], paddle.Tensor]] = {
    "plain": total_loss,
    "training": lambda model, item: training_loss(model, item, FACTOR),
}


def numpy_loss(model: NumpyModel, item: Item) -> float:
    """The same in float64."""
    ids, positions, segments, labels = ordered(item)
    return mean_loss(model.logits(ids, positions, segments), labels) + FACTOR * model.mtp_loss(*ordered(item))


def numpy_derivative(model: NumpyModel, item: Item, tensor: str, direction: np.ndarray, step: float = 1e-5) -> float:
    """Central difference of the loss along `direction`, a unit vector in the space of one tensor."""
    middle, values = model.tensors[tensor], []
    for sign in (1, -1):
        model.tensors[tensor] = middle + sign * step * direction
        values.append(numpy_loss(model, item))
    model.tensors[tensor] = middle
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("path", LOSSES)
def test_gradients_equal_finite_differences(name: str, path: str, tmp_path: Path) -> None:
    reference, item = make_model(name, tmp_path), item_of(name, "packed")
    model = erniekit.load_model(tmp_path)
    loss = LOSSES[path](model, item)
    loss.backward()
    assert loss.item() == pytest.approx(numpy_loss(reference, item), abs=2e-5)

    rng = np.random.default_rng(0)
    checked = 0
    for tensor, gradient in export_tensors(model, "pt", "grad"):
        norm = float(np.linalg.norm(gradient))
        if norm == 0.0 and tensor.endswith("e_score_correction_bias"):
            continue
        # Half along the gradient itself, so that the derivative is not small, and half anywhere, so that a missing part
        # shows.
        anywhere = rng.standard_normal(gradient.shape)
        direction = gradient / max(norm, 1e-30) + anywhere / np.linalg.norm(anywhere)
        direction = direction / np.linalg.norm(direction)
        derivative = numpy_derivative(reference, item, tensor, direction)
        ours = float((np.float64(gradient) * direction).sum())
        assert ours == pytest.approx(derivative, rel=1e-4, abs=1e-5 * norm + GRADIENT_NOISE), tensor
        checked += 1
    assert checked >= len(reference.tensors) - reference.config["num_hidden_layers"]


def test_numpy_loss_weighs_depths_equally(tmp_path: Path) -> None:
    model, item = make_model("moe_untied", tmp_path), item_of("moe_untied", "packed")
    depths = model.mtp(*ordered(item))
    means = [token_losses(d.logits, d.labels).sum() / (d.labels != IGNORE).sum() for d in depths]
    assert len({int((d.labels != IGNORE).sum()) for d in depths}) == 3  # so that a mean over all tokens would differ
    assert model.mtp_loss(*ordered(item)) == pytest.approx(sum(means) / 3)
