"""The preference recipe against the loss written out over separate rows; its references; its cache."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from support.tiny_models import tiny_model
from support.whole_model import run_step

from erniekit.checkpoint.model_dir import write_configs
from erniekit.config import Config
from erniekit.data.packed_batch import IGNORE, Document, PairLayout, join_rows, make_row
from erniekit.models.decoder import CausalLM
from erniekit.nn.frequencies import RopeScaling
from erniekit.training.recipes.preference import PreferenceRecipe
from erniekit.training.reference import PairScorer, SecondModel
from erniekit.training.reference_cache import CachedReference, describe_reference, pair_keys, read_cache, write_cache
from erniekit.utils.errors import CheckpointError

SIZES = [(5, 4, 6), (3, 5, 2), (0, 3, 4)]  # prompt without its last token, chosen, rejected


def document(prompt, chosen, rejected, seed):
    random = np.random.default_rng(seed)
    ids = random.integers(3, 61, prompt + chosen + rejected)
    ids[prompt + chosen] = ids[prompt]  # both answers begin with the prompt's last token
    labels = np.full(len(ids), IGNORE)
    labels[prompt : prompt + chosen - 1] = ids[prompt + 1 : prompt + chosen]
    labels[prompt + chosen : -1] = ids[prompt + chosen + 1 :]
    return Document(ids.astype(np.int32), labels.astype(np.int32), PairLayout(prompt, chosen, rejected, 1.0))


DOCUMENTS = [document(*sizes, seed) for seed, sizes in enumerate(SIZES)]


def batch_of(*rows):
    """Rows of numbers of DOCUMENTS."""
    return join_rows([make_row([DOCUMENTS[i] for i in row], [f"a:{i}" for i in row]) for row in rows])


def scorer_of(model):
    return PairScorer(100)


def recipe_of(model, reference=None, **keys):
    scorer = scorer_of(model)
    second = None if reference is None else SecondModel(reference, scorer)
    return PreferenceRecipe(Config(stage="DPO", moe_aux_loss_lambda=0.0, **keys), model, scorer, second)


def written_out(model, number):
    """Log-probabilities of the two answers of a pair, each as a row of its own, by a plain log-softmax."""
    document = DOCUMENTS[number]
    ids, labels, prompt, chosen = document.ids, document.labels, document.pair.prompt, document.pair.chosen
    sums = []
    for part in (slice(prompt, prompt + chosen), slice(prompt + chosen, None)):
        row = np.concatenate([ids[:prompt], ids[part]]).astype(np.int64)
        log_p = paddle.nn.functional.log_softmax(model(row[None])[0], axis=-1)
        targets = np.concatenate([np.full(prompt, IGNORE), labels[part]])
        places = np.flatnonzero(targets != IGNORE)
        sums.append(log_p[paddle.to_tensor(places), paddle.to_tensor(targets[places])].sum())
    return sums


def step(recipe, model, batches):
    """(loss, metrics, counts) of a step over these microbatches; gradients accumulate."""
    sums = run_step(recipe.cfg, model, recipe, batches)
    return sums.loss, sums.metrics, sums.counts


def gradients_of(model):
    found = {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
    model.clear_gradients()
    return found


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_loss_metrics_and_gradients_are_those_of_separate_rows(kind):
    model, reference = tiny_model(kind, seed=3), tiny_model(kind, seed=4)
    recipe = recipe_of(model, reference, beta=0.3, sft_loss_ratio=0.7, pref_loss_ratio=0.5)
    loss, metrics, counts = step(recipe, model, [batch_of([0, 1], [2])])
    ours = gradients_of(model)
    policy = [written_out(model, i) for i in range(3)]
    with paddle.no_grad():
        other = [written_out(reference, i) for i in range(3)]
    rewards = [[0.3 * (p - o) for p, o in zip(*sides, strict=True)] for sides in zip(policy, other, strict=True)]
    pref = paddle.add_n([-paddle.nn.functional.log_sigmoid(c - r) for c, r in rewards]) / 3
    sft = -paddle.add_n([chosen for chosen, _ in policy]) / sum(chosen - 1 for _, chosen, _ in SIZES)
    expected = 0.5 * pref + 0.7 * sft
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert counts["pairs"] == 3 and counts["chosen_tokens"] == 9
    assert metrics["reward_margin"] == pytest.approx(np.mean([float(c - r) for c, r in rewards]), rel=1e-4)
    assert metrics["reward_accuracy"] == pytest.approx(np.mean([float(c) > float(r) for c, r in rewards]))
    assert metrics["logp_rejected"] == pytest.approx(np.mean([float(r) for _, r in policy]), rel=1e-5)
    assert metrics["kl"] == pytest.approx(np.mean([float(c + r) for c, r in rewards]) / 0.6, rel=1e-4)
    expected.backward()
    for name, gradient in gradients_of(model).items():
        np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max(), err_msg=name)


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto_pair", "orpo"])
def test_how_rows_are_split_changes_nothing(loss_type, monkeypatch):
    """Nor does padding: for the last of the splits every batch has a multiple of 8 tokens on the device."""
    model, reference = tiny_model(seed=3), tiny_model(seed=4)
    results = []
    for batches in (
        [batch_of([0], [1], [2])],
        [batch_of([0, 1]), batch_of([2])],
        [batch_of([i]) for i in (2, 0, 1)],
    ):
        if len(batches) == 3:
            monkeypatch.setattr(CausalLM, "token_multiple", 8)
        recipe = recipe_of(model, reference, loss_type=loss_type)
        results.append((*step(recipe, model, batches)[:2], gradients_of(model)))
    for loss, metrics, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert metrics == pytest.approx(results[0][1], rel=1e-4)
        for name, gradient in gradients.items():
            np.testing.assert_allclose(gradient, results[0][2][name], rtol=0, atol=1e-5 * np.abs(gradient).max())


def test_divisors_of_a_joined_batch_are_those_of_its_rows_added():
    recipe = recipe_of(tiny_model())
    parts = [[0, 1], [2], [1]]
    joined = recipe.counts(batch_of(*parts))
    of_rows = [recipe.counts(batch_of(part)) for part in parts]
    assert joined == {name: sum(counts[name] for counts in of_rows) for name in joined}
    assert joined["pairs"] == 4 and all(joined.values())


def test_a_batch_without_tokens_reaches_every_parameter_and_adds_nothing():
    model = tiny_model()
    recipe = recipe_of(model, tiny_model(seed=4), sft_loss_ratio=1.0)
    empty = join_rows([])
    full, alone = batch_of([0, 1, 2]), None
    loss, metrics, _ = step(recipe, model, [full])
    alone = gradients_of(model)
    with_padding, same_metrics, _ = step(recipe, model, [full, empty])
    assert with_padding == loss and same_metrics == metrics
    for name, gradient in gradients_of(model).items():
        np.testing.assert_array_equal(gradient, alone[name])


def test_an_untrained_policy_has_a_loss_of_ln_2():
    model = tiny_model(seed=3)
    loss, metrics, _ = step(recipe_of(model, tiny_model(seed=3)), model, [batch_of([0, 1], [2])])
    assert loss == pytest.approx(np.log(2), abs=1e-6) and metrics["reward_margin"] == 0.0


def test_the_reference_is_frozen_and_moves_when_asked():
    model, reference = tiny_model(seed=3), tiny_model(seed=4)
    recipe = recipe_of(model, reference, ref_model_update_steps=2)
    assert all(p.stop_gradient for p in reference.parameters())
    before = reference.model.norm.weight.numpy().copy(), reference.model.embed_tokens.weight.numpy().copy()
    recipe.after_step(1)
    np.testing.assert_array_equal(reference.model.embed_tokens.weight.numpy(), before[1])
    recipe.after_step(2)
    np.testing.assert_array_equal(reference.model.embed_tokens.weight.numpy(), model.model.embed_tokens.weight.numpy())
    assert list(recipe.extra_weights()) == ["reference"]
    assert not recipe_of(model, reference).extra_weights()


@pytest.mark.parametrize(
    ("keys", "is_proposed"),
    [({}, True), ({"ref_model_update_steps": 2}, False), ({"stage": "VL-DPO"}, False)],
)
def test_a_cache_is_proposed_only_where_the_configuration_accepts_it(keys, is_proposed, caplog):
    model = tiny_model(seed=3)
    prepared = SimpleNamespace(build=lambda mesh, chunks: tiny_model(seed=3))
    cfg = Config(**{"stage": "DPO"} | keys)
    with caplog.at_level(logging.INFO):
        PreferenceRecipe.build(SimpleNamespace(cfg=cfg, model=model, prepared=prepared))
    assert "reference: a second copy of the model" in caplog.text and ("ref_logps_cache" in caplog.text) == is_proposed


def test_normalize_logps_is_said_loudly(caplog):
    with caplog.at_level(logging.WARNING):
        recipe_of(tiny_model(), normalize_logps=True)
    assert "not sigmoid as published" in caplog.text


# --- the cache


def test_a_pairs_key_depends_on_its_tokens_and_labels_alone():
    keys = pair_keys(batch_of([0, 1], [2]))
    assert len(set(keys)) == 3
    assert pair_keys(batch_of([2], [1, 0])) == [keys[2], keys[1], keys[0]]
    masked = DOCUMENTS[0].labels.copy()
    masked[SIZES[0][0]] = IGNORE
    changed = join_rows([make_row([DOCUMENTS[0]._replace(labels=masked)], ["a:0"])])
    assert pair_keys(changed) != keys[:1]
    assert pair_keys(join_rows([])) == []


def test_the_reference_of_a_cache_is_known_by_its_precision(tmp_path):
    shape = tiny_model("dense").config
    write_configs(tmp_path, shape, "pt")

    def described(dtype=paddle.bfloat16, **keys):
        given = Config(continue_training=False, **keys)
        return tuple(describe_reference(given, tmp_path, shape, dtype).items())

    eight = {"compute_type": "bf16", "emulate_precision": True, "fp8": "blockwise"}
    different = [
        described(compute_type="bf16"),
        described(paddle.float32, compute_type="bf16"),
        described(compute_type="bf16", emulate_precision=True),
        described(paddle.float32, compute_type="fp32"),
        *(described(**eight | more) for more in ({}, {"fp8_scale": "real"}, {"fp8_modules": ("experts", "mlp")})),
        *(described(**eight | more) for more in ({"fp8": "rowwise"}, {"fp8_routing_weight": "after"})),
        *(described(compute_type="bf16", qat=scheme, apply_hadamard=False) for scheme in ("fp8_static", "w8a8")),
        described(compute_type="bf16", qat="fp8_static"),
    ]
    assert len(set(different)) == len(different)
    assert described(**eight, fp8_gradients="e5m2", fp8_store=False) == described(**eight)  # of the backward pass


def test_the_reference_of_a_cache_is_known_by_what_the_configuration_changes(tmp_path):
    stored = tiny_model("dense").config
    yarn, linear = (RopeScaling(kind, 4.0, 128, given=(("rope_type", kind),)) for kind in ("yarn", "linear"))
    changes = [{}, {"rope_scaling": yarn}, {"rope_scaling": linear}, {"num_hidden_layers": 1}, {"rope_theta": 7.0}]

    def described():
        return [
            tuple(describe_reference(Config(), tmp_path, replace(stored, **change), paddle.float32).items())
            for change in changes
        ]

    (tmp_path / "model.safetensors").write_bytes(b"")
    shapes = described()  # without a config.json: the YAML gives the shape
    write_configs(tmp_path, stored, "pt")
    beside_file = described()
    assert len({*shapes, *beside_file}) == 2 * len(changes)
    assert {"rope_scaling", "num_hidden_layers"}.isdisjoint(dict(beside_file[0]))
    longer = replace(stored, max_position_embeddings=9999)
    assert tuple(describe_reference(Config(), tmp_path, longer, paddle.float32).items()) == beside_file[0]


def test_what_is_written_is_read_and_belongs_to_one_model(tmp_path):
    path = tmp_path / "below" / "ref.npz"
    table = {key: (-1.5 * i, -2.25) for i, key in enumerate(pair_keys(batch_of([0, 1], [2])))}
    assert read_cache(path, {"weights": "x"}) == {}
    write_cache(path, {"weights": "x"}, table)
    assert read_cache(path, {"weights": "x"}) == table and [p.name for p in path.parent.iterdir()] == ["ref.npz"]
    with pytest.raises(CheckpointError, match="another reference: weights was x, is y"):
        read_cache(path, {"weights": "y"})
    with pytest.raises(CheckpointError, match="another reference: fp8 was None, is rowwise"):
        read_cache(path, {"weights": "x", "fp8": "rowwise"})
    write_cache(path, {"weights": "x", "fp8": "rowwise"}, table)
    with pytest.raises(CheckpointError, match="another reference: fp8 was rowwise, is None"):
        read_cache(path, {"weights": "x"})
    for arrays in ({"keys": np.zeros((2, 16), np.uint8)}, {"log_probs": np.full((2, 2), np.nan, np.float32)}, {}):
        content = {"model": np.array('{"weights": "x"}'), "keys": np.zeros((1, 16), np.uint8)} | arrays
        np.savez(path, **content)
        with pytest.raises(CheckpointError, match=r"ref_logps_cache: .*Remove it to compute it again"):
            read_cache(path, {"weights": "x"})
    reference = CachedReference(table, path)
    (found,) = reference.log_probs([batch_of([2], [0])])
    assert found.tolist() == [[-3.0, 0.0], [-2.25, -2.25]]
    (nothing,) = reference.log_probs([join_rows([])])
    assert nothing.shape == [2, 0]
    del table[pair_keys(batch_of([1]))[0]]
    with pytest.raises(CheckpointError, match="has no entry for a:1"):
        reference.log_probs([batch_of([0, 1])])
