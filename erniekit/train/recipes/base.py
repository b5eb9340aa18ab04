"""What a recipe gives the trainer: named sums, and the counts that each is divided by."""

from dataclasses import dataclass
from typing import Protocol

import paddle

from erniekit.models.decoder import CausalLM
from erniekit.nn.attention import Documents
from erniekit.train.flat import FlatBatch


@dataclass(frozen=True)
class Term:
    """One part of the loss: `weight * total / count`, where the count named `divisor` is summed over the whole step.

    `total` is a scalar sum over this microbatch. The trainer logs `total / count` under the term's name.
    """

    total: paddle.Tensor
    divisor: str
    weight: float = 1.0


class Recipe(Protocol):
    """A method. `counts` is known before any model runs, so that every microbatch is divided by the step's global
    count. The layers' own terms (router losses) are added by the stage that runs them, whatever the recipe.
    """

    def counts(self, batch: FlatBatch) -> dict[str, float]:
        """Divisors of this microbatch's terms; they are summed over microbatches and data ranks."""
        ...

    def noise(self, model: CausalLM, batch: FlatBatch) -> paddle.Tensor | None:
        """What is added to the embeddings [T, D], or None."""
        ...

    def head_terms(
        self, model: CausalLM, x_TD: paddle.Tensor, documents: Documents, batch: FlatBatch
    ) -> dict[str, Term]:
        """The terms that the last layer's output [T, D], before the final norm, gives; asked of the last stage only."""
        ...
