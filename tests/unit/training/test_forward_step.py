"""A stage's passes over its chunks and microbatches."""

import gc
import weakref

import numpy as np
import paddle
import pytest
from support.packed import packed
from support.tiny_models import tiny_model
from support.whole_model import train_stage

from erniekit.config import Config
from erniekit.data.packed_batch import PackedBatch
from erniekit.models import inputs as model_inputs
from erniekit.models.decoder import CausalLM
from erniekit.nn.rotary import Rotary
from erniekit.training.forward_pass import forward_pass
from erniekit.training.recipes.causal import CausalRecipe

CFG = Config(neftune=True, multi_token_pred_lambda=0.3)
MICROBATCHES = 3


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """What attention knows of a microbatch, as it is made."""
    made: dict[str, list] = {"plans": [], "rotations": []}
    make_plan, at = model_inputs.make_plan, Rotary.at

    def counted_plan(*args):
        plan = make_plan(*args)
        made["plans"].append(weakref.ref(plan))
        return plan

    def counted_rotation(self, *args):
        rotation = at(self, *args)
        made["rotations"].append(weakref.ref(rotation))
        return rotation

    monkeypatch.setattr(model_inputs, "make_plan", counted_plan)
    monkeypatch.setattr(Rotary, "at", counted_rotation)
    return made


def microbatches() -> list[PackedBatch]:
    random = np.random.default_rng(0)
    found = []
    for _ in range(MICROBATCHES):
        ids = random.integers(3, 61, (2, 12))
        segments = np.where(np.arange(12) < 7, 1, 2)[None].repeat(2, axis=0)
        positions = np.where(np.arange(12) < 7, np.arange(12), np.arange(12) - 7)[None].repeat(2, axis=0)
        found.append(packed(ids, np.roll(ids, -1, axis=1), positions, segments))
    return found


def four_layers() -> CausalLM:
    return tiny_model(num_hidden_layers=4, num_nextn_predict_layers=2)


def train(chunks: list[list[int]]) -> tuple[float, np.ndarray]:
    """Loss and the embedding's gradient of one step whose layers are these chunks of one process."""
    model, recipe, batches = four_layers(), CausalRecipe(CFG, 2), microbatches()
    stage = train_stage(CFG, model, recipe, batches, chunks)
    passing: dict[int, paddle.Tensor | None] = dict.fromkeys(range(MICROBATCHES))
    losses = []
    paddle.seed(5)
    for chunk in range(len(chunks)):  # an interleaved pipeline runs a chunk for several microbatches in turn, too
        for number in range(MICROBATCHES):
            passing[number], loss = stage.forward(chunk, number, passing[number])
            losses += [] if loss is None else [loss]
    total = paddle.add_n(losses)
    total.backward()
    return total.item(), model.model.embed_tokens.weight.grad.numpy()


@pytest.mark.parametrize("chunks", [[[0, 1, 2, 3]], [[0], [1, 2], [3]]], ids=["one chunk", "three chunks"])
def test_a_microbatch_has_one_plan_and_one_rotation_for_all_chunks_layers_and_depths(chunks, made):
    loss, gradient = train(chunks)
    assert len(made["plans"]) == len(made["rotations"]) == MICROBATCHES
    gc.collect()
    assert not any(ref() for refs in made.values() for ref in refs), "nothing is kept beyond the step"
    whole_loss, whole_gradient = train([[0, 1, 2, 3]])
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    np.testing.assert_allclose(gradient, whole_gradient, rtol=1e-4, atol=1e-6)


def test_a_pass_without_gradients_makes_them_once_a_microbatch(made):
    model, seen = four_layers(), []
    forward_pass(model, microbatches(), lambda number, x_TD, inputs: seen.append((number, inputs)))
    assert [number for number, _ in seen] == list(range(MICROBATCHES))
    assert len(made["plans"]) == len(made["rotations"]) == MICROBATCHES
    assert len({id(inputs) for _, inputs in seen}) == MICROBATCHES
