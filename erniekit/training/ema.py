"""An exponential moving average of the weights during training (Polyak & Juditsky 1992; Izmailov et al. 2018)."""

from pathlib import Path

import paddle

from erniekit.models.decoder import CausalLM
from erniekit.parallel.sharded_units import DividedTensor
from erniekit.training.adamw import AdamW
from erniekit.training.trainable import load_trained, trained_tensors

DIRECTORY = "ema"


class WeightAverage:
    """average = decay * average + (1 - decay) * weight after each step, in fp32, over all that a checkpoint holds:
    parameters and router biases, or an adapter. The weight of a 16-bit parameter is its master copy: the parameter
    itself is rounded, and moves less often than it is trained. The average of a divided weight is divided, too.
    """

    def __init__(self, model: CausalLM, decay: float, optimizer: AdamW | None = None) -> None:
        self.model, self.decay, self._optimizer = model, decay, optimizer
        self.average = _copies(model)

    @paddle.no_grad()
    def update(self) -> None:
        """Add the weights after an optimizer step. If masters are divided over ranks, all ranks must call it."""
        for name, tensor in trained_tensors(self.model).items():
            self._add(name, tensor)

    def _add(self, name: str, weight: paddle.Tensor) -> None:
        """Add the present value of a weight, or of this rank's chunk of it."""
        average, optimizer = self.average[name], self._optimizer
        if isinstance(weight, DividedTensor) and isinstance(average, DividedTensor):
            master = None if optimizer is None else optimizer.local_master(name)
            average, own = average.chunk, weight.chunk
        else:
            master, own = None if optimizer is None else optimizer.master(name), weight
        now = own.astype("float32") if master is None else master
        average.scale_(self.decay).add_(now * (1.0 - self.decay))

    @paddle.no_grad()
    def restart(self) -> None:
        """Reset the average to the present weights."""
        self.average = _copies(self.model)

    def load(self, checkpoint: Path) -> None:
        """Continue from the average in a checkpoint."""
        load_trained(self.model, checkpoint / DIRECTORY, into=self.average)


def _copies(model: CausalLM) -> dict[str, paddle.Tensor]:
    return {
        name: tensor.in_fp32() if isinstance(tensor, DividedTensor) else tensor.astype("float32").clone()
        for name, tensor in trained_tensors(model).items()
    }
