"""The metrics that an evaluation gives under a configuration; metric_for_best_model is one of them."""

from erniekit.config.schema import Config
from erniekit.config.schema_preference import wants_reference
from erniekit.config.schema_rewards import reward_names

_EACH_REWARD = "reward_*"


def metrics_of(cfg: Config) -> list[str]:
    """The names, without eval_, of what an evaluation during training gives. Some of them also need data of their kind
    (data/evaluated_kinds.py).
    """
    rewards = reward_names(cfg.reward_funcs) if cfg.method.reads("reward_funcs") else ()
    names: list[str] = []
    for name in cfg.method.metrics:
        if name == _EACH_REWARD:
            names += [f"reward_{reward}" for reward in rewards]
        elif not _is_missing(cfg, name, rewards):
            names.append(name)
    return names


def _is_missing(cfg: Config, name: str, rewards: tuple[str, ...]) -> bool:
    """Whether a metric of the method needs what the configuration leaves out."""
    if name == "kl":  # without a reference there is no divergence from it
        if cfg.method.reads("kto_loss_type"):
            return cfg.kto_loss_type != "kto"
        return not wants_reference(cfg)
    if name == "accuracy" and rewards:
        return cfg.difficulty_metric not in rewards
    return False
