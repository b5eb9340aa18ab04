"""Images, videos and text documents in one packed batch."""

from dataclasses import replace

import numpy as np
import paddle
import pytest
from support.tiny_vision import CONFIG, IMAGE, packed_row

from erniekit.data.packed_batch import PackedBatch, PictureTable, join_rows
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.init import init_weights
from erniekit.models.inputs import batch_inputs, packed_inputs, pictures_of

DOCUMENTS = [
    [3, (1, 4, 2), 5],
    [9],
    [(4, 2, 4), 2, (1, 2, 2), 4],
    [1, (2, 4, 4), 3],
]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    model = CausalLM(ModelConfig.from_dict(CONFIG))
    init_weights(model, 5)
    model.eval()
    return model


def hidden_of(model: CausalLM, batch: PackedBatch) -> paddle.Tensor:
    return model.model(batch_inputs(model, batch)).normed


def test_packed_documents_are_the_documents_alone(model: CausalLM) -> None:
    rows = [packed_row([document], seed) for seed, document in enumerate(DOCUMENTS)]
    batch = join_rows(rows)
    assert len(batch.pictures) == 4 and set(batch.modality.tolist()) == {0, 1, 2} and batch.num_segments == 4
    with paddle.no_grad():
        packed = hidden_of(model, batch).numpy()
        separate = np.concatenate([hidden_of(model, row).numpy() for row in rows])
    np.testing.assert_allclose(packed, separate, rtol=0, atol=2e-5)


def test_a_picture_changes_its_own_document_alone(model: CausalLM) -> None:
    batch = packed_row(DOCUMENTS)
    brighter = np.where(np.arange(len(batch.pictures.patches))[:, None] < 8, 255, batch.pictures.patches)
    other = replace(batch, pictures=replace(batch.pictures, patches=brighter.astype(np.uint8)))
    with paddle.no_grad():
        before, after = (hidden_of(model, each).numpy() for each in (batch, other))
    changed = np.abs(before - after).max(axis=1) > 1e-6
    first = batch.pictures.first_tokens[0]
    assert set(batch.segment_ids[changed]) == {0}
    assert not changed[:first].any() and changed[first:11].all()


def test_text_alone_in_a_vision_language_model_needs_no_picture_packed_row(model: CausalLM) -> None:
    batch = packed_row([[7], [5]])
    assert not len(batch.pictures) and not batch.modality.any()
    with paddle.no_grad():
        with_tables = hidden_of(model, batch).numpy()
        plain = model.model(packed_inputs(model, batch.input_ids, batch.segment_ids + 1)).normed.numpy()
    np.testing.assert_array_equal(with_tables, plain)


def test_each_modality_trains_its_own_experts(model: CausalLM) -> None:
    def trained(batch: PackedBatch) -> set[str]:
        model.clear_gradients()
        hidden_of(model, batch).square().sum().backward()
        return {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}

    text = trained(packed_row([[9], [4]]))
    assert not any("vision" in name or "resampler" in name or "weight_1" in name for name in text)
    assert "model.layers.1.mlp.experts.down_proj.weight" in text
    both = trained(packed_row(DOCUMENTS))
    for name in ("model.vision_model.patch_embed.proj.weight", "model.resampler_model.mlp.weight"):
        assert name in both
    assert "model.layers.1.mlp.vision_experts.down_proj.weight" in both and "model.layers.1.mlp.gate.weight_1" in both


def test_a_frozen_vision_transformer_leaves_the_resampler_to_train() -> None:
    model = CausalLM(ModelConfig.from_dict(CONFIG))
    for parameter in model.model.vision_model.parameters():
        parameter.stop_gradient = True
    hidden_of(model, packed_row(DOCUMENTS)).square().sum().backward()
    assert all(parameter.grad is None for parameter in model.model.vision_model.parameters())
    assert all(parameter.grad is not None for parameter in model.model.resampler_model.parameters())


def test_placeholders_without_pictures_are_refused(model: CausalLM) -> None:
    batch = packed_row(DOCUMENTS)
    table = batch.pictures
    fewer = PictureTable(table.patches[:-32], table.grid[:-1], table.first_tokens[:-1])
    with pytest.raises(ValueError, match="11 placeholders for 3 images and videos of 7 tokens"):
        pictures_of(model, replace(batch, pictures=fewer))
    with pytest.raises(ValueError, match="or not in their places"):
        pictures_of(model, replace(batch, pictures=replace(table, first_tokens=table.first_tokens + 1)))


def test_a_placeholder_in_text_stays_text(model: CausalLM) -> None:
    """Somebody writes about the token itself."""
    batch = packed_row(DOCUMENTS)
    ids = batch.input_ids.copy()
    ids[15] = IMAGE
    assert batch.modality[15] == 0
    pictures = pictures_of(model, replace(batch, input_ids=ids))
    assert pictures is not None and 15 not in pictures.places


def test_a_rank_without_a_row_takes_part(model: CausalLM) -> None:
    with paddle.no_grad():
        assert hidden_of(model, join_rows([])).shape == [1, 32]
