"""The policy loss and the advantages against numbers of TRL 1.16 and of independent formulas (fixtures/rl_vectors.json:
float64; its "about" says how each was made), against finite differences, and in parts against the whole.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from erniekit.losses import policy_loss
from erniekit.losses.advantages import advantages_of, combined, overlong_penalty
from erniekit.losses.policy import LOSS_TYPES, PolicyLoss, entropy_threshold, kl_estimate, pair_loss
from erniekit.training.rl.rollout_metrics import std

VECTORS = json.loads((Path(__file__).parents[2] / "fixtures" / "rl_vectors.json").read_text())
INPUTS = VECTORS["inputs"]
GROUP = VECTORS["about"]["num_generations"]
MODES = {"token_mask": "icepop", "token_truncate": "tis", "sequence_mask": "mis"}
OTHER_METHODS = ("sapo", "luspo")  # of TRL, not built here
CASES = [case for case in VECTORS["losses"] if case["settings"].get("loss_type") not in OTHER_METHODS]
EXACT = 1e-10  # both sides are float64; the longest sum has 46 terms


def tensor(values: Any) -> paddle.Tensor:
    return paddle.to_tensor(np.array(values, np.float64))


def inputs(rows: list[int] | None = None) -> dict[str, paddle.Tensor]:
    chosen = range(len(INPUTS["mask"])) if rows is None else rows
    names = ("logp", "old_logp", "ref_logp", "rollout_logp", "entropy", "mask")
    return {name: tensor([INPUTS[name][row] for row in chosen]) for name in names}


def keywords(settings: dict[str, Any], given: dict[str, paddle.Tensor]) -> dict[str, Any]:
    """policy_loss's arguments for the settings of a case."""
    loss_type = settings.get("loss_type", "grpo")
    low = settings.get("epsilon_low", 0.2)
    result: dict[str, Any] = {
        "loss_type": loss_type,
        "clip_low": low,
        "clip_high": settings.get("epsilon_high", 0.2),
        "delta": settings.get("delta"),
        "level": settings.get("importance_sampling_level"),
        "kl_coef": settings.get("beta", 0.0),
        "ref_logps": given["ref_logp"] if "beta" in settings else None,
        "kl_bias_correction": settings.get("use_bias_correction_kl", True),
        "entropy": given["entropy"],
        "entropy_coef": settings.get("entropy_coef", 0.0),
        "off_policy_threshold": settings.get("off_policy_mask_threshold"),
        "max_completion_length": VECTORS["about"]["max_completion_length"],
    }
    if "rollout_mode" in settings:
        result |= {"rollout_logps": given["rollout_logp"], "correction": MODES[settings["rollout_mode"]]}
        result |= {"correction_low": settings.get("rollout_clip_min", 0.5)}
        result |= {"correction_high": settings["rollout_clip_max"]}
    if "top_entropy_quantile" in settings:
        result["min_entropy"] = entropy_threshold(
            given["entropy"].numpy()[given["mask"].numpy() > 0], settings["top_entropy_quantile"]
        )
    if "grad_accum" in settings:  # a part of a step: the step's tokens are known
        result["num_tokens"] = float(np.sum(INPUTS["mask"]))
    return result


