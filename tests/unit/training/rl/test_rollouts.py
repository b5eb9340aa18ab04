"""Runs of stage RL by the real trainer: what a step is made of, resuming at any step, equality of all divisions."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.rl_runs import rl_workspace
from support.tiny_directories import write_lines

from erniekit import config
from erniekit.checkpoint.safetensors_read import Reader
from erniekit.losses import policy_loss
from erniekit.training.recipes import policy
from erniekit.training.reporting.completions import CompletionLog
from erniekit.training.reporting.plot import LossPlot
from erniekit.training.rl import loader
from erniekit.training.rl.completions import Completion, Group, json_value
from erniekit.training.rl.loader import RolloutLoader
from erniekit.training.rl.scoring import reward_table
from erniekit.training.run import train
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError, DataError, TrainError

CLOCKS = ("seconds", "tokens_per_second", "data_seconds")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than these runs."""
    monkeypatch.setattr(LossPlot, "_draw", lambda self: None)
    monkeypatch.setattr(CompletionLog, "_draw", lambda self: None)


@pytest.fixture
def keys(tmp_path: Path) -> dict:
    return rl_workspace(tmp_path)


def run(keys: dict, **changes: object) -> list[dict]:
    """Train; the steps in metrics.jsonl without what a clock measured."""
    result = train(config.load(None, keys | changes, "train"))
    steps = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in step.items() if name not in CLOCKS and not name.startswith("time/")}
        for step in steps
        if "loss" in step
    ]


def samples(directory: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(directory) / "samples.jsonl").read_text().splitlines()]


def weights(directory: str | Path) -> dict[str, np.ndarray]:
    reader = Reader(Path(directory))
    return {name: reader.read(name) for name in reader.keys()}  # noqa: SIM118


def without_speed(steps: list[dict]) -> list[dict]:
    return [{k: v for k, v in step.items() if k != "rollout/tokens_per_second"} for step in steps]


def test_groups_of_equal_rewards_are_counted_whatever_their_mean_is_rounded_to(keys, tmp_path: Path):
    (tmp_path / "same.py").write_text("def same(completions):\n    return [0.1] * len(completions)\n")
    step = run(keys, reward_funcs=f"{tmp_path / 'same.py'}:same", num_generations=3, max_steps=1)[0]
    assert step["frac_reward_zero_std"] == 1 and step["reward_std"] == 0


def test_a_rollout_without_any_reward_is_said(keys, tmp_path: Path):
    (tmp_path / "none.py").write_text("def none(completions):\n    return [None] * len(completions)\n")
    with log.captured() as lines:
        (step,) = run(keys, reward_funcs=f"{tmp_path / 'none.py'}:none", max_steps=1)
    assert step["reward"] is None and step["loss"] == 0
    assert [line for is_warning, line in lines if is_warning] == [
        "reward_funcs: no function has given any of 16 completions a reward"
    ]


def test_a_rollout_of_masked_completions_is_said(keys):
    with log.captured() as lines:
        (step,) = run(keys, mask_truncated_completions=True, max_completion_length=1, max_steps=1, seed=3)
    assert step["loss"] == 0 and step["completions/clipped_ratio"] == 1
    (line,) = [line for is_warning, line in lines if is_warning]
    assert line.startswith("mask_truncated_completions: all completions of a rollout (16) were cut at max_completion")


def test_the_deviation_of_rewards_is_that_of_all_completions(keys):
    """As TRL's reward_std; with groups of equal rewards, the mean over groups would be 0."""
    path = Path(keys["train_dataset_path"]).parent / "by_prompt.py"
    path.write_text("def by_prompt(completions, answer):\n    return [float(int(text) % 4) for text in answer]\n")
    step = run(keys, reward_funcs=f"{path}:by_prompt", max_steps=1)[0]
    assert step["frac_reward_zero_std"] == 1
    assert step["reward_std"] == pytest.approx(step["rewards/by_prompt/std"])
    assert step["reward_std"] > 0


def test_pass_rates_that_are_none_are_counted(keys):
    path = Path(keys["train_dataset_path"])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record, rate in zip(records, (0.25, "0.5", 50, True, None, 0), strict=False):
        record["pass_rate"] = rate
    write_lines(path, records)
    with log.captured() as lines:
        run(keys, max_steps=1)
    (line,) = [line for is_warning, line in lines if is_warning]
    assert line.startswith("not used: the pass_rate of 3 of 12 prompts, which must be a number from 0 to 1")
    assert f"{path}:2 has '0.5', ..." in line


