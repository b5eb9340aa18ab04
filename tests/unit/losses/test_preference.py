"""Every preference loss: its formula in numpy, its gradient by finite differences, TRL's numbers, and its options."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from support.numeric import numeric_gradient

from erniekit.losses import preference_loss
from erniekit.losses.preference import ALIASES, VARIANTS

FIXTURE = Path(__file__).resolve().parents[2] / "parity" / "fixtures" / "preference_trl.json"
TRL = json.loads(FIXTURE.read_text())
BETA = 0.3


def logsig(x):
    return -np.logaddexp(0, -x)


def sig(x):
    return 1 / (1 + np.exp(-x))


def log_odds(x):
    return x - np.log1p(-np.exp(x))


def kto(c, r):
    # the means are constants of the loss; at these points both are above 0
    return lambda kl_c, kl_r: (2 - sig(BETA * (c - kl_r)) - sig(BETA * (kl_c - r))) / 2


# name -> formula of (pi_c, pi_r, ref_c, ref_r), written again from the papers
FORMULAS = {
    "sigmoid": lambda a, b, c, d: -logsig(BETA * (a - b - c + d)),
    "hinge": lambda a, b, c, d: np.maximum(0, 1 - BETA * (a - b - c + d)),
    "ipo": lambda a, b, c, d: (a - b - c + d - 0.5 / BETA) ** 2,
    "simpo": lambda a, b, c, d: -logsig(BETA * (a - b) - 0.5),
    "or": lambda a, b, c, d: -logsig(log_odds(a) - log_odds(b)),
    "dpop": lambda a, b, c, d: -logsig(BETA * (a - b - c + d - 50.0 * np.maximum(0, c - a))),
    "sppo_hard": lambda a, b, c, d: (a - c - 0.5 / BETA) ** 2 + (b - d + 0.5 / BETA) ** 2,
    "nca_pair": lambda a, b, c, d: -logsig(BETA * (a - c)) - (logsig(-BETA * (a - c)) + logsig(-BETA * (b - d))) / 2,
    "robust": lambda a, b, c, d: -logsig(BETA * (a - b - c + d)),
    "apo_zero": lambda a, b, c, d: 1 - sig(BETA * (a - c)) + sig(BETA * (b - d)),
    "apo_down": lambda a, b, c, d: sig(BETA * (a - c)) + 1 - sig(BETA * (a - b - c + d)),
}


def example(seed=0, pairs=5):
    """Four arrays of log-probabilities below 0."""
    random = np.random.default_rng(seed)
    policy = -random.uniform(0.2, 6, (2, pairs))
    return [*policy, *(policy - random.uniform(0.2, 2, (2, pairs)) * random.choice([-1, 1], (2, pairs)))]


def run(values, upstream=None, **options):
    """(loss, rewards, gradients of the two policy inputs)."""
    tensors = [paddle.to_tensor(v.astype(np.float32), stop_gradient=i > 1) for i, v in enumerate(values)]
    loss, *rewards = preference_loss(*tensors, **({"beta": BETA} | options))
    assert all(reward.stop_gradient for reward in rewards)
    (loss * paddle.to_tensor(np.float32(1.0 if upstream is None else upstream))).sum().backward()
    gradients = [np.zeros_like(values[0]) if t.grad is None else t.grad.numpy() for t in tensors[:2]]
    return loss.numpy(), [reward.numpy() for reward in rewards], gradients


@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_gradient_follow_the_formula(name):
    values = example()
    upstream = np.array([1.0, 0.5, 2.0, 0.0, 1.0])
    loss, _, gradients = run(values, upstream, loss_type=name)
    np.testing.assert_allclose(loss, FORMULAS[name](*values), rtol=2e-5, atol=1e-5)  # fp32
    for which in range(2):
        expected = numeric_gradient(FORMULAS[name], values, which, upstream)
        np.testing.assert_allclose(gradients[which], expected, rtol=1e-4, atol=1e-5)


def test_kto_takes_the_means_over_the_batch_as_constants():
    values = example(1)
    c, r = values[0] - values[2], values[1] - values[3]
    means = max(0, c.mean()), max(0, r.mean())
    assert max(means) > 0
    loss, _, gradients = run(values, loss_type="kto_pair")
    np.testing.assert_allclose(loss, kto(c, r)(*means), rtol=1e-5)
    ones = np.ones(5)
    for which in range(2):
        slope = numeric_gradient(lambda x, y: kto(x, y)(*means), [c, r], which, ones)
        np.testing.assert_allclose(gradients[which], slope, rtol=1e-4, atol=1e-6)
    halves = [
        run([v[part] for v in values], loss_type="kto_pair", kl=tuple(map(paddle.to_tensor, means)))[0]
        for part in (slice(0, 2), slice(2, 5))
    ]
    np.testing.assert_allclose(np.concatenate(halves), loss, rtol=1e-5)


def test_label_smoothing_offset_and_exo():
    values = example(2)
    z = BETA * (values[0] - values[1] - values[2] + values[3])
    smoothed, _, _ = run(values, label_smoothing=0.1)
    np.testing.assert_allclose(smoothed, -0.9 * logsig(z) - 0.1 * logsig(-z), rtol=1e-5)
    deltas = np.array([1.0, 2.0, 0.5, 3.0, 1.0])
    offset, _, _ = run(values, offset_alpha=0.4, score_deltas=paddle.to_tensor(np.float32(deltas)))
    np.testing.assert_allclose(offset, -logsig(z - 0.4 * np.log(deltas)), rtol=1e-5)
    q, s = sig(z), 1e-3
    exo, _, _ = run(values, loss_type="exo_pair", label_smoothing=s)
    np.testing.assert_allclose(exo, q * np.log(q / (1 - s)) + (1 - q) * np.log((1 - q) / s), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", TRL["cases"])
def test_equal_to_trl(case):
    drawn, expected = TRL["drawn"], TRL["cases"][case]
    values = [
        np.array([sum(x) for x in drawn[f"{who}_{side}"]])
        for who in ("policy", "ref")
        for side in ("chosen", "rejected")
    ]
    lengths = [paddle.to_tensor([len(x) for x in drawn[f"policy_{side}"]]) for side in ("chosen", "rejected")]
    loss, _, gradients = run(values, chosen_lengths=lengths[0], rejected_lengths=lengths[1], **expected["options"])
    np.testing.assert_allclose(loss, expected["loss"], rtol=2e-5, atol=1e-6)  # fp32 against fp64
    for ours, side in zip(gradients, ("chosen", "rejected"), strict=True):
        np.testing.assert_allclose(ours, expected[f"d_{side}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*VARIANTS, *ALIASES])
def test_an_untrained_policy_and_extreme_log_probabilities_are_finite(name):
    options = {"loss_type": name, "label_smoothing": 1e-3 if name.startswith("exo") else 0.0}
    same = example()[:2] * 2
    loss, rewards, _ = run(same, **options)
    if name in ("sigmoid", "dpop", "robust"):
        np.testing.assert_allclose(loss, math.log(2), rtol=1e-6)
    if name not in ("simpo", "or", "orpo"):
        assert not np.any(rewards)
    far = [np.array([0.0, -1e4]), np.array([-1e4, 0.0]), np.array([-1e4, 0.0]), np.array([0.0, -1e4])]
    loss, _, gradients = run(far, **options)
    assert np.isfinite(loss).all() and np.isfinite(gradients).all()


def test_lengths_average_where_the_variant_says_so_and_normalize_where_asked():
    values, lengths = example(3), (np.array([1.0, 2, 3, 4, 5]), np.array([5.0, 4, 3, 2, 2]))
    given = dict(zip(("chosen_lengths", "rejected_lengths"), map(paddle.to_tensor, lengths), strict=True))
    averaged = [v / n for v, n in zip(values, lengths * 2, strict=True)]
    for name in ("ipo", "simpo", "or"):
        np.testing.assert_allclose(run(values, loss_type=name, **given)[0], FORMULAS[name](*averaged), rtol=2e-5)
    np.testing.assert_allclose(run(values, **given)[0], FORMULAS["sigmoid"](*values), rtol=1e-5)
    mean = sum(lengths) / 2
    scaled = [v * mean / n for v, n in zip(values, lengths * 2, strict=True)]
    np.testing.assert_allclose(run(values, normalize_logps=True, **given)[0], FORMULAS["sigmoid"](*scaled), rtol=1e-5)


def test_the_parts_add_up_and_rewards_are_beta_times_the_ratios():
    values = example(4)
    lengths = paddle.to_tensor([1, 2, 3, 4, 5])
    loss, rewards, _ = run(
        values, pref_loss_ratio=0.5, sft_loss_ratio=2.0, chosen_lengths=lengths, rejected_lengths=lengths
    )
    expected = 0.5 * FORMULAS["sigmoid"](*values).mean() + 2.0 * -values[0].sum() / 15
    assert loss.mean() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(rewards[0], BETA * (values[0] - values[2]), rtol=1e-5)
    np.testing.assert_allclose(rewards[1], BETA * (values[1] - values[3]), rtol=1e-5)
    free, free_rewards, _ = run([*values[:2], values[0] * 0, values[1] * 0], reference_free=True)
    np.testing.assert_allclose(free, -logsig(BETA * (values[0] - values[1])), rtol=1e-5)
    np.testing.assert_allclose(free_rewards[0], BETA * values[0], rtol=1e-6)


def test_the_rewards_of_ipo_are_sums_and_those_of_simpo_and_or_per_token():
    """As TRL's metrics: the answer with the higher reward is not the one with the higher mean over tokens."""
    values = [np.array(x) for x in ([-4.0], [-6.0], [-6.0], [-7.0])]  # log(policy / reference): 2 of 8 tokens, 1 of 2
    lengths = {"chosen_lengths": paddle.to_tensor([8]), "rejected_lengths": paddle.to_tensor([2])}
    _, rewards, _ = run(values, loss_type="ipo", **lengths)
    np.testing.assert_allclose(np.ravel(rewards), [BETA * 2, BETA * 1], rtol=1e-6)
    for name in ("simpo", "or"):
        _, rewards, _ = run(values, loss_type=name, **lengths)
        np.testing.assert_allclose(np.ravel(rewards), [BETA * -4 / 8, BETA * -6 / 2], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sigmod"}, "expected one of sigmoid"),
        ({"beta": 0.0}, "beta"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "hinge has no label smoothing"),
        ({"loss_type": "exo"}, "needs a value above 0"),
        ({"offset_alpha": 1.0, "loss_type": "ipo"}, "only loss_type: sigmoid has an offset"),
        ({"offset_alpha": 1.0}, "score_deltas"),
        ({"normalize_logps": True}, "needs chosen_lengths"),
        ({"sft_loss_ratio": 1.0}, "needs chosen_lengths"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(example(), **options)


def test_a_missing_reference_is_refused_where_one_is_needed():
    chosen, rejected = (paddle.to_tensor(np.float32(v)) for v in example()[:2])
    with pytest.raises(ValueError, match="needs the reference"):
        preference_loss(chosen, rejected, None, None)
    preference_loss(chosen, rejected, None, None, loss_type="simpo")


def test_importing_the_package_of_losses_does_not_import_paddle():
    code = "import sys, erniekit.losses; assert 'paddle' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
