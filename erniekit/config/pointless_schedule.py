"""Keys of the learning-rate schedule that another key makes pointless (see pointless.py)."""

from erniekit.config.pointless_rule import Rule
from erniekit.config.schema import Config


def _schedule(cfg: Config) -> str:
    return cfg.lr_scheduler_type.partition(":")[0]


SCHEDULE_RULES = [
    Rule(
        "min_lr",
        lambda c, f: _schedule(c) not in ("cosine", "wsd"),
        "lr_scheduler_type: {lr_scheduler_type} has no lowest rate; cosine and wsd have",
    ),
    Rule("decay_function", lambda c, f: _schedule(c) != "wsd", "read only with lr_scheduler_type: wsd:N"),
    Rule("num_cycles", lambda c, f: _schedule(c) != "cosine", "read only with lr_scheduler_type: cosine"),
    Rule("power lr_end", lambda c, f: _schedule(c) != "polynomial", "read only with lr_scheduler_type: polynomial"),
    Rule(
        "decay_steps",
        lambda c, f: _schedule(c) in ("constant", "constant_with_warmup"),
        "lr_scheduler_type: {lr_scheduler_type} does not decay",
    ),
    Rule(
        "warmup_steps warmup_ratio",
        lambda c, f: _schedule(c) == "constant",
        "lr_scheduler_type: constant has no warm-up; constant_with_warmup has",
    ),
    Rule("warmup_ratio", lambda c, f: c.warmup_steps > 0, "warmup_steps: {warmup_steps} decides"),
]
