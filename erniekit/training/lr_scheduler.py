"""Learning-rate schedules, as pure functions of the step."""

import math
from collections.abc import Callable

from erniekit.config.schema import Config

Schedule = Callable[[int], float]


def _linear(cfg: Config, progress: float) -> float:
    return cfg.learning_rate * (1.0 - progress)


def _cosine(cfg: Config, progress: float) -> float:
    """Loshchilov & Hutter 2017 (arXiv 1608.03983, eq. 5) without restarts when num_cycles is 0.5."""
    wave = 0.5 * (1.0 + math.cos(2.0 * math.pi * cfg.num_cycles * progress))
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * wave


def _polynomial(cfg: Config, progress: float) -> float:
    return cfg.lr_end + (cfg.learning_rate - cfg.lr_end) * (1.0 - progress) ** cfg.power


def _constant(cfg: Config, progress: float) -> float:
    return cfg.learning_rate


_SHAPES: dict[str, Callable[[Config, float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "polynomial": _polynomial,
    "constant": _constant,
    "constant_with_warmup": _constant,
}

_STEADY_SHARE = 0.9  # the share of all steps after which `wsd` without a number begins to decay
# the value at which the exponential of a `half_life` decay ends, before it is rescaled to end at the lowest rate
_HALF_LIFE_END = 0.05


def _wsd(cfg: Config, progress: float) -> float:
    """The decay of warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395) under ERNIEKit's names for its shapes:
    `half_life`, an exponential from 1 to 0.05 that is stretched to end at 0; `1-sqrt` as in Haegele et al. 2024 (arXiv
    2405.18392, eq. 2).
    """
    if cfg.decay_function == "1-sqrt":
        share = 1.0 - math.sqrt(progress)
    else:
        share = (_HALF_LIFE_END**progress - _HALF_LIFE_END) / (1.0 - _HALF_LIFE_END)
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * share


def warmup_steps(cfg: Config, max_steps: int) -> int:
    """The number of steps of linear warm-up: warmup_steps, else warmup_ratio of all steps (rounded up)."""
    return cfg.warmup_steps or math.ceil(cfg.warmup_ratio * max_steps)


def decay_start(cfg: Config, max_steps: int) -> float:
    """The step from which `wsd` decays: N of `wsd:N`, else 0.9 of all steps."""
    _, _, steady = cfg.lr_scheduler_type.partition(":")
    return int(steady) if steady else _STEADY_SHARE * (cfg.decay_steps or max_steps)


def build_schedule(cfg: Config, max_steps: int) -> Schedule:
    """lr(step) for step = 0, 1, ... (the rate that the step numbered step + 1 uses).

    Warm-up is linear from 0 (not reached: the first step has learning_rate / warm-up); then the shape of
    lr_scheduler_type runs until `decay_steps` (default: max_steps) and stays at its end. `wsd:N` stays at the peak
    before step N, warm-up included, and decays from there; N may be as large as the run.
    """
    warmup = warmup_steps(cfg, max_steps)
    end = cfg.decay_steps or max_steps
    name, _, _ = cfg.lr_scheduler_type.partition(":")
    shape = _SHAPES.get(name, _wsd)
    start = decay_start(cfg, max_steps) if name == "wsd" else float(warmup)
    if name == "constant":
        warmup = 0

    def rate(step: int) -> float:
        if step < warmup:
            return cfg.learning_rate * (step + 1) / warmup
        if step < start:
            return cfg.learning_rate
        return shape(cfg, min((step - start) / max(end - start, 1), 1.0))

    return rate
