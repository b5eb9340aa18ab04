"""Losses of preference optimisation, as pure functions of summed log-probabilities.

Legend, for each pair: pi_c, pi_r the policy's log-probability of the chosen and the rejected answer, ref_c, ref_r the
reference's; c = pi_c - ref_c, r = pi_r - ref_r; z = c - r; b = beta; s = label_smoothing; sigma the logistic function.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paddle
from paddle.nn.functional import log_sigmoid, relu, sigmoid

from erniekit.config.schema_preference import (
    ALIASES,
    AVERAGED,
    REFERENCE_FREE,
    PreferenceArgs,
    option_problems,
    wants_reference,
)

METRICS = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "logp_chosen", "logp_rejected", "kl")
_SMALLEST_SCORE = 1e-6


@dataclass
class Pairs:
    """What a variant sees, all fp32 [pairs] (`kl`: scalars): the legend's c and r, and what few variants need."""

    policy_chosen: paddle.Tensor
    policy_rejected: paddle.Tensor
    c: paddle.Tensor
    r: paddle.Tensor
    kl: tuple[paddle.Tensor, paddle.Tensor] | None = None
    score_deltas: paddle.Tensor | None = None

    @property
    def z(self) -> paddle.Tensor:
        return self.c - self.r


@dataclass(frozen=True)
class Options:
    """The numbers of the variants: see preference_loss."""

    beta: float
    label_smoothing: float
    offset_alpha: float
    simpo_gamma: float
    dpop_lambda: float


def _smoothed(logits: paddle.Tensor, s: float) -> paddle.Tensor:
    """-(1 - s) log sigma(x) - s log sigma(-x): the label is wrong with probability s."""
    loss = -(1 - s) * log_sigmoid(logits)
    return loss - s * log_sigmoid(-logits) if s else loss


def _sigmoid(pairs: Pairs, o: Options) -> paddle.Tensor:
    """-log sigma(b z): DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); with s conservative DPO (Mitchell 2023,
    "A note on DPO with noisy preferences"); with offset_alpha the margin must exceed an offset, -log sigma(b z - alpha
    log(score delta)) (ODPO, Amini et al. 2024, arXiv 2402.10571).
    """
    logits = o.beta * pairs.z
    if o.offset_alpha:
        assert pairs.score_deltas is not None
        logits = logits - o.offset_alpha * paddle.log(pairs.score_deltas + _SMALLEST_SCORE)
    return _smoothed(logits, o.label_smoothing)


def _hinge(pairs: Pairs, o: Options) -> paddle.Tensor:
    """max(0, 1 - b z): SLiC's hinge on normalised likelihoods (RSO, Liu et al. 2023, arXiv 2309.06657)."""
    return relu(1 - o.beta * pairs.z)


def _ipo(pairs: Pairs, o: Options) -> paddle.Tensor:
    """(z - 1 / (2 b))^2 per token: IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17; b is its tau). That the
    log-probabilities are averaged over tokens is not in the paper but is how its authors ran it.
    """
    return (pairs.z - 1 / (2 * o.beta)).square()


def _simpo(pairs: Pairs, o: Options) -> paddle.Tensor:
    """-log sigma(b (pi_c - pi_r) - gamma) per token: SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6)."""
    return _smoothed(o.beta * pairs.z - o.simpo_gamma, o.label_smoothing)


def _odds_ratio(pairs: Pairs, o: Options) -> paddle.Tensor:
    """-log sigma(log odds(pi_c) - log odds(pi_r)) per token, odds(p) = p / (1 - p): ORPO's second term (Hong et al.
    2024, arXiv 2403.07691, eq. 7). Its lambda is pref_loss_ratio; the first term is the sft loss.
    """
    return -log_sigmoid(_log_odds(pairs.policy_chosen) - _log_odds(pairs.policy_rejected))


