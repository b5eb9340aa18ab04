"""A product that the package does not know takes part in everything: gradients, LoRA, a run, its checkpoints."""

from functools import partial
from pathlib import Path

import numpy as np
import paddle
import pytest
from support import equality
from support.scaled_product import ScaledProduct, scaled
from support.tiny_models import tiny_model

from erniekit import config, lora
from erniekit.build import load_model
from erniekit.checkpoint.model_io import save_model
from erniekit.checkpoint.product_state import load_product_state, product_rank_files
from erniekit.checkpoint.reshard import Shares
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.models.decoder import CausalLM
from erniekit.models.products import attach_products, describe, held_weights, product_state, products
from erniekit.nn.shard import RankShard
from erniekit.parallel.mesh import Mesh
from erniekit.precision import policy
from erniekit.training.build import build_run
from erniekit.training.trainer import Trainer
from erniekit.utils.errors import CheckpointError

IDS = [[3, 7, 11, 2, 5, 9]]
KINDS = pytest.mark.parametrize("kind", ["dense", "moe"])


def pair(kind: str) -> tuple[CausalLM, CausalLM]:
    """A plain model, and the same with weights of twice the size under products that halve the result."""
    plain, model = tiny_model(kind), tiny_model(kind)
    attach_products(model, scaled)
    for projection, _ in products(model).values():
        projection.weight.set_value(projection.weight * 2.0)
    return plain, model


@KINDS
def test_it_replaces_every_matrix_product_of_the_layers(kind: str):
    """Powers of two are exact: the same logits bit by bit, and half the gradient of the weights, which sum in another
    order where gate and up are products of their own: an fp32 unit of the largest gradients, of about 100, is 1e-5.
    """
    plain, model = pair(kind)
    assert describe(model) == f"{len(products(model))} projections multiply in scaled" and not held_weights(model)
    for each in (plain, model):
        each(IDS).square().sum().backward()
    np.testing.assert_array_equal(model(IDS).numpy(), plain(IDS).numpy())
    expected = dict(plain.named_parameters())
    for name, (projection, product) in products(model).items():
        assert product.calls.item() == 2.0, name
        np.testing.assert_array_equal(product.dense(projection.weight), expected[name].numpy(), name)
        np.testing.assert_allclose(
            projection.weight.grad.numpy() * 2, expected[name].grad.numpy(), rtol=1e-5, atol=5e-5
        )
        assert np.isfinite(product.scale.grad.numpy()).all()


@KINDS
def test_lora_stands_beside_it(kind: str):
    """The adapted model is that of the plain base; only the adapter is trained; merging changes the parameter."""
    plain, model = pair(kind)
    for each in (plain, model):
        lora.attach(each, lora.LoraOptions(rank=2, alpha=4.0))
        for name, parameter in each.named_parameters():
            if name.rpartition(".adapter.")[2].startswith("B"):
                parameter.set_value(paddle.full_like(parameter, 0.01))
    np.testing.assert_allclose(model(IDS).numpy(), plain(IDS).numpy(), rtol=1e-5, atol=1e-6)
    trained = [name for name, parameter in model.named_parameters() if not parameter.stop_gradient]
    assert trained and all(".adapter." in name for name in trained)
    with lora.disabled(model):
        np.testing.assert_array_equal(model(IDS).numpy(), tiny_model(kind)(IDS).numpy())
    before = {name: projection.weight.numpy() for name, (projection, _) in products(model).items()}
    lora.merge(model)
    assert all((projection.weight.numpy() != before[name]).any() for name, (projection, _) in products(model).items())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("products")
    equality.prepare(path)
    return path


