"""Preference optimisation: pairs of answers, a chosen and a rejected one (losses/preference.py)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import paddle

from erniekit import lora
from erniekit.config.schema import Config
from erniekit.config.schema_preference import wants_reference
from erniekit.data.packed_batch import PackedBatch
from erniekit.losses.preference import (
    METRICS,
    log_ratios,
    options_of,
    pair_metrics,
    preference_loss,
    sft_ratio_of,
)
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import ModelInputs
from erniekit.models.scoring import nothing_through_head, pair_log_probs, share_of_loss
from erniekit.parallel import comm
from erniekit.training.forward_pass import final_norm
from erniekit.training.recipes.base import Recipe, RecipeContext, Term
from erniekit.training.reference import (
    AdapterReference,
    PairScorer,
    Reference,
    SecondModel,
    start_of_adapter,
)
from erniekit.training.reference_cache import prepare_cache
from erniekit.training.trainable import trained_tensors
from erniekit.utils import log
from erniekit.utils.device_sums import DeviceSums


class PreferenceRecipe(Recipe):
    """pref_loss_ratio * mean over pairs of the preference loss + sft_loss_ratio * mean over the chosen answers' tokens
    of -log p.

    Beside them it reports the means over pairs of losses.preference.pair_metrics.

    kto_pair's loss contains means over the whole step; the policy is run once more, without gradients, to know them.
    """

    def __init__(self, cfg: Config, policy: CausalLM, scorer: PairScorer, reference: Reference | None) -> None:
        self.cfg, self._policy, self._scorer, self.reference = cfg, policy, scorer, reference
        self._metrics = [name for name in METRICS if reference is not None or name != "kl"]
        self._kl: tuple[paddle.Tensor, paddle.Tensor] | None = None
        self._sft_ratio = sft_ratio_of(cfg)
        if self._sft_ratio != cfg.sft_loss_ratio:
            log.info("loss_type: orpo: sft_loss_ratio is 1 (its paper's loss; loss_type: or is the odds ratio alone)")
        if cfg.normalize_logps:
            log.warning(
                "normalize_logps: True: log-probabilities are scaled to the mean length of their pair, so this is not "
                f"{cfg.loss_type} as published"
            )

    @classmethod
    def build(cls, context: RecipeContext) -> "PreferenceRecipe":
        """The recipe of a run, with its reference: the model with its adapter as it was before training,
        log-probabilities from a file, or a second copy of the model.
        """
        cfg, model = context.cfg, context.model
        scorer = PairScorer(cfg.loss_subbatch_seqlen)
        reference: Reference | None = None
        if wants_reference(cfg) and lora.state_of(model) is not None:
            reference = AdapterReference(model, scorer, start_of_adapter(model, cfg))
        if wants_reference(cfg) and cfg.ref_logps_cache:
            log_probs = partial(scorer.log_probs, model) if reference is None else reference.log_probs
            reference = prepare_cache(cfg, context.prepared.path, model, context.tokenizer, context.template, log_probs)
        elif wants_reference(cfg) and reference is None:
            second = context.prepared.build(model.mesh, model.chunks)
            reference = SecondModel(second, scorer)
            is_constant = cfg.ref_model_update_steps <= 0 and not cfg.method.vision  # else config refuses the key
            instead = " (ref_logps_cache would save its memory)" if is_constant else ""
            log.info(f"reference: a second copy of the model{instead}")
        return cls(cfg, model, scorer, reference)

    def prepare(self, microbatches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """Add the reference's log-probabilities to the step's microbatches, without gradients."""
        prepared = list(microbatches)
        if self.reference is not None:
            found = self.reference.log_probs(prepared)
            prepared = [
                replace(batch, pairs=replace(batch.pairs, reference=log_probs))
                for batch, log_probs in zip(prepared, found, strict=True)
            ]
        if self.cfg.loss_type == "kto_pair":
            self._kl = self._measure_kl(prepared)
        return prepared

    def after_step(self, step: int) -> None:
        """ref_model_update_steps: the reference follows the policy (TR-DPO's hard update, Gorbatovski et al. 2024,
        arXiv 2404.09656).
        """
        every = self.cfg.ref_model_update_steps
        if every > 0 and step % every == 0 and isinstance(self.reference, SecondModel):
            self.reference.update(self._policy)

    def extra_weights(self) -> dict[str, dict[str, paddle.Tensor]]:
        """The weights of a reference that is updated; any other one is loaded from model_name_or_path."""
        if self.cfg.ref_model_update_steps > 0 and isinstance(self.reference, SecondModel):
            return {"reference": trained_tensors(self.reference.model)}
        return {}

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """Pairs, the chosen answers' labels, all tokens."""
        pairs = len(batch.pairs)
        chosen = float(batch.answer_labels[:pairs].sum())
        return {"pairs": float(pairs), "chosen_tokens": chosen, "tokens": float(batch.num_tokens)}

    def head_terms(
        self, model: CausalLM, x_TD: paddle.Tensor, inputs: ModelInputs, batch: PackedBatch
    ) -> dict[str, Term]:
        """Terms "pref" and, if asked for, "sft"; the metrics are only reported."""
        normed_TD = model.enter_head(final_norm(model, x_TD))
        weights = {"pref": ("pairs", self.cfg.pref_loss_ratio)}
        if self._sft_ratio:
            weights["sft"] = ("chosen_tokens", self._sft_ratio)
        if not len(batch.pairs):
            nothing = nothing_through_head(model, normed_TD).sum()
            sums = dict.fromkeys(weights, nothing) | dict.fromkeys(self._metrics, paddle.zeros([]))
        else:
            sums = self._sums(pair_log_probs(model, normed_TD, inputs, batch, self._scorer.max_logit_tokens), batch)
        share = share_of_loss(model)
        terms = {name: Term(sums[name] * share, divisor, weight) for name, (divisor, weight) in weights.items()}
        return terms | {name: Term(sums[name] * share, "pairs", None) for name in self._metrics}

    def _sums(self, log_probs: paddle.Tensor, batch: PackedBatch) -> dict[str, paddle.Tensor]:
        """Every term and metric, summed over this microbatch's pairs. log_probs [2N]: chosen, then rejected."""
        policy, reference, lengths = (
            _halves(log_probs),
            _reference(batch),
            _halves(paddle.to_tensor(batch.answer_labels)),
        )
        loss, *sides = preference_loss(
            *policy,
            *reference,
            **options_of(self.cfg),
            chosen_lengths=lengths[0],
            rejected_lengths=lengths[1],
            score_deltas=paddle.to_tensor(batch.pairs.score_deltas),
            kl=self._kl,
        )
        metrics = pair_metrics(policy, (sides[0], sides[1]), self.cfg.beta)
        return {"pref": loss.sum(), "sft": -policy[0].sum()} | {name: value.sum() for name, value in metrics.items()}

    def _measure_kl(self, microbatches: Sequence[PackedBatch]) -> tuple[paddle.Tensor, paddle.Tensor]:
        """max(0, mean over all the step's pairs of log(policy / reference)) of the chosen and the rejected answers."""
        sums, num_pairs = DeviceSums(), 0
        for batch, found in zip(microbatches, self._scorer.log_probs(self._policy, microbatches), strict=True):
            if not len(batch.pairs):
                continue
            lengths = _halves(paddle.to_tensor(batch.answer_labels))
            reference = _reference(batch)
            ratios = log_ratios(
                found[0],
                found[1],
                reference[0],
                reference[1],
                loss_type=self.cfg.loss_type,
                reference_free=self.cfg.reference_free,
                normalize_logps=self.cfg.normalize_logps,
                lengths=lengths,
            )
            sums.add("chosen", ratios.c.sum())
            sums.add("rejected", ratios.r.sum())
            num_pairs += found.shape[1]
        # This reads from the device before the step's passes, since the loss contains means over the pairs of all
        # ranks.
        fetched = sums.fetch()
        totals = np.array([fetched.get("chosen", 0.0), fetched.get("rejected", 0.0), num_pairs], np.float64)
        chosen, rejected, count = comm.sum_floats(totals, self._policy.mesh.data_group).tolist()
        kl_chosen, kl_rejected = (max(total / max(count, 1.0), 0.0) for total in (chosen, rejected))
        return paddle.full([], kl_chosen, "float32"), paddle.full([], kl_rejected, "float32")


def _halves(both: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
    half = both.shape[0] // 2
    return both[:half], both[half:]


def _reference(batch: PackedBatch) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
    reference = batch.pairs.reference
    return (None, None) if reference is None else (reference[0], reference[1])