def _log_odds(log_p: paddle.Tensor) -> paddle.Tensor:
    """log(p / (1 - p)) from log p < 0. 1 - p by expm1, which keeps its digits where p is near 1; nearer than 1e-6 it
    would be 0.
    """
    log_p = log_p.clip(max=-1e-6)
    return log_p - paddle.log(-paddle.expm1(log_p))


def _dpop(pairs: Pairs, o: Options) -> paddle.Tensor:
    """-log sigma(b (z - lambda max(0, -c))): DPO-Positive keeps the chosen answer likely (Pal et al. 2024, arXiv
    2402.13228, eq. 3). The penalty stands inside the logarithm, as in the paper.
    """
    return _smoothed(o.beta * (pairs.z - o.dpop_lambda * relu(-pairs.c)), o.label_smoothing)


def _kto_pair(pairs: Pairs, o: Options) -> paddle.Tensor:
    """Mean of 1 - sigma(b (c - KL_r)) and 1 - sigma(b (KL_c - r)), KL_x = max(0, mean of x): KTO for pairs (Ethayarajh
    et al. 2024, arXiv 2402.01306, section 4, both weights 1). No gradient goes through the KL terms.
    """
    assert pairs.kl is not None
    kl_c, kl_r = pairs.kl
    return 1 - (sigmoid(o.beta * (pairs.c - kl_r)) + sigmoid(o.beta * (kl_c - pairs.r))) / 2


def _sppo_hard(pairs: Pairs, o: Options) -> paddle.Tensor:
    """(c - 1 / (2 b))^2 + (r + 1 / (2 b))^2: SPPO where the chosen answer wins for certain (Wu et al. 2024, arXiv
    2405.00675, eq. 4.7 with P = 1 and 0; b is 1 / eta).
    """
    return (pairs.c - 0.5 / o.beta).square() + (pairs.r + 0.5 / o.beta).square()


def _nca_pair(pairs: Pairs, o: Options) -> paddle.Tensor:
    """-log sigma(b c) - log sigma(-b c) / 2 - log sigma(-b r) / 2: noise-contrastive alignment (Chen et al. 2024,
    arXiv 2402.05369, for two answers).
    """
    c, r = o.beta * pairs.c, o.beta * pairs.r
    return -log_sigmoid(c) - 0.5 * log_sigmoid(-c) - 0.5 * log_sigmoid(-r)


def _robust(pairs: Pairs, o: Options) -> paddle.Tensor:
    """(-(1 - s) log sigma(b z) + s log sigma(-b z)) / (1 - 2 s): unbiased under labels flipped with probability s
    (Chowdhury et al. 2024, arXiv 2403.00409).
    """
    logits, s = o.beta * pairs.z, o.label_smoothing
    return (-(1 - s) * log_sigmoid(logits) + s * log_sigmoid(-logits)) / (1 - 2 * s)


def _exo_pair(pairs: Pairs, o: Options) -> paddle.Tensor:
    """KL((q, 1 - q) || (1 - s, s)), q = sigma(b z): exact optimisation for two answers (Ji et al. 2024, arXiv
    2402.00856, eq. 16). It needs s > 0; the paper takes 1e-3.
    """
    logits, s = o.beta * pairs.z, o.label_smoothing
    chosen = sigmoid(logits) * (log_sigmoid(logits) - math.log1p(-s))
    return chosen + sigmoid(-logits) * (log_sigmoid(-logits) - math.log(s))


def _apo_zero(pairs: Pairs, o: Options) -> paddle.Tensor:
    """1 - sigma(b c) + sigma(b r): anchored preference where chosen answers are better than the model's own
    (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7).
    """
    return 1 - sigmoid(o.beta * pairs.c) + sigmoid(o.beta * pairs.r)


def _apo_down(pairs: Pairs, o: Options) -> paddle.Tensor:
    """sigma(b c) + 1 - sigma(b z): the same where chosen answers are worse than the model's own (eq. 8)."""
    return sigmoid(o.beta * pairs.c) + 1 - sigmoid(o.beta * pairs.z)


