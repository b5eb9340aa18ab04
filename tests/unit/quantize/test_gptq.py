"""GPTQ against its definition: a loop over columns in float64 with the inverse of H, as the paper has it."""

import numpy as np
import pytest

from erniekit.precision.codes import FP8_BLOCK, choose_scales, decode, encode, full_range, symmetric
from erniekit.quantize.gptq import factorise, gptq

INT8, INT4, INT4_GROUPS = symmetric(8), symmetric(4), full_range(4, group=16)


def correlated(num_tokens, num_in, seed=0):
    """Inputs with correlations and some large channels, as hidden states have them."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(num_tokens, num_in // 4)) @ rng.normal(size=(num_in // 4, num_in))
    return (mixed + 0.3 * rng.normal(size=mixed.shape)) * rng.lognormal(0, 1, num_in)


def naive(weight, hessian, scales, spec, damping, act_order):
    """The paper's algorithm 1, one column at a time in float64, by updates of the inverse after each (eq. 2 and 3)."""
    weight, hessian = weight.astype(np.float64), hessian.astype(np.float64)
    size = len(hessian)
    dead = np.diagonal(hessian) <= 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian = hessian + damping * np.diagonal(hessian).mean() * np.eye(size)
    order = np.argsort(-np.diagonal(hessian), kind="stable") if act_order else np.arange(size)
    tile_out, tile_in = spec.tile(weight.shape)
    rounded, left = np.zeros_like(weight), list(order)
    while left:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        column = left[0]
        step = np.repeat(scales[:, column // tile_in], tile_out)[: len(weight)].astype(np.float64)
        rounded[:, column] = np.clip(np.rint(weight[:, column] / step), spec.lowest, spec.largest) * step
        error = (weight[:, column] - rounded[:, column]) / inverse[0, 0]
        weight[:, left] -= np.outer(error, inverse[0])
        left = left[1:]
    return rounded


@pytest.mark.parametrize("spec", [INT8, INT4, INT4_GROUPS, FP8_BLOCK], ids=["int8", "int4", "group", "fp8"])
def test_equals_round_to_nearest_without_correlations(spec):
    weight = np.random.default_rng(1).normal(size=(40, 96)).astype(np.float32)
    scales = choose_scales(weight, spec)
    for act_order in (True, False):
        codes = gptq(weight, factorise(np.eye(96), act_order=act_order), scales, spec)
        np.testing.assert_array_equal(codes, encode(weight, scales, spec))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("spec", [INT4, INT4_GROUPS], ids=["channel", "group"])
def test_equals_the_loop_over_columns(spec, act_order):
    """150 inputs: more than two blocks. In float64 both orders of summation choose the same codes."""
    rng = np.random.default_rng(2)
    weight, inputs = rng.normal(size=(24, 150)), correlated(400, 150)
    inputs[:, [3, 77]] = 0  # dead
    hessian = inputs.T @ inputs
    scales = choose_scales(weight, spec)
    codes = gptq(weight, factorise(hessian.copy(), 0.01, act_order), scales, spec)
    expected = naive(weight, hessian, scales, spec, 0.01, act_order)
    np.testing.assert_allclose(decode(codes, scales, spec), expected, rtol=1e-6, atol=0)
    assert not codes[:, [3, 77]].any()


@pytest.mark.parametrize("spec", [INT8, INT4, INT4_GROUPS, FP8_BLOCK], ids=["int8", "int4", "group", "fp8"])
def test_outputs_are_nearer_than_by_rounding(spec):
    weight = np.random.default_rng(3).normal(size=(64, 128)).astype(np.float32)
    inputs = correlated(512, 128)
    scales = choose_scales(weight, spec)

    def error(codes):
        return np.linalg.norm(inputs @ (decode(codes, scales, spec) - weight).T)

    compensated = error(gptq(weight, factorise(inputs.T @ inputs), scales, spec))
    assert compensated < 0.7 * error(encode(weight, scales, spec))


def test_damping_grows_until_the_factor_exists():
    inputs = correlated(8, 64)
    hessian = inputs.T @ inputs - 30 * np.eye(64)  # not positive definite with 1 %
    factor = factorise(hessian)
    assert factor is not None and factor.damping > 0.01
    assert factorise(np.zeros((8, 8))) is None
    with pytest.raises(ValueError, match="not finite"):
        factorise(np.full((4, 4), np.nan))
