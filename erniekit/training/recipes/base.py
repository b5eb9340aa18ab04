"""What a recipe gives the trainer: named sums, and the counts that each is divided by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import paddle

from erniekit.data.batch import PackedBatch
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import ModelInputs


@dataclass(frozen=True)
class Term:
    """One part of the loss: `weight * total / count`, where the count named `divisor` is summed over the whole step.

    `total` is a scalar sum over this microbatch. The trainer logs `total / count` as "loss_" and the term's name; a
    term without weight is no part of the loss and only logged, under its name alone.
    """

    total: paddle.Tensor
    divisor: str
    weight: float | None = 1.0


class Recipe(Protocol):
    """A method. `counts` is known before any model runs, so that every microbatch is divided by the step's global
    count. The layers' own terms (router losses) are added by the stage that runs them, whatever the recipe.
    """

    reports_terms: bool  # whether an evaluation reports the recipe's terms, or the labels' loss and accuracy

    def prepare(self, microbatches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """A step's microbatches with what the recipe needs to know of them before any model is trained on them. Every
        rank asks at the same time, so passes through the model are possible.
        """
        ...

    def after_step(self, step: int) -> None:
        """Optimizer step number `step` is done."""
        ...

    def extra_weights(self) -> dict[str, dict[str, paddle.Tensor]]:
        """Weights that a run needs to go on beside those it trains, under the model's names, by the directory of a
        checkpoint that holds them.
        """
        ...

    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """Divisors of this microbatch's terms; they are summed over microbatches and data ranks."""
        ...

    def head_terms(
        self, model: CausalLM, x_TD: paddle.Tensor, inputs: ModelInputs, batch: PackedBatch
    ) -> dict[str, Term]:
        """The terms that the last layer's output [T, D], before the final norm, gives; asked of the last stage only."""
        ...


class PlainSteps:
    """For recipes that need nothing before or after a step."""

    reports_terms = False

    def prepare(self, microbatches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """The microbatches as they are."""
        return list(microbatches)

    def after_step(self, step: int) -> None:
        """Nothing to do."""

    def extra_weights(self) -> dict[str, dict[str, paddle.Tensor]]:
        """None."""
        return {}
