"""Next-token training that is also distilled from the model before training, unquantised (qat_distill_weight)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import paddle

from erniekit.data.packed_batch import PackedBatch
from erniekit.losses.distillation import linear_divergence
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import ModelInputs
from erniekit.nn.narrow import gather
from erniekit.training.forward_pass import final_norm, forward_pass
from erniekit.training.recipes.base import Recipe, RecipeContext, Term
from erniekit.training.recipes.causal import CausalRecipe
from erniekit.utils import log


class Teacher:
    """A frozen model that gives its states in front of the output head where a batch has labels."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
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
    def states(self, microbatches: Sequence[PackedBatch]) -> list[paddle.Tensor | None]:
        """The states [S, D] after the final norm at the S supervised tokens of each microbatch; None on stages without
        the head. Every rank calls it at the same time.
        """
        found: list[paddle.Tensor | None] = [None] * len(microbatches)

        def note(number: int, x_TD: paddle.Tensor, inputs: ModelInputs) -> None:
            hidden = self.model.enter_head(final_norm(self.model, x_TD))
            found[number] = gather(hidden, paddle.to_tensor(places_of(microbatches[number]))).detach()

        forward_pass(self.model, microbatches, note)
        return found


@dataclass(frozen=True)
class DistilledRecipe(CausalRecipe):
    """(1 - d) * cross-entropy + d * KL(teacher || model) over the supervised tokens, each weighing the same in the
    second term; the terms of multi-token prediction are those of CausalRecipe.
    """

    teacher: Teacher | None = None
    _states: dict[int, paddle.Tensor | None] = field(default_factory=dict)

    def prepare(self, microbatches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """See Recipe: the teacher's pass over the step's microbatches."""
        assert self.teacher is not None
        self._states.clear()
        prepared = super().prepare(microbatches)
        self._states.update(zip(map(id, prepared), self.teacher.states(prepared), strict=True))
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
        teacher_states, teacher = self._states.pop(id(batch)), self.teacher
        assert teacher is not None and teacher_states is not None
        hidden = gather(model.enter_head(final_norm(model, x_TD)), paddle.to_tensor(places_of(batch)))
        weights = paddle.full([hidden.shape[0]], 1.0 if len(batch.supervised) else 0.0)
        total = linear_divergence(
            hidden,
            model.output_head(),
            teacher_states,
            teacher.model.output_head(),
            weights,
            self.cfg.loss_subbatch_seqlen,
        )
        return terms | {"distill": Term(total, "distill", share)}


def places_of(batch: PackedBatch) -> np.ndarray:
    """The supervised tokens, or, where there are none, one that weighs nothing: all ranks run the same graph."""
    return batch.supervised if len(batch.supervised) else np.zeros(1, np.int64)


def causal_recipe(context: RecipeContext) -> Recipe:
    """Next-token training as the configuration asks for it."""
    plain, cfg = CausalRecipe.build(context), context.cfg
    if cfg.qat == "none" or not cfg.qat_distill_weight:
        return plain
    return DistilledRecipe(plain.cfg, plain.mtp_depths, plain.by_modality, Teacher.before_training(context))
