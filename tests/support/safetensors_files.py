"""Small safetensors files for tests."""

import numpy as np

from erniekit.checkpoint.safetensors_read import Reader
from erniekit.checkpoint.safetensors_write import Writer
from erniekit.utils.bfloat16 import fp32_to_bf16


def some_tensors(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a.weight": ("F32", rng.standard_normal((3, 5)).astype(np.float32)),
        "b.weight": ("BF16", fp32_to_bf16(rng.standard_normal((4, 2)).astype(np.float32))),
        "c": ("F16", rng.standard_normal(7).astype(np.float16)),
        "scalar": ("F32", np.array(2.5, np.float32)),
        "empty": ("F32", np.zeros((0, 3), np.float32)),
        "ids": ("I64", np.arange(3)),
        "flags": ("BOOL", np.array([True, False])),
    }


def write(directory, tensors, **options):
    plan = [(name, dtype, array.shape) for name, (dtype, array) in tensors.items()]
    with Writer(directory, plan, **options) as writer:
        for name, (_, array) in tensors.items():
            writer.write(name, array)
    return writer


def assert_holds(directory, tensors):
    reader = Reader(directory)
    assert set(reader.keys()) == set(tensors)
    for name, (dtype, array) in tensors.items():
        assert reader.info(name) == (dtype, array.shape)
        read = reader.read(name)
        assert read.dtype == array.dtype and read.tobytes() == array.tobytes()
