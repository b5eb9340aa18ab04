"""Policy optimisation: completions with advantages (losses/policy.py)."""

from typing import Any

import numpy as np
import paddle

from erniekit.config.schema import Config
from erniekit.data.packed_batch import CompletionTable, PackedBatch
from erniekit.losses.policy import METRIC_DIVISORS, PolicyOptions, pair_loss, policy_loss
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import ModelInputs
from erniekit.models.scoring import nothing_through_head
from erniekit.training.forward_pass import final_norm
from erniekit.training.recipes.base import Recipe, RecipeContext, Term
from erniekit.training.rl.loader import RolloutLoader
from erniekit.training.rl.reference import PolicyReference, build_reference
from erniekit.training.rl.token_scores import TokenScorer
from erniekit.training.trainable import trained_tensors

_TERMS = {"policy": "policy", "kl": "kl_penalty", "entropy": "entropy_bonus"}  # names that no metric has


def policy_options(cfg: Config) -> dict[str, Any]:
    """The arguments of policy_loss that a configuration stands for."""
    return {
        "loss_type": cfg.rl_loss_type,
        "clip_low": cfg.epsilon,
        "clip_high": cfg.epsilon_high,
        "delta": cfg.delta,
        "level": cfg.importance_sampling_level,
        "kl_coef": 0.0 if cfg.kl_in_reward else cfg.kl_coef,
        "kl_estimator": cfg.kl_estimator,
        "kl_bias_correction": cfg.kl_bias_correction,
        "correction": cfg.rollout_correction,
        "correction_low": cfg.icepop_alpha,
        "correction_high": {"tis": cfg.tis_cap, "mis": cfg.mis_cap}.get(cfg.rollout_correction, cfg.icepop_beta),
        "off_policy_threshold": cfg.off_policy_mask_threshold,
        "entropy_coef": cfg.entropy_coef,
        "max_completion_length": cfg.max_completion_length,
    }