VARIANTS: dict[str, Callable[[Pairs, Options], paddle.Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "simpo": _simpo,
    "or": _odds_ratio,
    "dpop": _dpop,
    "kto_pair": _kto_pair,
    "sppo_hard": _sppo_hard,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
}


def options_of(cfg: PreferenceArgs) -> dict[str, Any]:
    """The keyword arguments of preference_loss that a configuration gives, but for the two ratios."""
    return {
        "loss_type": cfg.loss_type,
        "beta": cfg.beta,
        "label_smoothing": cfg.label_smoothing,
        "offset_alpha": cfg.offset_alpha,
        "simpo_gamma": cfg.simpo_gamma,
        "dpop_lambda": cfg.dpop_lambda,
        "reference_free": not wants_reference(cfg),
        "normalize_logps": cfg.normalize_logps,
    }


def sft_ratio_of(cfg: PreferenceArgs) -> float:
    """Weight of the chosen answers' next-token loss; orpo has it by its paper."""
    return cfg.sft_loss_ratio or (1.0 if cfg.loss_type == "orpo" else 0.0)


def preference_loss(
    policy_chosen: paddle.Tensor,
    policy_rejected: paddle.Tensor,
    ref_chosen: paddle.Tensor | None,
    ref_rejected: paddle.Tensor | None,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    offset_alpha: float = 0.0,
    simpo_gamma: float = 0.5,
    dpop_lambda: float = 50.0,
    pref_loss_ratio: float = 1.0,
    sft_loss_ratio: float = 0.0,
    reference_free: bool = False,
    normalize_logps: bool = False,
    chosen_lengths: paddle.Tensor | None = None,
    rejected_lengths: paddle.Tensor | None = None,
    score_deltas: paddle.Tensor | None = None,
    kl: tuple[paddle.Tensor, paddle.Tensor] | None = None,
) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
    """(loss, chosen reward, rejected reward) of each pair, all fp32 [pairs]; the rewards b c and b r have no gradient.
    Those of simpo and or are per token, as in TRL; those of ipo are sums, though its loss is per token.

    The four log-probabilities [pairs] are sums over each answer's tokens, natural logarithms; the reference's may be
    None where none is needed (reference_free, simpo, or). `loss_type` is a key of VARIANTS (each documents its paper
    and formula) or of ALIASES. Lengths [pairs] are the answers' numbers of tokens: ipo, simpo and or divide by them
    (without lengths the log-probabilities are taken as averages already); normalize_logps multiplies each
    log-probability by (mean of the pair's two lengths / its own), ERNIEKit's habit and not the papers'.
    `score_deltas` [pairs] > 0 are needed for offset_alpha; `kl` replaces kto_pair's means over these pairs, for a step
    that is computed in parts. loss = pref_loss_ratio * variant + sft_loss_ratio * (-pi_c / mean chosen length), whose
    mean is the chosen tokens' mean loss. Raises ValueError for options that do not go together.
    """
    options = Options(beta, label_smoothing, offset_alpha, simpo_gamma, dpop_lambda)
    _check(loss_type, options, score_deltas)
    lengths = None
    if chosen_lengths is not None and rejected_lengths is not None:
        lengths = chosen_lengths.astype("float32"), rejected_lengths.astype("float32")
    given = (policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    pairs = log_ratios(
        *given,
        loss_type=loss_type,
        reference_free=reference_free,
        normalize_logps=normalize_logps,
        lengths=lengths,
    )
    shown = log_ratios(*given, loss_type=loss_type, reference_free=reference_free) if loss_type == "ipo" else pairs
    pairs.score_deltas = score_deltas
    pairs.kl = kl or (relu(pairs.c.detach().mean()), relu(pairs.r.detach().mean()))
    loss = pref_loss_ratio * VARIANTS[ALIASES.get(loss_type, loss_type)](pairs, options)
    if sft_loss_ratio:
        if lengths is None:
            raise ValueError("sft_loss_ratio needs chosen_lengths and rejected_lengths")
        loss = loss - sft_loss_ratio * policy_chosen.astype("float32") / lengths[0].mean()
    return loss, (beta * shown.c).detach(), (beta * shown.r).detach()


def pair_metrics(
    policy: tuple[paddle.Tensor, paddle.Tensor], rewards: tuple[paddle.Tensor, paddle.Tensor], beta: float
) -> dict[str, paddle.Tensor]:
    """What is reported of pairs, each fp32 [pairs], without gradient: the rewards, their difference (margin), whether
    it is above 0 (accuracy), the policy's log-probabilities (chosen, rejected), and `kl`, the mean of log(policy /
    reference) over the two answers: how far the policy has gone, measured on the data's answers.
    """
    margin = rewards[0] - rewards[1]
    return {
        "reward_chosen": rewards[0],
        "reward_rejected": rewards[1],
        "reward_margin": margin,
        "reward_accuracy": (margin > 0).astype("float32"),
        "logp_chosen": policy[0].detach(),
        "logp_rejected": policy[1].detach(),
        "kl": (rewards[0] + rewards[1]) / (2 * beta),
    }


def log_ratios(
    policy_chosen: paddle.Tensor,
    policy_rejected: paddle.Tensor,
    ref_chosen: paddle.Tensor | None,
    ref_rejected: paddle.Tensor | None,
    *,
    loss_type: str,
    reference_free: bool = False,
    normalize_logps: bool = False,
    lengths: tuple[paddle.Tensor, paddle.Tensor] | None = None,
) -> Pairs:
    """What preference_loss makes of its log-probabilities: in fp32, averaged or scaled as it says, without reference
    where there is none.
    """
    name = ALIASES.get(loss_type, loss_type)
    if reference_free or name in REFERENCE_FREE:
        ref_chosen = ref_rejected = paddle.zeros_like(policy_chosen)
    elif ref_chosen is None or ref_rejected is None:
        raise ValueError(f"{name} needs the reference's log-probabilities, or reference_free")
    given = [t.astype("float32") for t in (policy_chosen, policy_rejected, ref_chosen, ref_rejected)]
    scales = _length_scales(name, normalize_logps, lengths)
    chosen, rejected, ref_c, ref_r = (t if s is None else t * s for t, s in zip(given, scales * 2, strict=True))
    return Pairs(chosen, rejected, chosen - ref_c, rejected - ref_r)


def _length_scales(
    name: str, normalize: bool, lengths: tuple[paddle.Tensor, paddle.Tensor] | None
) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
    """The factors of the chosen and the rejected answers' log-probabilities; None: no scaling."""
    if normalize and lengths is None:
        raise ValueError("normalize_logps needs chosen_lengths and rejected_lengths")
    if lengths is None:
        return None, None
    if name in AVERAGED:
        return 1 / lengths[0], 1 / lengths[1]
    if normalize:
        mean = (lengths[0] + lengths[1]) / 2
        return mean / lengths[0], mean / lengths[1]
    return None, None


def _check(loss_type: str, options: Options, score_deltas: paddle.Tensor | None) -> None:
    """ValueError where a caller's options are not what the configuration's keys of these names may be."""
    if ALIASES.get(loss_type, loss_type) not in VARIANTS:
        raise ValueError(f"loss_type: expected one of {', '.join([*VARIANTS, *ALIASES])}, got {loss_type!r}")
    if options.beta <= 0:
        raise ValueError(f"beta: must be more than 0, got {options.beta}")
    if not 0 <= options.label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: must be at least 0 and less than 0.5, got {options.label_smoothing}")
    for problem in option_problems(loss_type, options.label_smoothing, options.offset_alpha):
        raise ValueError(problem)
    if options.offset_alpha and score_deltas is None:
        raise ValueError("offset_alpha: needs score_deltas")