def run(settings: dict[str, Any], **changes: Any) -> tuple[PolicyLoss, np.ndarray]:
    """(the result, its gradient at the unmasked tokens)."""
    rows = settings.get("rows")
    given = inputs(rows)
    logps = given["logp"]
    logps.stop_gradient = False
    advantages = VECTORS["advantages"][settings.get("advantages", "group")]["advantages"]
    advantages = tensor(advantages if rows is None else [advantages[row] for row in rows])
    old = given["old_logp"] if settings.get("use_old", True) else None
    result = policy_loss(logps, old, advantages, given["mask"], **keywords(settings, given) | changes)
    result.loss.backward()
    return result, logps.grad.numpy()[given["mask"].numpy() > 0]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_loss_gradient_and_metrics_equal_trl(case: dict[str, Any]):
    result, gradient = run(case["settings"])
    assert float(result.loss) == pytest.approx(case["loss"], abs=EXACT)
    if "grad" in case:
        np.testing.assert_allclose(gradient, case["grad"], atol=EXACT)
    means, metrics = result.means(), case["metrics"]
    for ours, theirs in (("low", "low_mean"), ("high", "high_mean"), ("region", "region_mean")):
        if f"clip_ratio/{theirs}" in metrics:  # TRL's mean over completions is fp32
            assert means[f"clip_ratio/{ours}"] == pytest.approx(metrics[f"clip_ratio/{theirs}"], abs=1e-7)
    if "cispo_clip_ratio" in metrics:
        assert means["clip_ratio/high"] == pytest.approx(metrics["cispo_clip_ratio"], abs=EXACT)
    assert means["entropy"] == pytest.approx(metrics["entropy"], abs=EXACT)
    assert means.get("kl") == pytest.approx(metrics.get("kl"), abs=EXACT)


INDEPENDENT = {
    "icepop_token_ring": {"correction": "icepop"},
    "gspo_token_form_wide_eps": {"loss_type": "gspo_token"},
    "gspo_icepop_sequence": {"loss_type": "gspo", "correction": "icepop_sequence"},
    "gspo_icepop_sequence_narrow": {"loss_type": "gspo", "correction": "icepop_sequence"},
    "misc_token_mask_sequence_ratio": {"loss_type": "gspo", "correction": "misc"},
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_published_formulas_equal_independent_numpy(name: str):
    case = next(case for case in VECTORS["numpy"] if case["name"] == name)
    changes: dict[str, Any] = dict(INDEPENDENT[name])
    if "alpha" in case:
        changes |= {"correction_low": case["alpha"], "correction_high": case["beta"]}
        changes |= {"rollout_logps": inputs()["rollout_logp"]}
    result, gradient = run({}, **{"level": None, "loss_type": "grpo"} | changes)
    assert float(result.loss) == pytest.approx(case["loss"], abs=EXACT)
    np.testing.assert_allclose(gradient, case["grad"], atol=EXACT)
    if "masked_fraction" in case:
        assert result.means()["rollout/masked_fraction"] == pytest.approx(case["masked_fraction"], abs=EXACT)


def test_the_loss_of_pairs_equals_independent_numpy():
    case = next(case for case in VECTORS["numpy"] if case["name"].startswith("upo"))
    given = inputs()
    logps = given["logp"]
    logps.stop_gradient = False
    losses, margins = pair_loss(
        logps, given["ref_logp"], given["mask"], paddle.to_tensor(case["pairs"]), case["dpo_beta"]
    )
    policy, gradient = run({"importance_sampling_level": "sequence"})
    assert float(policy.loss) == pytest.approx(case["policy_loss"], abs=EXACT)
    assert float(losses.mean()) == pytest.approx(case["pair_loss"], abs=EXACT)
    (case["upo_weight"] * losses.mean()).backward()
    found = gradient + logps.grad.numpy()[given["mask"].numpy() > 0]
    np.testing.assert_allclose(found, case["grad"], atol=EXACT)
    assert margins.stop_gradient and margins.shape == [2]


def test_differences_of_the_two_computations_equal_independent_numpy():
    result, _ = run({}, rollout_logps=inputs()["rollout_logp"])
    means, expected = result.means(), VECTORS["mismatch_metrics"]
    assert means["rollout/kl_k1"] == pytest.approx(expected["rollout_kl_k1"], abs=EXACT)
    assert means["rollout/kl_k3"] == pytest.approx(expected["rollout_kl_k3"], abs=EXACT)
    assert means["rollout/token_mult_prob_error"] == pytest.approx(expected["token_mult_prob_error"], abs=EXACT)
    assert means["rollout/logp_difference"] == pytest.approx(expected["logp_difference_mean"], abs=EXACT)
    assert means["rollout/logp_difference/max"] == pytest.approx(expected["logp_difference_max"], abs=EXACT)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_extreme_ratios_are_those_of_tokens(level: str):
    """Not of padding, of which the longest row alone has none."""
    given = inputs()
    advantages = tensor(np.ones(len(INPUTS["mask"])))
    result = policy_loss(given["logp"], given["logp"] + 0.5, advantages, given["mask"], level=level).metrics
    np.testing.assert_allclose([float(result["ratio/min"]), float(result["ratio/max"])], np.exp(-0.5), rtol=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_equal_their_formulas(estimator: str):
    given, expected = inputs(), VECTORS["kl"][estimator]
    logps = given["logp"]
    logps.stop_gradient = False
    values = kl_estimate(logps, given["ref_logp"], estimator)
    values.sum().backward()
    chosen = given["mask"].numpy() > 0
    np.testing.assert_allclose(values.numpy()[chosen], expected["values"], atol=EXACT)
    np.testing.assert_allclose(logps.grad.numpy()[chosen], expected["grad"], atol=EXACT)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("correction", ["none", "icepop", "misc"])
def test_parts_of_a_step_add_up_to_it(loss_type: str, correction: str):
    given = inputs()
    extra: dict[str, Any] = {"kl_coef": 0.1, "entropy_coef": 0.02, "correction": correction}

    def of(rows: list[int], **counts: float) -> float:
        part = inputs(rows)
        advantages = tensor([VECTORS["advantages"]["group"]["advantages"][row] for row in rows])
        return float(
            policy_loss(
                part["logp"],
                part["old_logp"],
                advantages,
                part["mask"],
                loss_type=loss_type,
                ref_logps=part["ref_logp"],
                rollout_logps=part["rollout_logp"],
                entropy=part["entropy"],
                max_completion_length=8,
                **extra,
                **counts,
            ).loss
        )

    counts = {"num_sequences": 12.0, "num_tokens": float(given["mask"].sum())}
    whole = of(list(range(12)))
    for parts in ([[0, 5, 7], [1, 2, 3, 4, 6, 8, 9, 10, 11]], [[row] for row in range(12)]):
        assert sum(of(rows, **counts) for rows in parts) == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name not in ("cispo", "gspo_token")])
