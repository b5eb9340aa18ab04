"""Evaluation of stage RL: the rewards of the likeliest completions of held-out prompts."""

from typing import Any

import numpy as np

from erniekit.data.prompts import PromptSet
from erniekit.data.record_feed import specs_of
from erniekit.rewards import Scorer
from erniekit.training.data import DataContext
from erniekit.training.evaluators import EvaluatedModel, Scores
from erniekit.training.rl.generate import Generator
from erniekit.training.rl.prompts import check_records, prompt_options, tool_loop
from erniekit.training.rl.reward_model import reward_models
from erniekit.training.rl.scoring import score_groups
from erniekit.utils import log
from erniekit.utils.wording import count_of


class PromptEvaluation:
    """The prompts of an evaluation, or the first max_evaluate_steps * batch_size of them, and what scores their
    completions (training.evaluators.EvaluationData).
    """

    def __init__(self, context: DataContext) -> None:
        cfg = context.cfg
        self.context = context
        self.tools = tool_loop(context)
        options = prompt_options(context, self.tools)
        self.prompts = PromptSet.open(specs_of(cfg, "eval"), "eval", options, cfg.download_hub)
        self.count = len(self.prompts)
        if cfg.max_evaluate_steps > 0:
            self.count = min(self.count, cfg.max_evaluate_steps * cfg.batch_size)
        self.scorer = Scorer(cfg, given=reward_models(cfg)) if context.mesh.rank == 0 else None
        check_records(self.scorer, self.prompts)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the prompts depend on."""
        return self.prompts.identity

    def report(self) -> dict[str, Any]:
        """Counts; "dropped" are the prompts that are too long."""
        counts = self.prompts.report()
        return counts | {"dropped": counts["too_long"]}

    def close(self) -> None:
        """End the processes that compute rewards."""
        if self.scorer is not None:
            self.scorer.close()
        if self.tools is not None:
            self.tools.close()


def open_evaluation_prompts(context: DataContext) -> PromptEvaluation:
    """The evaluation data of methods that learn from rewards."""
    return PromptEvaluation(context)


def reward_scores(evaluated: EvaluatedModel, data: PromptEvaluation) -> Scores:
    """The mean "reward" and that of each function ("reward_NAME"), "accuracy" (the mean of difficulty_metric, if it is
    one of them), "completion_length", and "truncated", the share without an end token. Temperature 0 always takes the
    likeliest token.
    """
    cfg, context = evaluated.cfg, data.context
    assert context.template is not None, "prompts need a chat template"
    prompts = [data.prompts[index] for index in range(data.count)]
    generator = Generator(cfg, evaluated.model, context.template, data.tools, is_greedy=True)
    groups = generator(prompts, [[0]] * len(prompts), range(len(prompts)))
    if data.scorer is not None:
        data.scorer.begin_rollout()
    score_groups(cfg, evaluated.mesh, data.scorer, context.tokenizer, groups, prompts)
    values = {name: np.concatenate([group.rewards[name] for group in groups]) for name in groups[0].rewards}
    completions = [group.completions[0] for group in groups]
    rewards = np.array([completion.reward for completion in completions])
    missing = int(np.isnan(rewards).sum())
    if missing:
        log.warning(f"left out of the means: {missing} of {count_of(len(rewards), 'completion')}, without a reward")
    metrics = {
        "reward": _mean(rewards),
        **{f"reward_{name}": _mean(column) for name, column in values.items()},
        "completion_length": float(np.mean([completion.num_sampled for completion in completions])),
        "truncated": float(np.mean([completion.is_truncated for completion in completions])),
    }
    if cfg.difficulty_metric in values:
        metrics["accuracy"] = _mean(values[cfg.difficulty_metric])
    return Scores(metrics, {"num_samples": len(completions)})


def _mean(values: np.ndarray) -> float:
    """The mean of what is not NaN; 0 if nothing is."""
    given = values[~np.isnan(values)]
    return float(given.mean()) if len(given) else 0.0
