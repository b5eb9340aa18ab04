"""Reduce the counts, losses and router statistics of a step over all ranks."""

from collections.abc import Iterable

import numpy as np

from erniekit.data.packed_batch import PackedBatch
from erniekit.parallel import comm
from erniekit.parallel.mesh import Mesh
from erniekit.training.forward_step import StepSums, merge_extremes
from erniekit.training.recipes.base import Recipe


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
    summed /= mesh.degrees.context  # every rank of a context group has counted the same whole rows
    return dict(zip(counts, summed.tolist(), strict=True))


def _merged(parts: Iterable[dict[str, tuple[str, float]]]) -> dict[str, tuple[str, float]]:
    """The extremes of several ranks together."""
    result: dict[str, tuple[str, float]] = {}
    for part in parts:
        for name, (reduce, value) in part.items():
            merge_extremes(result, name, reduce, value)
    return result


def global_sums(sums: StepSums, mesh: Mesh) -> StepSums:
    """Terms, metrics and loss over all stages and data ranks; routers (those of this rank's own layers) over the data
    ranks.
    """
    of_rank = {"terms": dict(sums.terms), "metrics": dict(sums.metrics), "loss": {"": sums.loss}}
    numbers: dict[tuple[str, str], float] = {}  # (field of StepSums, name)
    stages = comm.gather_objects([of_rank, sums.extremes], mesh.pipe_group)
    for of_stage, _ in stages:
        for field, named in of_stage.items():
            for name, value in named.items():
                numbers[field, name] = numbers.get((field, name), 0.0) + value
    extremes = _merged(of_stage for _, of_stage in stages)
    if extremes:
        extremes = _merged(comm.gather_objects(extremes, mesh.data_group))
    keys = sorted(numbers)
    vectors = [np.array([numbers[key] for key in keys])]
    vectors += [stats.to_vector() for stats in sums.routers.values()]
    summed = comm.sum_floats(np.concatenate(vectors), mesh.data_group)
    values = dict(zip(keys, summed[: len(keys)].tolist(), strict=True))
    ends = np.cumsum([len(vector) for vector in vectors])
    routers = {
        router: stats.from_vector(summed[begin:end])
        for (router, stats), begin, end in zip(sums.routers.items(), ends[:-1], ends[1:], strict=True)
    }
    terms = {name: value for (field, name), value in values.items() if field == "terms"}
    metrics = {name: value for (field, name), value in values.items() if field == "metrics"}
    metrics |= {name: value for name, (_, value) in extremes.items()}
    return StepSums(sums.counts, terms, metrics, extremes, values["loss", ""], routers)
