"""LoRA on a frozen base in few bits learns as it does on the same base in fp32."""

from pathlib import Path

import numpy as np
import paddle
import pytest
from support.tiny_models import tiny_model
from support.tiny_vision import CONFIG, packed_row

from erniekit import save_model
from erniekit.build import load_model
from erniekit.lora import LoraOptions, attach
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.init import init_weights
from erniekit.models.inputs import batch_inputs
from erniekit.models.products import held_weights
from erniekit.models.weights import our_shapes
from erniekit.precision.quantized_weight import QuantizedWeights
from erniekit.precision.weight_only import SCHEMES

IDS = np.random.default_rng(0).integers(0, 61, (4, 17))
STEPS = 25


def losses(directory: str, product: QuantizedWeights | None) -> list[float]:
    """Of each step and after the last, learning four rows by heart."""
    model = load_model(directory, product=product)
    attach(model, LoraOptions(rank=8, alpha=16.0), our_shapes(model.config))
    codes = {name: product.dense(None) for name, (_, product) in held_weights(model).items()}
    optimizer = paddle.optimizer.AdamW(
        0.02, parameters=[p for p in model.parameters() if not p.stop_gradient], weight_decay=0.0
    )
    labels, found = paddle.to_tensor(IDS[:, 1:].reshape(-1)), []
    for _ in range(STEPS + 1):
        loss = paddle.nn.functional.cross_entropy(model(IDS[:, :-1]).reshape([-1, 61]), labels)
        found.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
    for name, (_, product) in held_weights(model).items():
        np.testing.assert_array_equal(product.dense(None), codes[name])
    return found


@pytest.fixture(scope="module", params=["dense", "moe"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[float]]:
    directory = str(tmp_path_factory.mktemp(request.param))
    save_model(tiny_model(request.param, hidden_size=64, head_dim=16, initializer_range=0.1), directory)
    return directory, losses(directory, None)


@pytest.mark.parametrize("compute_type", SCHEMES)
def test_learning(base: tuple[str, list[float]], compute_type: str):
    """The start differs by what rounding does to a random model's logits (under 0.1 nats), and the adapters learn it
    away: the last loss is within a tenth of a nat of fp32's, where both have fallen from about 4.2 to under 1.
    """
    directory, plain = base
    found = losses(directory, QuantizedWeights(SCHEMES[compute_type]))
    assert found[0] != plain[0] and abs(found[0] - plain[0]) < 0.1
    assert plain[-1] < 1.0 and abs(found[-1] - plain[-1]) < 0.1


def visual_losses(directory: Path, product: QuantizedWeights | None) -> list[float]:
    """Of each step and after the last: adapters of the default targets learn a packed row with an image and a video."""
    model = load_model(directory, product=product)
    state = attach(model, LoraOptions(rank=8, alpha=16.0), our_shapes(ModelConfig.from_dir(directory)), tied=True)
    assert "model.resampler_model.spatial_linear.0" in state.slots
    assert "model.layers.1.mlp.vision_experts.down_proj" in state.slots
    assert not any(name.startswith("model.vision_model") for name in (*held_weights(model), *state.slots))
    batch = packed_row([[3, (1, 4, 2), 9], [(4, 2, 4), 8], [12]])
    trained = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    optimizer = paddle.optimizer.AdamW(0.02, parameters=list(trained.values()), weight_decay=0.0)
    found = []
    for step in range(STEPS + 1):
        hidden = model.model(batch_inputs(model, batch)).normed
        logits = paddle.matmul(hidden, model.model.embed_tokens.weight, transpose_y=True)
        loss = paddle.nn.functional.cross_entropy(logits, paddle.to_tensor(batch.labels))
        found.append(loss.item())
        loss.backward()
        if not step:  # B is zero at first, so that A has no gradient yet
            assert all(bool((p.grad != 0).any()) for name, p in trained.items() if "resampler" in name and "_B" in name)
        optimizer.step()
        optimizer.clear_grad()
    return found


def test_a_vision_language_model_learns_on_a_base_in_8_bits(tmp_path: Path):
    model = CausalLM(ModelConfig.from_dict(CONFIG))
    init_weights(model, 5)
    save_model(model, tmp_path)
    plain, found = visual_losses(tmp_path, None), visual_losses(tmp_path, QuantizedWeights(SCHEMES["wint8"]))
    assert found[0] != plain[0] and abs(found[0] - plain[0]) < 0.1
    assert plain[-1] < 0.5 * plain[0] and abs(found[-1] - plain[-1]) < 0.1
