"""How many values in FP8 are at the end of the range, and how many became zero, by kind of tensor."""

from typing import Literal

import paddle

from erniekit.precision.fp8_tensor import Quantised
from erniekit.precision.rounding import FORMATS

Kind = Literal["activations", "weights", "gradients"]
KINDS: tuple[Kind, ...] = ("activations", "weights", "gradients")


class Fp8Counts:
    """Counts while `enabled`, on the device: by kind, the values with the largest code, those that were not zero and
    have code 0, and all values.
    """

    def __init__(self) -> None:
        self.enabled = False
        self._sums: dict[Kind, paddle.Tensor] = {}

    @paddle.no_grad()
    def add(self, kind: Kind, x: paddle.Tensor, quantised: Quantised) -> None:
        """Count a tensor and what it became."""
        if not self.enabled:
            return
        form = "e5m2" if quantised.codes.dtype == paddle.float8_e5m2 else "e4m3"
        codes = quantised.codes.astype("float32")
        largest = (codes.abs() == FORMATS[form].largest).astype("float32").sum()
        became_zero = paddle.logical_and(codes == 0, x.astype("float32") != 0).astype("float32").sum()
        found = paddle.stack([largest, became_zero, paddle.full([], float(x.size))])
        self._sums[kind] = self._sums[kind] + found if kind in self._sums else found

    def take(self) -> dict[Kind, paddle.Tensor]:
        """The three sums [3] of each kind that was counted since the last call."""
        sums, self._sums = self._sums, {}
        return sums
