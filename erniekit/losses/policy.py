"""Losses of policy optimisation by verifiable rewards, as a pure function of token log-probabilities.

Legend: N completions, T tokens of the longest; i a completion, t a token of it; m the mask, |y| the number of a
completion's tokens with m = 1; pi the policy, old the policy that made the completions as the training computation
evaluates it, mu the same as the generating computation reported it, ref the reference; r = pi / old for each token;
A the advantage; sg[] stops the gradient.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import paddle

Level = Literal["token", "sequence", "sequence_token"]
Mean = Literal["sequences", "tokens", "constant"]
Correction = Literal["none", "tis", "mis", "icepop", "icepop_sequence", "misc"]
KLEstimator = Literal["k1", "k2", "k3"]

_MAX_LOG_RATIO = 20.0  # beyond it a ratio has no meaning, and its exponential leaves fp32
_ROUNDING = 1e-5  # of an entropy in fp32, which other microbatches and ranks compute in another order


class Variant(NamedTuple):
    """One `loss_type`: where ratios are formed, and over what the loss is averaged.

    level: "token": r. "sequence": s = exp of the mean of log r over a completion, one ratio for all its tokens.
        "sequence_token": the value of s, with the gradient of each token's own log-probability.
    mean: "sequences": the mean over completions of the mean over their tokens; "tokens": the mean over all tokens;
        "constant": the sum over tokens divided by N * max_completion_length.
    """

    level: Level
    mean: Mean
    source: str


LOSS_TYPES: dict[str, Variant] = {
    "grpo": Variant("token", "sequences", "Shao et al. 2024, arXiv 2402.03300, eq. 3"),
    "bnpo": Variant("token", "tokens", "the token mean of a microbatch or, with its counts, of the step"),
    "dapo": Variant("token", "tokens", "Yu et al. 2025, arXiv 2503.14476, eq. 8"),
    "dr_grpo": Variant("token", "constant", "Liu et al. 2025, arXiv 2503.20783, section 3.2"),
    "gspo": Variant("sequence", "sequences", "Zheng et al. 2025, arXiv 2507.18071, eq. 5 and 7"),
    "gspo_token": Variant("sequence_token", "sequences", "Zheng et al. 2025, arXiv 2507.18071, eq. 13 and 14"),
    "cispo": Variant("token", "tokens", "MiniMax 2025, arXiv 2506.13585, eq. 4 and 5"),
    "ppo": Variant("token", "tokens", "Schulman et al. 2017, arXiv 1707.06347, eq. 7"),
}

# What a metric's sum is divided by to be a mean; a name that is missing is no sum but the largest or smallest value.
METRIC_DIVISORS = {
    "clip_ratio/low": "clipped_of",
    "clip_ratio/high": "clipped_of",
    "clip_ratio/region": "clipped_of",
    "ratio/mean": "tokens",
    "kl": "tokens",
    "entropy": "tokens",
    "rollout/masked_fraction": "tokens",
    "rollout/kl_k1": "tokens",
    "rollout/kl_k3": "tokens",
    "rollout/token_mult_prob_error": "tokens",
    "rollout/logp_difference": "tokens",
}


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of some completions.

    sums: scalars with gradient, "policy" and, where asked for, "kl" and "entropy": sums over these completions, which
        `divisors` turn into the means of a step ("sequences" or "tokens").
    weights: of each term in the loss.
    counts: "sequences", "tokens" and "clipped_of" of these completions, on the device where they depend on the mask.
    metrics: scalars without gradient; sums over these completions under the names of METRIC_DIVISORS, smallest and
        largest values under "ratio/min", "ratio/max" (infinite without tokens) and "rollout/logp_difference/max".
    loss: the sum of weight * sum / divisor over the terms, with the divisors that were given or, by default, those of
        these completions.
    """

    sums: dict[str, paddle.Tensor]
    divisors: dict[str, str]
    weights: dict[str, float]
    counts: dict[str, paddle.Tensor | float]
    metrics: dict[str, paddle.Tensor]
    loss: paddle.Tensor

    def means(self) -> dict[str, float]:
        """The metrics of these completions as numbers: sums divided, the others as they are."""
        result = {}
        for name, value in self.metrics.items():
            divisor = METRIC_DIVISORS.get(name)
            result[name] = float(value) / (1.0 if divisor is None else max(float(self.counts[divisor]), 1.0))
        return result


