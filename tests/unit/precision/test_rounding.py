"""Rounding to 16 and 8 bits: against a list of all values of a format, ml_dtypes, torch, and stored digests."""

import hashlib

import numpy as np
import pytest

from erniekit.precision.rounding import FORMATS, round_to
from erniekit.utils.bfloat16 import bf16_to_fp32

NAMES = pytest.mark.parametrize("name", list(FORMATS))
# All values that 16 bits can hold, in two ways: 65,536 bfloat16 patterns and 65,536 float16 patterns.
PATTERNS = np.concatenate(
    [
        bf16_to_fp32(np.arange(1 << 16, dtype=np.uint16)),
        np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32),
    ]
)
# SHA-256 of round_to(PATTERNS, name) with NaN replaced by 12345, made with ml_dtypes 0.6.0 (values clipped first for
# the 8-bit formats); test_agrees_with_ml_dtypes computes the same where the library is installed.
DIGESTS = {
    "bf16": "a7767f71c3062930bc1a7b4c806b02c2917e9b2f4b32199b8bc6ca0989a62b03",
    "fp16": "5c7e80ec4add8327095c8d1c52597e965ffdd72bb370f226c5e35f57df8af666",
    "e4m3": "02208c01bce3e7e53290dabdf40bd86a3f4e6a6b9e96a7cf015502d3da1e9b40",
    "e5m2": "2af86bdf353180bf3f0ee1343b1485e68022cc6953b6e81e0ec0a0c5e584d222",
}


def all_values(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(the non-negative finite values of a format in ascending order, whether the mantissa of each is even), from the
    definition of its bits; and one step beyond the largest, which stands for overflow.
    """
    form = FORMATS[name]
    per_binade = 1 << form.mantissa_bits
    values, code = [], 0
    while True:
        binade, mantissa = divmod(code, per_binade)
        if binade == 0:
            value = mantissa * 2.0 ** (form.min_exponent - form.mantissa_bits)
        else:
            value = (per_binade + mantissa) * 2.0 ** (form.min_exponent + binade - 1 - form.mantissa_bits)
        values.append(value)
        if value > form.largest:
            return np.array(values), np.arange(len(values)) % 2 == 0
        code += 1


def nearest(values: np.ndarray, name: str) -> np.ndarray:
    """An independent oracle in float64: the nearest of all values, ties to the even mantissa."""
    grid, even = all_values(name)
    with np.errstate(invalid="ignore"):  # signalling NaN
        wide = values.astype(np.float64)
    size = np.abs(wide)
    finite = np.where(np.isfinite(size), np.minimum(size, grid[-1]), grid[-1])
    above = np.clip(np.searchsorted(grid, finite), 1, len(grid) - 1)
    to_low, to_high = finite - grid[above - 1], grid[above] - finite
    take_low = (to_low < to_high) | ((to_low == to_high) & even[above - 1])
    rounded = np.where(take_low, grid[above - 1], grid[above])
    rounded[rounded > FORMATS[name].largest] = FORMATS[name].largest if FORMATS[name].saturates else np.inf
    return np.where(np.isnan(wide), np.nan, np.copysign(rounded, wide)).astype(np.float32)


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal bit for bit, signs of zeros included; any NaN equals any other."""
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    known = ~np.isnan(ours)
    np.testing.assert_array_equal(ours[known].view(np.uint32), theirs[known].view(np.uint32))


@NAMES
def test_every_16_bit_pattern_goes_to_the_nearest_value(name: str):
    assert_same(round_to(PATTERNS, name), nearest(PATTERNS, name))


@NAMES
def test_every_16_bit_pattern_has_the_digest_of_ml_dtypes(name: str):
    rounded = round_to(PATTERNS, name)
    stored = np.where(np.isnan(rounded), np.float32(12345), rounded)
    assert hashlib.sha256(stored.tobytes()).hexdigest() == DIGESTS[name]


@NAMES
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_beside_each_tie_go_to_their_own_side(name: str, dtype: type):
    """All midpoints of neighbours, and the numbers just below and above them in float32 or float64."""
    grid, _ = all_values(name)
    middle = ((grid[1:] + grid[:-1]) / 2).astype(dtype)
    values = np.concatenate([middle, np.nextafter(middle, dtype(0)), np.nextafter(middle, dtype(np.inf))])
    both = np.concatenate([values, -values])
    assert_same(round_to(both, name), nearest(both, name))


@pytest.mark.parametrize(("name", "largest"), [("e4m3", 448.0), ("e5m2", 57344.0)])
def test_8_bits_saturate_and_keep_nan(name: str, largest: float):
    """Paddle's own casts make 470 a NaN and NaN 448."""
    beyond = np.array([448, 464, 470, 488, 1e5, 1e36, np.inf], np.float32) * np.float32(largest / 448)
    np.testing.assert_array_equal(round_to(beyond, name), np.float32(largest))
    np.testing.assert_array_equal(round_to(-beyond, name), np.float32(-largest))
    assert np.isnan(round_to(np.array([np.nan, -np.nan], np.float32), name)).all()


def test_16_bits_overflow_to_infinity():
    values = np.array([65519.0, 65520.0, -1e30], np.float32)
    np.testing.assert_array_equal(round_to(values, "fp16"), np.array([65504, np.inf, -np.inf], np.float32))
    large = np.array([np.finfo(np.float32).max], np.float32)
    np.testing.assert_array_equal(round_to(large, "bf16"), np.array([np.inf], np.float32))


def test_float64_is_rounded_once():
    """By way of float32, 1 + 2**-8 + 2**-40 would lose its last bit and become a tie."""
    value = np.array([1 + 2.0**-8 + 2.0**-40])
    np.testing.assert_array_equal(round_to(value, "bf16"), np.float32(1 + 2.0**-7))


def test_shapes_strides_and_narrow_inputs_are_kept_and_integers_refused():
    values = np.arange(12, dtype=np.float16).reshape(3, 4).T
    for name in FORMATS:
        np.testing.assert_array_equal(round_to(values, name), round_to(np.ascontiguousarray(values), name))
        assert round_to(np.zeros((0, 3), np.float32), name).shape == (0, 3)
        assert round_to(np.float32(3.0).reshape(()), name).shape == ()
    with pytest.raises(TypeError, match="int64"):
        round_to(np.arange(3), "e4m3")


@NAMES
def test_agrees_with_ml_dtypes(name: str):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kinds = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "e4m3": ml_dtypes.float8_e4m3fn}
    kind = kinds.get(name, ml_dtypes.float8_e5m2)
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    for values in (PATTERNS, bits.view(np.float32)):
        inside = np.clip(values, -FORMATS[name].largest, FORMATS[name].largest) if FORMATS[name].saturates else values
        with np.errstate(over="ignore", invalid="ignore"):
            theirs = inside.astype(kind).astype(np.float32)
        assert_same(round_to(values, name), theirs)


@pytest.mark.parity
@NAMES
def test_agrees_with_torch(name: str):
    torch = pytest.importorskip("torch")
    kinds = {"bf16": "bfloat16", "fp16": "float16", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
    inside = PATTERNS
    if FORMATS[name].saturates:
        inside = np.clip(PATTERNS, -FORMATS[name].largest, FORMATS[name].largest)
    theirs = torch.from_numpy(inside).to(getattr(torch, kinds[name])).to(torch.float32).numpy()
    assert_same(round_to(PATTERNS, name), theirs)
