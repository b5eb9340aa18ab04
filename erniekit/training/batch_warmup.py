"""Batch-size warm-up: early steps accumulate fewer microbatches, since small batches suffice while the loss falls
quickly (McCandlish et al. 2018, arXiv 1812.06162). It also determines the number of steps of a training.
"""

import math

from erniekit.config.schema import Config
from erniekit.data.loader import StepSource


def microbatches_at(step: int, full: int, warmup_steps: int) -> int:
    """The microbatches of step `step` (from 0), which grow linearly to `full` over `warmup_steps`; at least 1."""
    if step >= warmup_steps:
        return full
    return max(1, -(-full * (step + 1) // (warmup_steps + 1)))


def steps_for(num_microbatches: int, full: int, warmup_steps: int, done: int = 0) -> int:
    """The number of optimizer steps for `num_microbatches` after `done` steps; the last step may be short."""
    step, used = done, 0
    while used < num_microbatches and step < warmup_steps:
        used += microbatches_at(step, full, warmup_steps)
        step += 1
    return step - done + -(-max(num_microbatches - used, 0) // full)


def warmup_steps(cfg: Config) -> int:
    """The steps over which the batch grows; 0 for methods whose steps do not consist of such microbatches."""
    return cfg.batch_size_warmup_steps if cfg.method.reads("batch_size_warmup_steps") else 0


def microbatches_per_read(cfg: Config) -> int:
    """The microbatches that the loader yields at a time: those of a step, or one while the batch size still grows."""
    return 1 if warmup_steps(cfg) else cfg.gradient_accumulation_steps


def repeats_line(rows: int) -> str:
    """The warning that a step of up to `rows` rows reads all of the training data several times."""
    return (
        f"batch_size * gradient_accumulation_steps * data ranks: a step takes up to {rows:,} rows, and reads all of "
        "the training data several times. Lower gradient_accumulation_steps"
    )


def last_step(cfg: Config, loader: StepSource, data_ranks: int, done: int = 0) -> int:
    """The number of the last step: max_steps, or where num_train_epochs end for a run that has done `done` steps and
    whose next rows are the loader's next.
    """
    if cfg.max_steps > 0:
        return cfg.max_steps
    steps = loader.steps_left()
    if steps is not None:
        return done + steps
    together = math.ceil(loader.rows_left() / (cfg.batch_size * data_ranks))
    return done + steps_for(together, cfg.gradient_accumulation_steps, warmup_steps(cfg), done)
