"""Keys of rewards that only some reward functions read (see config/pointless.py)."""

from functools import partial

from erniekit.config.methods import join_names
from erniekit.config.pointless_rule import Facts, Rule
from erniekit.config.schema import Config
from erniekit.config.schema_rewards import READS_ANSWER

# Keys (separated by spaces) -> the functions of which at least one reads them.
_READERS = {
    "answer_key": READS_ANSWER,
    "reward_min_length reward_max_length": ("length",),
    "cosine_max_length": ("cosine",),
    "reward_language": ("language",),
    "reward_coordinates": ("box_iou", "box_f1", "point_in_box"),
    "code_sandbox code_network code_time_limit code_memory_mb code_score": ("code",),
    "judge_base_url judge_model judge_prompt judge_max_score judge_concurrency judge_timeout judge_max_retries "
    "judge_cache": ("judge",),
    "reward_model_path": ("reward_model",),
}


def _has_no_reader(functions: tuple[str, ...], cfg: Config, facts: Facts) -> bool:
    return cfg.method.reads("reward_funcs") and not set(functions) & set(cfg.reward_funcs)


REWARD_RULES = [
    Rule(keys, partial(_has_no_reader, readers), f"read only with reward_funcs: {join_names(readers, 'or')}")
    for keys, readers in _READERS.items()
] + [
    Rule(
        "domain_normalize",
        lambda c, f: c.method.reads("reward_funcs") and c.scale_rewards == "gdpo",
        "scale_rewards: gdpo scales the rewards of each function, not their sum",
    ),
]
