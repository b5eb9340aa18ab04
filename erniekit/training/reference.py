"""The reference of preference optimisation: what the answers' log-probabilities were before training.

It is a second model, or the trained one without its adapter, or numbers computed once (reference_cache.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import paddle

from erniekit import lora
from erniekit.data.batch import IGNORE
from erniekit.losses.log_probs import answer_log_probs
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import ModelInputs
from erniekit.training.flat import FlatBatch
from erniekit.training.forward_pass import ForwardPass


class Reference(Protocol):
    """Gives the log-probabilities [2, N] fp32 (chosen, rejected) of each microbatch's N pairs, on the device; on stages
    without the head, zeros. Every rank calls it at the same time.
    """

    def log_probs(self, microbatches: Sequence[FlatBatch]) -> list[paddle.Tensor]: ...


def pair_log_probs(model: CausalLM, hidden_TD: paddle.Tensor, batch: FlatBatch, max_logit_tokens: int) -> paddle.Tensor:
    """Log-probabilities of the chosen answers, then of the rejected ones [2N], from the hidden states of all tokens as
    the head takes them; at most `max_logit_tokens` tokens' logits exist at a time.
    """
    assert batch.pairs is not None
    head, documents = model.output_head(), batch.segment_ids - 1
    return answer_log_probs(hidden_TD, head, batch.labels, documents, batch.pairs.answers, max_logit_tokens)


def answer_lengths(batch: FlatBatch) -> np.ndarray:
    """Labels of each answer, chosen then rejected: fp32 [2N]."""
    assert batch.pairs is not None
    counts = np.bincount(batch.segment_ids[batch.labels != IGNORE], minlength=int(batch.segment_ids.max()) + 1)
    return counts[batch.pairs.answers + 1].astype(np.float32)


@dataclass(frozen=True)
class PairScorer:
    """Log-probabilities of answers, by passes without gradients; at most `max_logit_tokens` tokens' logits exist at a
    time.
    """

    forward: ForwardPass
    max_logit_tokens: int

    def log_probs(self, model: CausalLM, microbatches: Sequence[FlatBatch]) -> list[paddle.Tensor]:
        """As Reference.log_probs, of `model` as it is, in eval mode."""
        log_probs = [paddle.zeros([2, 0 if batch.pairs is None else len(batch.pairs.chosen)]) for batch in microbatches]

        def note(number: int, x_TD: paddle.Tensor, inputs: ModelInputs) -> None:
            hidden = model.enter_head(model.model.norm(x_TD))
            if microbatches[number].pairs is not None:
                sums = pair_log_probs(model, hidden, microbatches[number], self.max_logit_tokens)
                # Paddle's CPU softmax takes NaN and infinite logits for equal ones, which hides them; times 0 what they
                # are made of is NaN.
                sums += (hidden.sum() + model.output_head().weight.sum()).astype("float32") * 0
                log_probs[number] = sums.detach().reshape([2, -1])

        self.forward.run(model, microbatches, note)
        return log_probs


class SecondModel:
    """A frozen model of its own, which may follow the policy from time to time (`update`)."""

    def __init__(self, model: CausalLM, scorer: PairScorer) -> None:
        self.model, self._scorer = model, scorer
        for parameter in model.parameters():
            parameter.stop_gradient = True

    def log_probs(self, microbatches: Sequence[FlatBatch]) -> list[paddle.Tensor]:
        """See Reference."""
        return self._scorer.log_probs(self.model, microbatches)

    @paddle.no_grad()
    def update(self, policy: CausalLM) -> None:
        """Become the policy as it is now."""
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for name, tensor in (dict(policy.named_parameters()) | dict(policy.named_buffers())).items():
            own[name].set_value(tensor)


class AdapterOff:
    """The trained model without its adapter."""

    def __init__(self, model: CausalLM, scorer: PairScorer) -> None:
        self._model, self._scorer = model, scorer

    def log_probs(self, microbatches: Sequence[FlatBatch]) -> list[paddle.Tensor]:
        """See Reference."""
        with lora.disabled(self._model):
            return self._scorer.log_probs(self._model, microbatches)
