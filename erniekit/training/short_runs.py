"""Warnings about keys for which a run has too few steps."""

from erniekit.config.schema import Config
from erniekit.training.lr_scheduler import decay_start, warmup_steps
from erniekit.utils import log
from erniekit.utils.wording import count_of


def warn_if_too_short(cfg: Config, max_steps: int, done: int = 0) -> None:
    """Log each warning about a run of `max_steps` steps, of which `done` were done by earlier processes; once, however
    often the steps are planned.
    """
    warn_of_long_warmup(cfg, max_steps)
    warn_if_nothing_compares(cfg, max_steps)
    warn_if_nothing_is_profiled(cfg, max_steps - done)


def warn_of_long_warmup(cfg: Config, max_steps: int) -> None:
    """Log a warning if the schedule of a run of `max_steps` steps ends within its warm-up, or should decay within it;
    once, however often it is planned.
    """
    warmup, end = warmup_steps(cfg, max_steps), cfg.decay_steps or max_steps
    if cfg.lr_scheduler_type == "constant":
        return
    if warmup > end:
        log.once(
            f"warmup_steps: {count_of(warmup, 'step')} of warm-up, but the schedule ends at step {end}: the learning "
            f"rate does not reach {cfg.learning_rate:g}. Lower "
            f"{'warmup_steps' if cfg.warmup_steps else 'warmup_ratio'}, or raise "
            f"{'decay_steps' if cfg.decay_steps else 'the number of steps'}"
        )
    elif cfg.lr_scheduler_type.startswith("wsd") and warmup > (start := decay_start(cfg, max_steps)):
        log.once(
            f"lr_scheduler_type: {cfg.lr_scheduler_type}: the decay counts from step {start:g}, so the "
            f"learning rate drops when the warm-up ends, after {count_of(warmup, 'step')}. Give a larger number, as "
            f"in wsd:{warmup}"
        )


def warn_if_nothing_compares(cfg: Config, max_steps: int) -> None:
    """Log a warning if keys need evaluations that a run of `max_steps` steps is too short for."""
    given = {
        "load_best_model_at_end": cfg.load_best_model_at_end,
        "early_stopping_patience": cfg.early_stopping_patience is not None,
    }
    keys = [key for key, is_given in given.items() if is_given]
    if keys and cfg.evaluation_strategy == "steps" and (cfg.eval_steps or 0) > max_steps:
        log.once(
            f"{', '.join(keys)}: no effect: the run has {count_of(max_steps, 'step')} and eval_steps is "
            f"{cfg.eval_steps}: the one evaluation comes after the last step. Lower eval_steps"
        )


def warn_if_nothing_is_profiled(cfg: Config, steps: int) -> None:
    """Log a warning if a process that trains `steps` steps ends before the first one that `profile` measures."""
    if cfg.profile and 0 < steps < cfg.profile_step_start:
        log.once(
            f"profile: no effect: {count_of(steps, 'step is', 'steps are')} left to train and "
            f"profile_step_start is {cfg.profile_step_start}. Lower profile_step_start"
        )
