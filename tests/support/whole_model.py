"""A training step of a whole model in one process, as the product's only pipeline stage computes it."""

from collections.abc import Sequence

from erniekit.config import Config
from erniekit.data.packed_batch import PackedBatch
from erniekit.models.decoder import CausalLM
from erniekit.parallel import pipeline
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.pipeline_schedule import plan
from erniekit.training.forward_step import StepSums, TrainStage
from erniekit.training.recipes.base import Recipe
from erniekit.training.reduce_metrics import global_counts


def train_stage(
    cfg: Config,
    model: CausalLM,
    recipe: Recipe,
    microbatches: Sequence[PackedBatch],
    chunks: Sequence[Sequence[int]] | None = None,
) -> TrainStage:
    """The stage of a step that the trainer would make for these microbatches. `chunks`: None: one with all layers."""
    prepared = recipe.prepare(microbatches)
    counts = global_counts(recipe, prepared, Mesh.single())
    if chunks is not None:
        model.chunks = tuple(tuple(layers) for layers in chunks)
    return TrainStage(cfg, model, recipe, prepared, counts, lambda chunk: None)


def run_step(cfg: Config, model: CausalLM, recipe: Recipe, microbatches: Sequence[PackedBatch]) -> StepSums:
    """What the microbatches of a step add up to; the gradients are added to the parameters'."""
    stage = train_stage(cfg, model, recipe, microbatches)
    pipeline.run(plan("1f1b", 1, len(microbatches))[0], stage, (0,))
    return stage.sums(stage.on_device.fetch())
