"""Conversions of element types, value by value."""

import numpy as np
import pytest

from erniekit.checkpoint.dtypes import STORAGE, convert, header_name
from erniekit.utils.bfloat16 import fp32_to_bf16
from erniekit.utils.errors import CheckpointError


def test_convert_keeps_bits_of_the_same_type_and_refuses_overflow():
    half = np.array([1.5, np.inf], np.float16)
    assert convert(half, "F16", "F16") is half
    assert np.array_equal(convert(half, "F16", "BF16"), fp32_to_bf16(half.astype(np.float32)))
    np.testing.assert_array_equal(convert(half, "F16", "F32"), [1.5, np.inf])
    assert np.isinf(convert(np.array([np.inf], np.float32), "F32", "F16"))[0]
    with pytest.raises(CheckpointError, match="float16"):
        convert(np.array([1e5], np.float32), "F32", "F16")
    with pytest.raises(CheckpointError, match="I64"):
        convert(np.array([1]), "I64", "F32")
    with pytest.raises(CheckpointError, match="int8"):
        header_name("int8")
    assert header_name("bfloat16") == "BF16"


def test_storage_is_little_endian():
    assert all(np.dtype(kind).byteorder in "<|=" for kind in STORAGE.values())
