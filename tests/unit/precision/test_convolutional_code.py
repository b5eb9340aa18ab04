"""2 bits a weight: the decoder on words made by hand, the encoder against every point, its error, and bad values."""

import numpy as np
import pytest

from erniekit.precision import codes
from erniekit.precision.convolutional_code import (
    GROUP,
    Scales,
    choose_scales,
    decode,
    encode,
    from_file,
    reachable_points,
    to_file,
)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def relative_error(back: np.ndarray, weight: np.ndarray) -> float:
    return float(np.linalg.norm(back - weight) / np.linalg.norm(weight))


def test_words_made_by_hand_are_decoded_as_fastdeploy_reads_them():
    """Two channels of 128 inputs. Every byte is 0 except those named; the words follow from code_scale and code_zp."""
    words = np.zeros((32, 2), np.uint8)  # [in / 4, out]
    words[0, 0] = 2  # floor(2 * 100.25 + 23495.5 + 0.5) = 23696 + 0, see below
    words[16, 0] = 3
    words[31, 1] = 255
    tensors = {
        "quant_weight": words,
        "weight_scale": np.array([[0x3A, 0x1F]], np.uint8),  # groups 0 and 1: 3 and 10; 1 and 15
        "super_scales": np.array([0.5, 0.25], np.float32),
        "code_scale": np.array([100.25, 128.5], np.float32),
        "code_zp": np.array([23551.0, 0.0], np.float32),
    }
    weight = decode(*from_file(tensors))
    assert weight.shape == (2, 128)
    # Byte 2: 200.5 + 23551 + 0.5 = 23752 = 101 110 011 001 000 in binary, so the windows are 101110, 110011, 011001 and
    # 001000: 46, 51, 25, 8, minus 32; times local 3 and super 0.5.
    assert weight[0, :4].tolist() == [1.5 * z for z in (14, 19, -7, -24)]
    # Byte 3 in the second group: 300.75 + 23551 + 0.5 = 23852.25 -> 23852 = 101 110 100 101 100; local 10 from the low
    # half.
    assert weight[0, 64:68].tolist() == [5.0 * z for z in (0b101110 - 32, 0b110100 - 32, 0b100101 - 32, 0b101100 - 32)]
    # Byte 255 of the other channel: 32767.5 + 0.5 = 32768 needs 16 bits; the mask leaves the lower 15, which are 0.
    assert weight[1, 124:].tolist() == [15 * 0.25 * -32] * 4
    # Byte 0 everywhere else: 23551.5 -> 23551 = 101 101 111 111 111.
    assert weight[0, 4:8].tolist() == [1.5 * z for z in (0b101101 - 32, 0b101111 - 32, 31, 31)]
    assert weight[1, :4].tolist() == [0.25 * -32] * 4


def test_file_tensors_are_what_was_given():
    words = np.random.default_rng(0).integers(0, 256, (6, 64), np.uint8)
    scales = choose_scales(normal(6, 256))
    tensors = to_file(words, scales)
    assert {name: (array.shape, array.dtype) for name, array in tensors.items()} == {
        "quant_weight": ((64, 6), np.uint8),
        "weight_scale": ((2, 6), np.uint8),
        "super_scales": ((6,), np.float32),
        "code_scale": ((6,), np.float32),
        "code_zp": ((6,), np.float32),
    }
    again, scales_again = from_file(tensors)
    np.testing.assert_array_equal(again, words)
    for name, value in vars(scales).items():
        np.testing.assert_array_equal(getattr(scales_again, name), value)


@pytest.mark.parametrize("code", [None, (128.25, 0.0), (100.25, 5000.0)])
def test_what_is_held_already_stays(code: tuple[float, float] | None):
    """Exact: distinct words are distinct points, whose squared distance is at least 1, and the comparison in fp32 errs
    by less than a thousandth. The channels have different codes, of any encoder.
    """
    rng = np.random.default_rng(1)
    words = rng.integers(0, 256, (8, 64), np.uint8)
    scales = choose_scales(normal(8, 256))
    if code is not None:
        scales.code_scale[::2], scales.code_zp[::2] = code
    np.testing.assert_array_equal(encode(decode(words, scales), scales), words)
    importance = rng.uniform(0.5, 2, 256)
    np.testing.assert_array_equal(encode(decode(words, scales), scales, importance), words)


