"""Scores the completions of a rollout on the first rank, for all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from erniekit.config.schema import Config
from erniekit.data.chat.tokenizer import Tokenizer
from erniekit.data.prompts import Prompt
from erniekit.generation.thinking import ids_open_thought
from erniekit.losses.advantages import overlong_penalty
from erniekit.parallel import comm
from erniekit.parallel.agree import all_or_none
from erniekit.parallel.mesh import Mesh
from erniekit.rewards import Sample, Scorer
from erniekit.training.rl.completions import Completion, Group
from erniekit.training.rl.rollout_metrics import sampled_kl
from erniekit.utils import log
from erniekit.utils.wording import count_of


@dataclass
class Scored:
    """What scoring says beside the rewards. texts: of the completions, on the first rank alone. failures: how often
    each function failed. metrics: means that the user's functions logged.
    """

    texts: list[str] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def score_groups(
    cfg: Config,
    mesh: Mesh,
    scorer: Scorer | None,
    tokenizer: Tokenizer,
    groups: Sequence[Group],
    prompts: Sequence[Prompt],
    step: int = 0,
) -> Scored:
    """Set the rewards of groups of equal size, of which group i answers prompts[i]. `scorer`: on the first rank alone.

    Every rank calls it and gets the rewards. Raises TrainError for rewards that fail, on every rank.
    """
    result: dict[str, Any] | None = None
    texts: list[str] = []
    extras: dict[str, list[Any]] = {}
    with all_or_none(mesh.world_group):
        if scorer is not None:
            samples = [
                _sample(completion, prompt, tokenizer)
                for group, prompt in zip(groups, prompts, strict=True)
                for completion in group.completions
            ]
            table = scorer.score(samples, step=step)
            texts, extras = [sample.completion for sample in samples], table.extras
            result = {
                "values": {name: column.tolist() for name, column in table.values.items()},
                "total": table.total.tolist(),
                "rest": [table.failures, table.metrics],
            }
            if np.isnan(table.total).all():
                log.once(f"reward_funcs: no function has given any of {count_of(len(samples), 'completion')} a reward")
    shared = comm.gather_objects(result, mesh.world_group)[0]
    begin = 0
    for group in groups:
        place = slice(begin, begin + len(group.completions))
        begin = place.stop
        group.rewards = {name: np.array(column[place], np.float64) for name, column in shared["values"].items()}
        group.extras = {name: column[place] for name, column in extras.items()}
        for completion, total in zip(group.completions, shared["total"][place], strict=True):
            completion.reward = total + _overlong(cfg, completion)
    return Scored(texts, *shared["rest"])


def _sample(completion: Completion, prompt: Prompt, tokenizer: Tokenizer) -> Sample:
    ids = completion.ids.tolist()
    begin = 0 if completion.is_sampled.all() else int(np.flatnonzero(~completion.is_sampled)[-1]) + 1  # the last turn
    opening = prompt.ids if not begin else ids[:begin]
    return Sample(
        prompt.messages,
        tokenizer.decode(ids[begin:] if completion.is_truncated else ids[begin:-1]),
        tuple(ids),
        prompt.fields,
        prompt.place,
        ids_open_thought(opening, tokenizer.decode),
        completion.is_truncated,
        completion.turns,
    )


def reward_table(cfg: Config, groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray]:
    """(rewards [N, K], their weights [K]) of which the advantages of all completions are made: their sums, or, with
    scale_rewards: gdpo, which scales each alone, the functions and beside them what is subtracted from the sum.
    """
    flat = [completion for group in groups for completion in group.completions]
    if cfg.scale_rewards != "gdpo":
        return np.array([[completion.reward] for completion in flat]), np.ones(1)
    names = list(groups[0].rewards)
    columns = [np.concatenate([group.rewards[name] for group in groups]) for name in names]
    weights = list(cfg.reward_weights or [1.0] * len(names))
    nothing = np.where(np.isnan(columns).all(axis=0), np.nan, 0.0)  # a completion without a reward stays without
    if cfg.soft_max_length is not None:
        columns.append(nothing + [_overlong(cfg, completion) for completion in flat])
        weights.append(1.0)
    if cfg.kl_in_reward:
        columns.append(nothing - [sampled_kl(completion) for completion in flat])
        weights.append(cfg.kl_coef)
    return np.stack(columns, axis=1), np.array(weights)


def _overlong(cfg: Config, completion: Completion) -> float:
    """The penalty on long completions, 0 without soft_max_length."""
    limit = cfg.soft_max_length
    if limit is None:
        return 0.0
    return overlong_penalty(completion.num_sampled, limit, cfg.soft_cache_length or max(limit // 5, 1))