@dataclass(frozen=True)
class PolicyOptions:
    """The options of policy_loss, whose keywords they are.

    loss_type: a key of LOSS_TYPES. All but cispo have the token loss -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A);
        cispo has -sg[min(r, clip_high)] A log pi.
    clip_low, clip_high: see loss_type; clip_high is clip_low by default.
    delta: the upper bound of r in the unclipped term, above 1 + clip_high (INTELLECT-2, arXiv 2505.07291).
    level: replaces that of the loss type.
    kl_coef, kl_estimator: kl_coef times k1 = log pi - log ref, k2 = k1^2 / 2 or k3 = exp(-k1) - 1 + k1 is added to each
        token's loss (Schulman 2020, "Approximating KL divergence").
    kl_bias_correction: the estimate is multiplied by the ratio (DeepSeek-V3.2, arXiv 2512.02556).
    correction: weights of the token losses for the difference between the generating and the training computation, with
        k = old / mu for a token, all constants. "tis": min(k, correction_high), by default 2. "mis": the product of a
        completion's k if it is at most correction_high (3), otherwise 0. "icepop": k inside [correction_low,
        correction_high] ([0.5, 5]), 0 outside (Ring-1T, arXiv 2510.18855, section 2.3). "icepop_sequence": the same of
        the geometric mean of k over a completion. "misc": icepop's weight of each token times the ratio of the whole
        completion in the form "sequence_token" (ERNIE 5.0, arXiv 2602.04705, section 4). Tokens whose weight is 0 stay
        in all divisors.
    off_policy_threshold: completions with A < 0 whose mean of log mu - log pi is larger have no loss (DeepSeek-V3.2,
        eq. 9); without rollout_logps with old for mu.
    entropy_coef: this times the mean entropy of the tokens is subtracted.
    min_entropy: tokens with less have no policy loss; see entropy_threshold.
    max_completion_length: for dr_grpo, its constant.
    """

    loss_type: str = "grpo"
    clip_low: float = 0.2
    clip_high: float | None = None
    delta: float | None = None
    level: Level | None = None
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    kl_bias_correction: bool = True
    correction: Correction = "none"
    correction_low: float = 0.5
    correction_high: float | None = None
    off_policy_threshold: float | None = None
    entropy_coef: float = 0.0
    min_entropy: float | None = None
    max_completion_length: int | None = None

    @property
    def variant(self) -> Variant:
        """The loss type with the level that holds."""
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type: expected one of {', '.join(LOSS_TYPES)}, got {self.loss_type!r}")
        variant = LOSS_TYPES[self.loss_type]
        level = "sequence_token" if self.correction == "misc" else self.level or variant.level
        if level not in ("token", "sequence", "sequence_token"):
            raise ValueError(f"level: expected token, sequence or sequence_token, got {level!r}")
        return variant._replace(level=level)

    @property
    def upper(self) -> float:
        """clip_high, or its default."""
        return self.clip_low if self.clip_high is None else self.clip_high


@dataclass(frozen=True)
class _Inputs:
    """What policy_loss is given, in one dtype, [N, T]; `advantages` [N, 1] or [N, T], `lengths` [N, 1], at least 1."""

    logps: paddle.Tensor
    old: paddle.Tensor
    advantages: paddle.Tensor
    mask: paddle.Tensor
    lengths: paddle.Tensor
    ref_logps: paddle.Tensor | None
    rollout_logps: paddle.Tensor | None
    entropy: paddle.Tensor | None