def test_gradients_are_those_of_finite_differences(loss_type: str):
    """Where no bound is near (a ratio within 1e-4 of one would not be differentiable); cispo and gspo_token stop
    gradients on purpose.
    """
    given = inputs()
    advantages = tensor(VECTORS["advantages"]["group"]["advantages"])

    def loss(logps: np.ndarray) -> paddle.Tensor:
        values = paddle.to_tensor(logps, stop_gradient=False)
        result = policy_loss(
            values,
            given["old_logp"],
            advantages,
            given["mask"],
            loss_type=loss_type,
            ref_logps=given["ref_logp"],
            kl_coef=0.1,
            max_completion_length=8,
        )
        result.loss.backward()
        return result.loss, values.grad

    start, step = given["logp"].numpy(), 1e-6
    _, gradient = loss(start)
    for row, place in ((0, 0), (1, 3), (3, 4), (9, 0), (10, 2)):
        up, down = start.copy(), start.copy()
        up[row, place] += step
        down[row, place] -= step
        slope = (float(loss(up)[0]) - float(loss(down)[0])) / (2 * step)
        assert float(gradient[row, place]) == pytest.approx(slope, abs=1e-8)


def test_a_masked_token_and_a_bound_stop_the_gradient_exactly():
    old = tensor([[-1.0, -1.0, -1.0]])
    for shift, advantage in ((1.0, 1.0), (-1.0, -1.0)):
        logps = paddle.to_tensor(np.array([[-1.0 + shift, -1.0, -2.0]]), stop_gradient=False)
        policy_loss(logps, old, tensor([advantage]), tensor([[1, 1, 0]])).loss.backward()
        assert logps.grad.numpy()[0, 0] == 0
        assert logps.grad.numpy()[0, 1] != 0
        assert logps.grad.numpy()[0, 2] == 0