def test_gdpo_scales_penalties_as_rewards_of_their_own(keys):
    cfg = config.load(None, keys | {"scale_rewards": "gdpo", "soft_max_length": 4, "soft_cache_length": 2}, "train")
    lengths, rewards = (2, 3, 4, 6), np.array([1.0, 0.0, np.nan, 0.5])
    group = Group(0, [_completion(length) for length in lengths], {"checksum": rewards})
    table, weights = reward_table(cfg, [group])
    assert weights.tolist() == [1, 1]
    np.testing.assert_array_equal(table, np.array([rewards, [0, -0.5, np.nan, -1]]).T)
    penalised = replace(cfg, kl_in_reward=True, kl_coef=0.25)
    table, weights = reward_table(penalised, [group])
    assert weights.tolist() == [1, 1, 0.25]
    np.testing.assert_allclose(table[:, 2], [-0.2, -0.3, np.nan, -0.6], rtol=1e-6)
    assert reward_table(replace(cfg, scale_rewards="group"), [group])[0].shape == (4, 1)


def _completion(length: int) -> Completion:
    ones = np.ones(length, np.float32)
    return Completion(0, 0, ones.astype(np.int32), ones > 0, ones, False, 0.0, 0.0, ones * 0.3, ones * 0.2)


def test_the_share_of_tokens_with_high_entropy_is_that_of_each_update(keys, monkeypatch):
    """Also after updates that have changed the entropies."""
    shares = []

    def noted(log_probs, old, advantages, mask, **options):
        kept = (options["entropy"] >= options["min_entropy"]).astype(mask.dtype) * mask
        shares.append((float(kept.sum()), float(mask.sum())))
        return policy_loss(log_probs, old, advantages, mask, **options)

    monkeypatch.setattr(policy, "policy_loss", noted)
    changes = {"num_iterations": 3, "steps_per_generation": 1, "batch_size": 16, "learning_rate": 0.05}
    run(keys, top_entropy_quantile=0.25, max_steps=3, lr_scheduler_type="constant", save_strategy="no", **changes)
    assert len(shares) == 3
    for kept, count in shares:  # the first tokens of a prompt's completions have the same entropy
        assert abs(kept - 0.25 * count) <= 4


def test_a_rollout_is_divided_into_steps_of_whole_groups(keys):
    steps = run(keys, num_iterations=2)
    lines = samples(keys["output_dir"])
    assert [step["staleness"] for step in steps] == [0, 1, 2, 3]
    assert {line["step"] for line in lines} == {1} and len(lines) == 16
    assert steps[0]["num_supervised"] + steps[1]["num_supervised"] == sum(line["length"] for line in lines)
    assert [steps[i]["num_supervised"] for i in (0, 1)] == [steps[i]["num_supervised"] for i in (2, 3)]
    assert steps[0]["reward"] == pytest.approx(np.mean([line["reward"] for line in lines]))
    # The first update is on the policy that generated; afterwards ratios differ from 1.
    assert steps[0]["ratio/max"] == pytest.approx(1, abs=1e-5) and steps[3]["ratio/max"] > 1 + 1e-4
    for source in {line["source"] for line in lines}:
        group = [line for line in lines if line["source"] == source]
        assert len(group) == 4 and sum(line["advantage"] for line in group) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"rl_algorithm": "gspo", "kl_coef": 0.1, "entropy_coef": 0.01, "temperature": 0.7, "soft_max_length": 5},
        pytest.param(
            {"rl_algorithm": "dapo", "rollout_correction": "icepop", "mask_truncated_completions": True},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_microbatches_change_nothing(keys, changes):
    first = run(keys, **changes)
    lines = samples(keys["output_dir"])
    other = run(keys, **changes, batch_size=8, output_dir=keys["output_dir"] + "2", rollout_max_running=3)
    assert len(first) == len(other) == 4
    again = samples(keys["output_dir"] + "2")
    assert [line["completion"] for line in lines] == [line["completion"] for line in again]
    for one, two in zip(first, other, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"rollout/tokens_per_second", "num_tokens"}:  # neighbours share their prompt's tokens
            if one[name] is two[name] is None:
                continue  # a ratio, in a step without tokens that carry loss
            # fp32 sums in another order, after up to three updates
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=2e-5), name


