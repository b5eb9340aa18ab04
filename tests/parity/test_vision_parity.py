"""The vision-language model computes what transformers computes: features, positions, logits, gradients, greedy tokens
and files of a stored fixture (torch is not needed here).
"""

from pathlib import Path

import numpy as np
import paddle
import pytest
from parity.ours import mean_cross_entropy
from parity.support import LOGIT_TOLERANCE, VISION_CASE, Fixture, assert_gradients_agree, read_fixture
from parity.test_transformers_parity import read_tensors

import erniekit
from erniekit.models.decoder import CausalLM
from erniekit.models.pictures import PictureArguments, picture_tables
from erniekit.models.weights import export_tensors

NAMES = ("image", "video", "mixed", "padded", "long_video")
GENERATED = ("image", "video", "padded")
PICTURES = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
)
Item = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return read_fixture(VISION_CASE)


@pytest.fixture(scope="module")
def model(fixture: Fixture) -> CausalLM:
    return erniekit.load_model(fixture.path)


def pictures_of(item: Item) -> Item:
    """The arguments of the public call beside the tokens."""
    return {key: item[key] for key in PICTURES if key in item}


def logits_of(model: CausalLM, item: Item, rule: str = "transformers") -> paddle.Tensor:
    return model(item["input_ids"], segment_ids=item["attention_mask"], position_rule=rule, **pictures_of(item))


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", NAMES)
def test_features_of_the_tower_and_of_the_resampler(fixture: Fixture, model: CausalLM, name: str, kind: str) -> None:
    item = fixture.item(name)
    if f"{kind}_features" not in item:
        pytest.skip(f"{name} has no {kind}")
    pixels, sizes = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    with paddle.no_grad():
        features = model.model.vision_model(paddle.to_tensor(item[pixels]), item[sizes])
        tokens = model.model.resampler_model(features, item[sizes])
    np.testing.assert_allclose(features.numpy(), item[f"{kind}_features"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(tokens.numpy(), item[f"{kind}_tokens"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_position_ids(fixture: Fixture, model: CausalLM, name: str) -> None:
    item = fixture.item(name)
    arguments = PictureArguments(**pictures_of(item), position_rule="transformers")
    tables = picture_tables(model.config, item["input_ids"], item["attention_mask"], arguments)
    real = item["attention_mask"] != 0
    np.testing.assert_array_equal(tables.positions[real], item["position_ids"].transpose(1, 2, 0)[real])


@pytest.mark.parametrize("name", NAMES)
def test_logits(fixture: Fixture, model: CausalLM, name: str) -> None:
    item = fixture.item(name)
    real = item["attention_mask"] != 0
    with paddle.no_grad():
        logits = logits_of(model, item).numpy()
    np.testing.assert_allclose(logits[real], item["logits"][real], rtol=0, atol=LOGIT_TOLERANCE)


def test_given_positions_of_transformers_replace_the_rule(fixture: Fixture, model: CausalLM) -> None:
    item = fixture.item("long_video")
    with paddle.no_grad():
        logits = model(item["input_ids"], position_ids=item["position_ids"], **pictures_of(item)).numpy()
    np.testing.assert_allclose(logits, item["logits"], rtol=0, atol=LOGIT_TOLERANCE)


def test_the_training_rule_is_the_default_and_differs_behind_a_long_video(fixture: Fixture, model: CausalLM) -> None:
    item = fixture.item("long_video")
    behind = int(np.flatnonzero(item["mm_token_type_ids"][0])[-1]) + 1
    with paddle.no_grad():
        default = model(item["input_ids"], **pictures_of(item)).numpy()[0]
        training = logits_of(model, item, "training").numpy()[0]
    np.testing.assert_array_equal(default, training)
    np.testing.assert_allclose(default[:behind], item["logits"][0, :behind], rtol=0, atol=LOGIT_TOLERANCE)
    assert np.abs(default[behind:] - item["logits"][0, behind:]).max() > 0.01


def test_token_types_follow_from_the_token_ids(fixture: Fixture, model: CausalLM) -> None:
    item = fixture.item("mixed")
    types = ("mm_token_type_ids", "moe_mm_token_type_ids")
    pictures = {key: value for key, value in pictures_of(item).items() if key not in types}
    with paddle.no_grad():
        logits = model(item["input_ids"], segment_ids=item["attention_mask"], **pictures).numpy()
        expected = logits_of(model, item, "training").numpy()
    np.testing.assert_array_equal(logits, expected)


def test_loss_and_every_gradient(fixture: Fixture) -> None:
    item, model = fixture.item("mixed"), erniekit.load_model(fixture.path)
    loss = mean_cross_entropy(logits_of(model, item), item["labels"])
    loss.backward()
    assert loss.item() == pytest.approx(float(item["loss"]), abs=1e-5)
    reference = fixture.gradients("mixed")
    assert sum("vision_model" in name for name in reference) > 20
    assert_gradients_agree(dict(export_tensors(model, "pt", "grad")), reference)


@pytest.mark.parametrize("name", GENERATED)
def test_greedy_generation(fixture: Fixture, model: CausalLM, name: str) -> None:
    item = fixture.item(name)
    expected = item["generated"]
    result = model.generate(
        item["input_ids"],
        item["attention_mask"],
        max_new_tokens=expected.shape[1],
        eos_token_id=[],
        position_rule="transformers",
        **pictures_of(item),
    )
    np.testing.assert_array_equal(result.numpy()[:, item["input_ids"].shape[1] :], expected)


def vision_names_of_baidu(tensors: Item) -> Item:
    """The same file with the vision transformer beside the decoder, as Baidu's checkpoints have it."""
    return {name.replace("model.vision_model.", "vision_model."): value for name, value in tensors.items()}


def test_a_pt_round_trip_is_bit_exact(fixture: Fixture, model: CausalLM, tmp_path: Path) -> None:
    erniekit.save_model(model, tmp_path, format="pt")
    saved, expected = read_tensors(tmp_path), read_tensors(fixture.path)
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        assert saved[name].dtype == value.dtype, name
        np.testing.assert_array_equal(saved[name], value, err_msg=name)


@pytest.mark.parametrize("weights_format", ["pt", "paddle"])
def test_saved_and_loaded_again_is_the_same_model(
    fixture: Fixture, model: CausalLM, weights_format: str, tmp_path: Path
) -> None:
    erniekit.save_model(model, tmp_path, format=weights_format)
    again = erniekit.load_model(tmp_path)
    assert again.config == model.config
    item = fixture.item("mixed")
    with paddle.no_grad():
        np.testing.assert_array_equal(logits_of(again, item).numpy(), logits_of(model, item).numpy())


def test_a_paddle_file_follows_the_converters_rules(fixture: Fixture, model: CausalLM, tmp_path: Path) -> None:
    erniekit.save_model(model, tmp_path, format="paddle")
    saved, pt = read_tensors(tmp_path), vision_names_of_baidu(read_tensors(fixture.path))
    layer = "model.layers.1"
    same = [name for name in pt if name.startswith("vision_model.") and pt[name].ndim == 1]
    transposed = [name for name in pt if name.startswith("vision_model.") and pt[name].ndim == 2]
    assert len(same) > 10 and len(transposed) > 8
    for name in same:
        np.testing.assert_array_equal(saved[name], pt[name], err_msg=name)
    for name in [*transposed, "model.resampler_model.spatial_linear.0.weight", "model.resampler_model.mlp.weight"]:
        np.testing.assert_array_equal(saved[name.replace("model.resampler", "ernie.resampler")], pt[name].T)
    for name in (f"{layer}.mlp.gate.weight", f"{layer}.mlp.gate.weight_1", "model.embed_tokens.weight"):
        np.testing.assert_array_equal(saved[name.replace("model.", "ernie.", 1)], pt[name], err_msg=name)
    for expert in (1, 6):  # of text and of vision
        halves = [pt[f"{layer}.mlp.experts.{expert}.{half}_proj.weight"].T for half in ("gate", "up")]
        joined = saved[f"ernie.layers.1.mlp.experts.{expert}.up_gate_proj.weight"]
        np.testing.assert_array_equal(joined, np.concatenate(halves, axis=-1))


@pytest.mark.parametrize("where", ["beside the decoder", "inside the decoder"])
def test_either_prefix_of_the_vision_transformer_is_read(
    fixture: Fixture, model: CausalLM, where: str, tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    tensors = read_tensors(fixture.path)
    tensors = vision_names_of_baidu(tensors) if where == "beside the decoder" else tensors
    assert any(name.startswith("vision_model.") for name in tensors) == (where == "beside the decoder")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((fixture.path / "config.json").read_bytes())
    item = fixture.item("image")
    with paddle.no_grad():
        expected = logits_of(model, item).numpy()
        np.testing.assert_array_equal(logits_of(erniekit.load_model(tmp_path), item).numpy(), expected)
