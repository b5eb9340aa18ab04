"""Images, videos and text documents in one packed batch."""

import numpy as np
import paddle
import pytest
from support.pictures import CONFIG, IMAGE, Tables, tables

from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.models.init import init_weights
from erniekit.models.inputs import packed_inputs, pictures_of

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


def hidden_of(model: CausalLM, batch: Tables) -> paddle.Tensor:
    pictures = pictures_of(model, batch.input_ids, batch.modality, batch.patches, batch.grid)
    inputs = packed_inputs(
        model, batch.input_ids, batch.segment_ids, batch.positions, modality=batch.modality, pictures=pictures
    )
    return model.model(inputs).normed


def documents_of(batch: Tables) -> list[Tables]:
    """Each document of a packed row by itself."""
    out, patch, picture = [], 0, 0
    for number in range(1, int(batch.segment_ids.max()) + 1):
        own = batch.segment_ids == number
        count = int((np.diff(np.isin(batch.input_ids[own], [IMAGE, IMAGE + 1]).astype(int), prepend=0) == 1).sum())
        grid = batch.grid[picture : picture + count]
        patches = batch.patches[patch : patch + int(grid.prod(axis=1).sum())]
        picture, patch = picture + count, patch + len(patches)
        rest = [array[own] for array in batch[:5]]
        out.append(Tables(*rest, patches, grid))
    return out


def test_packed_documents_are_the_documents_alone(model: CausalLM) -> None:
    batch = tables(DOCUMENTS)
    assert len(batch.grid) == 4 and set(batch.modality.tolist()) == {0, 1, 2}
    alone = documents_of(batch)
    assert [len(document.grid) for document in alone] == [1, 0, 2, 1]
    with paddle.no_grad():
        packed = hidden_of(model, batch).numpy()
        separate = np.concatenate([hidden_of(model, document).numpy() for document in alone])
    np.testing.assert_allclose(packed, separate, rtol=0, atol=2e-5)


def test_a_picture_changes_its_own_document_alone(model: CausalLM) -> None:
    batch = tables(DOCUMENTS)
    other = batch._replace(patches=np.where(np.arange(len(batch.patches))[:, None] < 8, 255, batch.patches))
    with paddle.no_grad():
        before, after = (hidden_of(model, each.__class__(*each)).numpy() for each in (batch, other))
    changed = np.abs(before - after).max(axis=1) > 1e-6
    first = np.flatnonzero(batch.modality > 0)[1]  # behind the start token of the first image
    assert set(batch.segment_ids[changed]) == {1}
    assert not changed[:first].any() and changed[first:12].all()


def test_text_alone_in_a_vision_language_model_needs_no_picture_tables(model: CausalLM) -> None:
    batch = tables([[7], [5]])
    assert not len(batch.grid) and not batch.modality.any()
    with paddle.no_grad():
        with_tables = hidden_of(model, batch).numpy()
        plain = model.model(packed_inputs(model, batch.input_ids, batch.segment_ids)).normed.numpy()
    np.testing.assert_array_equal(with_tables, plain)


def test_each_modality_trains_its_own_experts(model: CausalLM) -> None:
    def trained(batch: Tables) -> set[str]:
        model.clear_gradients()
        hidden_of(model, batch).square().sum().backward()
        return {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}

    text = trained(tables([[9], [4]]))
    assert not any("vision" in name or "resampler" in name or "weight_1" in name for name in text)
    assert "model.layers.1.mlp.experts.down_proj.weight" in text
    both = trained(tables(DOCUMENTS))
    for name in ("model.vision_model.patch_embed.proj.weight", "model.resampler_model.mlp.weight"):
        assert name in both
    assert "model.layers.1.mlp.vision_experts.down_proj.weight" in both and "model.layers.1.mlp.gate.weight_1" in both


def test_placeholders_without_pictures_are_refused(model: CausalLM) -> None:
    batch = tables(DOCUMENTS)
    with pytest.raises(ValueError, match="11 placeholders for 3 images and videos of 7 tokens"):
        pictures_of(model, batch.input_ids, batch.modality, batch.patches[:-32], batch.grid[:-1])


def test_a_placeholder_in_text_stays_text(model: CausalLM) -> None:
    """Somebody writes about the token itself."""
    batch = tables(DOCUMENTS)
    ids = batch.input_ids.copy()
    ids[15] = IMAGE
    assert batch.modality[15] == 0
    pictures = pictures_of(model, ids, batch.modality, batch.patches, batch.grid)
    assert pictures is not None and 15 not in pictures.places
