"""Reward models: a score for the last token of an answer, trained on pairs of a chosen and a rejected answer
(losses/reward_model.py).
"""

from collections.abc import Sequence

import numpy as np
import paddle

from erniekit.config.schema import Config
from erniekit.data.loader import Loader
from erniekit.data.packed_batch import PackedBatch
from erniekit.losses.reward_model import METRICS, center_loss, pairwise_loss, score_metrics
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import ModelInputs
from erniekit.models.scoring import last_token_scores, share_of_loss
from erniekit.parallel import comm
from erniekit.training.evaluators import EvaluatedModel, Scores, batch_groups
from erniekit.training.forward_pass import final_norm, forward_pass
from erniekit.training.recipes.base import Recipe, RecipeContext, Term
from erniekit.utils.errors import DataError


class RewardModelRecipe(Recipe):
    """Mean over pairs of the pairwise loss + center_rewards_coefficient * mean over pairs of the center loss.

    Beside them it reports the means over pairs of losses.reward_model.score_metrics.
    """

    def __init__(self, cfg: Config) -> None:
        self._center, self._margin = cfg.center_rewards_coefficient, cfg.reward_margin

    @classmethod
    def build(cls, context: RecipeContext) -> "RewardModelRecipe":
        """The recipe of a run."""
        return cls(context.cfg)

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """Pairs and all tokens."""
        return {"pairs": float(len(batch.pairs)), "tokens": float(batch.num_tokens)}

    def head_terms(
        self, model: CausalLM, x_TD: paddle.Tensor, inputs: ModelInputs, batch: PackedBatch
    ) -> dict[str, Term]:
        """Terms "pairwise" and, if asked for, "center"; the metrics are only reported."""
        normed_TD = model.enter_head(final_norm(model, x_TD))
        weights = {"pairwise": 1.0} | ({"center": self._center} if self._center else {})
        if not len(batch.pairs):
            # 0, through the head: a rank without pairs runs the same graph as the others (recipes/preference.py).
            assert model.score is not None
            nothing = model.score(normed_TD[:1]).sum() * 0.0
            sums = dict.fromkeys(weights, nothing) | dict.fromkeys(METRICS, paddle.zeros([]))
        else:
            sums = self._sums(last_token_scores(model, normed_TD, inputs, batch, batch.pairs.answers), batch)
        share = share_of_loss(model)
        terms = {name: Term(sums[name] * share, "pairs", weight) for name, weight in weights.items()}
        return terms | {name: Term(sums[name] * share, "pairs", None) for name in METRICS}

    def _sums(self, scores: paddle.Tensor, batch: PackedBatch) -> dict[str, paddle.Tensor]:
        """Every term and metric, summed over this microbatch's pairs. scores [2N]: chosen, then rejected."""
        chosen, rejected = paddle.split(scores, 2)
        margins = paddle.to_tensor(batch.pairs.score_deltas) * self._margin if self._margin else None
        values = {
            "pairwise": pairwise_loss(chosen, rejected, margins),
            "center": center_loss(chosen, rejected),
        } | score_metrics(chosen, rejected)
        return {name: value.sum() for name, value in values.items()}


def reward_model_scores(evaluated: EvaluatedModel, loader: Loader) -> Scores:
    """The loss that the configuration asks for, and the means of losses.reward_model.score_metrics, over all pairs."""
    cfg, model, mesh = evaluated.cfg, evaluated.model, evaluated.mesh
    columns: list[list[float]] = [[], [], []]  # chosen, rejected, score_deltas

    def note(batches: Sequence[PackedBatch], number: int, x_TD: paddle.Tensor, inputs: ModelInputs) -> None:
        batch, hidden = batches[number], model.enter_head(final_norm(model, x_TD))
        if len(batch.pairs) and mesh.tensor == 0:
            scores = last_token_scores(model, hidden, inputs, batch, batch.pairs.answers).numpy().reshape([2, -1])
            if mesh.context_group.index:
                return  # the first of the ranks that share the pairs has noted them
            for column, values in zip(columns, (*scores, batch.pairs.score_deltas), strict=True):
                column.extend(values.tolist())

    for microbatches in batch_groups(evaluated, loader):
        forward_pass(model, microbatches, lambda *at, batches=microbatches: note(batches, *at))
    gathered = comm.gather_objects(columns, mesh.world_group)
    table = np.concatenate([np.array(of_rank, np.float32).reshape([3, -1]) for of_rank in gathered], axis=1)
    if not table.shape[1]:
        raise DataError("eval_dataset_path: no pair of answers is left to evaluate. Hint: raise max_seq_len.")
    chosen, rejected, deltas = (paddle.to_tensor(column) for column in table)
    loss = pairwise_loss(chosen, rejected, deltas * cfg.reward_margin)
    loss += cfg.center_rewards_coefficient * center_loss(chosen, rejected)
    metrics = {"loss": loss} | score_metrics(chosen, rejected)
    return Scores({name: float(value.mean()) for name, value in metrics.items()}, {"num_samples": table.shape[1]})