def test_words_are_the_nearest_of_all():
    """Against a plain comparison in float64, with inputs of very different importance."""
    weight, importance = normal(5, 128), np.random.default_rng(1).lognormal(0, 2, 128)
    scales = choose_scales(weight, importance)
    errors = (decode(encode(weight, scales, importance), scales) - weight.astype(np.float64)) ** 2 * importance
    points = reachable_points(float(scales.code_scale[0]), float(scales.code_zp[0])).astype(np.float64)
    for channel, word in np.ndindex(5, 32):
        inputs = slice(4 * word, 4 * word + 4)
        every = points * scales.steps()[channel, 4 * word // GROUP]
        least = (((every - weight[channel, inputs]) ** 2) * importance[inputs]).sum(axis=1).min()
        assert errors[channel, inputs].sum() == pytest.approx(least, rel=1e-4)


def test_error_on_normal_weights():
    """At most 33.5 %, as the documentation states. Plain 2-bit codes with 64 inputs a scale leave 38 % with the best
    scales and 51 % with the largest weight kept, the best scalar code 34.3 %; 25 % is the bound of information theory
    for 2 bits a normal number. The spread of a matrix of 262144 is 0.0003.
    """
    weight = normal(256, 1024)
    scales = choose_scales(weight)
    assert relative_error(decode(encode(weight, scales), scales), weight) <= 0.335
    # Neither the size of a channel nor that of a group changes it: scales follow both. Ratios of groups up to 4 leave
    # local scales of 4 or more, whose steps are coarser.
    sizes = np.repeat(np.exp2(np.random.default_rng(1).uniform(-1, 1, (256, 16))), GROUP, axis=1)
    weight *= (sizes * np.logspace(-15, 15, 256)[:, None]).astype(np.float32)
    scales = choose_scales(weight)
    back = decode(encode(weight, scales), scales)
    for channel in range(256):
        assert relative_error(back[channel], weight[channel]) <= 0.40
    np.testing.assert_array_equal(scales.super_scales.view(np.uint32) & 0xFFFF, 0)  # values of bf16


def test_zeros_stay_zeros():
    weight = normal(3, 256)
    weight[0] = 0
    weight[1, 64:128] = 0
    scales = choose_scales(weight)
    back = decode(encode(weight, scales), scales)
    assert not back[0].any() and not back[1, 64:128].any() and np.abs(back[1, :64]).max() > 1
    assert np.isfinite(back).all() and (scales.super_scales > 0).all()
    scales = choose_scales(weight, np.zeros(256))  # no importance at all
    assert np.isfinite(decode(encode(weight, scales, np.zeros(256)), scales)).all()


def test_importance_lowers_the_error_that_it_weighs():
    weight, importance = normal(64, 512), np.random.default_rng(1).lognormal(0, 1.5, 512)
    plain = choose_scales(weight)
    weighed = choose_scales(weight, importance)
    errors = [
        (((decode(words, scales) - weight) ** 2) * importance).sum()
        for words, scales in ((encode(weight, plain), plain), (encode(weight, weighed, importance), weighed))
    ]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused(value: float):
    weight = normal(2, 128)
    weight[1, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        choose_scales(weight)


def test_it_is_one_of_the_codes_of_files():
    """precision.codes with WINT2 gives the same words, and scales as one array."""
    weight = normal(3, 256)
    scales, array = choose_scales(weight), codes.choose_scales(weight, codes.WINT2)
    assert array.shape == codes.WINT2.scale_shape(weight.shape) == (3, 256 // 64 + 3)
    for name, value in vars(Scales.from_array(array)).items():
        np.testing.assert_array_equal(value, getattr(scales, name))
    words = codes.encode(weight, array, codes.WINT2)
    np.testing.assert_array_equal(words, encode(weight, scales))
    np.testing.assert_array_equal(codes.decode(words, array, codes.WINT2), decode(words, scales))