def policy_loss(
    logps: paddle.Tensor,
    old_logps: paddle.Tensor | None,
    advantages: paddle.Tensor,
    mask: paddle.Tensor,
    *,
    ref_logps: paddle.Tensor | None = None,
    rollout_logps: paddle.Tensor | None = None,
    entropy: paddle.Tensor | None = None,
    num_sequences: float | None = None,
    num_tokens: float | None = None,
    **options: Any,
) -> PolicyLoss:
    """The policy loss of N completions, and its metrics.

    Args:
        logps: log pi of each token [N, T], natural logarithms of the softmax of the scores divided by the temperature
            of sampling; fp32 or fp64, as all other arguments.
        old_logps: log old [N, T], a constant; None: the first update after the completions were made, where old is pi.
        advantages: [N], or [N, T] where tokens differ; a constant.
        mask: [N, T], 1 on the tokens that the policy chose, 0 on padding and on results of tools. A completion may have
            none.
        ref_logps: log ref [N, T], for kl_coef; a constant.
        rollout_logps: log mu [N, T], for correction and off_policy_threshold; a constant, NaN where it is unknown.
        entropy: of each token's distribution [N, T], for entropy_coef, min_entropy and the metric.
        num_sequences, num_tokens: the counts of the whole step, by which the sums are divided; by default those of
            these completions. With them the losses of parts of a step add up to the step's loss.
        options: the fields of PolicyOptions: loss_type, clip_low, clip_high, ...

    Raises:
        ValueError: an unknown name, or an argument that another one needs is missing.
    """
    o = PolicyOptions(**options)
    _check(o, ref_logps, rollout_logps, entropy)
    mask = mask.astype(logps.dtype)
    old = logps.detach() if old_logps is None else old_logps.detach()
    advantages = (advantages.unsqueeze(-1) if advantages.ndim == 1 else advantages).astype(logps.dtype).detach()
    lengths = mask.sum(-1, keepdim=True).clip(min=1.0)
    given = _Inputs(logps, old, advantages, mask, lengths, ref_logps, rollout_logps, entropy)
    ratio = _ratio(o.variant.level, given)
    metrics = _clip_metrics(o, ratio.detach(), given)
    loss = _token_losses(o, given, ratio)
    if rollout_logps is not None:
        log_k = _log_mismatch(old, rollout_logps)
        weight = _weight(o, log_k, given)
        loss = loss if weight is None else loss * weight
        metrics |= _mismatch_metrics(log_k, weight, mask)
    sums, weights, divisors = _sums(o, given, loss, ratio, metrics)
    counts: dict[str, paddle.Tensor | float] = {"sequences": float(mask.shape[0]), "tokens": mask.sum()}
    counts["clipped_of"] = counts["sequences" if o.variant.level == "sequence" else "tokens"]
    whole = {
        "sequences": counts["sequences"] if num_sequences is None else num_sequences,
        "tokens": mask.sum().clip(min=1.0) if num_tokens is None else num_tokens,
    }
    total = sum(weights[name] * value / whole[divisors[name]] for name, value in sums.items())
    return PolicyLoss(sums, divisors, weights, counts, metrics, total)


def _token_losses(o: PolicyOptions, given: _Inputs, ratio: paddle.Tensor) -> paddle.Tensor:
    """The policy loss of each token, before the correction: [N, T] or, with ratios of completions, [N, 1]."""
    if o.loss_type == "cispo":
        loss = -ratio.detach().clip(max=o.upper) * given.advantages * given.logps
    else:
        first = ratio if o.delta is None else ratio.clip(max=o.delta)
        clipped = ratio.clip(1 - o.clip_low, 1 + o.upper)
        loss = -paddle.minimum(first * given.advantages, clipped * given.advantages)
    if o.min_entropy is not None and given.entropy is not None:
        loss = loss * (given.entropy >= o.min_entropy).astype(loss.dtype)
    return loss if o.off_policy_threshold is None else loss * _on_policy(given, o.off_policy_threshold)


