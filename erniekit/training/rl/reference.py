"""The reference of policy optimisation, which the policy is kept near."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import paddle

from erniekit import lora
from erniekit.config.pointless_rl import has_reference
from erniekit.data.packed_batch import PackedBatch
from erniekit.models.decoder import CausalLM
from erniekit.models.sharded_blocks import local_tensors
from erniekit.training.recipes.base import RecipeContext
from erniekit.training.reference import before_training, start_of_adapter
from erniekit.training.rl.token_scores import TokenScorer
from erniekit.utils import log


class PolicyReference:
    """A frozen model, or the trained one with its adapter as it was before (`second_model` is then None, and `start`
    as in training.reference.before_training).
    """

    def __init__(
        self,
        policy: CausalLM,
        second_model: CausalLM | None,
        scorer: TokenScorer,
        start: Mapping[str, paddle.Tensor] | None = None,
    ) -> None:
        self._policy, self.second_model, self._scorer, self._start = policy, second_model, scorer, start
        if second_model is not None:
            for parameter in second_model.parameters():
                parameter.stop_gradient = True

    def log_probs(self, batches: Sequence[PackedBatch]) -> list[paddle.Tensor]:
        """Log-probabilities of each microbatch's labels; see TokenScorer. The reference's own routers choose its
        experts, since it is a model of its own.
        """
        batches = [replace(batch, completions=replace(batch.completions, experts=None)) for batch in batches]
        if self.second_model is not None:
            return self._scorer.log_probs(self.second_model, batches)
        with before_training(self._policy, self._start):
            return self._scorer.log_probs(self._policy, batches)

    @paddle.no_grad()
    def update(self, policy: CausalLM, share: float) -> None:
        """Move towards the policy: share * policy + (1 - share) * reference (arXiv 2404.09656, TR-DPO, soft)."""
        assert self.second_model is not None, "config/rl_keys.py refuses an adapter"
        own = local_tensors(self.second_model)
        for name, tensor in local_tensors(policy).items():
            own[name].set_value(tensor * share + own[name] * (1 - share))


def build_reference(context: RecipeContext) -> PolicyReference | None:
    """The reference that the configuration asks for."""
    cfg, model = context.cfg, context.model
    if not has_reference(cfg):
        return None
    scorer = TokenScorer(cfg.temperature, cfg.loss_subbatch_seqlen)
    if lora.state_of(model) is not None:
        return PolicyReference(model, None, scorer, start_of_adapter(model, cfg))
    log.info("reference: a second copy of the model")
    return PolicyReference(model, context.prepared.build(model.mesh, model.chunks), scorer)
