"""Router losses: each one function, and the only definition of it in this project.

Every function gets real tokens only (padding has been dropped) and returns a sum over tokens, or a value that does not
depend on tokens, so that microbatches and ranks add up to the same number. Legend: T tokens, E experts, K experts of a
token.
"""

import numpy as np
import paddle

from erniekit.moe.layer import RowShare
from erniekit.moe.router import RouterOptions, choose
from erniekit.parallel import comm


def load_balance_loss(
    probs_TE: paddle.Tensor, options: RouterOptions, row_lengths: list[int], share: RowShare | None = None
) -> paddle.Tensor:
    """sum over rows r of n_r * E * sum_e f_re * P_re: f_re = share of row r's n_r tokens that choose expert e by
    the unbiased probabilities (no gradient), P_re = mean probability. Divided by all tokens it is K when balanced.

    Load is counted over each packed row, which no split into microbatches or ranks divides (sequence-wise balance,
    DeepSeek-V3, arXiv 2412.19437, eq. 17-20; Fedus et al. 2021, arXiv 2101.03961, eq. 4, for one row). probs [T, E]
    fp32, `row_lengths` sums to T. `share`: context ranks have parts of the rows, and n_r and f_re are those of the
    whole rows; the values of the ranks add up.
    """
    num_experts = probs_TE.shape[1]
    with paddle.no_grad():
        chosen_TE = paddle.nn.functional.one_hot(choose(probs_TE.detach(), options), num_experts).sum(axis=1)
    total = paddle.zeros([], dtype="float32")
    if share is not None:
        with paddle.no_grad():
            counts = [chosen.sum(axis=0) for chosen in _rows(chosen_TE, row_lengths)]
            loads_RE = paddle.stack(counts) if counts else paddle.zeros([0, num_experts])
            comm.all_reduce_(loads_RE, share.group)
        for probs_row, load, whole in zip(_rows(probs_TE, row_lengths), loads_RE, share.row_lengths, strict=True):
            total = total + (load / whole * probs_row.sum(axis=0)).sum() * num_experts
        return total
    for probs_row, chosen_row in zip(_rows(probs_TE, row_lengths), _rows(chosen_TE, row_lengths), strict=True):
        total = total + (chosen_row.mean(axis=0) * probs_row.sum(axis=0)).sum() * num_experts
    return total


def _rows(x_TE: paddle.Tensor, row_lengths: list[int]) -> list[paddle.Tensor]:
    if 0 in row_lengths:  # context ranks may have none of a row's tokens, and paddle.split refuses that
        ends = np.cumsum(row_lengths).tolist()
        return [x_TE[end - length : end] for end, length in zip(ends, row_lengths, strict=True)]
    return [x_TE] if len(row_lengths) == 1 else paddle.split(x_TE, row_lengths, axis=0)


def router_z_loss(logits_TE: paddle.Tensor) -> paddle.Tensor:
    """sum_t logsumexp(logits_t)^2 (Zoph et al. 2022, arXiv 2202.08906, eq. 5, before its mean). logits [T, E] fp32."""
    return paddle.logsumexp(logits_TE, axis=-1).square().sum()


def router_orthogonal_loss(gate_weight_DE: paddle.Tensor, num_groups: int = 1) -> paddle.Tensor:
    """Mean squared entry of W W^T - I, W [E, D] the experts' gate vectors scaled to length 1; with groups of E /
    num_groups experts, the mean over the groups.

    ERNIE 4.5 technical report, "router orthogonalization loss". It does not depend on tokens.
    """
    unit_ED = paddle.nn.functional.normalize(gate_weight_DE.astype("float32").t(), axis=-1)
    num_experts, size = unit_ED.shape
    grouped = unit_ED.reshape([num_groups, num_experts // num_groups, size])
    gram = paddle.matmul(grouped, grouped, transpose_y=True) - paddle.eye(num_experts // num_groups)
    return gram.square().mean()
