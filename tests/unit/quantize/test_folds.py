"""Every fold leaves the model's function as it was: logits in float64 by the independent model in numpy, and the choice
of experts.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from parity.numpy_model import NumpyModel

from erniekit.checkpoint.safetensors_read import Reader
from erniekit.models.config import ModelConfig
from erniekit.models.inputs import head_layout
from erniekit.models.weights import logical_tensors
from erniekit.quantize import folds
from erniekit.quantize.folds import LayerWeight, layer_matrices
from erniekit.utils.bfloat16 import bf16_to_fp32, fp32_to_bf16

FIXTURES = Path(__file__).parents[2] / "parity" / "fixtures"
KINDS = ["dense_bias", "dense_mha", "moe_bias", "moe_untied"]


class FileTensors:
    """The weights of a -PT file in float64, and layer `number` of them as folds.LayerTensors."""

    def __init__(self, kind):
        path = FIXTURES / kind
        reader = Reader(path)
        self.config = ModelConfig.from_dir(path)
        self.raw = json.loads((path / "config.json").read_text())
        self.tensors = {name: reader.read(name, as_fp32=True).astype(np.float64) for name in reader.keys()}  # noqa: SIM118
        self._logicals = {(logical.param, logical.index): logical for logical in logical_tensors(self.config)}
        self.number = 0

    def get(self, place):
        logical = self._logicals[f"model.layers.{self.number}.{place.param}", place.index]
        return np.array(logical.from_file([self.tensors[piece.name] for piece in logical.pt], "pt"))

    def put(self, place, value):
        logical = self._logicals[f"model.layers.{self.number}.{place.param}", place.index]
        for piece, array in zip(logical.pt, logical.to_file(value, "pt"), strict=True):
            self.tensors[piece.name] = array.astype(np.float64)

    def run(self):
        """(logits, the experts that every router chooses, in the order of calls)."""
        model, chosen = NumpyModel(self.raw, self.tensors), []
        route = model.route

        def recorded(x, name):
            experts, weights = route(x, name)
            chosen.append(experts)
            return experts, weights

        model.route = recorded
        ids = np.random.default_rng(0).integers(3, self.config.vocab_size, (1, 24))
        logits = model.logits(ids, np.arange(24)[None], np.ones_like(ids))
        return logits, chosen


def scale(size, seed):
    return np.exp(np.random.default_rng(seed).normal(0, 1, size))


def every_layer(model):
    for number in range(model.config.num_hidden_layers):
        model.number = number
        yield layer_matrices(model.config, model.config.is_moe_layer(model.number))


def fold_input_norm(model, matrices, rounding=None):
    folds.fold_norm(model, folds.INPUT_NORM, [matrices.qkv], scale(model.config.hidden_size, model.number), rounding)


def fold_feed_forward_norm(model, matrices, rounding=None):
    size = model.config.hidden_size
    folds.fold_norm(model, folds.FEED_FORWARD_NORM, matrices.norm_targets, scale(size, model.number), rounding)


def fold_up(model, matrices):
    for number, block in enumerate(matrices.blocks):
        folds.fold_up(model, block, scale(model.get(block.down).shape[0], number))


def fold_values(model, matrices):
    heads = head_layout(model.config)
    folds.fold_values(model, matrices, heads, scale(heads.num_kv_heads * heads.dim, model.number))


FOLDS = [fold_input_norm, fold_feed_forward_norm, fold_up, fold_values]


@pytest.mark.parametrize("kind", KINDS)
def test_folds_change_nothing(kind):
    """1e-10 of the logits: float64 has 16 digits, and scales over four decades and a few layers cost some of them."""
    reference = FileTensors(kind)
    logits, chosen = reference.run()
    for fold in FOLDS:
        model = FileTensors(kind)
        for matrices in every_layer(model):
            fold(model, matrices)
        assert any(not np.array_equal(model.tensors[name], reference.tensors[name]) for name in model.tensors)
        folded, folded_chosen = model.run()
        np.testing.assert_allclose(folded, logits, rtol=0, atol=1e-10 * np.abs(logits).max(), err_msg=fold.__name__)
        for mine, theirs in zip(folded_chosen, chosen, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_without_the_router_other_experts_are_chosen():
    """What other tools do: the norm is divided, the experts are multiplied, the router is forgotten."""
    reference = FileTensors("moe_untied")
    _, chosen = reference.run()
    model = FileTensors("moe_untied")
    for matrices in every_layer(model):
        targets = [target for target in matrices.norm_targets if target not in matrices.routers]
        folds.fold_norm(model, folds.FEED_FORWARD_NORM, targets, scale(model.config.hidden_size, model.number))
    _, changed = model.run()
    first = np.sort(chosen[0], axis=-1) != np.sort(changed[0], axis=-1)
    assert first.any(axis=-1).mean() > 0.2


def test_rounding_a_gain_changes_nothing():
    """The targets get the quotient of the old and the rounded gain, in float64 here."""
    logits, chosen = FileTensors("moe_bias").run()
    model = FileTensors("moe_bias")

    def to_bf16(gain):
        return bf16_to_fp32(fp32_to_bf16(gain.astype(np.float32))).astype(gain.dtype)

    for matrices in every_layer(model):
        fold_input_norm(model, matrices, to_bf16)
        fold_feed_forward_norm(model, matrices, to_bf16)
    gain = model.get(LayerWeight(folds.INPUT_NORM))
    np.testing.assert_array_equal(to_bf16(gain), gain)
    folded, folded_chosen = model.run()
    np.testing.assert_allclose(folded, logits, rtol=0, atol=1e-10 * np.abs(logits).max())
    np.testing.assert_array_equal(np.concatenate(folded_chosen), np.concatenate(chosen))


def test_the_folds_name_every_weight_behind_a_norm():
    """Both routers of a model that sees pictures, the experts of both modalities, and the shared ones."""
    model = ModelConfig.from_dir(FIXTURES / "vl_moe")
    names = {place.param for place in layer_matrices(model, sparse=True).norm_targets}
    assert names == {
        "mlp.gate.weight",
        "mlp.gate.weight_1",
        "mlp.experts.up_gate_proj.weight",
        "mlp.vision_experts.up_gate_proj.weight",
        "mlp.shared_experts.up_gate_proj.weight",
    }