def test_unknown_probabilities_of_the_rollout_have_weight_one():
    given = inputs()
    unknown = paddle.full_like(given["rollout_logp"], float("nan"))
    corrected, gradient = run({}, rollout_logps=unknown, correction="icepop")
    plain, expected = run({})
    assert float(corrected.loss) == float(plain.loss)
    assert gradient.tolist() == expected.tolist()
    masked, gradient = run({}, rollout_logps=unknown, off_policy_threshold=0.01)
    by_old, expected = run({}, off_policy_threshold=0.01)
    assert float(masked.loss) == float(by_old.loss) != float(plain.loss)
    assert gradient.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"loss_type": "reinforce"}, "loss_type: expected one of grpo, bnpo"),
        ({"correction": "icepop"}, "icepop needs rollout_logps"),
        ({"correction": "half"}, "correction: expected none, tis"),
        ({"kl_coef": 0.1}, "kl_coef needs ref_logps"),
        ({"loss_type": "dr_grpo"}, "dr_grpo needs max_completion_length"),
        ({"entropy_coef": 0.1}, "need entropy"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: dict[str, Any], words: str):
    given = inputs()
    with pytest.raises(ValueError, match=words):
        policy_loss(given["logp"], given["old_logp"], tensor(np.zeros(12)), given["mask"], **arguments)


@pytest.mark.parametrize("name", ["group", "batch", "none", "gdpo", "group_with_missing"])
def test_advantages_equal_trl(name: str):
    column = "rewards_missing" if name == "group_with_missing" else "rewards"
    rewards, weights = np.array(INPUTS[column], np.float64), np.array(INPUTS["reward_weights"])
    expected = VECTORS["advantages"][name]
    found = advantages_of(rewards, weights, GROUP, name.split("_")[0])
    # TRL computes n / (n - 1) in fp32.
    np.testing.assert_allclose(found, expected["advantages"], atol=1e-7)
    sums = combined(rewards, weights)
    if name != "gdpo":
        np.testing.assert_allclose(sums, np.array(expected["rewards"], np.float64), atol=1e-12)
    assert [std(group) > 0 for group in sums.reshape(-1, GROUP)] == VECTORS["dynamic_sampling_keep"]


def test_leave_one_out_equals_its_formula():
    found = advantages_of(INPUTS["rewards"], INPUTS["reward_weights"], GROUP, "rloo")
    np.testing.assert_allclose(found, VECTORS["rloo_advantages"], atol=1e-12)


def test_a_completion_without_any_reward_has_no_advantage_and_is_in_no_mean():
    nothing = [np.nan, np.nan]
    found = advantages_of([nothing, [1.0, 0.0], [0.0, 0.0], nothing], [1.0, 1.0], 4, "none")
    assert found.tolist() == [0.0, 0.5, -0.5, 0.0]
    assert np.isnan(combined(np.array([nothing]), np.ones(2)))[0]


@pytest.mark.parametrize("scaling", ["group", "batch", "none", "rloo", "gdpo"])
@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3])
def test_equal_rewards_teach_nothing_whatever_their_mean_is_rounded_to(scaling: Any, reward: float):
    found = advantages_of(np.array([[reward]] * 6 + [[np.nan]] + [[reward]] * 2), [1.0], 3, scaling)
    assert found.tolist() == [0] * 9


@pytest.mark.parametrize(("rewards", "size"), [([[1.0]] * 3, 2), ([[1.0]] * 2, 1), ([[np.inf]] * 2, 2)])
def test_broken_groups_and_rewards_are_refused(rewards: list[list[float]], size: int):
    with pytest.raises(ValueError, match=r"group|infinite"):
        advantages_of(rewards, [1.0], size)


def test_the_penalty_of_long_answers_equals_its_formula():
    table = VECTORS["soft_overlong"]
    for length, expected in table["table"]:
        assert overlong_penalty(length, table["max"], table["cache"]) == pytest.approx(expected)
