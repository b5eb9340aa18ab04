"""The fused dispatch (moe_permute, moe_unpermute) where the experts are sharded over two ranks: outputs and gradients
are those of one process with plain operations. The operators are of tests/support/gpu_shapes/reference_kernels.cc,
and the rows travel over TCP: nothing here is NCCL's.
"""

from typing import Any

import numpy as np
import pytest
from support.worlds import World

Arrays = dict[str, np.ndarray]
TOKENS = (13, 9)  # of each data rank
SIZE, WIDTH, EXPERTS = 16, 8, 6
# bfloat16 rounds to 0.004: as for the sparse layer in one process (test_fused_values.py).
TOLERANCE = 0.012
CASES = {
    "expert ranks": ({"data": 2, "expert": 2}, {}),
    "expert ranks that drop": ({"data": 2, "expert": 2}, {"capacity": 0.6}),
    "expert ranks whose experts weigh": ({"data": 2, "expert": 2}, {"takes_weights": True}),
    "tensor ranks": ({"tensor": 2}, {}),
}


def values(random: np.random.Generator) -> Arrays:
    """The whole layer's weights, by the names of its parameters, and all tokens with the gradient of their outputs."""
    shapes = {
        "gate.weight": (SIZE, EXPERTS),
        "experts.up_gate_proj.weight": (EXPERTS, SIZE, 2 * WIDTH),
        "experts.down_proj.weight": (EXPERTS, WIDTH, SIZE),
        "x": (sum(TOKENS), SIZE),
        "dy": (sum(TOKENS), SIZE),
    }
    return {name: random.normal(size=shape) * (0.3 if "." in name else 1.0) for name, shape in shapes.items()}


def forward_backward(
    whole: Arrays, rows: slice, row_lengths: list[int], ranks: Any, begin: int, held: int, options: dict[str, Any]
) -> Arrays:
    """The layer with `held` experts from `begin` on, over these rows: its output and all gradients."""
    import paddle

    from erniekit.moe.layer import MoELayer, MoESizes, TokenInfo
    from erniekit.moe.router import RouterOptions

    paddle.set_default_dtype("bfloat16")
    try:
        sizes = MoESizes(SIZE, (WIDTH,), EXPERTS, 0, False, 0.3, expert_shares=EXPERTS // held)
        layer = MoELayer(sizes, RouterOptions(2, capacity=options.get("capacity")))
    finally:
        paddle.set_default_dtype("float32")
    layer.experts.takes_weights = options.get("takes_weights", False)
    layer.ranks = ranks
    for name, parameter in layer.named_parameters():
        value = whole[name][begin : begin + held] if name.startswith("experts.") else whole[name]
        parameter.set_value(paddle.to_tensor(value.astype(np.float32)).astype(parameter.dtype))
    x, dy = (paddle.to_tensor(whole[name][rows].astype(np.float32)).astype("bfloat16") for name in ("x", "dy"))
    x.stop_gradient = False
    y = layer(x, TokenInfo(row_lengths))[0]
    (y * dy).sum().backward()
    found = {"y": y, "dx": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    return {name: tensor.astype("float32").numpy() for name, tensor in found.items()}


def sharded_and_whole(degrees: dict[str, int], options: dict[str, Any]) -> tuple[Arrays, Arrays, dict[str, int]]:
    """This rank's share with fused operators, the whole layer with plain ones, and the calls of the first."""
    from support import gpu_stand_in

    from erniekit.moe.all_to_all import ExpertRanks
    from erniekit.nn import fused
    from erniekit.parallel.mesh import ParallelDims, build_mesh

    gpu_stand_in.start()
    mesh = build_mesh(ParallelDims(**degrees))
    whole = values(np.random.default_rng(0))
    bounds = np.cumsum([0, *TOKENS])
    rows = slice(bounds[mesh.data], bounds[mesh.data + 1]) if mesh.degrees.data == 2 else slice(None)
    held, lengths = EXPERTS // 2, [TOKENS[mesh.data]] if mesh.degrees.data == 2 else list(TOKENS)
    ranks = ExpertRanks(mesh.tensor_group, mesh.expert_group)
    gpu_stand_in.calls.clear()
    shard = forward_backward(whole, rows, lengths, ranks, mesh.rank * held, held, options)
    calls = dict(gpu_stand_in.calls)
    fused.enable(False)
    try:
        plain = forward_backward(whole, slice(None), list(TOKENS), None, 0, EXPERTS, options)
    finally:
        fused.enable(True)
    return shard, plain, calls


def joined(first: Arrays, second: Arrays, divides_tokens: bool) -> Arrays:
    """The whole layer's arrays from two ranks': experts side by side; tokens, too, and the router's gradients added,
    where the ranks have different tokens.
    """
    together = {name: np.concatenate([first[name], second[name]]) for name in first if name.startswith("experts.")}
    for name in first.keys() - together.keys():
        if not divides_tokens:
            np.testing.assert_array_equal(first[name], second[name], name)
            together[name] = first[name]
        elif name in ("y", "dx"):
            together[name] = np.concatenate([first[name], second[name]])
        else:
            together[name] = first[name] + second[name]
    return together


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_does(gpu_ranks: World, case: str):
    degrees, options = CASES[case]
    results = gpu_ranks.run(sharded_and_whole, degrees=degrees, options=options)
    for _, _, calls in results:  # forward, and the adjoint of the other one in the backward pass
        assert calls["moe_permute"] == calls["moe_unpermute"] == 2, calls
    (first, plain, _), (second, _, _) = results
    found = joined(first, second, "data" in degrees)
    assert found.keys() == plain.keys()
    for name, expected in plain.items():
        norm = np.linalg.norm(expected)
        assert norm > 0, name
        assert np.linalg.norm(found[name] - expected) <= TOLERANCE * norm, name
