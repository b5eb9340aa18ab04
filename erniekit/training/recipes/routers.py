"""Router losses and statistics of the sparse layers that a stage ran."""

import numpy as np
import paddle

from erniekit.config.schema import Config
from erniekit.models.decoder import CausalLM, Routings
from erniekit.moe.aux_losses import load_balance_loss, router_orthogonal_loss, router_z_loss
from erniekit.moe.layer import Routed
from erniekit.moe.router import RouterOptions
from erniekit.moe.stats import RouterStats, measure
from erniekit.training.recipes.base import Term


def router_terms(
    cfg: Config, model: CausalLM, routings: Routings
) -> tuple[dict[str, Term], dict[tuple[int, int], tuple[RouterStats, dict[str, paddle.Tensor]]]]:
    """Terms "router_balance", "router_z", "router_orthogonal": sums over routers of the losses whose coefficient is not
    0; and each router's own numbers (moe.stats.measure). A frozen router has no loss.
    """
    totals: dict[str, list[paddle.Tensor]] = {}
    stats = {}
    for (layer, modality), routed in routings.items():
        mlp = model.model.layers[layer].mlp
        gate = mlp.router_of(modality)
        losses = {} if gate.stop_gradient else _losses(cfg, routed, gate, mlp.options)
        for name, loss in losses.items():
            totals.setdefault(name, []).append(loss)
        stats[layer, modality] = measure(routed, losses)
    weights = _coefficients(cfg)
    return {name: Term(paddle.add_n(parts), "tokens", weights[name]) for name, parts in totals.items()}, stats


def idle_router(cfg: Config, model: CausalLM, layer: int, modality: int) -> RouterStats:
    """The numbers of a router that got no token, as `router_terms` would name them: ranks whose tokens are all text add
    them to those of others.
    """
    mlp = model.model.layers[layer].mlp
    trained = not mlp.router_of(modality).stop_gradient
    return RouterStats(
        np.zeros(mlp.sizes.num_experts, np.int64),
        losses=dict.fromkeys(_coefficients(cfg), 0.0) if trained else {},
    )


def _coefficients(cfg: Config) -> dict[str, float]:
    """The coefficient of each router loss that the run has."""
    coefficients = {
        "router_balance": cfg.moe_aux_loss_lambda,
        "router_z": cfg.moe_z_loss_lambda,
        "router_orthogonal": cfg.moe_orthogonal_loss_lambda,
    }
    return {name: coefficient for name, coefficient in coefficients.items() if coefficient}


def _losses(cfg: Config, routed: Routed, gate: paddle.Tensor, options: RouterOptions) -> dict[str, paddle.Tensor]:
    wanted, losses = _coefficients(cfg), {}
    num_tokens = routed.routing.probs.shape[0]
    if "router_balance" in wanted:
        losses["router_balance"] = load_balance_loss(routed.routing.probs, options, routed.row_lengths, routed.share)
    if "router_z" in wanted:
        losses["router_z"] = router_z_loss(routed.routing.logits)
    if "router_orthogonal" in wanted:
        groups = options.top_k if options.grouped else 1
        losses["router_orthogonal"] = router_orthogonal_loss(gate, groups) * num_tokens
    return losses