def test_a_rollout_of_one_step_is_not_scored_for_its_correction(keys, monkeypatch):
    """The policy before the only update is the one that computes the loss."""
    changes = {"rollout_correction": "icepop", "rollout_dtype": "bf16", "steps_per_generation": 1, "max_steps": 1}
    passes: list[str] = []
    fill = RolloutLoader._fill
    monkeypatch.setattr(
        RolloutLoader, "_fill", lambda self, c, name, score: passes.append(name) or fill(self, c, name, score)
    )
    [step] = run(keys, **changes)
    assert not passes and step["rollout/logp_difference/max"] > 1e-4
    monkeypatch.setattr(loader, "wants_old_log_probs", lambda cfg: True)  # as if a second step followed
    [scored] = run(keys, **changes, output_dir=keys["output_dir"] + "2", save_strategy="no")
    assert passes == ["old_logps"]
    for name in ("loss", "grad_norm", "rollout/kl_k3"):
        assert step[name] == pytest.approx(scored[name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("step", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_repeats_an_uninterrupted_one(keys, step):
    changes = {"dynamic_sample": True, "kl_coef": 0.1, "rollout_correction": "icepop"}
    whole = run(keys, **changes)
    there = f"{keys['output_dir']}/checkpoint-{step}"
    wanted, lines = weights(keys["output_dir"]), samples(keys["output_dir"])
    resumed = run(keys, **changes, resume_from_checkpoint=there)
    assert without_speed(resumed) == without_speed(whole)
    assert samples(keys["output_dir"]) == lines
    found = weights(keys["output_dir"])
    assert all((wanted[name] == found[name]).all() for name in wanted)


@pytest.mark.slow
def test_loss_terms_and_metrics_have_names_of_their_own(keys):
    steps = run(keys, kl_coef=0.5, entropy_coef=0.1, num_iterations=2)
    for step in steps:
        total = step["loss_policy"] + 0.5 * step["loss_kl_penalty"] - 0.1 * step["loss_entropy_bonus"]
        assert step["loss"] == pytest.approx(total, abs=1e-6)
        assert step["entropy"] == pytest.approx(step["loss_entropy_bonus"], abs=1e-6)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[3]["kl"] > 1e-6


@pytest.mark.slow
def test_without_the_divergence_in_the_reward_advantages_are_those_of_the_rewards(keys):
    run(keys, kl_coef=0.1, kl_in_reward=True, num_iterations=2, max_steps=8)
    later = [line for line in samples(keys["output_dir"]) if line["step"] == 5]
    assert any(abs(line["reward"] - line["rewards"]["checksum"]) > 1e-6 for line in later)


@pytest.mark.slow
def test_a_rollout_in_use_is_not_divided_otherwise(keys):
    run(keys)
    there = f"{keys['output_dir']}/checkpoint-1"
    with pytest.raises(CheckpointError, match="steps_per_generation: 2 -> 4"):
        run(keys, resume_from_checkpoint=there, steps_per_generation=4)
    run(keys, resume_from_checkpoint=f"{keys['output_dir']}/checkpoint-2", steps_per_generation=1)


def test_a_missing_or_damaged_rollout_is_named(keys):
    run(keys)
    there = Path(keys["output_dir"]) / "checkpoint-1"
    data = (there / "rollout.npz").read_bytes()
    (there / "rollout.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"rollout\.npz: cannot be read"):
        run(keys, resume_from_checkpoint=str(there))
    (there / "rollout.npz").unlink()
    with pytest.raises(CheckpointError, match=r"rollout\.npz is missing"):
        run(keys, resume_from_checkpoint=str(there))


def test_a_reference_that_moved_and_is_gone_is_an_error(keys, tmp_path):
    moving = keys | {"kl_coef": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1}
    run(moving, max_steps=1)
    shutil.rmtree(tmp_path / "out" / "checkpoint-1" / "reference")
    with pytest.raises(CheckpointError, match="reference/ was saved with it and is gone"):
        run(moving, max_steps=2)


def test_a_reference_may_begin_to_move_later(keys):
    run(keys | {"kl_coef": 0.1}, max_steps=1)
    with log.captured() as lines:
        run(keys | {"kl_coef": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1}, max_steps=2)
    said = "reference: checkpoint-1 was trained with the one of the beginning; it is updated from now on"
    assert (False, said) in lines


def test_prompts_that_teach_nothing_end_the_run(keys, tmp_path):
    (tmp_path / "same.py").write_text("def same(completions, **rest):\n    return [1.0] * len(completions)\n")
    with pytest.raises(DataError, match="there is nothing to learn"):
        run(keys, reward_funcs=f"{tmp_path / 'same.py'}:same", dynamic_sample=True, difficulty_pause=1)


def test_prompts_that_teach_nothing_end_a_run_without_dynamic_sampling(keys, tmp_path):
    """When every prompt was answered, and often enough that it is no chance."""
    (tmp_path / "same.py").write_text("def same(completions, **rest):\n    return [1.0] * len(completions)\n")
    with pytest.raises(DataError, match="of 12 prompts, all answered"):
        run(keys, reward_funcs=f"{tmp_path / 'same.py'}:same", rollout_batch_size=16, save_strategy="no")
    assert len(samples(keys["output_dir"])) == 64  # 16 groups; the second rollout has the 32nd


def test_samples_have_the_right_answer_whatever_its_field_is_called(keys):
    path = Path(keys["train_dataset_path"])
    path.write_text(path.read_text().replace('"answer"', '"right"'))
    run(keys, answer_key="right", max_steps=1)
    assert all(line["answer"] for line in samples(keys["output_dir"]))


def test_values_that_json_has_no_form_for_are_texts_in_samples():
    for value, shown in (
        ("\ud83d", "\\ud83d"),
        (float("nan"), "nan"),
        ([float("inf")], "[inf]"),
        (object, str(object)),
    ):
        assert json_value(value) == shown
    assert json_value({"a": ["好", 1.5, None]}) == {"a": ["好", 1.5, None]}


def test_what_a_function_logs_replaces_no_number_of_the_run(keys, tmp_path):
    (tmp_path / "logs.py").write_text(
        "def logs(completions, log_extra, log_metric):\n"
        "    log_extra('reward', ['much'] * len(completions))\n"
        "    for name in ('loss', 'reward', 'mine'):\n        log_metric(name, 99)\n"
        "    return list(range(len(completions)))\n"
    )
    (step,) = run(keys, reward_funcs=f"{tmp_path / 'logs.py'}:logs", max_steps=1)
    assert (step["reward"], step["logged/loss"], step["logged/reward"], step["mine"]) == (1.5, 99, 99, 99)
    assert abs(step["loss"]) < 1
    assert {(line["logged/reward"], type(line["reward"])) for line in samples(keys["output_dir"])} == {("much", float)}


def test_a_reward_that_fails_ends_the_run(keys, tmp_path):
    (tmp_path / "bad.py").write_text("def bad(completions, **rest):\n    raise KeyError('solution')\n")
    with pytest.raises(TrainError, match="reward bad: failed for 16 of 16 completions"):
        run(keys, reward_funcs=f"{tmp_path / 'bad.py'}:bad")


def test_records_without_an_answer_are_refused_before_weights_are_read(keys, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"src": ["1+1?"]}\n')
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: the record has no 'answer'"):
        run(keys, reward_funcs="accuracy")


@pytest.mark.slow
def test_an_evaluation_reports_the_rewards_of_the_likeliest_completions(keys, tmp_path):
    train(
        config.load(
            None,
            keys | {"eval_dataset_path": keys["train_dataset_path"], "evaluation_strategy": "steps", "eval_steps": 4},
            "train",
        )
    )
    lines = [json.loads(line) for line in (Path(keys["output_dir"]) / "metrics.jsonl").read_text().splitlines()]
    (evaluation,) = [line for line in lines if "eval_reward" in line]
    assert 0 <= evaluation["eval_reward"] <= 1 and evaluation["eval_reward"] == evaluation["eval_reward_checksum"]
    state = json.loads((Path(keys["output_dir"]) / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_metric"] == evaluation["eval_reward"]
