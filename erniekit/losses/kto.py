"""The loss of answers that are judged one by one, good or bad (KTO)."""

import paddle
from paddle.nn import functional as F


def kto_loss(
    log_ratios: paddle.Tensor,
    is_good: paddle.Tensor,
    kl: paddle.Tensor | float,
    *,
    loss_type: str,
    beta: float,
    good_weight: float,
    bad_weight: float,
) -> paddle.Tensor:
    """The loss of each judged answer [N], fp32.

    kto (Ethayarajh et al. 2024, arXiv 2402.01306, equation 8, without the constant): with h = log p(y|x) - log
    p_ref(y|x), good_weight * (1 - sigmoid(beta (h - kl))) of a good answer, bad_weight * (1 - sigmoid(beta (kl - h)))
    of a bad one. apo_zero_unpaired (D'Oosterlinck et al. 2024, arXiv 2408.06266, as TRL has it for judged answers): the
    same with kl = 0.

    Args:
        log_ratios: h of each answer, fp32 [N].
        is_good: bool [N].
        kl: the estimate of the divergence from the reference, at least 0; a constant without gradient.
    """
    baseline = 0.0 if loss_type == "apo_zero_unpaired" else kl
    margin = beta * (log_ratios - baseline)
    losses = F.sigmoid(paddle.where(is_good, -margin, margin))  # 1 - sigmoid(x) = sigmoid(-x)
    weights = paddle.where(is_good, paddle.full([], good_weight), paddle.full([], bad_weight))
    return losses * weights
