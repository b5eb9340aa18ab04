"""The reference of preference optimisation: what the answers' log-probabilities were before training.

It is a second model, or the trained one without its adapter, or numbers computed once (reference_cache.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import paddle

from erniekit import lora
from erniekit.data.batch import PackedBatch
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import ModelInputs
from erniekit.models.scoring import pair_log_probs
from erniekit.parallel.mesh import Mesh
from erniekit.training.forward_backward import forward_pass


class Reference(Protocol):
    """Gives the log-probabilities [2, N] fp32 (chosen, rejected) of each microbatch's N pairs, on the device; on stages
    without the head, zeros. Every rank calls it at the same time.
    """

    def log_probs(self, microbatches: Sequence[PackedBatch]) -> list[paddle.Tensor]: ...


@dataclass(frozen=True)
class ForwardPass:
    """How this run's models are run: their chunks on this process, and how many tokens' logits may exist at a time."""

    mesh: Mesh
    chunks: Sequence[Sequence[int]]
    most: int

    def log_probs(self, model: CausalLM, microbatches: Sequence[PackedBatch]) -> list[paddle.Tensor]:
        """As Reference.log_probs, of `model` as it is, in eval mode."""
        log_probs = [paddle.zeros([2, len(batch.pairs)]) for batch in microbatches]

        def note(number: int, x_TD: paddle.Tensor, inputs: ModelInputs) -> None:
            hidden = model.enter_head(model.model.norm(x_TD))
            if len(microbatches[number].pairs):
                sums = pair_log_probs(model, hidden, microbatches[number], self.most)
                log_probs[number] = sums.detach().reshape([2, -1])

        forward_pass(model, self.mesh, self.chunks, microbatches, note)
        return log_probs


class SecondModel:
    """A frozen model of its own, which may follow the policy from time to time (`update`)."""

    def __init__(self, model: CausalLM, forward: ForwardPass) -> None:
        self.model, self._forward = model, forward
        for parameter in model.parameters():
            parameter.stop_gradient = True

    def log_probs(self, microbatches: Sequence[PackedBatch]) -> list[paddle.Tensor]:
        """See Reference."""
        return self._forward.log_probs(self.model, microbatches)

    @paddle.no_grad()
    def update(self, policy: CausalLM) -> None:
        """Become the policy as it is now."""
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for name, tensor in (dict(policy.named_parameters()) | dict(policy.named_buffers())).items():
            own[name].set_value(tensor)


class AdapterOff:
    """The trained model without its adapter."""

    def __init__(self, model: CausalLM, forward: ForwardPass) -> None:
        self._model, self._forward = model, forward

    def log_probs(self, microbatches: Sequence[PackedBatch]) -> list[paddle.Tensor]:
        """See Reference."""
        with lora.disabled(self._model):
            return self._forward.log_probs(self._model, microbatches)
