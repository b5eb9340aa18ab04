"""References of preference optimisation, which give the log-probabilities of answers before training.

A reference is a second model, or the trained one without its adapter, or numbers that were computed once
(reference_cache.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import paddle

from erniekit import lora
from erniekit.data.packed_batch import PackedBatch
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import ModelInputs
from erniekit.models.scoring import pair_log_probs
from erniekit.models.sharded_blocks import local_tensors
from erniekit.training.forward_pass import final_norm, forward_pass


class Reference(Protocol):
    """Gives the log-probabilities fp32 of each microbatch's N pairs [2, N] (chosen, rejected), or of its N judged
    answers [N], on the device; on stages without the head, zeros. Every rank calls it at the same time.
    """

    def log_probs(self, microbatches: Sequence[PackedBatch]) -> list[paddle.Tensor]: ...


@dataclass(frozen=True)
class PairScorer:
    """Log-probabilities of answers, by passes without gradients; at most `max_logit_tokens` tokens' logits exist at a
    time.
    """

    max_logit_tokens: int

    def log_probs(self, model: CausalLM, microbatches: Sequence[PackedBatch]) -> list[paddle.Tensor]:
        """As Reference.log_probs, for the present weights of `model`, in eval mode."""
        log_probs = [paddle.zeros(_shape(batch)) for batch in microbatches]

        def note(number: int, x_TD: paddle.Tensor, inputs: ModelInputs) -> None:
            hidden = model.enter_head(final_norm(model, x_TD))
            if len(microbatches[number].answers):
                sums = pair_log_probs(model, hidden, inputs, microbatches[number], self.max_logit_tokens)
                # Paddle's CPU softmax takes NaN and infinite logits for equal ones, which hides them; times 0 what they
                # are made of is NaN.
                sums += (hidden.sum(dtype="float32") + model.output_head().weight.sum(dtype="float32")) * 0
                log_probs[number] = sums.detach().reshape(_shape(microbatches[number]))

        forward_pass(model, microbatches, note)
        return log_probs


def _shape(batch: PackedBatch) -> list[int]:
    """The shape of a batch's log-probabilities, see Reference."""
    return [len(batch.judged)] if len(batch.judged) else [2, len(batch.pairs)]


class SecondModel:
    """A second, frozen model, which may be set to the policy from time to time (`update`)."""

    def __init__(self, model: CausalLM, scorer: PairScorer) -> None:
        self.model, self._scorer = model, scorer
        for parameter in model.parameters():
            parameter.stop_gradient = True

    def log_probs(self, microbatches: Sequence[PackedBatch]) -> list[paddle.Tensor]:
        """See Reference."""
        return self._scorer.log_probs(self.model, microbatches)

    @paddle.no_grad()
    def update(self, policy: CausalLM) -> None:
        """Copy the present weights of the policy."""
        own = local_tensors(self.model)
        for name, tensor in local_tensors(policy).items():
            own[name].set_value(tensor)


class AdapterOff:
    """The trained model without its adapter."""

    def __init__(self, model: CausalLM, scorer: PairScorer) -> None:
        self._model, self._scorer = model, scorer

    def log_probs(self, microbatches: Sequence[PackedBatch]) -> list[paddle.Tensor]:
        """See Reference."""
        with lora.disabled(self._model):
            return self._scorer.log_probs(self._model, microbatches)
