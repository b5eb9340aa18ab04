"""Which weights are held in few bits, and that loading fills them with what the directory holds."""

import numpy as np
import paddle
import pytest
from support.tiny_models import tiny_model

from erniekit import save_model
from erniekit.build import load_model
from erniekit.checkpoint.model_io import load_weights
from erniekit.models.decoder import CausalLM
from erniekit.models.init import init_weights
from erniekit.models.products import attach_products, describe, held_weights, num_elements
from erniekit.nn.shard import RankShard, named_shard_specs, shard
from erniekit.precision.quantized_weight import QuantizedWeight, QuantizedWeights
from erniekit.precision.weight_only import INT4, INT8, SCHEMES, dequantise, quantise
from erniekit.utils.errors import CheckpointError

IDS = [[3, 7, 11, 2, 5, 9]]
SIZES = {"hidden_size": 80, "intermediate_size": 144, "moe_intermediate_size": 24}  # with short last groups


def quantized_weights(model: CausalLM) -> dict[str, QuantizedWeight]:
    """The quantised weights of a model by the names that the parameters would have."""
    weights = {name: product for name, (_, product) in held_weights(model).items()}
    assert all(isinstance(weight, QuantizedWeight) for weight in weights.values())
    return weights


@pytest.mark.parametrize("compute_type", SCHEMES)
def test_which_weights(compute_type: str):
    """Every projection of the layers, experts and shared experts included; never router, norms, embedding, head or
    multi-token prediction.
    """
    model = tiny_model("moe", num_nextn_predict_layers=1, tie_word_embeddings=False)
    before = {name for name, _ in model.named_parameters()}
    attach_products(model, QuantizedWeights(SCHEMES[compute_type]))
    held = quantized_weights(model)
    projections = ("qkv_proj", "o_proj", "up_gate_proj", "down_proj")
    assert before - {name for name, _ in model.named_parameters()} == set(held)
    assert set(held) == {
        name for name in before if name.startswith("model.layers.") and name.split(".")[-2] in projections
    }
    assert any(".shared_experts." in name for name in held)
    schemes = SCHEMES[compute_type]
    for name, weight in held.items():
        assert weight.scheme is (schemes.experts if ".mlp.experts." in name else schemes.projections)


def test_experts_in_4_bits_and_the_rest_in_8():
    assert (SCHEMES["wint4/8"].projections, SCHEMES["wint4/8"].experts) == (INT8, INT4)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("compute_type", SCHEMES)
def test_loading(kind: str, compute_type: str, tmp_path):
    """The model computes as one whose weights went through the codes and back: 1e-5, other orders of summation."""
    model = tiny_model(kind, **SIZES)
    save_model(model, tmp_path)
    held = load_model(tmp_path, product=QuantizedWeights(SCHEMES[compute_type]))
    for name, weight in quantized_weights(held).items():
        plain = dict(model.named_parameters())[name]
        values = plain.numpy() if plain.ndim == 3 else plain.numpy()[None]
        back = [dequantise(*quantise(matrix, weight.scheme), weight.scheme, matrix.shape[0]) for matrix in values]
        np.testing.assert_array_equal(weight.dense(), np.stack(back).reshape(plain.shape))
        plain.set_value(weight.dense())
    np.testing.assert_allclose(held(IDS).numpy(), model(IDS).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compute_type", SCHEMES)
def test_a_rank_quantises_its_own_share(compute_type: str, tmp_path):
    """Tensor rank 1 of 2, expert rank 1 of 2: first the share, then the codes, so that no scale spans two ranks."""
    model = tiny_model("moe", vocab_size=62, **SIZES)
    save_model(model, tmp_path)
    part = RankShard(tensor_rank=1, tensor_degree=2, expert_rank=1, expert_degree=2)
    with paddle.LazyGuard():
        share = CausalLM(model.config, part)
    attach_products(share, QuantizedWeights(SCHEMES[compute_type]))
    load_weights(share, tmp_path)
    whole, shard_specs = dict(model.named_parameters()), named_shard_specs(model)
    for name, weight in quantized_weights(share).items():
        own = shard(whole[name].numpy(), shard_specs[name], *part.share(shard_specs[name]))
        assert own.shape == weight.shape
        for place, matrix in enumerate(own if own.ndim == 3 else [own]):
            codes, scales = quantise(matrix, weight.scheme)
            np.testing.assert_array_equal(weight.matrices[place].codes.numpy(), codes)
            np.testing.assert_array_equal(weight.matrices[place].scales.numpy(), scales)


@pytest.mark.parametrize("compute_type", SCHEMES)
def test_the_gradient_reaches_what_lies_below(compute_type: str, tmp_path):
    """Of a frozen base, the embedding's gradient is that of the dequantised model."""
    model = tiny_model("moe", **SIZES)
    save_model(model, tmp_path)
    held = load_model(tmp_path, product=QuantizedWeights(SCHEMES[compute_type]))
    for name, weight in quantized_weights(held).items():
        dict(model.named_parameters())[name].set_value(weight.dense())
    upstream = paddle.to_tensor(np.random.default_rng(0).normal(size=(1, 6, 61)).astype(np.float32))
    for each in (model, held):
        (each(IDS) * upstream).sum().backward()
    ours, expected = (each.model.embed_tokens.weight.grad.numpy() for each in (held, model))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_what_is_said_and_counted():
    """Half a byte and a 64th of 4 bytes a weight."""
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128, "num_hidden_layers": 1}
    model = tiny_model("dense", **sizes)
    attach_products(model, QuantizedWeights(SCHEMES["wint4"]))
    for weight in quantized_weights(model).values():
        weight.fill(0, np.ones(weight.shape, np.float32))
    count = 64 * 128 + 64 * 64 + 64 * 256 + 128 * 64
    assert (
        describe(model)
        == f"4 frozen weights in int4: {count * 9 / 16 / 1e3:.1f} kB instead of {count * 4 / 1e3:.1f} kB"
    )
    assert num_elements(model) == num_elements(tiny_model("dense", **sizes))


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    model = tiny_model("dense")
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.set_value(paddle.where(paddle.arange(32) == 3, paddle.full_like(weight, np.nan), weight))
    save_model(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: a weight is not finite"):
        load_model(tmp_path, product=QuantizedWeights(SCHEMES["wint8"]))


@pytest.mark.parametrize("compute_type", SCHEMES)
def test_a_random_start_is_quantised_like_a_file(compute_type: str):
    """The values that a plain model would start with, expert by expert, go through the codes."""
    plain, model = tiny_model("moe", **SIZES), tiny_model("moe", **SIZES)
    attach_products(model, QuantizedWeights(SCHEMES[compute_type]))
    init_weights(plain, 5)
    init_weights(model, 5)
    parameters = dict(plain.named_parameters())
    for name, weight in quantized_weights(model).items():
        values = parameters[name].numpy()
        for index, matrix in enumerate(values if values.ndim == 3 else [values]):
            np.testing.assert_array_equal(weight.matrices[index].codes.numpy(), quantise(matrix, weight.scheme)[0])
    np.testing.assert_array_equal(model.model.norm.weight.numpy(), plain.model.norm.weight.numpy())


def test_codes_are_not_weights_to_save(tmp_path):
    model = tiny_model("dense")
    attach_products(model, QuantizedWeights(SCHEMES["nf4"]))
    with pytest.raises(CheckpointError, match="save its adapter"):
        save_model(model, tmp_path)