def _sums(
    o: PolicyOptions,
    given: _Inputs,
    loss: paddle.Tensor,
    ratio: paddle.Tensor,
    metrics: dict[str, paddle.Tensor],
) -> tuple[dict[str, paddle.Tensor], dict[str, float], dict[str, str]]:
    """(sums, weights and divisors of the terms); adds to `metrics` those of the terms."""
    mask, mean = given.mask, o.variant.mean
    terms, weights = {"policy": loss}, {"policy": 1.0}
    if o.kl_coef and given.ref_logps is not None:
        kl = kl_estimate(given.logps, given.ref_logps, o.kl_estimator)
        kl = kl * ratio if o.kl_bias_correction else kl
        metrics["kl"] = (kl.detach() * mask).sum()
        terms["kl"], weights["kl"] = kl, o.kl_coef
    scale = {"sequences": 1 / given.lengths, "constant": 1.0 / (o.max_completion_length or 1), "tokens": 1.0}[mean]
    sums = {name: (value * mask * scale).sum() for name, value in terms.items()}
    divisors = dict.fromkeys(terms, "tokens" if mean == "tokens" else "sequences")
    if given.entropy is not None:
        metrics["entropy"] = (given.entropy.detach() * mask).sum()
        if o.entropy_coef:
            sums["entropy"] = (given.entropy * mask).sum()
            weights["entropy"], divisors["entropy"] = -o.entropy_coef, "tokens"
    return sums, weights, divisors


