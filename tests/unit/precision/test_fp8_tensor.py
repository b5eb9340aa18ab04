"""Codes and scales against a reference in float64: every kind of tile, odd sizes, special values."""

import numpy as np
import paddle
import pytest
from support.fp8_reference import factor_of, fp8_values
from support.host_reads import counted

from erniekit.precision.fp8_tensor import Tile, quantise

TILES = {
    "1x128": Tile(1, 128),
    "128x128": Tile(128, 128),
    "128x1": Tile(128, 1),
    "row": Tile(1, None),
    "column": Tile(None, 1),
    "whole": Tile(None, None),
}
EVERY_TILE = pytest.mark.parametrize("tile", TILES.values(), ids=TILES.keys())
FORMS = pytest.mark.parametrize("form", ["e4m3", "e5m2"])


def wild(shape: tuple[int, int]) -> np.ndarray:
    """Values of every size, with rows of zeros, of subnormal, huge and unknown numbers."""
    random = np.random.default_rng(0)
    with np.errstate(over="ignore"):
        x = (random.standard_normal(shape) * np.exp2(random.integers(-30, 30, shape))).astype(np.float32)
    x[1], x[2, :3], x[3] = 0.0, [np.nan, np.inf, -np.inf], 1e-44
    x[4] = np.clip(x[4].astype(np.float64) * 1e30, -3e38, 3e38)
    return x


@EVERY_TILE
@FORMS
@pytest.mark.parametrize("shape", [(5, 7), (130, 300), (128, 256)], ids=str)
def test_powers_of_two_agree_with_float64_bit_for_bit(tile: Tile, form: str, shape: tuple[int, int]):
    x = wild(shape)
    made = quantise(paddle.to_tensor(x), tile, form)
    assert list(made.codes.shape) == list(shape) and made.codes.element_size() == 1
    np.testing.assert_array_equal(made.dequantised().numpy(), fp8_values(x, tile, form).astype(np.float32))
    known = np.isfinite(made.scales.numpy())
    assert known.all() and (np.frexp(made.scales.numpy())[0] == 0.5).all(), "every scale is a power of two"


@EVERY_TILE
def test_other_scales_use_the_whole_range(tile: Tile):
    """fp32 division may differ in its last unit, which can move a value at a tie by one step: 2**-3 relative."""
    x = np.random.default_rng(1).standard_normal((130, 300)).astype(np.float32)
    made = quantise(paddle.to_tensor(x), tile, "e4m3", pow2=False).dequantised().numpy()
    expected = fp8_values(x, tile, pow2=False)
    np.testing.assert_allclose(made, expected, rtol=2.0**-3)
    assert np.isclose(made, expected, rtol=1e-6).mean() > 0.999
    np.testing.assert_allclose(np.abs(made).max(), np.abs(x).max(), rtol=1e-6)


@FORMS
def test_factors_of_every_size_are_rounded_down(form: str):
    """Also where the quotient is a power of two itself: largest magnitudes of 1.75 times a power of two."""
    exact = 1.75 * np.exp2(np.arange(-120.0, 120.0)).astype(np.float32)
    largest = np.concatenate([exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(0))])
    scales = quantise(paddle.to_tensor(largest[:, None]), Tile(1, None), form).scales.numpy()[:, 0]
    np.testing.assert_array_equal(1 / scales.astype(np.float64), [factor_of(value, form, True) for value in largest])


def test_no_value_saturates_or_becomes_nan_by_its_size():
    """The largest value of a tile keeps its relative error below 2**-4, and NaN never becomes 448."""
    x = np.float32([[3e38, -3e38, 1.0], [1e-30, 1.3e-30, -1e-31], [479.0, 463.0, 1.0], [np.nan, 1.0, 2.0]])
    made = quantise(paddle.to_tensor(x), Tile(1, 128)).dequantised().numpy()
    np.testing.assert_allclose(made[:3, :2], x[:3, :2], rtol=2.0**-4)
    assert np.isnan(made[3, 0]) and (made[3, 1:] == [1.0, 2.0]).all()


def test_codes_of_powers_of_two_are_exact_in_bfloat16():
    x = np.random.default_rng(2).standard_normal((64, 256)).astype(np.float32)
    values = quantise(paddle.to_tensor(x), Tile(1, 128)).dequantised()
    np.testing.assert_array_equal(values.astype("bfloat16").astype("float32").numpy(), values.numpy())


def test_the_second_quantisation_of_a_stored_activation_changes_few_values():
    """From tiles along rows to tiles along columns: nearly free with powers of two, not with other scales."""
    x = paddle.to_tensor(np.random.default_rng(3).standard_normal((512, 512)).astype(np.float32))
    changed = {}
    for pow2 in (True, False):
        first = quantise(x, Tile(1, 128), pow2=pow2).dequantised()
        second = quantise(first, Tile(128, 1), pow2=pow2).dequantised()
        changed[pow2] = (first.numpy() != second.numpy()).mean()
    assert changed[True] < 0.04 and changed[False] > 0.5


def test_stacks_and_16_bit_inputs():
    x = np.random.default_rng(4).standard_normal((3, 130, 140)).astype(np.float32)
    whole = quantise(paddle.to_tensor(x), Tile(128, 128)).dequantised().numpy()
    for expert in range(3):
        np.testing.assert_array_equal(whole[expert], fp8_values(x[expert], Tile(128, 128)).astype(np.float32))
    short = paddle.to_tensor(x).astype("bfloat16")
    np.testing.assert_array_equal(
        quantise(short, Tile(1, 128)).dequantised().numpy(),
        quantise(short.astype("float32"), Tile(1, 128)).dequantised().numpy(),
    )


def test_on_another_device_the_host_does_not_look_for_unknown_numbers(monkeypatch: pytest.MonkeyPatch):
    x = paddle.to_tensor(wild((5, 200)))
    expected = quantise(x, Tile(1, 128))
    monkeypatch.setattr(paddle.base.core.Place, "is_cpu_place", lambda _: False)
    with counted() as transfers:
        made = quantise(x, Tile(1, 128)), quantise(paddle.ones([3, 128]), Tile(1, 128))
    assert not transfers.reads
    monkeypatch.undo()
    np.testing.assert_array_equal(made[0].codes.view("uint8").numpy(), expected.codes.view("uint8").numpy())
    np.testing.assert_array_equal(made[0].scales.numpy(), expected.scales.numpy())
    np.testing.assert_array_equal(made[1].dequantised().numpy(), 1.0)
