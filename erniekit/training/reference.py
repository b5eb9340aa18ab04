"""References of preference optimisation, which give the log-probabilities of answers before training.

A reference is a second model, or the trained one with its adapter as it was before, or numbers that were computed once
(reference_cache.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import paddle

from erniekit import lora
from erniekit.checkpoint.peft_write import adapter_parameters
from erniekit.config.schema import Config
from erniekit.data.packed_batch import PackedBatch
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import ModelInputs
from erniekit.models.scoring import pair_log_probs
from erniekit.models.sharded_blocks import local_tensors
from erniekit.training.forward_pass import final_norm, forward_pass
from erniekit.utils import log


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
        """The log-probabilities of Reference.log_probs by the present weights of `model`, in eval mode."""
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


class AdapterReference:
    """The model that a run with LoRA trains, as it was before; `start` as in `before_training`."""

    def __init__(self, model: CausalLM, scorer: PairScorer, start: Mapping[str, paddle.Tensor] | None) -> None:
        self._model, self._scorer, self._start = model, scorer, start

    def log_probs(self, microbatches: Sequence[PackedBatch]) -> list[paddle.Tensor]:
        """See Reference."""
        with before_training(self._model, self._start):
            return self._scorer.log_probs(self._model, microbatches)


def start_of_adapter(model: CausalLM, cfg: Config) -> dict[str, paddle.Tensor] | None:
    """The values that `before_training` needs, copied from a model that is not trained yet; a log line says what the
    reference is. An adapter that `lora_path` names is part of the model before training, as TRL takes it; a new one
    changes nothing.
    """
    if not cfg.lora_path:
        log.info("reference: the model without its adapter")
        return None
    log.info(f"reference: the model with the adapter of lora_path ({cfg.lora_path}), as it is before training")
    return adapter_values(model)


def adapter_values(model: CausalLM) -> dict[str, paddle.Tensor]:
    """Copies of what this process has of the adapter's parameters and of modules_to_save, by name."""
    state = lora.state_of(model)
    assert state is not None, "the model has no adapter"
    own = local_tensors(model)
    return {name: own[name].detach().clone() for name in adapter_parameters(state) if name in own}


@contextmanager
def before_training(model: CausalLM, start: Mapping[str, paddle.Tensor] | None) -> Iterator[None]:
    """A context with the model as it was before training, for forward passes only: with the values `start` of its
    adapter, or, for None, without it. Afterwards the trained state is restored bit for bit.
    """
    if start is None:
        with lora.disabled(model):
            yield
        return
    trained, own = adapter_values(model), local_tensors(model)
    try:
        for name, value in start.items():
            own[name].set_value(value)
        yield
    finally:
        for name, value in trained.items():
            own[name].set_value(value)
