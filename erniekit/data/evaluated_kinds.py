"""Metrics of an evaluation that only data of their kind gives: judged answers on both sides, pictures, videos."""

from contextlib import closing

import numpy as np

from erniekit.config import Config
from erniekit.data.loader import Loader
from erniekit.data.packed_batch import Modality, PackedBatch
from erniekit.utils.errors import DataError

_GOOD, _BAD = "good answers", "bad answers"
# What the evaluated rows have to hold, by the name of the metric.
_NEEDS: dict[str, frozenset[str]] = {
    "reward_good": frozenset({_GOOD}),
    "reward_bad": frozenset({_BAD}),
    "margin": frozenset({_GOOD, _BAD}),
    **{f"loss_{kind.name.lower()}": frozenset({f"labels of modality {kind.name.lower()}"}) for kind in Modality},
}


def require_metric(cfg: Config, loader: Loader) -> None:
    """Read the evaluation data up to the first rows that give metric_for_best_model. DataError if none do.

    Metrics that every evaluation gives cost nothing. `loader` is that of the evaluation data.
    """
    metric = (cfg.metric_for_best_model or cfg.method.metric).removeprefix("eval_")
    missing = set(_NEEDS.get(metric, ())) if cfg.evaluation_strategy != "no" else set()
    if not missing:
        return
    with closing(loader.evaluated_rows(cfg.max_evaluate_steps)) as rows:
        for row in rows:
            missing -= _kinds(row)
            if not missing:
                return
    raise DataError(
        f"metric_for_best_model: {metric}: the evaluation data holds no {' and no '.join(sorted(missing))}, so an "
        "evaluation gives no such number. Hint: name loss, or add such records to eval_dataset_path."
    )


def _kinds(row: PackedBatch) -> set[str]:
    judged = row.judged.is_good if len(row.judged) else np.zeros(0, bool)
    found = {f"labels of modality {Modality(kind).name.lower()}" for kind in np.unique(row.supervised_modality)}
    return found | ({_GOOD} if judged.any() else set()) | ({_BAD} if not judged.all() else set())
