"""Sums that stay on the device during a step and are read by the host in one transfer."""

from collections.abc import Hashable

import numpy as np
import paddle

from erniekit.utils import heartbeat


class DeviceSums:
    """Sums of device tensors, by key.

    `add` never waits for the device. `fetch` copies all summands to the host in one transfer and adds them there, in
    float64 and in the order of the calls, so that the result is the same as if each had been read when it was added.
    """

    def __init__(self) -> None:
        self._summands: list[tuple[Hashable, paddle.Tensor]] = []

    @paddle.no_grad()
    def add(self, key: Hashable, summand: paddle.Tensor) -> None:
        """Add a tensor; all summands of a key have the same shape."""
        self._summands.append((key, summand.detach()))

    @paddle.no_grad()
    def fetch(self) -> dict[Hashable, np.ndarray]:
        """The sum of each key as a float64 array (without axes for scalars). This removes all summands."""
        summands, self._summands = self._summands, []
        if not summands:
            return {}
        flat = [tensor.astype("float32").reshape([-1]) for _, tensor in summands]
        # The only synchronisation: the host waits here until the device has computed all summands.
        with heartbeat.device_read():
            values = paddle.concat(flat).numpy().astype(np.float64)
        sums: dict[Hashable, np.ndarray] = {}
        begin = 0
        for key, tensor in summands:
            end = begin + tensor.size
            value = values[begin:end].reshape(tensor.shape)
            sums[key] = sums[key] + value if key in sums else value
            begin = end
        return sums
