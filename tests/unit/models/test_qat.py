"""Quantisation-aware training of a model: what is quantised, what is saved, and that files hold what was trained."""

from pathlib import Path

import numpy as np
import paddle
import pytest
from support import equality
from support.tiny_models import tiny_model

from erniekit import config, lora
from erniekit.checkpoint.model_reader import ModelReader
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.config.schema_qat import QAT_SCHEMES
from erniekit.models import activation_checkpoint
from erniekit.models.decoder import CausalLM
from erniekit.models.products import products
from erniekit.models.qat import MovingRanges, attach_qat, describe_qat
from erniekit.nn.shard import RankShard
from erniekit.parallel.mesh import Mesh
from erniekit.precision import codes
from erniekit.precision.fake_quant import FakeQuant
from erniekit.precision.hadamard import rotate_rows
from erniekit.precision.qat import QatOptions, choose_qat
from erniekit.training.build import build_run
from erniekit.training.trainer import Trainer
from erniekit.utils.errors import ConfigError

IDS = np.random.default_rng(0).integers(0, 60, [2, 24]).tolist()


def options(scheme: str, **keys: object) -> QatOptions:
    given = {"model_name_or_path": "m", "output_dir": "o", "train_dataset_path": "t", "qat": scheme}
    sizes = {"hadamard_block_size": 4, "quantization_group_size": 8}
    chosen = choose_qat(config.load(None, given | sizes | keys, "train"))
    assert chosen is not None
    return chosen


def model(scheme: str, kind: str = "moe", **keys: object) -> CausalLM:
    made = tiny_model(kind, initializer_range=0.05)
    attach_qat(made, options(scheme, **keys))
    return made


def gradients(made: CausalLM) -> dict[str, np.ndarray]:
    made.train()
    made(IDS).square().sum().backward()
    return {name: p.grad.numpy() for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scheme", QAT_SCHEMES)
def test_every_projection_of_the_layers_is_quantised_and_the_log_says_how(scheme: str):
    plain, made = tiny_model("moe", initializer_range=0.05), model(scheme)
    assert {type(product) for _, product in products(made).values()} == {FakeQuant}
    assert len(products(made)) == 4 + 6  # a dense and a sparse layer
    said = describe_qat(made, options(scheme))
    assert said.startswith(f"qat: {scheme}: ") and "attention (" in said and "experts (" in said
    assert said.endswith("Not quantised: routers, norms, biases, embedding, head, multi-token prediction")
    found, expected = made(IDS).numpy(), plain(IDS).numpy()
    error = np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())
    assert 1e-5 < error < (0.5 if "4" in scheme else 0.15)  # logits of two layers; 4 bits lose up to 15 % a matrix
    assert all(np.isfinite(gradient).all() for gradient in gradients(made).values())


def test_what_is_computed_again_is_the_same():
    """Activation checkpointing notes the ranges twice, and they are the same."""
    first, second = model("fp8_static"), model("fp8_static")
    activation_checkpoint.apply(second.model, activation_checkpoint.RecomputeOptions())
    expected, found = gradients(first), gradients(second)
    for made in (first, second):
        MovingRanges(made, Mesh.single()).update()
    for name, gradient in expected.items():
        np.testing.assert_array_equal(found[name], gradient, name)
    for (_, one), (_, other) in zip(products(first).values(), products(second).values(), strict=True):
        np.testing.assert_array_equal(one.range.numpy(), other.range.numpy())
        assert (one.updates.numpy() <= 1).all() and one.range.numpy().max() > 0


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_an_adapter_is_quantised_within_the_weights(kind: str):
    """The logits are those of the merged model; dA = s dW B^T and dB = s A^T dW, with dW of the merged model."""
    made, merged = model("w8a8", kind), model("w8a8", kind)
    for each in (made, merged):
        lora.attach(each, lora.LoraOptions(rank=2, alpha=4.0))
        for name, parameter in each.named_parameters():
            if name.rpartition(".adapter.")[2].startswith("B"):
                values = np.random.default_rng(len(name)).standard_normal(parameter.shape) * 0.02
                parameter.set_value(values.astype(np.float32))
    lora.merge(merged)
    np.testing.assert_allclose(made(IDS).numpy(), merged(IDS).numpy(), rtol=1e-4, atol=1e-5)
    with lora.disabled(made):
        np.testing.assert_array_equal(made(IDS).numpy(), model("w8a8", kind)(IDS).numpy())
    found, expected = gradients(made), gradients(merged)
    assert found and all(".adapter." in name for name in found)
    for name, projection, adapter in lora.adapters(made):
        spans = adapter.spans if projection.num_experts is None else {"": (0, projection.out_features)}
        for part, (begin, end) in spans.items():
            a, b = (factor.numpy() for factor in adapter.factors(part))
            dw, scale = expected[f"{name}.weight"][..., begin:end], adapter.slots[part].scaling
            suffix = f"_{part}" if part else ""
            for which, wanted in (("A", dw @ b.swapaxes(-1, -2)), ("B", a.swapaxes(-1, -2) @ dw)):
                np.testing.assert_allclose(
                    found[f"{name}.adapter.{which}{suffix}"],
                    scale * wanted,
                    rtol=1e-3,
                    atol=1e-3 * np.abs(wanted).max(),
                )


