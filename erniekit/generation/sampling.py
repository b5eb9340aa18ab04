"""Chooses a token from next-token scores: penalties, filters and the draw. Plain numpy on one row of scores [V].

The order is that of Hugging Face transformers: repetition penalty, frequency and presence penalties, biases of single
tokens, the ban on early end tokens, then, when sampling, temperature, top-k, top-p, min-p, and the draw. Greedy choice
obeys penalties and biases too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from erniekit.utils.errors import UserError

_LEAST_TEMPERATURE = 1e-30  # smaller ones choose the likeliest token as well, but their scores would leave fp32
_LARGEST_SCORE = 1e8  # of a penalised token; divided by that temperature it stays within fp32


@dataclass(frozen=True)
class Sampling:
    """The settings for choosing the next token. The defaults choose the likeliest token.

    temperature: the scores are divided by it; 0 is greedy. top_k: draw among the k likeliest tokens, 0 is all. top_p:
    draw among the likeliest tokens that together reach this probability, 0 is the likeliest one. repetition_penalty:
    see `penalise_repetition`; it counts the prompt too. frequency_penalty, presence_penalty: see `penalise_frequency`;
    they count generated tokens only. min_p: draw among the tokens that have at least this share of the likeliest one's
    probability, 0 is all. logit_bias: (token, what is added to its score) of single tokens. seed: equal seeds give
    equal tokens; None draws a fresh one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        rules = (
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 <= self.top_p <= 1, "0 (the likeliest token) to 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "more than 0 (1: off)"),
            ("min_p", 0 <= self.min_p <= 1, "0 (off) to 1"),
        )
        for name, fine, expected in rules:
            if not fine:
                raise UserError(f"{name}: expected {expected}, got {vars(self)[name]}")
        if 0 < self.temperature < _LEAST_TEMPERATURE:
            object.__setattr__(self, "temperature", _LEAST_TEMPERATURE)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether single tokens' scores are changed."""
        has_penalty = self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0
        return has_penalty or bool(self.logit_bias)

    @property
    def filters(self) -> bool:
        """Whether a token is drawn among the likeliest ones alone."""
        return not self.greedy and (self.top_k != 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def plain(self) -> bool:
        """Whether the choice is simply the highest score."""
        return self.greedy and not self.penalises


def penalise_repetition(scores_V: np.ndarray, previous: Sequence[int] | np.ndarray, penalty: float) -> np.ndarray:
    """Scores of `previous` tokens are divided by the penalty where positive and multiplied where negative (CTRL, Keskar
    et al. 2019, arXiv 1909.05858, section 4.1, with the sign rule that makes it a penalty for negative scores too).
    """
    scores_V = scores_V.copy()
    if penalty != 1 and len(previous):
        tokens = np.unique(previous)
        old, penalty = scores_V[tokens], min(max(penalty, 1 / _LARGEST_SCORE), _LARGEST_SCORE)
        new = np.where(old < 0, old * penalty, old / penalty)
        scores_V[tokens] = np.clip(new, -_LARGEST_SCORE, _LARGEST_SCORE)
    return scores_V


def penalise_frequency(
    scores_V: np.ndarray, generated: Sequence[int] | np.ndarray, frequency: float, presence: float
) -> np.ndarray:
    """score[v] - frequency * count(v) - presence * [count(v) > 0], counts over the generated tokens."""
    scores_V = scores_V.copy()
    if (frequency or presence) and len(generated):
        tokens, counts = np.unique(generated, return_counts=True)
        scores_V[tokens] -= (frequency * counts + presence).astype(scores_V.dtype)
    return scores_V


def keep_top_k(scores_V: np.ndarray, k: int) -> np.ndarray:
    """-inf for all but the k highest scores; what ties with the k-th stays too. k = 0 keeps all."""
    if k == 0 or k >= len(scores_V):
        return scores_V
    lowest = np.partition(scores_V, -k)[-k]
    return np.where(scores_V < lowest, -np.inf, scores_V)


def keep_top_p(scores_V: np.ndarray, p: float) -> np.ndarray:
    """-inf for all but the smallest set of likeliest tokens whose probabilities sum to p or more (nucleus sampling,
    Holtzman et al. 2020, arXiv 1904.09751). At least one token stays.
    """
    if p >= 1:
        return scores_V
    weights = np.exp(scores_V - scores_V.max()).astype(np.float32, copy=False)
    total = float(weights.sum(dtype=np.float64))
    # Tokens below (1 - p) / V reach 1 - p not even together, which spares most of a large vocabulary.
    rest = np.flatnonzero(weights >= (1 - p) * total / len(scores_V))
    nucleus = rest[_heaviest(weights[rest], total, p)]
    filtered = np.full_like(scores_V, -np.inf)
    filtered[nucleus] = scores_V[nucleus]
    return filtered


def keep_min_p(scores_V: np.ndarray, p: float) -> np.ndarray:
    """-inf for tokens that are less likely than p times the likeliest one (Nguyen et al. 2024, arXiv 2407.01082)."""
    if p <= 0:
        return scores_V
    return np.where(scores_V < scores_V.max() + np.log(p), -np.inf, scores_V)


def _heaviest(weights_N: np.ndarray, total: float, p: float) -> np.ndarray:
    """The numbers of the fewest weights (positive, fp32) that sum to p * total or more, at least one. `total` includes
    lighter ones that are not among them. Only those near the border are sorted.
    """
    bins = weights_N.view(np.int32) >> 20  # exponent and three bits of the mantissa: in the order of the weights
    bins -= bins.min()
    lighter = total - float(weights_N.sum(dtype=np.float64))
    up_to_bin = lighter + np.cumsum(np.bincount(bins, weights_N))
    border = int(np.searchsorted(up_to_bin, (1 - p) * total, side="right"))
    heavy = np.flatnonzero(bins > border)
    near = np.flatnonzero(bins == border)
    near = near[np.argsort(weights_N[near], kind="stable")]
    below = np.cumsum(weights_N[near], dtype=np.float64) + (up_to_bin[border - 1] if border else lighter)
    chosen = np.concatenate([near[below > (1 - p) * total], heavy])
    return chosen if len(chosen) else np.array([weights_N.argmax()])


def draw(scores_V: np.ndarray, rng: np.random.Generator) -> int:
    """A token with the probability that softmax gives it: the first whose cumulative probability exceeds a uniform
    draw.
    """
    possible = np.flatnonzero(scores_V > -np.inf)
    scores = scores_V[possible]
    weights = np.exp(scores - scores.max())
    cumulative = np.cumsum(weights, dtype=np.float64)
    place = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    if place == len(weights) or not weights[place]:  # the product was rounded up to the sum
        place = np.flatnonzero(weights)[-1]
    return int(possible[place])


def choose(
    scores_V: np.ndarray,
    prompt: Sequence[int],
    generated: Sequence[int],
    sampling: Sampling,
    rng: np.random.Generator,
    banned: Sequence[int] = (),
) -> int:
    """The next token after prompt + generated, given its scores (logits) fp32 [V]. `banned` tokens are never chosen,
    unless no other is possible (where each is an end token that comes too early): then it is the first one.
    """
    scores_V = penalise_repetition(
        scores_V, [*prompt, *generated] if sampling.repetition_penalty != 1 else (), sampling.repetition_penalty
    )
    scores_V = penalise_frequency(scores_V, generated, sampling.frequency_penalty, sampling.presence_penalty)
    for token, bias in sampling.logit_bias:
        scores_V[token] += np.float32(bias)
    scores_V[list(banned)] = -np.inf
    if sampling.greedy or scores_V.max() == -np.inf:
        return int(scores_V.argmax())
    scores_V = keep_top_k(scores_V / np.float32(sampling.temperature), sampling.top_k)
    return draw(keep_min_p(keep_top_p(scores_V, sampling.top_p), sampling.min_p), rng)
