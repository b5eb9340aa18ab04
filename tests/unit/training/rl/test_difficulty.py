"""Prompts are drawn deterministically, leave when they teach nothing, come back by rule, and follow stages."""

import json
from collections import Counter

import numpy as np
import pytest

from erniekit.config.schema_curriculum import CurriculumArgs, curriculum_problems
from erniekit.training.rl.difficulty import Outcome, PromptSampler, fill_rollout
from erniekit.utils.errors import DataError


def sampler(*sizes, pass_rates=None, **args):
    return PromptSampler(sizes, CurriculumArgs(**args), 7, pass_rates)


def rollout(prompts, count, step=0):
    prompts.begin_rollout(step)
    return prompts.next(count)


def test_every_prompt_is_drawn_once_an_epoch_in_a_new_order():
    prompts = sampler(6, 4)
    epochs = [[i for _ in range(5) for i in rollout(prompts, 2)] for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1] and epochs[0] != list(range(10))
    again = sampler(10)
    assert [i for _ in range(5) for i in rollout(again, 2)] == epochs[0]


def test_a_rollout_repeats_a_prompt_only_when_it_has_drawn_all():
    prompts = sampler(5)
    rollout(prompts, 3)
    assert sorted(rollout(prompts, 5)) == list(range(5))  # also across the end of an epoch
    assert Counter(rollout(prompts, 12)).most_common()[0][1] == 3


def test_prompts_that_teach_nothing_pause_and_come_back_later_and_later():
    prompts = sampler(4, dynamic_sample=True, difficulty_pause=2)
    absent = []
    for number in range(1, 17):
        drawn = rollout(prompts, 3 if number > 1 else 4)
        if 0 not in drawn:
            absent.append(number)
        for index in drawn:
            prompts.observe(index, 1.0 if index == 0 else 0.5, index != 0)
    # drawn in rollout 1, away for 2; then for 4 and for 8, each after the rollout in which it came back
    assert absent[:2] == [2, 3]
    assert len(absent) >= 2 + 4 + 4
    state = prompts.state_dict()["prompts"]["0"]
    assert state[3] >= 3  # pauses in a row


def test_a_prompt_that_teaches_again_has_short_pauses_again():
    prompts = sampler(2, dynamic_sample=True, difficulty_pause=3)
    prompts.begin_rollout(0)
    prompts.observe(0, 0.0, False)
    prompts.observe(0, 0.0, False)
    assert prompts.state_dict()["prompts"]["0"][2:4] == [1 + 1 + 6, 2]
    prompts.observe(0, 0.5, True)
    prompts.observe(0, 0.0, False)
    assert prompts.state_dict()["prompts"]["0"][2:4] == [1 + 1 + 3, 1]


def test_paused_prompts_return_early_where_no_others_are_left():
    prompts = sampler(3, dynamic_sample=True, difficulty_pause=100)
    for index in rollout(prompts, 3):
        prompts.observe(index, 1.0, False)
    assert sorted(rollout(prompts, 3)) == [0, 1, 2]


def test_pass_rates_are_exponential_means():
    prompts = sampler(2, difficulty_momentum=0.75, pass_rates={1: 0.25})
    for rate in (1.0, 0.0, 0.5):
        prompts.observe(0, rate, True)
        prompts.observe(1, rate, True)
    state = prompts.state_dict()["prompts"]
    assert state["0"][0] == 0.75 * (0.75 * 1.0 + 0.25 * 0.0) + 0.25 * 0.5
    assert state["1"][0] == 0.75 * (0.75 * (0.75 * 0.25 + 0.25 * 1.0) + 0.25 * 0.0) + 0.25 * 0.5
    assert sampler(2, pass_rates={1: 0.25}).metrics()["difficulty/pass_rate"] == 0.25


def test_weights_are_those_of_the_formula_and_draws_follow_them():
    rates = {0: 0.0, 1: 1.0, 2: 0.5, 3: 0.9}
    args = {"difficulty_weighting": "variance", "difficulty_floor": 0.02}
    prompts = sampler(5, pass_rates=rates, **args)
    weights = np.array([0.02, 0.02, 0.27, 0.11, 0.27])
    np.testing.assert_allclose(prompts.weights(range(5)), weights, rtol=1e-12)
    counts = np.zeros(5)
    for _ in range(4000):
        counts[rollout(prompts, 1)] += 1
    # 4000 draws: three standard deviations of a share are below 0.024
    np.testing.assert_allclose(counts / 4000, weights / weights.sum(), atol=0.024)
    assert sorted(rollout(prompts, 5)) == list(range(5))  # without replacement


@pytest.mark.parametrize("weighting", ["none", "variance"])
def test_a_resumed_run_draws_what_an_uninterrupted_one_does(weighting):
    args = {"dynamic_sample": True, "difficulty_weighting": weighting, "rl_stages": (1, 2), "rl_stage_steps": (6,)}

    def play(prompts, first, last):
        drawn = []
        for step in range(first, last):
            drawn.append(rollout(prompts, 3, step))
            drawn.append(prompts.next(2))
            for index in drawn[-2] + drawn[-1]:
                rate = (index * 7 + step) % 5 / 4
                prompts.observe(index, rate, 0 < rate < 1)
        return drawn

    whole, first = sampler(8, 9, **args), sampler(8, 9, **args)
    expected = play(whole, 0, 12)
    begun = play(first, 0, 5)
    resumed = sampler(8, 9, **args)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + play(resumed, 5, 12) == expected
    assert resumed.state_dict() == whole.state_dict() and resumed.metrics() == whole.metrics()


