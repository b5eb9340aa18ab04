"""Numbers about the completions of a rollout."""

from collections.abc import Sequence

import numpy as np

from erniekit.config.schema import Config
from erniekit.training.rl.completions import Completion
from erniekit.utils import log


def sampled_kl(completion: Completion) -> float:
    """The sum over a completion's tokens of log old - log ref (k1)."""
    assert completion.old_logps is not None and completion.reference_logps is not None
    return float(np.nansum(completion.old_logps.astype(np.float64) - completion.reference_logps))


def length_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """The lengths of completions in tokens that the policy chose, and the share without an end token."""
    lengths = np.array([completion.num_sampled for completion in completions], np.float64)
    has_ended = np.array([not completion.is_truncated for completion in completions])
    result = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - has_ended.mean()),
    }
    if has_ended.any():
        result["completions/mean_terminated_length"] = float(lengths[has_ended].mean())
    return result


def note_if_all_masked(cfg: Config, completions: Sequence[Completion]) -> None:
    """Log that mask_truncated_completions leaves a rollout without a loss."""
    if cfg.mask_truncated_completions and all(completion.is_truncated for completion in completions):
        log.once(
            f"mask_truncated_completions: all completions of a rollout ({len(completions)}) were cut at "
            f"max_completion_length ({cfg.max_completion_length}), so none of them is trained on. Raise it, or start "
            "from a model that ends its answers"
        )


def mean(values: np.ndarray) -> float:
    given = values[~np.isnan(values)]
    return float(given.mean()) if len(given) else float("nan")


def std(values: np.ndarray) -> float:
    """The standard deviation with the divisor n - 1; 0 for fewer than two values, and exactly 0 for equal ones, of
    which the rounded mean may be another number.
    """
    given = values[~np.isnan(values)]
    return float(given.std(ddof=1)) if len(given) and (given != given[0]).any() else 0.0