@pytest.fixture
def train(directory: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs steps of a training whose projections multiply by the product, and returns the run."""
    choose = policy.choose

    def with_product(compute_type: str, device: str, emulate: bool = False) -> policy.Policy:
        return policy.Policy(choose(compute_type, device, emulate).param_dtype, partial(scaled, scale=1.0))

    monkeypatch.setattr(policy, "choose", with_product)

    def train(out: str, kind: str, **keys: object):
        keys = {"max_steps": 2, "save_steps": 1, "output_dir": str(directory / out), "ema_decay": 0.5} | keys
        keys["continue_training"] = True
        run = build_run(config.load(None, equality.keys_for(str(directory), kind, **keys), "train"), Mesh.single())
        Trainer(run, []).fit()
        return run

    return train


def arrays(path: Path) -> dict[str, np.ndarray]:
    reader = Reader(path)
    return {name: reader.read(name) for name in reader.keys()}  # noqa: SIM118


@KINDS
@pytest.mark.parametrize("fine_tuning", ["Full", "LoRA"])
def test_a_run_trains_saves_and_resumes_it(train, directory: Path, kind: str, fine_tuning: str):
    """A run of two steps, and one of one step that is resumed: the same weights, scales, averages and counts of calls.
    Under LoRA the scales stay as they are, as all of the base does.
    """
    once, again = f"{kind}-{fine_tuning}-once", f"{kind}-{fine_tuning}-again"
    run = train(once, kind, fine_tuning=fine_tuning)
    train(again, kind, fine_tuning=fine_tuning, max_steps=1)
    train(again, kind, fine_tuning=fine_tuning)
    for place in (
        "products",
        "ema/products",
        "checkpoint-1/products",
        "checkpoint-2/products",
        "checkpoint-2/optimizer",
    ):
        first, second = arrays(directory / once / place), arrays(directory / again / place)
        assert first.keys() == second.keys()
        for name, array in first.items():
            np.testing.assert_array_equal(second[name], array, f"{place} {name}")
    state = arrays(directory / once / "products")
    assert state.keys() == product_state(run.model).keys()
    scales = {name: array for name, array in state.items() if name.endswith(".product.scale")}
    assert scales and all((array == 1.0).all() == (fine_tuning == "LoRA") for array in scales.values())
    assert all(array.item() > 0 for name, array in state.items() if name.endswith(".product.calls"))


def test_what_a_run_saved_is_loaded_with_and_without_the_product(train, directory: Path):
    run = train("whole", "moe")
    loaded = load_model(directory / "whole", product=scaled)
    run.model.eval()
    np.testing.assert_array_equal(loaded(IDS).numpy(), run.model(IDS).numpy())
    plain = load_model(directory / "whole")
    assert not products(plain)
    np.testing.assert_array_equal(
        plain.model.layers[0].mlp.down_proj.weight.numpy(), run.model.model.layers[0].mlp.down_proj.weight.numpy()
    )


def test_a_rank_reads_the_state_of_its_own_experts(tmp_path: Path):
    model = tiny_model("moe")
    attach_products(model, scaled)
    for number, tensor in enumerate(product_state(model).values()):
        tensor.set_value(paddle.arange(tensor.shape[0], dtype="float32") + 10.0 * number)
    save_model(model, tmp_path)
    product_rank_files(model, product_state(model), Shares.of(model, Mesh.single())).write(tmp_path)
    with paddle.LazyGuard():
        share = CausalLM(model.config, RankShard(expert_rank=1, expert_degree=2))
    attach_products(share, scaled)
    load_product_state(share, tmp_path)
    for name, tensor in product_state(model).items():
        own = tensor.numpy()[2:] if ".mlp.experts." in name and name.endswith("scale") else tensor.numpy()
        np.testing.assert_array_equal(product_state(share)[name].numpy(), own, name)


def test_state_of_other_products_is_refused(tmp_path: Path):
    model = tiny_model("moe")
    attach_products(model, lambda projection: scaled(projection) if projection.num_experts else None)
    save_model(model, tmp_path)
    product_rank_files(model, product_state(model), Shares.of(model, Mesh.single())).write(tmp_path)
    name = r"model\.layers\.0\.self_attn\.qkv_proj\.product\.scale is missing"
    with pytest.raises(CheckpointError, match=rf"products: {name}, expected \[1\]"):
        load_model(tmp_path, product=scaled)


def test_a_product_keeps_fp32_beside_16_bit_weights():
    model = tiny_model("moe")
    attach_products(model, scaled)
    policy.apply(model, policy.Policy("bfloat16"))
    assert {tensor.dtype for tensor in product_state(model).values()} == {paddle.float32}
    assert all(isinstance(product, ScaledProduct) for _, product in products(model).values())
    assert {projection.weight.dtype for projection, _ in products(model).values()} == {paddle.bfloat16}