def test_stages_draw_from_their_own_data_sets():
    prompts = sampler(3, 4, 5, rl_stages=(1, 2, 2), rl_stage_steps=(4,))
    drawn = {step: rollout(prompts, 3, step) for step in range(0, 12, 2)}
    assert all(i < 3 for step in (0, 2) for i in drawn[step])
    assert sorted(i for step in (4, 6, 8) for i in drawn[step]) == list(range(3, 12))
    assert prompts.current_stage == 2 and prompts.metrics()["difficulty/stage"] == 2.0


def groups(rates):
    """A `generate` whose groups have given pass rates by prompt; the calls are kept."""
    calls = []

    def generate(indices):
        calls.append(list(indices))
        return [Outcome(i, rates[i], 0 < rates[i] < 1, f"group {i}") for i in indices]

    return generate, calls


def test_groups_that_teach_nothing_are_replaced():
    args = CurriculumArgs(dynamic_sample=True)
    prompts = PromptSampler([12], args, 3)
    rates = [0.5 if i % 2 else 1.0 for i in range(12)]
    generate, calls = groups(rates)
    prompts.begin_rollout(0)
    filled = fill_rollout(prompts, args, 4, generate)
    assert len(filled.outcomes) == 4 and all(outcome.index % 2 for outcome in filled.outcomes)
    assert filled.num_generated == sum(map(len, calls)) > 4 and filled.num_padded == 0
    assert len({i for call in calls for i in call}) == filled.num_generated  # no prompt twice
    assert filled.metrics()["sampling/used_prompts"] == 4.0


def test_what_is_still_lacking_is_padded_and_said(capsys):
    args = CurriculumArgs(dynamic_sample=True, max_resample_times=1, difficulty_high=0.8)
    prompts = PromptSampler([6], args, 3)
    generate, calls = groups([0.0, 1.0, 0.9, 0.9, 1.0, 0.0])
    prompts.begin_rollout(0)
    filled = fill_rollout(prompts, args, 3, generate)
    assert [len(call) for call in calls] == [3, 3]
    assert filled.num_padded == 3 and [outcome.index for outcome in filled.outcomes] == calls[0]
    printed = capsys.readouterr().err
    assert (
        "3 of 3 groups without anything to learn" in printed
        and "too easy" in printed
        and "max_resample_times" in printed
    )
    assert filled.metrics()["sampling/padded_prompts"] == 3
    prompts.begin_rollout(1)
    assert fill_rollout(prompts, args, 3, generate).num_padded and "anything to learn" not in capsys.readouterr().err


def test_without_dynamic_sample_all_groups_are_used():
    args = CurriculumArgs()
    prompts = PromptSampler([6], args, 3)
    generate, calls = groups([1.0] * 6)
    prompts.begin_rollout(0)
    filled = fill_rollout(prompts, args, 4, generate)
    assert [outcome.index for outcome in filled.outcomes] == calls[0] and filled.num_padded == 0
    assert prompts.metrics()["difficulty/too_easy"] == 4 / 6


@pytest.mark.parametrize("rates", [[0.0] * 4, [1.0] * 4, [0.0, 1.0, 1.0, 0.0]])
def test_data_without_any_signal_stop_the_run(rates):
    args = CurriculumArgs(dynamic_sample=True)
    prompts = PromptSampler([4], args, 3)
    right = sum(rate == 1 for rate in rates)
    prompts.begin_rollout(0)
    with pytest.raises(
        DataError, match=f"of 4 prompts, all answered, {right} were always right and {4 - right} always"
    ):
        fill_rollout(prompts, args, 4, groups(rates)[0])


def test_data_that_were_learnt_do_not_stop_the_run():
    args = CurriculumArgs(dynamic_sample=True)
    prompts = PromptSampler([2], args, 3)
    prompts.observe(0, 0.5, True)
    prompts.begin_rollout(0)
    assert fill_rollout(prompts, args, 2, groups([1.0, 1.0])[0]).num_padded == 2


def test_without_a_pass_rate_the_variance_of_the_rewards_decides():
    prompts = sampler(2, dynamic_sample=True)
    assert prompts.teaches(None, True) and not prompts.teaches(None, False)
    assert not prompts.teaches(0.5, False)  # right and wrong, but with equal rewards: no gradient


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"difficulty_low": 0.8, "difficulty_high": 0.2}, "difficulty_low: 0.8 is not below difficulty_high: 0.2"),
        ({"rl_stage_steps": (5,)}, "rl_stages: needed"),
        ({"rl_stages": (1, 2, 2), "rl_stage_steps": (4,)}, "rl_stages: 3 entries for 2 data sets"),
        ({"rl_stages": (1, 3), "rl_stage_steps": (4, 4)}, "rl_stages: stage 2 has no data set"),
        ({"rl_stages": (1, 2)}, "rl_stage_steps: 0 entries for 2 stages"),
        ({"rl_stages": (1, 2), "rl_stage_steps": (5,)}, "rl_stage_steps: 5 is not a multiple of the 2 steps"),
        (
            {"rl_stages": (1, 2), "rl_stage_steps": (20,)},
            "20 steps before the last stage, to which max_steps: 20 leaves none",
        ),
    ],
)
def test_problems_are_named_with_their_key(args, problem):
    assert problem in "\n".join(curriculum_problems(CurriculumArgs(**args), 2, 2, 20))


def test_a_good_configuration_has_no_problems():
    assert not list(curriculum_problems(CurriculumArgs(rl_stages=(1, 2), rl_stage_steps=(4,)), 2, 2, -1))
