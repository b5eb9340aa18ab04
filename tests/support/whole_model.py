"""The terms of the loss of one batch through a whole model, as the trainer's only stage computes them."""

from erniekit.config import Config
from erniekit.data.batch import PackedBatch
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import batch_inputs
from erniekit.training.recipes.base import Recipe, Term
from erniekit.training.recipes.routers import router_terms


def all_terms(cfg: Config, model: CausalLM, recipe: Recipe, batch: PackedBatch) -> dict[str, Term]:
    """Every term by name."""
    inputs = batch_inputs(model, batch)
    hidden = model.model(inputs)
    return recipe.head_terms(model, hidden.last, inputs, batch) | router_terms(cfg, model, hidden.routings)[0]
