"""Scores on the evaluation data while training, over every rank's share of model and data."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import paddle

from erniekit.config.schema import Config
from erniekit.data.batch import PackedBatch
from erniekit.models.inputs import ModelInputs
from erniekit.models.scoring import Score, score_hidden
from erniekit.parallel import comm
from erniekit.training.build import Run
from erniekit.training.forward_backward import forward_pass
from erniekit.training.recipes.base import Term
from erniekit.utils.errors import TrainError

_COUNT = "count "  # before a divisor's name, among sums


@dataclass
class TermSums:
    """A recipe's terms summed over microbatches, by name, with the divisor and weight of each; and the divisors, under
    names that begin with _COUNT.
    """

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    kinds: dict[str, tuple[str, float | None]] = field(default_factory=dict)

    def add_terms(self, terms: dict[str, Term]) -> None:
        """Add a microbatch's terms."""
        for name, term in terms.items():
            self.sums[name] += float(term.total)
            self.kinds[name] = (term.divisor, term.weight)

    def add_counts(self, counts: dict[str, float]) -> None:
        """Add a microbatch's divisors."""
        for name, count in counts.items():
            self.sums[_COUNT + name] += count


def metric_of(cfg: Config) -> tuple[str, bool]:
    """The metric that ranks evaluations, as evaluate() names it, and whether more of it is better."""
    name = "eval_" + (cfg.metric_for_best_model or "loss").removeprefix("eval_")
    greater = cfg.greater_is_better
    return name, not name.endswith(("loss", "perplexity")) if greater is None else greater


def evaluate(run: Run) -> dict[str, float]:
    """Scores over the evaluation data (at most max_evaluate_steps batches a rank): loss, perplexity and token accuracy,
    or what the recipe reports instead. The names begin with eval_.
    """
    metrics = _recipe_terms(run) if run.recipe.reports_terms else _label_scores(run)
    return {f"eval_{name}": value for name, value in metrics.items()}


def _groups(run: Run) -> Iterator[list[PackedBatch]]:
    """The evaluation data, as many microbatches at a time as keep every stage busy."""
    assert run.eval_loader is not None
    most, stages = run.cfg.max_evaluate_steps, run.mesh.degrees.pipeline
    with closing(run.eval_loader.batches()) as batches:
        limited = islice(batches, most if most > 0 else None)
        while taken := list(islice(limited, 4 * stages if stages > 1 else 1)):
            yield taken


def _recipe_terms(run: Run) -> dict[str, float]:
    """The recipe's metrics, each over its own divisor, and "loss", the weighted sum of its terms."""
    found = TermSums()
    for taken in _groups(run):
        prepared = run.recipe.prepare(taken)
        if run.mesh.pipe == 0:  # every stage has the same batches
            for batch in prepared:
                found.add_counts(run.recipe.counts(batch))

        def add_terms(number: int, x_TD: paddle.Tensor, inputs: ModelInputs, batches=prepared) -> None:
            found.add_terms(run.recipe.head_terms(run.model, x_TD, inputs, batches[number]))

        forward_pass(run.model, run.mesh, run.chunks, prepared, add_terms)
    everywhere = comm.gather_objects(found.kinds, run.mesh.world_group)
    kinds = {name: (_COUNT + divisor, weight) for part in everywhere for name, (divisor, weight) in part.items()}
    names = sorted({*kinds, *(divisor for divisor, _ in kinds.values())})
    total = dict(zip(names, _over_ranks(run, np.array([found.sums[name] for name in names])), strict=True))
    if not any(total[divisor] for divisor, _ in kinds.values()):
        raise TrainError("eval_dataset_path: the evaluation data holds no pair of answers")
    means = {name: total[name] / max(total[divisor], 1.0) for name, (divisor, _) in kinds.items()}
    loss = sum(means[name] * weight for name, (_, weight) in kinds.items() if weight is not None)
    return {"loss": loss} | {name: means[name] for name, (_, weight) in kinds.items() if weight is None}


def _over_ranks(run: Run, values: np.ndarray) -> list[float]:
    over_stages = comm.sum_floats(values, run.mesh.pipe_group)
    return comm.sum_floats(over_stages, run.mesh.data_group).tolist()


def _label_scores(run: Run) -> dict[str, float]:
    """Loss, perplexity and token accuracy."""
    scores = [Score()]
    for taken in _groups(run):

        def score(number: int, x_TD: paddle.Tensor, inputs: ModelInputs, batches=taken) -> None:
            batch, hidden = batches[number], run.model.enter_head(run.model.model.norm(x_TD))
            if len(batch.supervised):
                scores[0] += score_hidden(run.model, hidden, batch.supervised, batch.labels)

        forward_pass(run.model, run.mesh, run.chunks, taken, score)
    sum_nll, num_tokens, num_correct = _over_ranks(run, np.array(scores[0], np.float64))
    if not num_tokens:
        raise TrainError("eval_dataset_path: no token of the evaluation data carries loss")
    return Score(sum_nll, int(num_tokens), int(num_correct)).metrics()
