"""Codes of quantised files: published error bounds, scales as stored, tiles of zeros, and the formats' own numbers."""

from collections.abc import Callable

import numpy as np
import pytest

from erniekit.precision.codes import (
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_TENSOR,
    CodeSpec,
    choose_scales,
    decode,
    encode,
    fp32_to_e4m3,
    full_range,
    quantise,
    squared_error,
    symmetric,
)
from erniekit.precision.rounding import round_to

INT4_GROUP128 = full_range(4, 128)
SPECS = {
    "int8": full_range(8),
    "int8 +-127": symmetric(8),
    "int4": full_range(4),
    "int4 +-7": symmetric(4),
    "int4 g128": INT4_GROUP128,
    "int4 g128 +-7": symmetric(4, 128),
    "int4 g64": full_range(4, 64),
    "int4 g32": full_range(4, 32),
    "fp8 tensor": FP8_TENSOR,
    "fp8 channel": FP8_CHANNEL,
    "fp8 block": FP8_BLOCK,
}
BY_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def error(weight: np.ndarray, spec: CodeSpec, search: bool = False, importance: np.ndarray | None = None) -> float:
    """|W' - W| / |W|."""
    scales = choose_scales(weight, spec, search, importance)
    back = decode(encode(weight, scales, spec), scales, spec)
    size = 1 if importance is None else np.sqrt(importance)
    return float(np.linalg.norm((back - weight) * size) / np.linalg.norm(weight * size))


@pytest.mark.parametrize(
    ("name", "search", "percent"),
    [
        ("int8", False, 0.84),
        ("int8 +-127", False, 0.84),
        ("int4 +-7", False, 15.2),
        ("int4", False, 14.2),
        ("int4", True, 10.9),
        ("int4 g128 +-7", False, 11.7),
        ("int4 g128", False, 11.1),
        ("int4 g128", True, 10.1),
        ("int4 g64", False, 10.3),
        ("int4 g64", True, 9.5),
        ("int4 g32", False, 9.5),
        ("int4 g32", True, 8.8),
        ("fp8 tensor", False, 2.64),
        ("fp8 channel", False, 2.64),
        ("fp8 block", False, 2.64),
    ],
)
def test_error_on_unit_normal_weights(name: str, search: bool, percent: float):
    """2560 inputs, 256 outputs. The numbers of a wider sample, which a draw of this size reproduces within 2 %."""
    weight = np.random.default_rng(0).normal(size=(256, 2560)).astype(np.float32)
    assert 100 * error(weight, SPECS[name], search) == pytest.approx(percent, rel=0.02)


@BY_SPEC
def test_codes_are_the_nearest_ones_to_the_stored_scale(spec: CodeSpec):
    """In float64: no code of the format is nearer to w / scale. 1e-6 of a step: w / scale is rounded to fp32."""
    weight = np.random.default_rng(1).normal(size=(200, 300)).astype(np.float32)
    scales = choose_scales(weight, spec)
    if spec.scale_type == "bf16":
        assert (round_to(scales, "bf16") == scales).all()
    codes = encode(weight, scales, spec)
    rows, columns = spec.tile(weight.shape)
    wide = np.repeat(np.repeat(scales, rows, axis=0), columns, axis=1)[:200, :300].astype(np.float64)
    if spec.kind == "int":
        levels = np.arange(spec.lowest, spec.largest + 1)
    else:
        levels = decode(np.arange(256, dtype=np.uint8)[None], np.ones((1, 1), np.float32), FP8_TENSOR)[0]
        levels = levels[np.isfinite(levels)]
    chosen = decode(codes, np.ones_like(scales), spec)
    for row in range(0, 200, 40):
        exact = weight[row] / wide[row]
        least = np.abs(levels[:, None] - exact).min(axis=0)
        assert (np.abs(chosen[row] - exact) <= least * (1 + 1e-6) + 1e-6).all()
    np.testing.assert_allclose(decode(codes, scales, spec), chosen * wide, rtol=1e-7)  # one rounding to fp32


@BY_SPEC
def test_zeros_have_scale_one_and_tiny_weights_no_nan(spec: CodeSpec):
    weight = np.zeros((128, 256), np.float32)
    scales = choose_scales(weight, spec, search=not spec.whole)
    assert (scales == 1).all() and not encode(weight, scales, spec).any()
    weight[3, 5] = 1e-45
    scales = choose_scales(weight, spec)
    assert np.isfinite(decode(encode(weight, scales, spec), scales, spec)).all()