def test_sizes_that_a_scheme_cannot_take_are_named():
    made = tiny_model("moe")
    with pytest.raises(ConfigError, match=r"qkv_proj\.weight \[\d+, \d+\]: hadamard_block_size: 4096 does not divide"):
        attach_qat(made, options("fp8_static", hadamard_block_size=4096))
    for scheme, what in (("fp8", r"128 outputs share a scale"), ("wint4", r"16 inputs share a scale")):
        with paddle.LazyGuard():
            share = CausalLM(made.config, RankShard(tensor_rank=1, tensor_degree=2))
        with pytest.raises(ConfigError, match=rf"{what}, and a tensor rank has .*tensor_parallel_degree: 2"):
            attach_qat(share, options(scheme, quantization_group_size=16))
    with pytest.raises(ConfigError, match="do not divide into groups of 128 or 64 or 32: set quantization_group_size"):
        attach_qat(made, options("wint4", quantization_group_size=None))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qat")
    equality.prepare(path)
    return path


def train(directory: Path, out: str, scheme: str, steps: int, **changes: object):
    keys = {
        "qat": scheme,
        "max_steps": steps,
        "save_steps": 1,
        "output_dir": str(directory / out),
        "continue_training": True,
        "hadamard_block_size": 4,
        "apply_online_actscale_step": 2,
        "actscale_moving_rate": 0.3,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "constant",  # a longer run has the same first steps
    }
    given = equality.keys_for(str(directory), "moe", **(keys | changes))
    run = build_run(config.load(None, given, "train"), Mesh.single())
    Trainer(run, []).fit()
    return run


def arrays(path: Path) -> dict[str, np.ndarray]:
    reader = Reader(path)
    return {name: reader.read(name) for name in reader.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def trained(directory: Path):
    return train(directory, "once", "fp8_static", 4)


def test_a_resumed_run_is_the_uninterrupted_one(directory: Path, trained):
    """Weights, optimizer, moving ranges and their numbers of updates, bit for bit; the range moves after the resume."""
    train(directory, "again", "fp8_static", 3)
    before = arrays(directory / "again" / "products")
    train(directory, "again", "fp8_static", 4)
    for place in ("products", "", "checkpoint-4/optimizer"):
        first, second = arrays(directory / "once" / place), arrays(directory / "again" / place)
        assert first.keys() == second.keys()
        for name, array in first.items():
            np.testing.assert_array_equal(second[name], array, f"{place} {name}")
    state = arrays(directory / "once" / "products")
    assert {name.rpartition(".")[2] for name in state} == {"range", "updates"}
    updates = {name: array for name, array in state.items() if name.endswith(".updates")}
    assert all((array == 4).all() for name, array in updates.items() if ".experts." not in name)
    assert any((array != before[name]).any() for name, array in state.items() if name.endswith(".range"))


@pytest.mark.parametrize("scheme", ["fp8_static", "w8a8"])
def test_files_hold_the_weights_whose_codes_were_trained_with(directory: Path, trained, scheme: str):
    """The codes of the saved weights, by codes.py, are those by which the trained model multiplies."""
    run = trained if scheme == "fp8_static" else train(directory, "w8a8", scheme, 1)
    saved = {logical.param: None for logical in ModelReader(run.output_dir).logicals}
    checked = 0
    for name, (projection, product) in products(run.model).items():
        assert name in saved
        spec = product.recipe.weight
        for number, tensors in enumerate(product.quantized_tensors(projection.weight)):
            weight = projection.weight.numpy().reshape([-1, *projection.weight.shape[-2:]])[number]
            if product.recipe.rotation:
                weight = rotate_rows(weight, 4) / np.float32(4)
            scales = codes.choose_scales(weight.T, spec)
            np.testing.assert_array_equal(tensors["scales"].numpy(), scales, name)
            bits = tensors["codes"].numpy()
            bits = bits.view(np.uint8) if spec.kind == "e4m3" else bits
            np.testing.assert_array_equal(bits, codes.encode(weight.T, scales, spec), name)
            checked += 1
    assert checked > 30


def test_distillation_compares_with_the_model_before_training(directory: Path, capfd: pytest.CaptureFixture[str]):
    """With d = 1 the only term is the divergence; the teacher is not quantised, so that without training it is the
    rounding's, and training lowers it.
    """
    keys = {
        "quantization_group_size": 16,
        "qat_distill_weight": 1.0,
        "learning_rate": 1e-3,
        "moe_aux_loss_lambda": 0.0,
        "logging_steps": 1,
    }
    losses = {}
    for scheme in ("wint8", "wint4"):
        cfg = equality.keys_for(str(directory), "moe", qat=scheme, continue_training=True, **keys)
        run = build_run(
            config.load(None, cfg | {"output_dir": str(directory / f"distil-{scheme}")}, "train"), Mesh.single()
        )
        trainer = Trainer(run, [])
        batches = run.loader.next_step()
        losses[scheme] = [trainer.train_step(batches).parts["loss_distill"] for _ in range(6)]
        run.close()
        teacher = run.recipe.teacher.model
        assert not products(teacher) and all(p.stop_gradient for p in teacher.parameters())
    assert 0 < losses["wint8"][0] < losses["wint4"][0] / 20  # 16 times finer steps: some 256 times less divergence
    assert losses["wint4"][-1] < 0.7 * losses["wint4"][0]
    assert "the teacher is a second copy of the model, without quantisation" in capfd.readouterr().err
