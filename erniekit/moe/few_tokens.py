"""A sparse layer for the few tokens of a decoding step, on a CPU: routing, dispatch and sum in numpy.

Each operation here computes with a few thousand numbers, and starting one of Paddle's takes longer than that. The plain
operations (moe/router.py, moe/dispatch.py) are the reference. There is no backward pass.

Legend: T tokens, D model, E experts, K experts a token, R = T * K rows.
"""

import numpy as np
import paddle

from erniekit.moe.experts import Experts
from erniekit.moe.router import RouterOptions
from erniekit.nn import cpu_ops, decoding


def applies(x_TD: paddle.Tensor) -> bool:
    """Whether this module computes with the tokens of a layer."""
    return decoding.is_running() and cpu_ops.applies(x_TD)


def route(logits_TE: np.ndarray, bias_E: np.ndarray, options: RouterOptions) -> tuple[np.ndarray, np.ndarray]:
    """The experts of each token, int64 [T, K], and their weights, fp32 [T, K]: see moe.router.route."""
    if options.act == "softmax":
        scores = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    else:
        with np.errstate(over="ignore"):  # exp overflows to infinity, and the quotient is the zero that it should be
            scores = 1 / (1 + np.exp(-logits_TE))
    biased, top_k = scores + bias_E, options.top_k
    if options.grouped:
        size = scores.shape[1] // top_k
        experts = biased.reshape(-1, top_k, size).argmax(axis=2) + np.arange(top_k) * size
    else:
        experts = np.argpartition(-biased, top_k - 1, axis=1)[:, :top_k]
    weights = np.take_along_axis(scores, experts, axis=1)
    return experts, weights / np.maximum(weights.sum(axis=1, keepdims=True), np.float32(options.norm_min))


def run(x_TD: paddle.Tensor, experts: Experts, experts_TK: np.ndarray, weights_TK: np.ndarray) -> paddle.Tensor:
    """The weighted sum of each token's experts [T, D]."""
    (num_tokens, top_k), width = experts_TK.shape, x_TD.shape[1]
    chosen = experts_TK.reshape(-1)
    order = np.argsort(chosen, kind="stable")
    num_experts = experts.up_gate_proj.weight_shape[0]
    counts = np.bincount(chosen, minlength=num_experts).tolist()
    rows, of_rows = paddle.empty([len(order), width], dtype=x_TD.dtype), weights_TK.reshape(-1, 1)[order]
    np.take(np.from_dlpack(x_TD), order // top_k, axis=0, out=np.from_dlpack(rows))
    made: np.ndarray
    if experts.takes_weights:
        made = np.from_dlpack(experts(rows, counts, paddle.to_tensor(of_rows)))
    else:
        made = np.from_dlpack(experts(rows, counts))
        np.multiply(made, of_rows, out=made)
    row_of_pair = np.empty(len(order), np.int64)
    row_of_pair[order] = np.arange(len(order))
    out = paddle.empty([num_tokens, width], dtype=x_TD.dtype)
    total: np.ndarray = np.from_dlpack(out)
    np.take(made, row_of_pair[::top_k], axis=0, out=total)
    for choice in range(1, top_k):
        np.add(total, made[row_of_pair[choice::top_k]], out=total)
    return out
