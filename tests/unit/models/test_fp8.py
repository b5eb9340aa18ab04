"""FP8 in a whole model: which parts, how close it is, and that recomputation, LoRA and storage change nothing else."""

import numpy as np
import paddle
import pytest
from support.tiny_models import tiny_model

from erniekit import lora
from erniekit.models import activation_checkpoint
from erniekit.models.decoder import CausalLM
from erniekit.models.fp8 import adapted_layers, attach_fp8, describe_fp8, fp8_counts
from erniekit.models.products import parts_of, products
from erniekit.precision.fp8 import Fp8Options
from erniekit.precision.fp8_emulated import Emulated, Recipe
from erniekit.precision.fp8_kernels import PaddleKernels
from erniekit.precision.fp8_product import Fp8Product
from erniekit.training.fp8_shares import Fp8Shares
from erniekit.utils.device_sums import DeviceSums
from erniekit.utils.errors import ConfigError

IDS = np.random.default_rng(0).integers(0, 60, [2, 40]).tolist()
EVERYWHERE = frozenset({"experts", "shared_experts", "mlp", "attention"})


def options(parts: frozenset[str] = frozenset({"experts"}), **changes: object) -> Fp8Options:
    given = {"stores_fp8": True, "routing_weight": "before", "recompute_layers": frozenset()} | changes
    return Fp8Options(backend=Emulated(Recipe("blockwise")), parts=parts, **given)


def model(fp8: Fp8Options | None, kind: str = "moe", seed: int = 3) -> CausalLM:
    made = tiny_model(kind, seed, initializer_range=0.05)  # a larger one amplifies rounding from layer to layer
    if fp8 is not None:
        attach_fp8(made, fp8)
    return made


def gradients(made: CausalLM) -> dict[str, np.ndarray]:
    made.train()
    made(IDS).square().sum().backward()
    return {name: p.grad.numpy() for name, p in made.named_parameters() if p.grad is not None}


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


@pytest.mark.parametrize("part", sorted(EVERYWHERE))
def test_only_the_chosen_part_multiplies_in_fp8(part: str):
    made = model(options(frozenset({part})))
    for layer in made.model.layers:
        for name, module in parts_of(layer):
            inside = [each for each in module.sublayers() if isinstance(each, Fp8Product)]
            assert bool(inside) == (name == part)
    assert products(made).keys() < {name for name, _ in made.named_parameters()}
    said = describe_fp8(made, options(frozenset({part})))
    assert f": {part} (" in said and "power-of-two scales, emulated" in said and f" {part}," not in said.split(";")[1]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_logits_and_gradients_are_close_to_those_of_the_plain_model(kind: str):
    """Two layers of products with 3 bits of mantissa: stated bound 15 % relative RMS of each matrix's gradient. That of
    a norm is a sum over tokens in which much cancels: 25 %. A token that rounding sends to another expert changes that
    expert's gradient by much more; with this seed very few go elsewhere.
    """
    plain, made = model(None, kind, seed=7), model(options(EVERYWHERE), kind, seed=7)
    assert error(made(IDS).numpy(), plain(IDS).numpy()) < 0.15
    expected = gradients(plain)
    found = gradients(made)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        if ".gate." not in name:  # a router's gradient is a small difference of large ones
            assert error(gradient, expected[name]) < (0.15 if gradient.ndim > 1 else 0.25), name


@pytest.mark.parametrize("routing_weight", ["before", "after"])
def test_what_is_computed_again_is_the_same(routing_weight: str):
    """Layers that recompute themselves, and experts that compute gate and up again from the input in FP8."""
    expected = gradients(model(options(EVERYWHERE, routing_weight=routing_weight)))
    made = model(options(EVERYWHERE, routing_weight=routing_weight))
    activation_checkpoint.apply(made.model, activation_checkpoint.RecomputeOptions())
    experts_again = model(options(EVERYWHERE, routing_weight=routing_weight, recompute_layers=frozenset({0, 1})))
    for again in (gradients(made), gradients(experts_again)):
        assert again.keys() == expected.keys()
        for name, gradient in again.items():
            np.testing.assert_array_equal(gradient, expected[name], name)


def test_lora_trains_beside_a_frozen_base_in_fp8():
    """Experts with an adapter use the products of their projections, with the same numbers up to rounding."""
    plain, made = model(None), model(options(EVERYWHERE))
    for each in (plain, made):
        lora.attach(each, lora.LoraOptions(rank=2, alpha=4.0))
        for name, parameter in each.named_parameters():
            if name.rpartition(".adapter.")[2].startswith("B"):
                parameter.set_value(paddle.full_like(parameter, 0.01))
    expected, found = gradients(plain), gradients(made)
    assert found.keys() == expected.keys() and all(".adapter." in name for name in found)
    assert max(error(found[name], expected[name]) for name in found) < 0.2


def test_layers_whose_experts_have_adapters_do_not_compute_again():
    """Which build.py reports."""
    fp8 = options(recompute_layers=frozenset({1}))
    made = model(fp8)
    assert adapted_layers(made, fp8) == []
    lora.attach(made, lora.LoraOptions(rank=2, alpha=4.0, targets=("qkv_proj",)))
    assert adapted_layers(made, fp8) == []
    made = model(fp8)
    lora.attach(made, lora.LoraOptions(rank=2, alpha=4.0))
    assert adapted_layers(made, fp8) == [1]


def test_other_parts_than_the_experts_store_what_they_multiply():
    """With inputs that are kept as they are, the gradients of weights change a little: one quantisation less."""
    first, second = (gradients(model(options(EVERYWHERE, stores_fp8=stores))) for stores in (True, False))
    assert max(error(first[name], second[name]) for name in first if ".gate." not in name) < 0.05


def test_counts_are_made_where_they_are_asked_for():
    made = model(options())
    counts = fp8_counts(made)
    assert counts is not None
    gradients(made)
    assert not counts.take()
    counts.enabled = True
    gradients(made)
    found = counts.take()
    assert found.keys() == {"activations", "weights", "gradients"} and not counts.take()
    for sums in found.values():
        largest, zeros, total = sums.numpy()
        assert 0 <= largest < 0.1 * total and 0 <= zeros < 0.1 * total
    assert fp8_counts(model(None)) is None


def test_the_shares_of_a_step_are_those_of_its_training_passes():
    """What an evaluation or a reference multiplies between two steps is not counted, whether or not they are due."""
    made, sums = model(options()), DeviceSums()
    shares = Fp8Shares(made, every=1)
    made(IDS)
    shares.begin(1)
    gradients(made)
    shares.add_to(sums)
    first = sums.fetch()
    made.eval()
    made(IDS)  # an evaluation
    shares.begin(2)
    gradients(made)
    sums = DeviceSums()
    shares.add_to(sums)
    second = sums.fetch()
    assert len(first) == 3 and first.keys() == second.keys()
    for kind, counted in first.items():
        np.testing.assert_array_equal(counted, second[kind])


def test_sizes_that_the_kernels_refuse_are_named_with_their_matrix():
    made = tiny_model("moe")
    kernels = Fp8Options(PaddleKernels(Recipe("blockwise")), frozenset({"experts"}), True, "before", frozenset())
    width = made.config.hidden_size
    with pytest.raises(ConfigError, match=rf"experts\.up_gate_proj\.weight \[{width}, \d+\].*multiples of 128"):
        attach_fp8(made, kernels)