class PolicyRecipe(Recipe):
    """The policy loss of completions that the run's own model generates between its steps (training/rl/)."""

    def __init__(self, cfg: Config, policy: CausalLM, loader: RolloutLoader, reference: PolicyReference | None) -> None:
        self.cfg, self._policy, self._loader, self._reference = cfg, policy, loader, reference
        self._scorer = TokenScorer(cfg.temperature, cfg.loss_subbatch_seqlen, cfg.entropy_coef > 0)
        self._options = policy_options(cfg)
        self._level = PolicyOptions(**self._options).variant.level

    @classmethod
    def build(cls, context: RecipeContext) -> "PolicyRecipe":
        """The recipe of a run, whose loader gets the model to generate with."""
        cfg, loader = context.cfg, context.loader
        assert isinstance(loader, RolloutLoader), "the method's data are prompts"
        reference = build_reference(context)
        loader.connect(context.model, reference, (context.prepared.path, context.tokenizer.directory))
        return cls(cfg, context.model, loader, reference)

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """Completions, their tokens with loss, all tokens, pairs of completions, and pairs that were made in
        advance.
        """
        table = batch.completions
        counts = {"sequences": len(table), "loss_tokens": int(table.lengths.sum()), "pairs": len(table.pairs)}
        if table.is_offline:
            counts = dict.fromkeys(counts, 0)
        counts |= {"tokens": batch.num_tokens, "offline_pairs": len(table.pairs) if table.is_offline else 0}
        return {name: float(count) for name, count in counts.items()}

    def after_step(self, step: int) -> None:
        """sync_ref_model: the reference moves towards the policy."""
        cfg = self.cfg
        if cfg.sync_ref_model and step % cfg.ref_model_sync_steps == 0 and self._reference is not None:
            self._reference.update(self._policy, cfg.ref_model_mixup_alpha)

    def extra_weights(self) -> dict[str, dict[str, paddle.Tensor]]:
        """The weights of a reference that moves; any other one is loaded from model_name_or_path."""
        model = None if self._reference is None else self._reference.second_model
        return {"reference": trained_tensors(model)} if self.cfg.sync_ref_model and model is not None else {}

    def head_terms(
        self, model: CausalLM, x_TD: paddle.Tensor, inputs: ModelInputs, batch: PackedBatch
    ) -> dict[str, Term]:
        """Terms "policy" and, if asked for, "kl_penalty" and "entropy_bonus"; the metrics of the loss are only
        reported.
        """
        hidden_TD = model.enter_head(final_norm(model, x_TD))
        if len(batch.supervised):
            log_probs, entropy = self._scorer.statistics(model, hidden_TD, batch)
        else:
            log_probs, entropy = nothing_through_head(model, hidden_TD), paddle.zeros([1])
        places, mask = _places(batch.completions.lengths, len(log_probs))
        columns = _Columns(places, mask)
        table = batch.completions
        if table.is_offline:
            return self._pair_terms(columns, log_probs, batch)
        loss = policy_loss(
            columns.of(log_probs),
            columns.of_numbers(table.old_log_probs),
            paddle.to_tensor(table.advantages if len(table) else np.zeros(1, np.float32)),
            columns.mask,
            ref_logps=columns.of_numbers(self._reference_of(table)),
            rollout_logps=columns.of_numbers(table.rollout_log_probs),
            entropy=columns.of(entropy),
            num_sequences=1.0,
            num_tokens=1.0,
            min_entropy=table.min_entropy,
            **self._options,
        )
        divisors = {"sequences": "sequences", "tokens": "loss_tokens"}
        terms = {
            _TERMS[name]: Term(total, divisors[loss.divisors[name]], loss.weights[name])
            for name, total in loss.sums.items()
        }
        divisors["clipped_of"] = "sequences" if self._level == "sequence" else "loss_tokens"
        if self.cfg.upo_weight:
            terms |= self._pair_terms(columns, log_probs, batch)
        for name, value in loss.metrics.items():
            if name in METRIC_DIVISORS:
                terms[name] = Term(value, divisors[METRIC_DIVISORS[name]], None)
            else:
                terms[name] = Term(value, "tokens", None, reduce="min" if name.endswith("min") else "max")
        return terms

    def _reference_of(self, table: CompletionTable) -> np.ndarray | None:
        """The reference's log-probabilities, if the loss compares with them; a batch without completions has none."""
        if self._options["kl_coef"] == 0:
            return None
        return table.reference_log_probs if len(table) else np.zeros(1, np.float32)

    def _pair_terms(self, columns: "_Columns", log_probs: paddle.Tensor, batch: PackedBatch) -> dict[str, Term]:
        """UPO's term "upo" or, of pairs that were made in advance, "upo_offline"; the share of pairs whose better
        completion is the likelier one, and their margin.
        """
        table = batch.completions
        name = "upo_offline" if table.is_offline else "upo"
        if not len(table.pairs):
            nothing = log_probs.sum() * 0.0
            sums = {name: nothing, f"{name}/accuracy": nothing.detach(), f"{name}/margin": nothing.detach()}
        else:
            anchor = table.reference_log_probs if self.cfg.upo_reference == "ref" else table.old_log_probs
            anchor_NT = columns.of_numbers(anchor)
            assert anchor_NT is not None, "the loader computes what upo_reference names"
            pairs = paddle.to_tensor(table.pairs)
            losses, margins = pair_loss(columns.of(log_probs), anchor_NT, columns.mask, pairs, self.cfg.upo_beta)
            sums = {
                name: losses.sum(),
                f"{name}/accuracy": (margins > 0).astype("float32").sum(),
                f"{name}/margin": margins.sum(),
            }
        weights = {"upo": self.cfg.upo_weight, "upo_offline": self.cfg.upo_offline_weight}
        divisor = "offline_pairs" if table.is_offline else "pairs"
        return {name: Term(total, divisor, weights.get(name)) for name, total in sums.items()}


class _Columns:
    """Puts numbers of labels [L] into rows of completions [N, T], 0 where a row is shorter."""

    def __init__(self, places_NT: np.ndarray, mask_NT: np.ndarray) -> None:
        self._places = paddle.to_tensor(places_NT.reshape(-1))
        self.mask = paddle.to_tensor(mask_NT)
        self._shape = list(mask_NT.shape)

    def of(self, values_L: paddle.Tensor) -> paddle.Tensor:
        return paddle.gather(values_L, self._places).reshape(self._shape) * self.mask

    def of_numbers(self, values_L: np.ndarray | None) -> paddle.Tensor | None:
        if values_L is None:
            return None
        values_L = values_L if len(values_L) else np.zeros(1, np.float32)
        values_NT = paddle.gather(paddle.to_tensor(values_L), self._places).reshape(self._shape)
        return paddle.where(self.mask > 0, values_NT, paddle.zeros(self._shape))  # NaN times 0 would be NaN


def _places(lengths_N: np.ndarray, num_values: int) -> tuple[np.ndarray, np.ndarray]:
    """For rows of these lengths, of which the values stand one after another: the number of the value at each place
    [N, T] (any number where there is none), and whether there is one, float32 [N, T].
    """
    lengths_N = lengths_N if len(lengths_N) else np.zeros(1, np.int64)
    width = max(int(lengths_N.max()), 1)
    starts = np.cumsum(lengths_N) - lengths_N
    steps = np.arange(width)
    mask = steps < lengths_N[:, None]
    places = np.where(mask, starts[:, None] + steps, 0)
    return np.minimum(places, num_values - 1).astype(np.int64), mask.astype(np.float32)
