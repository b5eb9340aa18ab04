"""AWQ's search and SmoothQuant's scales."""

import numpy as np

from erniekit.precision.codes import choose_scales, decode, encode, full_range, symmetric
from erniekit.quantize.awq import Sharing, Weighed, search
from erniekit.quantize.smoothquant import smoothing_scale

SPEC = full_range(4, group=16)


def rounded(weight, spec=SPEC):
    scales = choose_scales(weight, spec)
    return decode(encode(weight, scales, spec), scales, spec)


def layer(seed=0, outliers=True):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(200, 64)).astype(np.float32)
    if outliers:
        inputs[:, rng.choice(64, 6, replace=False)] *= 20
    return rng.normal(size=(48, 64)).astype(np.float32), inputs


def test_the_search_lowers_the_error_of_outputs():
    """Its errors are those of the folded and rounded weights, computed here from the formula."""
    weight, inputs = layer()
    result = search(lambda: [Weighed(weight, inputs, 2.0, SPEC)], np.abs(inputs).mean(axis=0))

    def error(scale):
        return 2 * np.square(inputs @ (rounded(weight * scale) / scale - weight).T).sum()

    ones = np.ones(64, np.float32)
    np.testing.assert_allclose(result.plain_error, error(ones), rtol=1e-3)
    np.testing.assert_allclose(result.error, error(result.scale.astype(np.float32)), rtol=1e-3)
    assert result.error < 0.75 * result.plain_error and result.ratio is not None


def test_never_worse_than_plain_rounding():
    """Equal inputs: no scale helps, and s = 1 is a candidate."""
    weight, _ = layer()
    inputs = np.ones((4, 64), np.float32)
    result = search(lambda: [Weighed(weight, inputs, 1.0, SPEC)], np.ones(64), num_ratios=4)
    assert result.error <= result.plain_error
    absent = search(lambda: [Weighed(weight, inputs[:0], 0.0, SPEC)], np.zeros(64))
    assert absent.ratio is None and (absent.scale == 1).all()


def test_matrices_count_by_their_tokens():
    """Two experts want different scales: the one with nearly all tokens decides."""
    (first, inputs), (second, others) = layer(1), layer(2)
    mean = (np.abs(inputs).mean(axis=0) + np.abs(others).mean(axis=0)) / 2

    def both(many, few):
        return search(lambda: [Weighed(first, inputs, many, SPEC), Weighed(second, others, few, SPEC)], mean).scale

    alone = search(lambda: [Weighed(first, inputs, 1.0, SPEC)], mean)
    # The mean weights of the candidates are those of both; only the choice of the ratio follows the tokens.
    assert np.corrcoef(np.log(both(1e6, 1e-6)), np.log(alone.scale))[0, 1] > 0.9


def test_inputs_that_share_a_scale():
    """Two query heads of 32 that read one head of values."""
    weight, inputs = layer(3)
    sharing = Sharing(lambda x: x.reshape(2, 32).mean(axis=0), lambda s: np.tile(s, 2))
    result = search(lambda: [Weighed(weight, inputs, 1.0, SPEC)], np.abs(inputs).mean(axis=0), sharing)
    assert result.scale.shape == (32,) and result.error < result.plain_error


def test_a_matrix_that_is_not_rounded_has_no_say():
    weight, inputs = layer()
    plain = search(lambda: [Weighed(weight, inputs, 1.0, SPEC)], np.abs(inputs).mean(axis=0))
    beside = [Weighed(weight, inputs, 1.0, SPEC), Weighed(100 * weight, inputs, 9.0, None)]
    np.testing.assert_array_equal(search(lambda: beside, np.abs(inputs).mean(axis=0)).scale, plain.scale)


def test_smoothing_equalises_ranges():
    """At strength 0.5 the largest activation and the largest weight of each input become equal (figure 5)."""
    weight, inputs = layer()
    weight[:, 5], inputs[:, 9] = 0, 0
    scale = smoothing_scale(np.abs(inputs).max(axis=0), [weight[:30], weight[30:]])
    largest_x, largest_w = np.abs(inputs / scale).max(axis=0), np.abs(weight * scale).max(axis=0)
    used = np.delete(np.arange(64), [5, 9])
    np.testing.assert_allclose(largest_x[used], largest_w[used], rtol=1e-5)
    assert (scale[[5, 9]] == 1).all()


def test_smoothing_helps_products_in_8_bits():
    """Activations by token, weights by channel, as w8a8 computes."""
    weight, inputs = layer()
    scale = smoothing_scale(np.abs(inputs).max(axis=0), [weight]).astype(np.float32)

    def error(x, w):
        return np.linalg.norm(rounded(x, symmetric(8)) @ rounded(w, symmetric(8)).T - inputs @ weight.T)

    assert error(inputs / scale, weight * scale) < 0.7 * error(inputs, weight)
