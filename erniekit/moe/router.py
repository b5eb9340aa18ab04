"""Top-k routing with a correction bias that influences the choice of experts and never their weights.

Legend: T tokens, D model, E experts, K experts a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import paddle
from paddle import nn

from erniekit.nn.roles import Component, DeclaresRoles, Role


@dataclass(frozen=True)
class RouterOptions:
    """How a router chooses experts and weighs them.

    `act`: probabilities by softmax over all experts, or by a sigmoid each. `grouped`: experts form `top_k` groups of E
    / top_k, and the best one of each group is chosen. `capacity`: each expert takes at most ceil(capacity * n * K / E)
    of the n tokens of a packed row, earlier tokens first; None drops nothing.
    """

    top_k: int
    norm_min: float = 1e-12
    act: Literal["softmax", "sigmoid"] = "softmax"
    grouped: bool = False
    capacity: float | None = None


class Routing(NamedTuple):
    """What a router decided for T tokens, all fp32 but the choice: `logits` [T, E]; `probs` [T, E], rows sum to 1 (also
    for a sigmoid gate, whose scores are normalised for the losses); `experts` [T, K] int64; `weights` [T, K], rows sum
    to 1. `preferred` [T, K]: the experts that it would choose where others were given; None: it chose.
    """

    logits: paddle.Tensor
    probs: paddle.Tensor
    experts: paddle.Tensor
    weights: paddle.Tensor
    preferred: paddle.Tensor | None = None


def choose(scores_TE: paddle.Tensor, options: RouterOptions) -> paddle.Tensor:
    """The K experts of each token [T, K]: the largest scores, or the largest of each of K groups. No gradient."""
    with paddle.no_grad():
        if not options.grouped:
            return paddle.topk(scores_TE, options.top_k, axis=-1)[1]
        size = scores_TE.shape[1] // options.top_k
        best = scores_TE.reshape([scores_TE.shape[0], options.top_k, size]).argmax(axis=-1)
        return best + paddle.arange(options.top_k) * size


def _softmax(logits_TE: paddle.Tensor) -> paddle.Tensor:
    """Softmax over experts. Paddle's CPU kernel treats every logit as at most 64 below the largest: experts beyond that
    would have equal scores, and the choice among them would be wrong.
    """
    if not logits_TE.place.is_cpu_place():
        return nn.functional.softmax(logits_TE, axis=-1)
    powers = paddle.exp(logits_TE - logits_TE.detach().max(axis=-1, keepdim=True))
    return powers / powers.sum(axis=-1, keepdim=True)


def route(
    logits_TE: paddle.Tensor,
    correction_bias_E: paddle.Tensor,
    options: RouterOptions,
    agree: Callable[[paddle.Tensor], paddle.Tensor] | None = None,
    given_TK: paddle.Tensor | None = None,
) -> Routing:
    """Choose on score + bias; weigh by the unbiased scores, renormalised by max(sum, norm_min). Ranks that all route
    the same tokens `agree` on the choice, which depends on the last bit where two scores are close. `given_TK`: the
    experts [T, K] instead of a choice; they are weighed by the present scores, so the router still learns.

    The bias chooses and gets no gradient (Wang et al. 2024, arXiv 2408.15664, eq. 3); gradient reaches the router
    through the weights.
    """
    if options.act == "softmax":
        scores = probs = _softmax(logits_TE)
    else:
        scores = nn.functional.sigmoid(logits_TE)
        probs = scores / paddle.clip(scores.sum(axis=-1, keepdim=True), min=options.norm_min)
    preferred = choose(scores.detach() + correction_bias_E, options)
    if given_TK is not None:
        experts = given_TK
    else:
        experts = preferred if agree is None else agree(preferred)
    chosen = paddle.take_along_axis(scores, experts, axis=-1)
    weights = chosen / paddle.clip(chosen.sum(axis=-1, keepdim=True), min=options.norm_min)
    return Routing(logits_TE, probs, experts, weights, None if given_TK is None else preferred)


def within_capacity(experts_TK: np.ndarray, num_experts: int, capacity: float, row_lengths: list[int]) -> np.ndarray:
    """Which (token, expert) pairs are within the experts' capacity [T, K]: see RouterOptions.capacity. Rows are counted
    separately, so that no split into microbatches changes what is dropped.
    """
    keep = np.empty(experts_TK.shape, dtype=bool)
    start = 0
    for length in row_lengths:
        flat = experts_TK[start : start + length].reshape(-1)
        limit = int(np.ceil(capacity * len(flat) / num_experts))
        order = np.argsort(flat, kind="stable")
        counts = np.bincount(flat, minlength=num_experts)
        place = np.empty(len(flat), dtype=np.int64)
        place[order] = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
        keep[start : start + length] = (place < limit).reshape(length, -1)
        start += length
    return keep


class RouterStatics(DeclaresRoles):
    """State of the routers that is not trained by gradients: correction biases [modalities, E], fp32."""

    def __init__(self, num_modalities: int, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("e_score_correction_bias", paddle.zeros([num_modalities, num_experts], dtype="float32"))

    def roles(self) -> dict[str, Role]:
        """See DeclaresRoles."""
        return {"e_score_correction_bias": Role.ROUTER_BIAS}


class Gate(DeclaresRoles):
    """The routers' matrices [D, E], fp32 whatever the model's dtype: `weight` for text, `weight_1` for vision."""

    def __init__(self, hidden_size: int, num_experts: int, num_modalities: int, init_std: float = 0.02) -> None:
        super().__init__()
        normal = nn.initializer.Normal(0.0, init_std)
        shape = [hidden_size, num_experts]
        self.weight = self.create_parameter(shape, dtype="float32", default_initializer=normal)
        if num_modalities == 2:
            self.weight_1 = self.create_parameter(shape, dtype="float32", default_initializer=normal)

    def roles(self) -> dict[str, Role]:
        """See DeclaresRoles."""
        return {"weight": Role.ROUTER, "weight_1": Role.ROUTER}

    def components(self) -> dict[str, Component]:
        """See DeclaresRoles."""
        return {"weight_1": Component.VISION_EXPERTS}

    def matrix(self, modality: int) -> paddle.Tensor:
        """The router of a modality: 0 text, 1 vision."""
        return self.weight if modality == 0 else self.weight_1

    def forward(self, x_TD: paddle.Tensor, modality: int = 0) -> paddle.Tensor:
        """[T, D] -> logits [T, E] fp32."""
        return paddle.matmul(x_TD.astype("float32"), self.matrix(modality))
