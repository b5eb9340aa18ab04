"""The law of the trainer: how rows are split into microbatches changes neither loss nor gradient."""

from dataclasses import replace

import numpy as np
import paddle
import pytest
from support.tiny_vision import CONFIG as VISION
from support.tiny_vision import packed_row
from support.whole_model import run_step

from erniekit.config import Config
from erniekit.data.packed_batch import IGNORE, PackedBatch, join_rows
from erniekit.models.config import ModelConfig
from erniekit.models.decoder import CausalLM
from erniekit.training.recipes.causal import CausalRecipe

MOE = ModelConfig(
    model_type="ernie4_5_moe",
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    moe_num_experts=4,
    moe_k=2,
    moe_intermediate_size=8,
    moe_num_shared_experts=1,
    moe_layer_start_index=1,
    moe_layer_end_index=1,
    num_nextn_predict_layers=1,
)
ALL_LOSSES = {
    "moe_aux_loss_lambda": 0.1,
    "moe_z_loss_lambda": 0.01,
    "moe_orthogonal_loss_lambda": 0.1,
    "num_nextn_predict_layers": 1,
    "multi_token_pred_lambda": 0.3,
}


def rows(num_rows, length=24, seed=0):
    """Rows of unequal length, document cuts and supervision; the second row carries no label at all."""
    rng = np.random.default_rng(seed)
    batch = []
    for row in range(num_rows):
        real = length - 3 * row
        ids = rng.integers(3, 61, real)
        segments = np.arange(real) >= 5 + row
        labels = np.full(real, IGNORE)
        if row != 1:
            labels[2 : real - 1 : 1 + row % 2] = ids[3 : real : 1 + row % 2]
            labels[4 + row] = IGNORE  # across the cut
        positions = np.concatenate([np.arange(5 + row), np.arange(real - 5 - row)])
        batch.append(PackedBatch.text_row(ids, labels, positions, segments, [f"r{row}"]))
    return batch


def model():
    paddle.seed(3)
    return CausalLM(MOE)


def gradients(batches, cfg):
    """Loss and gradients of a step over these microbatches."""
    m = model()
    sums = run_step(cfg, m, CausalRecipe(cfg, mtp_depths=1), batches)
    return sums.loss, {n: p.grad.numpy() for n, p in m.named_parameters()}


@pytest.mark.parametrize("balance", ["none", "sample", "row"])
def test_loss_is_independent_of_accumulation(balance):
    cfg = Config(**{**ALL_LOSSES, "token_balance_loss": balance})
    parts = rows(4)
    loss, want = gradients([join_rows(parts)], cfg)
    for split in ([join_rows(parts[:2]), join_rows(parts[2:])], parts, [parts[0], join_rows(parts[1:])]):
        other, got = gradients(split, cfg)
        # fp32 sums in another order: a few units in the last place
        assert other == pytest.approx(loss, rel=2e-6)
        for name in want:
            np.testing.assert_allclose(got[name], want[name], atol=3e-7, err_msg=name)


def test_the_logged_loss_is_the_weighted_sum_of_its_terms():
    cfg = Config(**ALL_LOSSES)
    batch = join_rows(rows(3))
    recipe = CausalRecipe(cfg, mtp_depths=1)
    sums = run_step(cfg, model(), recipe, [batch])
    weights = {"lm": 1.0, "mtp_0": 0.3, "router_balance": 0.1, "router_z": 0.01, "router_orthogonal": 0.1}
    assert sums.terms.keys() == weights.keys() and all(value > 0 for value in sums.terms.values())
    assert sums.loss == pytest.approx(sum(weights[name] * value for name, value in sums.terms.items()), rel=1e-6)
    assert sums.counts["lm"] == (batch.labels != IGNORE).sum()


def test_token_balance_divides_each_sample_by_its_length():
    """(1/N) sum_i sum_t nll_it / length_i against the same numbers taken one document at a time."""
    cfg = Config(token_balance_loss="sample", moe_aux_loss_lambda=0.0)
    m, recipe = model(), CausalRecipe(cfg, mtp_depths=0)
    batch = join_rows(rows(3))
    got = run_step(cfg, m, recipe, [batch]).terms["lm"]
    want, samples = 0.0, 0
    for document in np.unique(batch.segment_ids):
        places = batch.segment_ids == document
        labels = batch.labels[places]
        if not (labels != IGNORE).any():
            continue
        logits = m(batch.input_ids[places][None]).numpy()[0].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = [-log_p[t, label] for t, label in enumerate(labels) if label != IGNORE]
        want += sum(chosen) / len(labels)
        samples += 1
    assert got == pytest.approx(want / samples, rel=1e-5)


@pytest.mark.parametrize("balance", ["none", "sample", "row"])
def test_divisors_of_a_joined_batch_are_those_of_its_rows_added(balance):
    recipe = CausalRecipe(Config(token_balance_loss=balance, num_nextn_predict_layers=2), mtp_depths=2)
    batch = rows(4)
    of_rows = [recipe.counts(row) for row in batch]
    joined = recipe.counts(join_rows(batch))
    assert joined == {name: sum(counts[name] for counts in of_rows) for name in joined}
    assert all(joined.values()) and not any(recipe.counts(join_rows([])).values())


def test_a_batch_without_tokens_has_zero_loss_and_zero_gradients():
    cfg = Config(moe_aux_loss_lambda=0.0)
    loss, got = gradients([join_rows([])], cfg)
    assert loss == 0.0
    assert all(not gradient.any() for name, gradient in got.items() if "mtp" not in name)


def test_token_balance_by_row_scales_the_gradient_and_not_the_reported_loss():
    batch = join_rows(rows(3))
    plain = Config(max_seq_len=40, moe_aux_loss_lambda=0.0)
    losses, found = [], []
    for cfg in (plain, replace(plain, token_balance_loss="row")):
        m = model()
        losses.append(run_step(cfg, m, CausalRecipe(cfg, mtp_depths=0), [batch]).loss)
        found.append({name: p.grad.numpy() for name, p in m.named_parameters() if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    scale = len(batch.supervised) / (3 * 40)
    for name, gradient in found[0].items():
        np.testing.assert_allclose(found[1][name], scale * gradient, atol=3e-7, err_msg=name)


def test_the_losses_of_modalities_are_means_over_their_documents():
    """By the same step over the documents of one modality alone; a modality that is not there is not counted."""
    cfg = Config(max_seq_len=64, moe_aux_loss_lambda=0.0)
    seen = CausalLM(ModelConfig.from_dict(VISION))
    documents = {"text": [9], "image": [3, (1, 4, 2), 5], "video": [2, (4, 2, 4), 4, (1, 2, 2), 3]}
    recipe = CausalRecipe(cfg, 0, by_modality=True)
    sums = run_step(cfg, seen, recipe, [packed_row([document], i) for i, document in enumerate(documents.values())])
    for i, (name, document) in enumerate(documents.items()):
        alone = run_step(cfg, seen, recipe, [packed_row([document], i)])
        assert sums.metrics[f"loss_{name}"] == pytest.approx(alone.loss, rel=1e-5)
        assert {key for key, count in alone.counts.items() if key.startswith("loss_") and count} == {f"loss_{name}"}
    total = sum(sums.counts[f"loss_{name}"] * sums.metrics[f"loss_{name}"] for name in documents)
    assert sums.loss == pytest.approx(total / sums.counts["lm"], rel=1e-5)
