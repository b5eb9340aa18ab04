"""Sums that stay on the device while a step runs, and are read by the host together."""

from collections.abc import Hashable

import numpy as np
import paddle


class DeviceSums:
    """Sums under keys whose summands lie on the device.

    `add` never waits for the device. `fetch` copies all summands to the host in one transfer and adds them up there, in
    float64 and in the order in which they came: the sums are those of reading every summand when it was made.
    """

    def __init__(self) -> None:
        self._summands: list[tuple[Hashable, paddle.Tensor]] = []

    @paddle.no_grad()
    def add(self, key: Hashable, summand: paddle.Tensor) -> None:
        """Add a tensor, whose shape is that of every summand of this key."""
        self._summands.append((key, summand.detach()))

    @paddle.no_grad()
    def fetch(self) -> dict[Hashable, np.ndarray]:
        """The sum of each key, float64; of a scalar an array without axes. Afterwards there are no summands left."""
        summands, self._summands = self._summands, []
        if not summands:
            return {}
        flat = [tensor.astype("float32").reshape([-1]) for _, tensor in summands]
        # The one read: the host waits here until the device has computed everything that was added.
        values = paddle.concat(flat).numpy().astype(np.float64)
        sums: dict[Hashable, np.ndarray] = {}
        begin = 0
        for key, tensor in summands:
            end = begin + tensor.size
            value = values[begin:end].reshape(tensor.shape)
            sums[key] = sums[key] + value if key in sums else value
            begin = end
        return sums
