"""KTO: answers that are judged one by one, good or bad (losses/kto.py)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import paddle

from erniekit import lora
from erniekit.config.judged_steps import lone_answer_line
from erniekit.config.schema import Config
from erniekit.data.packed_batch import PackedBatch
from erniekit.losses.kto import kto_loss
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import ModelInputs
from erniekit.models.scoring import nothing_through_head, pair_log_probs, share_of_loss
from erniekit.parallel import comm
from erniekit.training.forward_pass import final_norm
from erniekit.training.mismatched import mismatched_batches
from erniekit.training.recipes.base import Recipe, RecipeContext, Term
from erniekit.training.reference import AdapterReference, PairScorer, Reference, SecondModel, start_of_adapter
from erniekit.utils import log
from erniekit.utils.device_sums import DeviceSums


class KtoRecipe(Recipe):
    """The mean over judged answers of the KTO loss.

    Beside it, it reports kl, the estimated divergence, and the mean implicit rewards beta * log(policy / reference) of
    good and of bad answers.
    """

    def __init__(self, cfg: Config, policy: CausalLM, scorer: PairScorer, reference: Reference) -> None:
        self.cfg, self._policy, self._scorer, self.reference = cfg, policy, scorer, reference
        self._kl = 0.0

    @classmethod
    def build(cls, context: RecipeContext) -> "KtoRecipe":
        """The recipe of a run, with its reference: the model with its adapter as it was before training, or a second
        copy of the model.
        """
        cfg, model = context.cfg, context.model
        lone = lone_answer_line(cfg, model.mesh.degrees.batch)
        if lone is not None and model.mesh.rank == 0:
            log.warning(lone)
        scorer = PairScorer(cfg.loss_subbatch_seqlen)
        reference: Reference
        if lora.state_of(model) is not None:
            reference = AdapterReference(model, scorer, start_of_adapter(model, cfg))
        else:
            reference = SecondModel(context.prepared.build(model.mesh, model.chunks), scorer)
            log.info("reference: a second copy of the model")
        return cls(cfg, model, scorer, reference)

    def prepare(self, microbatches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """Add the reference's log-probabilities to the step's microbatches, and estimate the divergence, all without
        gradients.
        """
        assert self.reference is not None
        found = self.reference.log_probs(microbatches)
        if self.cfg.kto_loss_type == "kto":
            self._kl = divergence(self.cfg, self._policy, self._scorer, self.reference, microbatches)
        return [
            replace(batch, judged=replace(batch.judged, reference=log_probs.reshape([-1])))
            for batch, log_probs in zip(microbatches, found, strict=True)
        ]

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """Judged answers, good and bad ones, all tokens."""
        num_good = float(batch.judged.is_good.sum())
        return {
            "judged": float(len(batch.judged)),
            "reward_good": num_good,
            "reward_bad": len(batch.judged) - num_good,
            "tokens": float(batch.num_tokens),
        }

    def head_terms(
        self, model: CausalLM, x_TD: paddle.Tensor, inputs: ModelInputs, batch: PackedBatch
    ) -> dict[str, Term]:
        """The term "kto"; the metrics are only reported."""
        normed_TD = model.enter_head(final_norm(model, x_TD))
        names = ("kto", "kl", "reward_good", "reward_bad")
        if not len(batch.judged):
            nothing = nothing_through_head(model, normed_TD).sum()
            sums = dict.fromkeys(names, paddle.zeros([])) | {"kto": nothing}
        else:
            sums = self._sums(pair_log_probs(model, normed_TD, inputs, batch, self._scorer.max_logit_tokens), batch)
        share = share_of_loss(model)
        return {
            "kto": Term(sums["kto"] * share, "judged"),
            "kl": Term(sums["kl"] * share, "judged", None),
            "reward_good": Term(sums["reward_good"] * share, "reward_good", None),
            "reward_bad": Term(sums["reward_bad"] * share, "reward_bad", None),
        }

    def _sums(self, log_probs: paddle.Tensor, batch: PackedBatch) -> dict[str, paddle.Tensor]:
        """The loss and every metric, summed over this microbatch's answers. log_probs [N]."""
        is_good = paddle.to_tensor(batch.judged.is_good)
        log_ratios = log_probs - batch.judged.reference
        losses = judged_losses(self.cfg, log_ratios, is_good, self._kl)
        rewards = self.cfg.beta * log_ratios.detach()
        good = is_good.astype("float32")
        return {
            "kto": losses.sum(),
            "kl": paddle.full([], self._kl * len(batch.judged), "float32"),
            "reward_good": (rewards * good).sum(),
            "reward_bad": (rewards * (1 - good)).sum(),
        }


def judged_losses(cfg: Config, log_ratios: paddle.Tensor, is_good: paddle.Tensor, kl: float) -> paddle.Tensor:
    """The loss of each answer that the configuration asks for."""
    return kto_loss(
        log_ratios,
        is_good,
        kl,
        loss_type=cfg.kto_loss_type,
        beta=cfg.beta,
        good_weight=cfg.desirable_weight,
        bad_weight=cfg.undesirable_weight,
    )


def divergence(
    cfg: Config, policy: CausalLM, scorer: PairScorer, reference: Reference | None, microbatches: Sequence[PackedBatch]
) -> float:
    """max(0, mean of log(policy / reference) over prompts with the answers of others), over the microbatches of all
    data ranks; 0 on stages without the head. Every rank calls it at the same time.
    """
    batches = mismatched_batches(microbatches, policy.mesh, cfg.max_seq_len)
    sums, count = DeviceSums(), 0
    of_references = [0.0] * len(batches) if reference is None else reference.log_probs(batches)
    for batch, of_policy, of_reference in zip(batches, scorer.log_probs(policy, batches), of_references, strict=True):
        if len(batch.judged):
            sums.add("ratios", (of_policy - of_reference).sum())
            count += len(batch.judged)
    # This reads from the device before the step's passes, since every answer's loss contains the mean.
    totals = np.array([sums.fetch().get("ratios", 0.0), count], np.float64)
    total, count_of_all = comm.sum_floats(totals, policy.mesh.data_group).tolist()
    return max(total / max(count_of_all, 1.0), 0.0)
