"""The interface between recipes and the trainer: named sums, and the counts by which they are divided."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import paddle

from erniekit.build import PreparedModel
from erniekit.config.schema import Config
from erniekit.data.chat.template import Template
from erniekit.data.chat.tokenizer import Tokenizer
from erniekit.data.loader import StepSource
from erniekit.data.packed_batch import PackedBatch
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import ModelInputs
from erniekit.training.reference import Reference


@dataclass(frozen=True)
class Term:
    """One term of the loss: `weight * total / count`, where the count named `divisor` is summed over the whole step.

    `total` is a scalar sum over this microbatch. The trainer logs `total / count` as "loss_" and the term's name; a
    term without weight is no part of the loss and only logged, under its name alone. `gradient_divisor`: the count that
    the gradient is divided by, where it is not that of the logged value. `reduce`: of a term without weight, "max" or
    "min" if its number for the step is the largest or smallest of the microbatches', which nothing divides.
    """

    total: paddle.Tensor
    divisor: str
    weight: float | None = 1.0
    gradient_divisor: str | None = None
    reduce: Literal["sum", "max", "min"] = "sum"


class Recipe(ABC):
    """The loss of a method. `counts` is known before any model runs, so that every microbatch is divided by the step's
    global count. The layers' own terms (router losses) are added by the stage that runs them, whatever the recipe.

    `reference`: the model that the loss compares with, or None.
    """

    reference: Reference | None = None

    def before_step(self, step: int) -> None:
        """Called before `prepare` of optimizer step number `step`, from 0."""
        return

    def prepare(self, microbatches: Sequence[PackedBatch]) -> list[PackedBatch]:
        """Add to a step's microbatches what the recipe needs before the step, such as a reference's log-probabilities.
        Every rank calls it at the same time, so passes through the model are possible.
        """
        return list(microbatches)

    def after_step(self, step: int) -> None:
        """Called when optimizer step number `step` is done."""
        return

    def extra_weights(self) -> dict[str, dict[str, paddle.Tensor]]:
        """Weights that a run needs in addition to the trained ones in order to resume: under the model's names, by
        their directory in a checkpoint.
        """
        return {}

    @abstractmethod
    def counts(self, batch: PackedBatch) -> dict[str, float]:
        """The divisors of this microbatch's terms, which are summed over microbatches and data ranks."""

    @abstractmethod
    def head_terms(
        self, model: CausalLM, x_TD: paddle.Tensor, inputs: ModelInputs, batch: PackedBatch
    ) -> dict[str, Term]:
        """The terms from the last layer's output [T, D], before the final norm. Only the last stage calls it."""


@dataclass(frozen=True)
class RecipeContext:
    """What a recipe may be built from. `model` has its first weights, so it is still its own reference; `prepared` can
    build a second copy of it. `template`: the run's chat template; None for plain text.
    `loader`: the training data.
    """

    cfg: Config
    prepared: PreparedModel
    model: CausalLM
    tokenizer: Tokenizer
    template: Template | None
    loader: StepSource
