"""Packed codes: by hand, against Paddle's own operator, and back."""

import numpy as np
import paddle
import pytest
from paddle.nn.quant import weight_quantize

from erniekit.precision.codes import choose_scales, encode, symmetric
from erniekit.precision.packing import (
    pack_for_kernels,
    pack_input_pairs,
    pack_words,
    unpack_for_kernels,
    unpack_input_pairs,
    unpack_words,
)
from erniekit.precision.rounding import round_to


def random_codes(bits: int, shape: tuple[int, int], lowest: int | None = None) -> np.ndarray:
    low = -(1 << bits - 1) if lowest is None else lowest
    return np.random.default_rng(bits).integers(low, 1 << bits - 1, shape).astype(np.int8)


def test_words_by_hand():
    """Plus 8, input 8k + j at bits 4j; a row of 9 takes two words, the second with zeros behind its code."""
    codes = np.array([[-8, -7, -6, -5, -4, -3, -2, -1, 7]], np.int8)
    assert pack_words(codes, 4).view(np.uint32).tolist() == [[0x76543210, 0xF]]
    assert pack_words(np.array([[-128, -127, 0, 127]], np.int8), 8).view(np.uint32).tolist() == [[0xFF800100]]


def test_input_pairs_by_hand():
    """[in / 2, out]; -1 is 0xF, -7 is 0x9."""
    codes = np.array([[1, -1], [-7, 7]], np.int8)
    assert pack_input_pairs(codes).view(np.uint8).tolist() == [[0xF1, 0x79]]
    assert (unpack_input_pairs(pack_input_pairs(random_codes(4, (6, 10)))) == random_codes(4, (6, 10))).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_in", [1, 5, 8, 64])
def test_words_and_back(bits: int, num_in: int):
    codes = random_codes(bits, (7, num_in))
    assert (unpack_words(pack_words(codes, bits), bits, num_in) == codes).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(16, 64), (48, 192), (64, 128)])
def test_the_order_of_the_kernels_is_that_of_paddles_operator(bits: int, shape: tuple[int, int]):
    """Weights that are codes times one, with the largest code in each channel, so that the operator's scales are 1."""
    largest = 2 ** (bits - 1) - 1
    codes = random_codes(bits, shape, lowest=-largest)
    codes[:, 0] = largest
    weight = paddle.to_tensor(codes.T.astype(np.float32)).astype("float16")
    made, scales = weight_quantize(weight, algo=f"weight_only_int{bits}", arch=80)
    np.testing.assert_allclose(scales.astype("float32").numpy(), 1.0)
    packed = pack_for_kernels(codes, bits)
    assert packed.size == made.numpy().size
    np.testing.assert_array_equal(packed.reshape(-1), made.numpy().reshape(-1))
    np.testing.assert_array_equal(unpack_for_kernels(packed, bits), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_paddles_operator_makes_the_same_file_of_a_weight(bits: int):
    """But for codes at a border between two, since the operator divides by a scale that is not yet rounded to bf16.
    Scales of bf16 differ by one unit in the last place, 2^-7, at most.
    """
    weight = round_to(np.random.default_rng(0).normal(size=(128, 256)).astype(np.float32), "bf16")
    spec = symmetric(bits)
    scales = choose_scales(weight, spec)
    codes = encode(weight, scales, spec)
    made, theirs = weight_quantize(
        paddle.to_tensor(weight.T.copy()).astype("bfloat16"), algo=f"weight_only_int{bits}", arch=80
    )
    np.testing.assert_allclose(theirs.astype("float32").numpy(), scales[:, 0], rtol=2**-7)
    distance = np.abs(unpack_for_kernels(made.numpy().reshape(128 * bits // 8, 256), bits).astype(int) - codes)
    assert distance.max() <= 1 and (distance > 0).mean() < (0.02 if bits == 4 else 0.25)