def kl_estimate(logps: paddle.Tensor, ref_logps: paddle.Tensor, estimator: KLEstimator = "k3") -> paddle.Tensor:
    """An estimate of KL(pi || ref) from sampled tokens, of the shape of `logps`; see policy_loss."""
    log_ratio = (ref_logps.detach() - logps).clip(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        return log_ratio.exp() - log_ratio - 1
    raise ValueError(f"kl_estimator: expected k1, k2 or k3, got {estimator!r}")


def pair_loss(
    logps: paddle.Tensor, anchor_logps: paddle.Tensor, mask: paddle.Tensor, pairs: paddle.Tensor, beta: float
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """(-log sigmoid(margin) [P], margins [P] without gradient) of pairs of completions: the preference loss of DPO
    (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) on completions that the policy made itself, which the technical
    report of ERNIE 4.5 adds to the policy loss under the name of online UPO without a formula.

    logps, anchor_logps, mask [N, T] as in policy_loss; the anchor is a constant. pairs int64 [P, 2]: numbers of the
    better and of the worse completion. margin = beta * the difference of sum over tokens of logps - anchor_logps.
    """
    ratios_N = ((logps - anchor_logps.detach()) * mask).sum(-1)
    margins = beta * (paddle.gather(ratios_N, pairs[:, 0]) - paddle.gather(ratios_N, pairs[:, 1]))
    return -paddle.nn.functional.log_sigmoid(margins), margins.detach()


def entropy_threshold(entropies: np.ndarray, share: float) -> float:
    """The entropy that `share` of the tokens [N] reach, for policy_loss's min_entropy (Wang et al. 2025, arXiv
    2506.01939, who keep 0.2): the quantile 1 - share, between two values by linear interpolation; 0 without tokens. It
    is a little less than the quantile, so that tokens whose entropies differ by rounding alone are kept together.
    """
    return float(np.quantile(entropies.astype(np.float64), 1 - share)) - _ROUNDING if len(entropies) else 0.0


def _check(
    o: PolicyOptions,
    ref_logps: paddle.Tensor | None,
    rollout_logps: paddle.Tensor | None,
    entropy: paddle.Tensor | None,
) -> None:
    if o.correction not in ("none", "tis", "mis", "icepop", "icepop_sequence", "misc"):
        raise ValueError(f"correction: expected none, tis, mis, icepop, icepop_sequence or misc, got {o.correction!r}")
    if o.correction != "none" and rollout_logps is None:
        raise ValueError(f"correction {o.correction} needs rollout_logps")
    if o.kl_coef and ref_logps is None:
        raise ValueError("kl_coef needs ref_logps")
    if o.variant.mean == "constant" and not o.max_completion_length:
        raise ValueError(f"{o.loss_type} needs max_completion_length")
    if entropy is None and (o.entropy_coef or o.min_entropy is not None):
        raise ValueError("entropy_coef and min_entropy need entropy")


def _ratio(level: Level, given: _Inputs) -> paddle.Tensor:
    """r [N, T], or s [N, 1], or s with the tokens' own gradients [N, T]."""
    log_ratio = (given.logps - given.old).clip(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    if level == "token":
        return log_ratio.exp()
    of_sequence = ((log_ratio * given.mask).sum(-1, keepdim=True) / given.lengths).exp()
    if level == "sequence":
        return of_sequence
    return of_sequence.detach() * (given.logps - given.logps.detach()).exp()


def _on_policy(given: _Inputs, threshold: float) -> paddle.Tensor:
    """1 for the completions that off_policy_threshold keeps, else 0: [N, 1] or [N, T]."""
    sampled = given.old
    if given.rollout_logps is not None:
        sampled = paddle.where(paddle.isnan(given.rollout_logps), given.old, given.rollout_logps.detach())
    distance = ((sampled - given.logps.detach()) * given.mask).sum(-1, keepdim=True) / given.lengths
    return 1 - ((given.advantages < 0) & (distance > threshold)).astype(given.logps.dtype)


def _log_mismatch(old: paddle.Tensor, rollout_logps: paddle.Tensor) -> paddle.Tensor:
    """log k [N, T]; 0 where mu is unknown."""
    log_k = (old - rollout_logps.detach()).clip(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return paddle.where(paddle.isnan(rollout_logps), paddle.zeros_like(log_k), log_k)


def _weight(o: PolicyOptions, log_k: paddle.Tensor, given: _Inputs) -> paddle.Tensor | None:
    """The weight of each token's loss: [N, T] or [N, 1]; None: 1."""
    high = o.correction_high
    if o.correction == "none":
        return None
    if o.correction == "tis":
        return log_k.exp().clip(max=2.0 if high is None else high)
    of_sequence = (log_k * given.mask).sum(-1, keepdim=True)
    if o.correction == "mis":
        k = of_sequence.clip(max=_MAX_LOG_RATIO).exp()
        return k * (k <= (3.0 if high is None else high)).astype(k.dtype)
    k = (of_sequence / given.lengths if o.correction == "icepop_sequence" else log_k).exp()
    return k * ((k >= o.correction_low) & (k <= (5.0 if high is None else high))).astype(k.dtype)


@paddle.no_grad()
def _clip_metrics(o: PolicyOptions, ratio: paddle.Tensor, given: _Inputs) -> dict[str, paddle.Tensor]:
    """How often the bounds hold: low where A < 0 and r < 1 - clip_low, high where A > 0 and r > 1 + clip_high; for
    ratios of completions, of these. For cispo high is r > clip_high where A > 0, and there is no lower bound.
    """
    mask, is_cispo = given.mask, o.loss_type == "cispo"
    is_low = (ratio < (0.0 if is_cispo else 1 - o.clip_low)) & (given.advantages < 0)
    is_high = (ratio > (o.upper if is_cispo else 1 + o.upper)) & (given.advantages > 0)
    per_token = ratio.expand_as(mask)
    least, largest = (
        paddle.where(mask > 0, per_token, paddle.full_like(per_token, no_token)) for no_token in (np.inf, -np.inf)
    )
    of = paddle.ones_like(ratio) if o.variant.level == "sequence" else mask
    parts = {"low": is_low, "high": is_high, "region": is_low | is_high}
    metrics = {f"clip_ratio/{name}": (part.astype(of.dtype) * of).sum() for name, part in parts.items()}
    return metrics | {"ratio/mean": (per_token * mask).sum(), "ratio/min": least.min(), "ratio/max": largest.max()}


@paddle.no_grad()
def _mismatch_metrics(
    log_k: paddle.Tensor, weight: paddle.Tensor | None, mask: paddle.Tensor
) -> dict[str, paddle.Tensor]:
    """How far the generating and the training computation are apart: KL(mu || old) by k1 and k3, the mean of
    exp |log k|, the absolute differences, and the share of tokens whose weight is 0.
    """
    distance = log_k.abs()
    metrics = {
        "rollout/kl_k1": (-log_k * mask).sum(),
        "rollout/kl_k3": ((log_k.exp() - log_k - 1) * mask).sum(),
        "rollout/token_mult_prob_error": (distance.exp() * mask).sum(),
        "rollout/logp_difference": (distance * mask).sum(),
        "rollout/logp_difference/max": (distance * mask).max(),
    }
    if weight is not None:
        metrics["rollout/masked_fraction"] = ((weight == 0).astype(mask.dtype) * mask).sum()
    return metrics
