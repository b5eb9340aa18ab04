"""bfloat16 and back, value by value."""

import numpy as np
import pytest

from erniekit.utils.bfloat16 import bf16_to_fp32, fp32_to_bf16


def test_every_bfloat16_value_survives_the_way_there_and_back():
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = bf16_to_fp32(bits)
    back = fp32_to_bf16(wide)
    nan = np.isnan(wide)
    assert np.array_equal(back[~nan], bits[~nan])
    assert np.isnan(bf16_to_fp32(back[nan])).all()


def test_rounding_is_to_nearest_and_ties_go_to_even():
    # bfloat16 keeps 8 significant bits: near 1 its step is 2**-7.
    step = 2.0**-7
    values = np.array([1 + step / 2, 1 + 3 * step / 2, 1 + step / 2 + 2.0**-20, -(1 + step / 2), 3.4e38], np.float32)
    expected = np.array([1.0, 1 + 2 * step, 1 + step, -1.0, np.inf], np.float32)
    np.testing.assert_array_equal(bf16_to_fp32(fp32_to_bf16(values)), expected)
    # A NaN whose payload lies only in the bits that are dropped must not become infinite.
    assert np.isnan(bf16_to_fp32(fp32_to_bf16(np.array([0x7F800001], np.uint32).view(np.float32))))[0]


def test_shapes_and_strides_are_kept():
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T
    assert not values.flags.c_contiguous
    np.testing.assert_array_equal(bf16_to_fp32(fp32_to_bf16(values)), values)


def test_blocks_give_the_same_as_one_piece(monkeypatch):
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    whole = fp32_to_bf16(values)
    monkeypatch.setattr("erniekit.utils.bfloat16._BLOCK", 7)
    assert np.array_equal(fp32_to_bf16(values), whole) and np.array_equal(
        bf16_to_fp32(whole), (whole.astype(np.uint32) << 16).view(np.float32)
    )


def test_rounding_agrees_with_torch():
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(1).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[~np.isnan(values)]
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(fp32_to_bf16(values), theirs)
