"""The terms of the loss of one batch through a whole model, as the trainer's only stage computes them."""

from erniekit.config import Config
from erniekit.models.decoder import CausalLM
from erniekit.moe.layer import TokenInfo
from erniekit.training.flat import FlatBatch
from erniekit.training.recipes.base import Recipe, Term
from erniekit.training.recipes.routers import router_terms


def all_terms(cfg: Config, model: CausalLM, recipe: Recipe, batch: FlatBatch) -> dict[str, Term]:
    """Every term by name."""
    documents = model.documents(batch.segment_ids[None], batch.position_ids[None])
    x, noise = model.model.embed_tokens(batch.ids_tensor()), recipe.noise(model, batch)
    x = x if noise is None else x + noise
    x, routings = model.model.run(x, model.model.layers.numbers, documents, TokenInfo(batch.row_lengths))
    return recipe.head_terms(model, x, documents, batch) | router_terms(cfg, model, routings)[0]
