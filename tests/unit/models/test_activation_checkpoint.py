"""What is recomputed changes no bit of loss and gradients, and is really not kept."""

import numpy as np
import paddle
import pytest
from support.packed import packed
from support.tiny_models import tiny_model
from support.tiny_vision import CONFIG as VISION
from support.tiny_vision import packed_row
from support.whole_model import run_step

from erniekit import lora
from erniekit.config import Config
from erniekit.models import activation_checkpoint
from erniekit.models.activation_checkpoint import RecomputeOptions
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.init import init_weights
from erniekit.models.inputs import batch_inputs
from erniekit.nn import checkpointed as generic
from erniekit.training.recipes.causal import CausalRecipe

CFG = Config(num_nextn_predict_layers=1, moe_z_loss_lambda=0.01)
IDS = np.random.default_rng(0).integers(3, 60, (2, 16))
BATCH = packed(IDS, np.roll(IDS, -1, axis=1), np.tile(np.arange(16), (2, 1)), np.ones_like(IDS))

CASES = {
    "full": (RecomputeOptions(), 2),
    "full, not layer 0": (RecomputeOptions(not_in=(0,)), 1),
    "full, offloaded": (RecomputeOptions(offloads=True), 2),
    "attention": (RecomputeOptions(("attention",)), 2),
    "core": (RecomputeOptions(("core_attn",)), 2),
    "core and sparse layers": (RecomputeOptions(("core_attn", "moe")), 3),
    "sparse layers": (RecomputeOptions(("moe",)), 1),
    "experts": (RecomputeOptions(("experts",)), 1),
    "attention, dense blocks, experts and shared experts, offloaded": (
        RecomputeOptions(("attention", "mlp", "experts", "shared_experts"), offloads=True),
        5,
    ),
    "with multi-token prediction": (RecomputeOptions(mtp=True), 3),
}


def loss_and_gradients(options: RecomputeOptions | None) -> tuple[float, dict[str, np.ndarray]]:
    model = tiny_model("moe", num_nextn_predict_layers=1)
    model.train()
    if options is not None:
        activation_checkpoint.apply(model.model, options)
    loss = run_step(CFG, model, CausalRecipe(CFG, 1), [BATCH]).loss
    return loss, {name: p.grad.numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_no_bit_changes(case: str, monkeypatch):
    options, parts = CASES[case]
    again = []
    run = generic.paddle_recompute

    def counted(function, *inputs, **keys):
        def twice(*inputs):
            again.append(paddle.is_grad_enabled())
            return function(*inputs)

        return run(twice, *inputs, **keys)

    monkeypatch.setattr(generic, "paddle_recompute", counted)
    plain, recomputed = loss_and_gradients(None), loss_and_gradients(options)
    assert recomputed[0] == plain[0]
    for name, gradient in plain[1].items():
        np.testing.assert_array_equal(recomputed[1][name], gradient, err_msg=name)
    assert again.count(True) == again.count(False) == parts  # forward without a graph, then once more with it


def test_saved_inputs_go_to_host_memory_and_come_back(monkeypatch):
    moved = {"to_host": [], "to_device": []}
    for name, calls in moved.items():
        move = vars(generic)[name]
        monkeypatch.setattr(generic, name, lambda tensor, move=move, calls=calls: calls.append(tensor) or move(tensor))
    loss_and_gradients(RecomputeOptions(offloads=True))
    # The input of each of the two layers, once: what a layer saves while it is computed again stays where it is.
    assert [tensor.shape for tensor in moved["to_host"]] == [[32, tiny_model("moe").config.hidden_size]] * 2
    assert len(moved["to_device"]) == 2


def test_experts_that_take_the_routing_weights_give_these_their_gradient():
    """The weights are a second tensor that needs a gradient."""

    def gradients(modules: tuple[str, ...]) -> dict[str, np.ndarray]:
        model = tiny_model("moe")
        model.train()
        for layer in model.model.layers:
            if layer.sparse:
                layer.mlp.experts.takes_weights = True
        activation_checkpoint.apply(model.model, RecomputeOptions(modules))
        run_step(Config(), model, CausalRecipe(Config(), 1), [BATCH])
        return {name: p.grad.numpy() for name, p in model.named_parameters()}

    plain, recomputed = gradients(()), gradients(("experts",))
    assert any("gate" in name and gradient.any() for name, gradient in plain.items())
    for name, gradient in plain.items():
        np.testing.assert_array_equal(recomputed[name], gradient, err_msg=name)


def vision_gradients(recompute: bool) -> dict[str, np.ndarray]:
    """Of adapters with dropout in the vision transformer."""
    model = CausalLM(ModelConfig.from_dict(VISION))
    init_weights(model, 3)
    lora.attach(model, lora.LoraOptions(rank=2, dropout=0.5, targets=("attn.qkv",)))
    model.train()
    trained = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    for parameter in trained.values():
        parameter.set_value(paddle.full_like(parameter, 0.1))
    if recompute:
        activation_checkpoint.apply(model.model, RecomputeOptions(draws_noise=True))
    paddle.seed(5)
    pictures = batch_inputs(model, packed_row([[2, (1, 4, 4), 3]])).pictures
    model.model.encode(pictures).features.square().sum().backward()
    return {name: p.grad.numpy() for name, p in trained.items()}


def test_blocks_of_the_vision_transformer_draw_the_same_dropout_again():
    plain, recomputed = vision_gradients(False), vision_gradients(True)
    assert all(gradient.any() for gradient in plain.values())
    for name, gradient in plain.items():
        np.testing.assert_array_equal(recomputed[name], gradient, err_msg=name)
