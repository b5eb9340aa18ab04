"""The optimizer's moments in 8 and 4 bits: bounds of the error, bytes, and what cannot be coded."""

import numpy as np
import pytest

from erniekit.training.moment_codes import CODES, Rounding
from erniekit.utils.errors import CheckpointError

SHAPE = (3, 70, 8)  # 70 inputs: two groups of 32 and one of 6


def moments(seed=0, spread=1.5):
    """Moments whose gradients differ by orders of magnitude, some never touched: fp32."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(size=SHAPE) * spread) * 1e-4
    first, second = size * rng.normal(size=SHAPE), size**2
    first[:, :, 3], second[:, :, 3] = 0, 0  # an output without gradients
    first[0, 5], second[0, 5] = 0, 0  # an input without gradients, such as an unseen token
    return first.astype(np.float32), second.astype(np.float32)


def groups(array, size):
    """[..., inputs, outputs] as a list of its groups of inputs."""
    return [array[..., begin : begin + size, :] for begin in range(0, array.shape[-2], size)]


@pytest.mark.parametrize(("stage", "size"), [("O1", 70), ("O2", 32)])
def test_errors_stay_within_half_a_step(stage, size):
    """Of the ratio half a step of its scale, largest / 127 (7); of the second moment's root half a step of the
    logarithm, range / 254 (14). 1e-5 is fp32's rounding on the way.
    """
    code, (first, second) = CODES[stage], moments()
    decoded = code.decode(code.encode("w", first, second, Rounding()))
    np.testing.assert_array_equal(decoded["moment2"] == 0, second == 0)
    np.testing.assert_array_equal(decoded["moment1"][second == 0], 0)
    largest, levels = {"O1": (127, 255), "O2": (7, 15)}[stage]
    for m, v, m_read, v_read in zip(
        *(groups(x.astype(np.float64), size) for x in (first, second, decoded["moment1"], decoded["moment2"])),
        strict=True,
    ):
        on = v > 0
        safe, safe_read = np.where(on, v, 1), np.where(on, v_read, 1)
        ratio, read = m / np.sqrt(safe), m_read / np.sqrt(safe_read)
        limit = np.abs(ratio).max(-2, keepdims=True) / largest / 2
        assert (np.abs(read - ratio) <= limit + 1e-5).all()
        logs, read = np.log(safe) / 2, np.log(safe_read) / 2
        low, high = (f(np.where(on, logs, worst), -2) for f, worst in ((np.min, np.inf), (np.max, -np.inf)))
        half_step = np.where(high > low, high - low, 0) / (levels - 1) / 2
        assert (np.abs(read - logs) <= half_step[..., None, :] + 1e-5).all()


@pytest.mark.parametrize(("stage", "bytes_each"), [("O1", 2 + 12 / 70), ("O2", 1 + 3 * 12 / 70)])
def test_files_have_the_bytes_that_are_said(stage, bytes_each):
    code, rounding = CODES[stage], Rounding()
    arrays = code.encode("w", *moments(), rounding)
    assert {name: array.shape for name, array in arrays.items()} == {
        name: field.shape for name, field in code.fields(SHAPE).items()
    }
    assert rounding.bytes_after == sum(array.nbytes for array in arrays.values())
    assert rounding.bytes_after == pytest.approx(bytes_each * np.prod(SHAPE))
    assert rounding.bytes_before == 8 * np.prod(SHAPE)


@pytest.mark.parametrize("stage", CODES)
def test_what_was_read_is_coded_again_to_the_same(stage):
    """A run that is resumed and saved at once does not lose more."""
    code = CODES[stage]
    once = code.encode("w", *moments(), Rounding())
    again = code.encode("w", *code.decode(once).values(), Rounding())
    for name, array in once.items():
        np.testing.assert_allclose(again[name], array, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(("stage", "ratio", "root"), [("O1", 0.01, 0.01), ("O2", 0.12, 0.15)])
def test_the_rounding_that_is_logged_is_that_of_the_moments(stage, ratio, root):
    code, rounding, (first, second) = CODES[stage], Rounding(), moments()
    decoded = code.decode(code.encode("w", first, second, rounding))
    on = second > 0
    m, v, m_read, v_read = (x[on].astype(np.float64) for x in (first, second, *decoded.values()))
    ratios, read = m / np.sqrt(v), m_read / np.sqrt(v_read)
    assert rounding.ratio_error == pytest.approx(
        np.sqrt(np.square(read - ratios).sum() / np.square(ratios).sum()), 1e-3
    )
    assert rounding.root_error == pytest.approx(
        np.sqrt(np.square(np.sqrt(v_read) - np.sqrt(v)).sum() / v.sum()), rel=1e-3
    )
    assert rounding.ratio_error < ratio and rounding.root_error < root


@pytest.mark.parametrize("stage", CODES)
def test_equal_and_absent_gradients_are_exact(stage):
    first, second = np.full((64, 2), 0.5, np.float32), np.full((64, 2), 0.25, np.float32)
    first[:, 1], second[:, 1] = 0, 0
    decoded = CODES[stage].decode(CODES[stage].encode("w", first, second, Rounding()))
    np.testing.assert_array_equal(decoded["moment2"], second)
    np.testing.assert_allclose(decoded["moment1"], first, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "applies"), [((64,), False), ((31, 64), False), ((32, 1), True), ((4, 16, 64), False), ((64, 0), False)]
)
def test_small_and_one_dimensional_parameters_stay_as_they_are(shape, applies):
    assert [code.applies(shape) for code in CODES.values()] == [applies, applies]


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("which", [0, 1])
def test_a_moment_that_is_not_finite_is_named(value, which):
    pair = moments()
    pair[which][0, 0, 0] = value
    with pytest.raises(CheckpointError, match=r"ckpt_quant_stage: O1: a moment of layer\.weight is not finite.*O0"):
        CODES["O1"].encode("layer.weight", *pair, Rounding())
