"""The loss of a reward model on pairs of answers. Legend: c, r [N], the scores of the chosen and rejected answers."""

import paddle
from paddle.nn import functional

METRICS = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")


def pairwise_loss(
    chosen_N: paddle.Tensor, rejected_N: paddle.Tensor, margins_N: paddle.Tensor | None = None
) -> paddle.Tensor:
    """-log sigmoid(c - r - margin), fp32 [N]: the negative log-likelihood of the choices in the model of Bradley and
    Terry 1952 (Ouyang et al. 2022, arXiv 2203.02155, equation 1), with the margin of Llama 2 (arXiv 2307.09288,
    equation 2).
    """
    difference = chosen_N - rejected_N
    return -functional.log_sigmoid(difference if margins_N is None else difference - margins_N)


def center_loss(chosen_N: paddle.Tensor, rejected_N: paddle.Tensor) -> paddle.Tensor:
    """(c + r)^2, fp32 [N]: keeps scores near 0, which the loss above leaves free (Eisenstein et al. 2023, arXiv
    2312.09244, equation 2).
    """
    return (chosen_N + rejected_N) ** 2


def score_metrics(chosen_N: paddle.Tensor, rejected_N: paddle.Tensor) -> dict[str, paddle.Tensor]:
    """What is reported of pairs, each fp32 [N], without gradient: the scores, their difference (margin), and whether it
    is above 0 (accuracy).
    """
    chosen_N, rejected_N = chosen_N.detach(), rejected_N.detach()
    margin = chosen_N - rejected_N
    values = (chosen_N, rejected_N, margin, (margin > 0).astype("float32"))
    return dict(zip(METRICS, values, strict=True))
