"""Scores on the evaluation data while training, over every rank's share of model and data."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import paddle

from erniekit.models.decoder import CausalLM
from erniekit.models.scoring import Score, score_hidden
from erniekit.nn.attention import Documents
from erniekit.parallel import comm, pipeline
from erniekit.parallel.schedule import forward_plan
from erniekit.train.build import Run
from erniekit.train.flat import FlatBatch, flatten
from erniekit.train.recipes.base import Recipe, Term
from erniekit.train.stage import input_shape, run_chunk
from erniekit.utils.errors import TrainError

_COUNT = "count "  # before a divisor's name, among sums


class ScoreStage:
    """Runs this process's chunks without gradients; the last stage adds up the `score`."""

    def __init__(self, model: CausalLM, chunks: Sequence[Sequence[int]], microbatches: Sequence[FlatBatch]) -> None:
        self.model, self.chunks, self.microbatches = model, chunks, microbatches
        self.score = Score()

    def forward(
        self, chunk: int, microbatch: int, x_TD: paddle.Tensor | None
    ) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        """(output for the next stage, or None from the last; no loss)."""
        batch = self.microbatches[microbatch]
        x_TD, documents, _ = run_chunk(self.model, self.chunks[chunk], batch, x_TD)
        if not (self.model.part.has_head and chunk == len(self.chunks) - 1):
            return x_TD, None
        self.score_hidden(x_TD, documents, batch)
        return None, None

    def score_hidden(self, x_TD: paddle.Tensor, documents: Documents, batch: FlatBatch) -> None:
        """Add the scores of a microbatch, from the last layer's output."""
        hidden = self.model.enter_head(self.model.model.norm(x_TD))
        if len(batch.supervised):
            self.score += score_hidden(self.model, hidden, batch.supervised, batch.labels)

    def input_shape(self, chunk: int, microbatch: int) -> tuple[list[int], str]:
        """Shape and dtype of what the stage before sends."""
        return input_shape(self.model, self.microbatches[microbatch])

    def after_backward(self, chunk: int, microbatch: int) -> None:
        """Nothing goes backward here."""


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


class TermStage(ScoreStage):
    """The same, but the last stage adds up the recipe's terms."""

    def __init__(
        self,
        model: CausalLM,
        recipe: Recipe,
        chunks: Sequence[Sequence[int]],
        microbatches: Sequence[FlatBatch],
        found: TermSums,
    ) -> None:
        super().__init__(model, chunks, microbatches)
        self.recipe, self.found = recipe, found

    def score_hidden(self, x_TD: paddle.Tensor, documents: Documents, batch: FlatBatch) -> None:
        """Add the microbatch's terms."""
        self.found.add_terms(self.recipe.head_terms(self.model, x_TD, documents, batch))


def evaluate(run: Run) -> dict[str, float]:
    """Scores over the evaluation data (at most max_evaluate_steps batches a rank): loss, perplexity and token accuracy,
    or what the recipe reports instead. The names begin with eval_.
    """
    run.model.eval()
    metrics = _recipe_terms(run) if run.recipe.reports_terms else _label_scores(run)
    run.model.train()
    return {f"eval_{name}": value for name, value in metrics.items()}


def _groups(run: Run) -> Iterator[list[FlatBatch]]:
    """The evaluation data, as many microbatches at a time as keep every stage busy."""
    assert run.eval_loader is not None
    most, stages = run.cfg.max_evaluate_steps, run.mesh.degrees.pipeline
    with closing(run.eval_loader.batches()) as batches:
        limited = islice(batches, most if most > 0 else None)
        while taken := [
            flatten(batch, run.token_multiple) for batch in islice(limited, 4 * stages if stages > 1 else 1)
        ]:
            yield taken


def _run(run: Run, stage: ScoreStage) -> None:
    actions = forward_plan(run.mesh.degrees.pipeline, len(stage.microbatches), len(run.chunks))[run.mesh.pipe]
    pipeline.run(actions, stage, run.mesh.pipe_group.ranks)


def _recipe_terms(run: Run) -> dict[str, float]:
    """The recipe's metrics, each over its own divisor, and "loss", the weighted sum of its terms."""
    found = TermSums()
    for taken in _groups(run):
        prepared = run.recipe.prepare(taken)
        if run.mesh.pipe == 0:  # every stage has the same batches
            for batch in prepared:
                found.add_counts(run.recipe.counts(batch))
        _run(run, TermStage(run.model, run.recipe, run.chunks, prepared, found))
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
    score = Score()
    for taken in _groups(run):
        stage = ScoreStage(run.model, run.chunks, taken)
        _run(run, stage)
        score += stage.score
    sum_nll, num_tokens, num_correct = _over_ranks(run, np.array(score, np.float64))
    if not num_tokens:
        raise TrainError("eval_dataset_path: no token of the evaluation data carries loss")
    return Score(sum_nll, int(num_tokens), int(num_correct)).metrics()