@BY_SPEC
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_an_error(spec: CodeSpec, bad: float):
    weight = np.ones((130, 140), np.float32)
    weight[129, 139] = bad
    with pytest.raises(ValueError, match="not finite"):
        choose_scales(weight, spec)


@BY_SPEC
def test_parts_of_a_large_matrix_do_not_change_codes(spec: CodeSpec, monkeypatch: pytest.MonkeyPatch):
    """Codes do not depend on the number of weights a step; a matrix whose sizes are no multiples of a tile."""
    weight = np.random.default_rng(2).normal(size=(391, 330)).astype(np.float32)
    scales = choose_scales(weight, spec)
    codes, back = encode(weight, scales, spec), decode(encode(weight, scales, spec), scales, spec)
    monkeypatch.setattr("erniekit.precision.codes._BLOCK", 1000)
    assert (choose_scales(weight, spec) == scales).all()
    assert (encode(weight, scales, spec) == codes).all()
    assert (decode(codes, scales, spec) == back).all()


def test_every_e4m3_number_and_what_lies_between():
    """Bytes agree with precision.rounding, which is compared with ml-dtypes' numbers in its own test."""
    values = decode(np.arange(256, dtype=np.uint8)[None], np.ones((1, 1), np.float32), FP8_TENSOR)[0]
    finite = np.isfinite(values)
    assert finite.sum() == 254 and values[finite].max() == 448 and values[1] == 2.0**-9
    assert (fp32_to_e4m3(values[finite]) == np.arange(256)[finite]).all()
    ordered = np.unique(values[finite])
    middles = (ordered[1:] + ordered[:-1]) / 2
    random = np.random.default_rng(3).normal(size=4000) * np.exp2(np.random.default_rng(4).uniform(-14, 8, 4000))
    wanted = np.clip(np.concatenate([middles, np.nextafter(middles, 500, dtype=np.float32), random]), -448, 448)
    back = values[fp32_to_e4m3(wanted.astype(np.float32))]
    np.testing.assert_array_equal(back, round_to(wanted.astype(np.float32), "e4m3"))


def test_importance_moves_the_error_to_inputs_that_matter_less():
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(64, 256)).astype(np.float32)
    importance = np.exp2(rng.uniform(-6, 6, 256)).astype(np.float32)
    plain = choose_scales(weight, INT4_GROUP128, search=True)
    back = decode(encode(weight, plain, INT4_GROUP128), plain, INT4_GROUP128)
    without = np.linalg.norm((back - weight) * np.sqrt(importance)) / np.linalg.norm(weight * np.sqrt(importance))
    assert error(weight, INT4_GROUP128, True, importance) < 0.97 * without


@pytest.mark.parametrize("size", [1e-24, 1.0, 1e25])
def test_the_error_of_weights_whose_squares_fp32_cannot_hold(size: float):
    weight = (np.random.default_rng(8).normal(size=(8, 128)) * size).astype(np.float32)
    spec = full_range(8)
    codes, scales = quantise(weight, spec)
    exact = decode(codes, scales, spec).astype(np.float64) - weight
    found = squared_error(weight, codes, scales, spec)
    expected = np.square(exact).sum(), np.square(weight, dtype=np.float64).sum()
    assert found == pytest.approx(expected, rel=1e-4, abs=0)


def test_asymmetric_codes_of_other_tools():
    """(code - zero) * scale: (3 - 2) / 2, (15 - 2) / 2; (1 - 4) * 3."""
    spec = full_range(4)
    codes = np.array([[3, 15], [1, 4]], np.int8)
    back = decode(codes, np.array([[0.5], [3.0]], np.float32), spec, zeros=np.array([[2], [4]]))
    assert back.tolist() == [[0.5, 6.5], [-9.0, 0.0]]


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("make", [full_range, symmetric])
def test_candidates_that_are_left_out_of_the_search_cannot_win(make: Callable[[int, int], CodeSpec], group: int):
    """The scales are those of a search that tries every candidate for every group: with weights that all count the
    same, which is the other way through the code. Normal weights, weights with few large ones, and zeros.
    """
    rng = np.random.default_rng(6)
    weight = np.concatenate([rng.normal(size=(40, 384)), rng.standard_t(2, (40, 384)), np.zeros((2, 384))])
    weight = weight.astype(np.float32)
    weight[:20] = round_to(weight[:20], "bf16")
    every = choose_scales(weight, make(4, group), True, importance=np.ones(384, np.float32))
    np.testing.assert_array_equal(choose_scales(weight, make(4, group), True), every)
