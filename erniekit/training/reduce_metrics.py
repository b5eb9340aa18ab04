"""Reduce the counts, losses and router statistics of a step over all ranks."""

import numpy as np

from erniekit.data.batch import PackedBatch
from erniekit.parallel import comm
from erniekit.parallel.mesh import Mesh
from erniekit.training.forward_backward import StepSums
from erniekit.training.recipes.base import Recipe

_TERM, _LOSS = "term ", "loss"  # names under which ranks exchange them


def global_counts(recipe: Recipe, microbatches: list[PackedBatch], mesh: Mesh) -> dict[str, float]:
    """What each term of the loss is divided by: over every microbatch and every data rank, before any model runs.
    "supervised" are the tokens that carry loss.
    """
    counts: dict[str, float] = {"supervised": 0.0}
    for batch in microbatches:
        counts["supervised"] += len(batch.supervised)
        for name, count in recipe.counts(batch).items():
            counts[name] = counts.get(name, 0.0) + count
    summed = comm.sum_floats(np.array(list(counts.values())), mesh.data_group)
    return dict(zip(counts, summed.tolist(), strict=True))


def global_sums(sums: StepSums, mesh: Mesh) -> StepSums:
    """Terms, metrics and loss over all stages and data ranks; routers (those of this rank's own layers) over the data
    ranks.
    """
    numbers: dict[str, float] = {}
    own = {_TERM + name: value for name, value in sums.terms.items()} | dict(sums.metrics) | {_LOSS: sums.loss}
    for stage_numbers in comm.gather_objects(own, mesh.pipe_group):
        for name, value in stage_numbers.items():
            numbers[name] = numbers.get(name, 0.0) + value
    names = sorted(numbers)
    vectors = [np.array([numbers[name] for name in names])]
    vectors += [stats.to_vector() for stats in sums.routers.values()]
    summed = comm.sum_floats(np.concatenate(vectors), mesh.data_group)
    values = dict(zip(names, summed[: len(names)].tolist(), strict=True))
    ends = np.cumsum([len(vector) for vector in vectors])
    routers = {
        router: stats.from_vector(summed[begin:end])
        for (router, stats), begin, end in zip(sums.routers.items(), ends[:-1], ends[1:], strict=True)
    }
    loss = values.pop(_LOSS)
    terms = {name.removeprefix(_TERM): values.pop(name) for name in names if name.startswith(_TERM)}
    return StepSums(sums.counts, terms, values, loss, routers)
