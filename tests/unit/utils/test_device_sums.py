"""Sums on the device are read once and are those of reading every summand."""

import paddle
from support.host_reads import counted

from erniekit.utils.device_sums import DeviceSums


def test_device_sums_are_those_of_reading_every_summand():
    sums, values = DeviceSums(), [0.1, 1e8, -0.3, 7.0]
    for value in values:
        sums.add("scalar", paddle.to_tensor(value, dtype="float32"))
        sums.add("vector", paddle.to_tensor([value, 1.0], dtype="float32"))
    expected = sum(paddle.to_tensor(value, dtype="float32").item() for value in values)
    with counted() as transfers:
        fetched = sums.fetch()
    assert transfers.reads == {"utils/device_sums.py:fetch": 1}
    assert fetched["scalar"].shape == () and fetched["scalar"] == expected
    assert fetched["vector"].tolist() == [expected, 4.0]
    assert sums.fetch() == {}
