"""Statistics of inputs that arrive in parts equal those of all at once."""

import numpy as np

from erniekit.quantize.inputs import NUM_SAMPLED, InputStatistics, evenly_spaced


def statistics(rows, sizes, with_hessian=True):
    result = InputStatistics(rows.shape[1], len(rows), with_hessian)
    begin = 0
    for size in sizes:
        result.add(rows[begin : begin + size])
        begin += size
    return result


def test_parts_add_up():
    rows = np.random.default_rng(0).normal(size=(1500, 6)).astype(np.float32)
    parts = statistics(rows, [1, 0, 700, 499, 300])
    wide = rows.astype(np.float64)
    assert parts.count == 1500
    np.testing.assert_allclose(parts.hessian, wide.T @ wide, rtol=1e-4, atol=1e-2)  # sums of fp32 products
    np.testing.assert_allclose(parts.mean_square, (wide**2).mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(parts.mean_abs, np.abs(wide).mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(parts.max_abs, np.abs(rows).max(axis=0))
    np.testing.assert_array_equal(parts.sample, rows[evenly_spaced(1500, NUM_SAMPLED)])
    np.testing.assert_array_equal(statistics(rows, [1500]).sample, parts.sample)


def test_divided_inputs():
    rows = np.random.default_rng(1).normal(size=(40, 5)).astype(np.float32)
    scale = np.array([0.5, 1, 2, 4, 8.0])
    divided = statistics(rows, [40], False).divided_by(scale)
    expected = statistics((rows / scale).astype(np.float32), [40], False)
    for name in ("mean_abs", "mean_square", "max_abs", "sample"):
        np.testing.assert_allclose(getattr(divided, name), getattr(expected, name), rtol=1e-6)


def test_a_blend_weighs_both_equally():
    """Three tokens of an expert and 300 of its layer: H of equal trace, means of equal weight."""
    rng = np.random.default_rng(2)
    own, others = rng.normal(size=(3, 4)).astype(np.float32) * 5, rng.normal(size=(300, 4)).astype(np.float32)
    few, many = statistics(own, [3]), statistics(others, [300])
    blend = few.blended_with(many)
    np.testing.assert_allclose(np.trace(blend.hessian), 2 * np.trace(few.hessian), rtol=1e-12)
    np.testing.assert_allclose(blend.mean_square, (few.mean_square + many.mean_square) / 2, rtol=1e-12)
    assert len(blend.sample) == 303 and blend.count == 303
    none = InputStatistics(4, 0, True).blended_with(many)
    np.testing.assert_array_equal(none.hessian, many.hessian)
    none.hessian = None
    assert many.hessian is not None  # it serves other experts, too


def test_evenly_spaced():
    np.testing.assert_array_equal(evenly_spaced(3, 5), [0, 1, 2])
    np.testing.assert_array_equal(evenly_spaced(10, 5), [1, 3, 5, 7, 9])
    assert not len(evenly_spaced(0, 5))
