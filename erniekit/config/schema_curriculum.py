"""Keys about which prompts reinforcement learning draws."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from erniekit.config.fields import key, list_of
from erniekit.utils.wording import count_of


@dataclass(frozen=True, kw_only=True)
class CurriculumArgs:
    """Which prompts are drawn: by their difficulty, and in stages (docs/rl-prompts.md)."""

    group: ClassVar[str] = "difficulty of prompts"

    dynamic_sample: bool = key(
        False,
        "Groups that teach nothing, because all their completions are equally right, are replaced by those of other "
        "prompts, and prompts that are always right or always wrong are not drawn for a while.",
    )
    max_resample_times: int = key(
        3, "dynamic_sample: how often a rollout draws other prompts; groups still lacking then have no advantage.", ge=0
    )
    difficulty_low: float = key(
        0.0, "dynamic_sample: a prompt teaches if its share of right completions is above this.", ge=0, lt=1
    )
    difficulty_high: float = key(
        1.0, "dynamic_sample: a prompt teaches if its share of right completions is below this.", gt=0, le=1
    )
    difficulty_metric: str = key(
        "accuracy",
        "The one of reward_funcs whose mean over a group is the share of right completions; where accuracy is not "
        "among them, the sum of all rewards decides whether a group teaches.",
    )
    difficulty_pause: int = key(
        8,
        "dynamic_sample: rollouts for which a prompt outside difficulty_low and difficulty_high is not drawn; twice as "
        "many each further time in a row.",
        ge=1,
    )
    difficulty_momentum: float = key(
        0.5, "The weight of the earlier pass rate in a prompt's new one; 0: only the last group counts.", ge=0, lt=1
    )
    difficulty_weighting: str = key(
        "none",
        "variance: prompts are drawn with the weight p (1 - p) + difficulty_floor, p being the pass rate (1/2 where it "
        "is unknown), with no epochs; none: each once an epoch.",
        choices=("none", "variance"),
    )
    difficulty_floor: float = key(0.05, "difficulty_weighting: variance: the least weight of a prompt.", gt=0)
    rl_stages: tuple[int, ...] = list_of(
        int,
        "The stage, from 1 on, in which each entry of train_dataset_path is drawn, such as 1,2,2,3; empty: there is "
        "one stage.",
        ge=1,
    )
    rl_stage_steps: tuple[int, ...] = list_of(
        int, "Optimizer steps of each stage but the last, which lasts to the end.", ge=1
    )


def curriculum_problems(
    args: CurriculumArgs, num_datasets: int, steps_of_rollout: int, max_steps: int
) -> Iterator[str]:
    """What does not fit together, each as "key: what is wrong, and what to do". `steps_of_rollout`: optimizer steps
    that one rollout is used for; `max_steps`: of the run, -1 if the epochs decide.
    """
    if args.difficulty_low >= args.difficulty_high:
        yield f"difficulty_low: {args.difficulty_low:g} is not below difficulty_high: {args.difficulty_high:g}"
    stages, steps = args.rl_stages, args.rl_stage_steps
    if not stages:
        if steps:
            yield "rl_stages: needed with rl_stage_steps: the stage of each entry of train_dataset_path"
        return
    if len(stages) != num_datasets:
        yield (
            f"rl_stages: {count_of(len(stages), 'entry', 'entries')} for {count_of(num_datasets, 'data set')} in "
            "train_dataset_path; give one for each"
        )
    if missing := sorted(set(range(1, max(stages) + 1)) - set(stages)):
        yield f"rl_stages: stage {missing[0]} has no data set; number the stages 1, 2, ... without a gap"
    if len(steps) != max(stages) - 1:
        yield (
            f"rl_stage_steps: {count_of(len(steps), 'entry', 'entries')} for {count_of(max(stages), 'stage')}; give "
            "the steps of each stage but the last"
        )
    for count in steps:
        if count % steps_of_rollout:
            yield (
                f"rl_stage_steps: {count} is not a multiple of the {steps_of_rollout} steps that a rollout is used for "
                "(num_iterations x steps_per_generation)"
            )
    if max_steps > 0 and sum(steps) >= max_steps:
        yield (
            f"rl_stage_steps: {count_of(sum(steps), 'step')} before the last stage, to which "
            f"max_steps: {max_steps} leaves none. Raise max_steps, or give fewer"
        )
