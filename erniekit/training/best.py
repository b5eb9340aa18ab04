"""The best evaluation so far, and early stopping of a run without a better one.

The numbers are fields of TrainState, so that a checkpoint stores them together with the conditions of their
measurement.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from erniekit.config.methods import option_names
from erniekit.config.schema import Config
from erniekit.training.state import TrainState
from erniekit.utils import log
from erniekit.utils.errors import TrainError

# metrics beside losses of which a smaller value is better
_SMALLER = {
    "eval_perplexity",
    "eval_kl",
    "eval_truncated",
    "eval_reward_bad",
    "eval_reward_rejected",
    "eval_logp_rejected",
}
# they affect training only: an evaluation reads in file order
_OF_TRAINING = {"seed", "random_shuffle", "mix_strategy", "train_dataset_prob"}
# they concern the data, or how the loss is computed
_NOT_OF_SCORES = {"max_prompt_len", "ref_logps_cache", "ref_model_update_steps"}


@dataclass(frozen=True)
class BestModel:
    """Compares evaluations by metric_for_best_model. `data`: the identity of the evaluation data."""

    cfg: Config
    data: Mapping[str, Any]

    @property
    def metric(self) -> str:
        """The metric's name, as an evaluation reports it."""
        return "eval_" + (self.cfg.metric_for_best_model or self.cfg.method.metric).removeprefix("eval_")

    @property
    def greater_is_better(self) -> bool:
        """Whether a greater value of the metric is better."""
        given = self.cfg.greater_is_better
        return not (self.metric.startswith("eval_loss") or self.metric in _SMALLER) if given is None else given

    def measured_under(self) -> dict[str, Any]:
        """The conditions that must be equal for two evaluations to be comparable, in the form in which the JSON of a
        checkpoint gives them back: a list for a tuple.
        """
        cfg = self.cfg
        basis: dict[str, Any] = {"metric_for_best_model": self.metric, "greater_is_better": self.greater_is_better}
        basis["max_evaluate_steps"] = cfg.max_evaluate_steps
        if cfg.max_evaluate_steps > 0:
            basis["batch_size"] = cfg.batch_size
        values = asdict(cfg)
        for options in cfg.method.options:
            basis |= {name: values[name] for name in option_names(options) if name not in _NOT_OF_SCORES}
        basis |= {key: value for key, value in self.data.items() if key not in _OF_TRAINING}
        read_again: dict[str, Any] = json.loads(json.dumps(basis))
        return read_again

    def note(self, state: TrainState, metrics: Mapping[str, float]) -> bool:
        """Record the metrics of an evaluation after `state.step`. Returns whether they are the best so far."""
        if self.metric not in metrics:
            known = ", ".join(sorted(metrics))
            raise TrainError(f"metric_for_best_model: an evaluation during training gives {known}, not {self.metric}")
        value, best = metrics[self.metric], state.best_metric
        is_better = best is None or (value > best if self.greater_is_better else value < best)
        if is_better:
            state.best_metric, state.best_step, state.best_of = value, state.step, self.measured_under()
            state.evaluations_since_best = 0
        else:
            state.evaluations_since_best += 1
        return is_better

    def stops_early(self, state: TrainState) -> bool:
        """Whether the last early_stopping_patience evaluations were not better; if so, this is logged."""
        patience = self.cfg.early_stopping_patience
        stops = patience is not None and state.evaluations_since_best >= patience
        if stops:
            log.info(f"early stopping after step {state.step}: no better evaluation since step {state.best_step}")
        return stops

    def forget_incomparable(self, state: TrainState) -> str | None:
        """Reset the best value and the count of evaluations without a better one if they were measured under other
        conditions. Returns a message about it, or None.
        """
        before, now = state.best_of, self.measured_under()
        if state.best_metric is None or before == now:
            return None
        changed = [
            f"{key}: {before.get(key)} -> {now.get(key)}"
            for key in {**before, **now}
            if before.get(key) != now.get(key)
        ]
        why = "; ".join(changed) if before else "its version did not note what it was measured on"
        line = (
            f"the best evaluation so far ({state.best_metric:.6g} at step {state.best_step}) cannot be compared with "
            f"those to come and is forgotten, and with it the count of early_stopping_patience: {why}"
        )
        state.best_metric = state.best_step = None
        state.evaluations_since_best = 0
        return line
