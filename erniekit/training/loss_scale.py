"""Loss scaling of fp16 training (Micikevicius et al. 2017, arXiv 1710.03740, section 3.2).

Gradients in fp16 vanish below 6e-8, so the loss is multiplied by a scale before the backward pass, and gradients are
divided by it in fp32 afterwards. A scale that is too large makes a gradient infinite: that step updates nothing, and
the scale is halved. After many steps without that it is doubled. These are the rules and numbers of Paddle's
GradScaler.
"""

import math
from collections.abc import Mapping

import paddle

from erniekit.training.state import TrainState
from erniekit.utils import log

_GOOD_STEPS = 2000  # steps in a row without an overflow, after which the scale is doubled


class LossScaler:
    """The scale of the present step. Whether a step overflowed follows from the norm of all ranks' gradients, so that
    every rank decides the same.
    """

    def __init__(self, initial: float) -> None:
        self.scale = initial
        self._good_steps = 0

    def load(self, state: TrainState) -> None:
        """Continue with the scale of a checkpoint, if that has one."""
        if state.loss_scale is not None:
            self.scale, self._good_steps = max(state.loss_scale, 1.0), state.good_steps

    def save(self, state: TrainState) -> None:
        """Note the scale of the next step in what a checkpoint will hold."""
        state.loss_scale, state.good_steps = self.scale, self._good_steps

    @paddle.no_grad()
    def unscale(self, gradients: Mapping[str, paddle.Tensor]) -> dict[str, paddle.Tensor]:
        """The gradients of the unscaled loss, fp32; those that were fp32 are changed in place."""
        return {name: gradient.astype("float32").scale_(1.0 / self.scale) for name, gradient in gradients.items()}

    def skips(self, step: int, loss: float, norm: float) -> bool:
        """Whether `step` must be skipped, since the scale was too large. Sets the scale of the next step.

        A loss that is not finite has overflowed in the forward pass, and at scale 1 a gradient overflows by itself:
        no other scale would help, so such a step is not skipped but an error.
        """
        if math.isfinite(norm):
            self._good_steps += 1
            if self._good_steps == _GOOD_STEPS:
                self.scale, self._good_steps = self.scale * 2.0, 0
            return False
        if not math.isfinite(loss) or self.scale == 1.0:
            return False
        before, self.scale, self._good_steps = self.scale, max(self.scale / 2.0, 1.0), 0
        change = f"loss scale {before:.0f} -> {self.scale:.0f}"
        log.warning(f"step {step}: a gradient overflowed in fp16: nothing is updated, {change}")
        return True
