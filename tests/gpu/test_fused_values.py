"""Each fused operator computes what the plain operations beside it compute, as far as the package decides it: which
tensors go in, in which order, and what is made of what comes out. The operators themselves are those of
tests/support/gpu_shapes/reference_kernels.cc.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.worlds import World

Arrays = dict[str, np.ndarray]


def both_ways(run: str, seed: int = 0) -> tuple[Arrays, Arrays, dict[str, int]]:
    """Results and gradients of a function of this module with fused operators and without, and the calls of the first;
    fp32.
    """
    from support import gpu_stand_in

    from erniekit.nn import fused

    gpu_stand_in.start()
    gpu_stand_in.calls.clear()
    with_fused = globals()[run](np.random.default_rng(seed))
    calls = dict(gpu_stand_in.calls)
    fused.enable(False)
    try:
        plain = globals()[run](np.random.default_rng(seed))
    finally:
        fused.enable(True)
    assert dict(gpu_stand_in.calls) == calls, "the plain way called a fused operator"
    return with_fused, plain, calls


def gradients(make: Callable[..., Any], random: np.random.Generator, dtype: str, **arrays: np.ndarray) -> Arrays:
    """The result of make(**tensors) and the gradients of all, against a random gradient of the result."""
    import paddle

    tensors = {name: paddle.to_tensor(array.astype(np.float32)).astype(dtype) for name, array in arrays.items()}
    for tensor in tensors.values():
        tensor.stop_gradient = False
    y = make(**tensors)
    (y * paddle.to_tensor(random.normal(size=y.shape).astype(np.float32)).astype(y.dtype)).sum().backward()
    found = {name: tensor.grad for name, tensor in tensors.items()} | {"y": y}
    return {name: tensor.astype("float32").numpy() for name, tensor in found.items()}


def norm(random: np.random.Generator) -> Arrays:
    from erniekit.nn.norm import rms_norm

    x, w = random.normal(size=(7, 64)), 1 + 0.1 * random.normal(size=64)
    return gradients(lambda x, w: rms_norm(x, w, 1e-5), random, "bfloat16", x=x, w=w)


def norm_in_fp32(random: np.random.Generator) -> Arrays:
    from erniekit.nn.norm import rms_norm

    x, w = random.normal(size=(7, 64)), 1 + 0.1 * random.normal(size=64)
    return gradients(lambda x, w: rms_norm(x, w, 1e-5), random, "float32", x=x, w=w)


def rotation(random: np.random.Generator) -> Arrays:
    """Heads that turn and heads that stay, far from the first token."""
    from erniekit.nn.rotary import Rotary

    turned = Rotary(16, 500000.0).at(np.arange(100_000, 100_009), 3, 2)
    found = gradients(lambda x: turned.apply(x), random, "float32", x=random.normal(size=(9, 5, 16)))
    import paddle

    x = paddle.to_tensor(found["y"])
    return found | {"back": turned.apply(x, inverse=True).numpy()}


def attention(random: np.random.Generator) -> Arrays:
    """Three packed documents, two of which share a prefix's keys, grouped heads."""
    from erniekit.nn.attention import HeadLayout, PackedAttention
    from erniekit.nn.attention_mask import make_plan
    from erniekit.nn.rotary import Rotary

    heads = HeadLayout(4, 2, 16)
    plan = make_plan(np.repeat([0, 1, 2], [5, 9, 7])[None])
    rotation = Rotary(16, 10000.0).at(plan.position_in_document, 6, 2)
    packed = PackedAttention(plan, rotation, heads)
    return gradients(lambda qkv: packed.attend(qkv, 0), random, "bfloat16", qkv=random.normal(size=(21, 128)))


def grouped(random: np.random.Generator) -> Arrays:
    """An expert without rows among them."""
    from erniekit.nn.grouped import grouped_matmul

    rows, weight = random.normal(size=(11, 8)), random.normal(size=(4, 8, 6))
    return gradients(lambda x, w: grouped_matmul(x, w, [3, 0, 6, 2]), random, "bfloat16", x=rows, w=weight)


def _sparse_layer(random: np.random.Generator, capacity: float | None, takes_weights: bool = False) -> Arrays:
    import paddle

    from erniekit.moe.layer import MoELayer, MoESizes, TokenInfo
    from erniekit.moe.router import RouterOptions

    paddle.seed(3)
    paddle.set_default_dtype("bfloat16")
    try:
        layer = MoELayer(MoESizes(16, (8,), 6, 1, False, 0.3), RouterOptions(2, capacity=capacity))
    finally:
        paddle.set_default_dtype("float32")
    layer.experts.takes_weights = takes_weights
    found = gradients(lambda x: layer(x, TokenInfo([13]))[0], random, "bfloat16", x=random.normal(size=(13, 16)))
    return found | {name: p.grad.astype("float32").numpy() for name, p in layer.named_parameters()}


def sparse_layer(random: np.random.Generator) -> Arrays:
    return _sparse_layer(random, None)


def sparse_layer_that_drops(random: np.random.Generator) -> Arrays:
    return _sparse_layer(random, 0.6)


def sparse_layer_whose_experts_weigh(random: np.random.Generator) -> Arrays:
    return _sparse_layer(random, None, takes_weights=True)


def _head(random: np.random.Generator, by_vocab: bool) -> Arrays:
    import paddle

    from erniekit.losses.lm import Head, linear_cross_entropy

    labels = paddle.to_tensor(random.integers(0, 11, 20))
    weight = random.normal(size=(11, 8) if by_vocab else (8, 11))

    def loss(x: Any, w: Any) -> Any:
        return linear_cross_entropy(x, Head(w, by_vocab), labels, paddle.ones([20]) / 20, 6)[0]

    return gradients(loss, random, "bfloat16", x=random.normal(size=(20, 8)), w=weight)


def tied_head(random: np.random.Generator) -> Arrays:
    return _head(random, True)


def untied_head(random: np.random.Generator) -> Arrays:
    return _head(random, False)


# The function, what it must call, and the relative error against the plain way; bfloat16 rounds to 0.004.
CASES: dict[str, tuple[set[str], float]] = {
    "norm": ({"fused_rms_norm_ext"}, 0.006),
    "norm_in_fp32": ({"fused_rms_norm_ext"}, 1e-5),
    "rotation": ({"fused_rotary_position_embedding"}, 1e-5),
    "attention": ({"flashmask_attention", "fused_rotary_position_embedding"}, 0.012),
    "grouped": ({"batched_gemm"}, 1e-6),
    "sparse_layer": ({"moe_permute", "moe_unpermute", "batched_gemm", "swiglu"}, 0.012),
    "sparse_layer_that_drops": ({"moe_permute", "moe_unpermute", "batched_gemm", "swiglu"}, 0.012),
    "sparse_layer_whose_experts_weigh": ({"moe_permute", "moe_unpermute", "batched_gemm", "swiglu"}, 0.012),
    "tied_head": ({"fused_linear_param_grad_add"}, 0.006),
    "untied_head": ({"fused_linear_param_grad_add"}, 0.006),
}


@pytest.mark.parametrize("case", CASES)
def test_fused_is_plain(gpu: World, case: str):
    expected_calls, tolerance = CASES[case]
    ((fused, plain, calls),) = gpu.run(both_ways, run=case)
    assert expected_calls <= calls.keys()
    assert fused.keys() == plain.keys()
    for name, values in fused.items():
        norm = np.linalg.norm(plain[name])
        assert np.linalg.norm(values - plain[name]) <= tolerance * norm, name
        assert norm > 0, name
