"""Codes and scales: bounds, layout, and agreement with published levels and Paddle's own quantiser."""

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from paddle.nn.quant import weight_quantize

from erniekit.precision.weight_only import INT4, INT8, NF4, Scheme, dequantise, pack, quantise, unpack

SCHEMES = pytest.mark.parametrize("scheme", [INT8, INT4, NF4], ids=lambda scheme: scheme.name)
# bitsandbytes' table, as printed in its documentation.
PUBLISHED_NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def matrices() -> st.SearchStrategy[np.ndarray]:
    """Every finite float32, tiny and huge ones beside one another, in sizes with short last groups."""
    shape = st.tuples(st.integers(1, 150), st.integers(1, 4))
    values = st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False) | st.floats(
        -1, 1, width=32, allow_subnormal=False
    )
    return shape.flatmap(lambda size: arrays.arrays(np.float32, size, elements=values))


@SCHEMES
@settings(max_examples=40, deadline=None)
@given(weight=matrices())
def test_each_weight_is_within_half_a_gap_of_itself(scheme: Scheme, weight: np.ndarray):
    """Rounding to the nearest level moves a weight by at most half the widest gap, in scales. fp32 arithmetic adds a
    few units in the last place of the group's largest weight, and the smallest numbers (below 1e-37) lose bits.
    """
    codes, scales = quantise(weight, scheme)
    back = dequantise(codes, scales, scheme, weight.shape[0])
    half_gap = np.diff(scheme.levels).max() / 2
    for channel in range(weight.shape[1]):
        step = np.repeat(scales[channel], scheme.group or weight.shape[0])[: weight.shape[0]].astype(np.float64)
        rounding = step * (half_gap + 1e-6 * scheme.levels[-1]) + 1e-37
        assert (np.abs(back[:, channel].astype(np.float64) - weight[:, channel]) <= rounding).all()


@SCHEMES
def test_the_largest_of_a_group_is_kept_and_what_is_held_already_stays(scheme: Scheme):
    weight = np.random.default_rng(0).normal(size=(130, 5)).astype(np.float32)
    once = dequantise(*quantise(weight, scheme), scheme, 130)
    for begin in range(0, 130, scheme.group or 130):
        group, back = (array[begin : begin + (scheme.group or 130)] for array in (weight, once))
        largest = np.abs(group).argmax(axis=0), np.arange(5)
        np.testing.assert_allclose(back[largest], group[largest], rtol=1e-6)
    np.testing.assert_allclose(dequantise(*quantise(once, scheme), scheme, 130), once, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("scheme", "expected"), [(INT8, 0.0083), (INT4, 0.108), (NF4, 0.092)])
def test_error_on_normal_weights(scheme: Scheme, expected: float):
    """|W' - W| / |W| of a normal 2048 x 256 matrix, as stated in the documentation. int8: a channel's largest is 3.5
    sigma, so that the step is 3.5 / 127 and the error its 1 / sqrt(12); int4: 2.6 sigma of 64, step 2.6 / 7.
    """
    weight = np.random.default_rng(0).normal(size=(2048, 256)).astype(np.float32)
    error = np.linalg.norm(dequantise(*quantise(weight, scheme), scheme, 2048) - weight) / np.linalg.norm(weight)
    assert error == pytest.approx(expected, rel=0.02)


def test_nf4_levels_are_the_published_ones():
    """Both are rounded to fp32 on the way, hence 2e-7."""
    np.testing.assert_allclose(NF4.levels, PUBLISHED_NF4, atol=2e-7)


def test_layout():
    """Channel by channel, even inputs in the low halves."""
    assert unpack(np.array([[0x21, 0x43]], np.uint8), 4).tolist() == [[1, 2, 3, 4]]
    assert pack(np.array([[1, 2, 3]])).tolist() == [[0x21, 0x03]]
    codes, scales = quantise(np.array([[7.0, 0.0], [-1.0, 3.5], [0.4, -3.5]], np.float32), INT4)
    assert codes.tolist() == [[0x7F, 0x08], [0xF8, 0x01]]  # 7, -1, 0 and, in steps of a half, 0, 7, -7; each plus 8
    np.testing.assert_allclose(scales, [[1.0], [0.5]], rtol=1e-7)
    codes, scales = quantise(np.array([[127.0, 0.0], [-3.4, -1.0]], np.float32), INT8)
    assert codes.tolist() == [[127, -3], [0, -127]]
    np.testing.assert_allclose(scales, [[1.0], [1 / 127]], rtol=1e-7)


@given(st.lists(st.integers(0, 15), min_size=1, max_size=9))
def test_packing_loses_nothing(codes: list[int]):
    assert unpack(pack(np.array(codes)), len(codes)).tolist() == codes


@SCHEMES
def test_sizes(scheme: Scheme):
    codes, scales = quantise(np.ones((131, 6), np.float32), scheme)
    assert codes.shape == (6, scheme.width(131)) and scales.shape == (6, scheme.groups(131))
    assert scheme.num_bytes(131, 6) == codes.nbytes + scales.nbytes


@SCHEMES
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(scheme: Scheme, bad: float):
    weight = np.ones((130, 3), np.float32)
    weight[129, 1] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantise(weight, scheme)


@pytest.mark.parametrize("scheme", [INT8, INT4], ids=lambda scheme: scheme.name)
def test_scales_and_codes_are_those_of_paddles_kernels(scheme: Scheme):
    """Paddle's quantiser runs on a CPU too, in the layout of its GPU kernels: channels' codes are permuted and, for
    int8, shifted by 128. Its scales are bfloat16, hence a relative 2^-8, and a code at a border may differ by one.
    """
    weight = paddle.to_tensor(np.random.default_rng(0).normal(size=(128, 48)).astype(np.float32)).astype("bfloat16")
    group = scheme.group or -1
    theirs, their_scales = weight_quantize(weight, algo=f"weight_only_int{scheme.bits}", arch=80, group_size=group)
    codes, scales = quantise(weight.astype("float32").numpy(), scheme)
    their_scales = their_scales.astype("float32").numpy().reshape(-1, 48).T
    np.testing.assert_allclose(their_scales, scales, rtol=2**-8)
    if scheme is INT8:
        shifted = theirs.numpy().view(np.uint8).astype(int) - 128
        assert np.abs(np.sort(shifted, axis=None) - np.sort(codes.astype(int), axis=None)).max() <= 1
