"""Next-token training that is also distilled from the model before training, unquantised (qat_distill_weight)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import paddle

from erniekit.data.packed_batch import PackedBatch
from erniekit.losses.distillation import FORWARD_KL, Divergence, linear_divergence
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import ModelInputs
from erniekit.nn.narrow import gather
from erniekit.training.forward_pass import final_norm, forward_pass
from erniekit.training.recipes.base import Recipe, RecipeContext, Term
from erniekit.training.recipes.causal import CausalRecipe
from erniekit.utils import log


class Teacher:
    """A frozen model that a trained one follows where a batch has labels."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self._states: dict[int, paddle.Tensor] = {}  # of the step's microbatches, on stages with the head
        for parameter in model.parameters():
            parameter.stop_gradient = True

    @staticmethod
    def before_training(context: RecipeContext) -> "Teacher":
        """A second copy of the model, with its first weights and without quantisation or adapter."""
        prepared, model = context.prepared, context.model
        precision = replace(prepared.options.precision, qat=None)
        options = replace(prepared.options, precision=precision, adapter=None, recompute=None, training=False)
        second = replace(prepared, options=options, adapter=None).build(model.mesh, model.chunks)
        log.info("qat_distill_weight: the teacher is a second copy of the model, without quantisation")
        return Teacher(second)

    @paddle.no_grad()
    def observe(self, microbatches: Sequence[PackedBatch]) -> None:
        """Keep the teacher's states for a step's microbatches. Every rank calls it at the same time."""
        self._states = {}

        def note(number: int, x_TD: paddle.Tensor, inputs: ModelInputs) -> None:
            batch = microbatches[number]
            self._states[id(batch)] = _supervised_states(self.model, x_TD, batch).detach()

        forward_pass(self.model, microbatches, note)

    def divergence(
        self, model: CausalLM, x_TD: paddle.Tensor, batch: PackedBatch, max_tokens: int, kind: Divergence = FORWARD_KL
    ) -> paddle.Tensor:
        """The divergence of `model` from the teacher, summed over the supervised tokens of an observed microbatch, from
        the last layer's output [T, D]; at most `max_tokens` tokens' logits exist at a time.
        """
        hidden = _supervised_states(model, x_TD, batch)
        weights = paddle.full([hidden.shape[0]], 1.0 if len(batch.supervised) else 0.0)
        states, head = self._states.pop(id(batch)), self.model.output_head()
        return linear_divergence(hidden, model.output_head(), states, head, weights, max_tokens, kind)


@dataclass(frozen=True, kw_only=True)
class DistilledRecipe(CausalRecipe):
    """(1 - d) * cross-entropy + d * KL(teacher || model) over the supervised tokens, each weighing the same in the
    second term; the terms of multi-token prediction are those of CausalRecipe.
    """

    teacher: Teacher

    def prepare(self, microbatches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """See Recipe: the teacher's pass over the step's microbatches."""
        prepared = super().prepare(microbatches)
        self.teacher.observe(prepared)
        return prepared

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """See CausalRecipe; and the supervised tokens."""
        return super().counts(batch) | {"distill": float(len(batch.supervised))}

    def head_terms(
        self, model: CausalLM, x_TD: paddle.Tensor, inputs: ModelInputs, batch: PackedBatch
    ) -> dict[str, Term]:
        """The terms of CausalRecipe with the weight of "lm" lowered, and "distill"."""
        share = self.cfg.qat_distill_weight
        terms = super().head_terms(model, x_TD, inputs, batch)
        terms["lm"] = replace(terms["lm"], weight=1.0 - share)
        total = self.teacher.divergence(model, x_TD, batch, self.cfg.loss_subbatch_seqlen)
        return terms | {"distill": Term(total, "distill", share)}


def _supervised_states(model: CausalLM, x_TD: paddle.Tensor, batch: PackedBatch) -> paddle.Tensor:
    """What the head takes of the supervised tokens [S, D], or, where there are none, of one that weighs nothing: all
    ranks run the same graph.
    """
    places = batch.supervised if len(batch.supervised) else np.zeros(1, np.int64)
    return gather(model.enter_head(final_norm(model, x_TD)), paddle.to_tensor(places))


def causal_recipe(context: RecipeContext) -> Recipe:
    """Next-token training as the configuration asks for it."""
    plain, cfg = CausalRecipe.build(context), context.cfg
    if cfg.qat == "none" or not cfg.qat_distill_weight:
        return plain
    return DistilledRecipe(**vars(plain), teacher=Teacher.before_training(context))
