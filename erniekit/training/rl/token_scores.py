"""Log-probabilities of completions' tokens by passes of the training computation without gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import paddle

from erniekit.config.schema import Config
from erniekit.data.packed_batch import PackedBatch
from erniekit.data.prompts import Prompt
from erniekit.losses.log_probs import token_statistics
from erniekit.models.decoder import CausalLM
from erniekit.models.inputs import ModelInputs
from erniekit.nn.narrow import gather
from erniekit.parallel import comm
from erniekit.parallel.mesh import Mesh
from erniekit.training.forward_pass import final_norm, forward_pass
from erniekit.training.rl.batches import BatchOptions, microbatches
from erniekit.training.rl.completions import Completion


@dataclass(frozen=True)
class TokenScorer:
    """Log-probabilities [L] fp32 of a batch's labels, whose distributions have this temperature; at most
    `max_logit_tokens` tokens' logits exist at a time.
    """

    temperature: float
    max_logit_tokens: int
    entropy_gradient: bool = False

    def log_probs(self, model: CausalLM, batches: Sequence[PackedBatch]) -> list[paddle.Tensor]:
        """The log-probabilities of each microbatch's labels by the present weights of `model`, in eval mode; zeros on
        stages without the head.
        Every rank calls it at the same time.
        """
        return self._of(model, batches, 0)

    def entropies(self, model: CausalLM, batches: Sequence[PackedBatch]) -> list[paddle.Tensor]:
        """The entropies of the labels' distributions, in the form of `log_probs`."""
        return self._of(model, batches, 1)

    def _of(self, model: CausalLM, batches: Sequence[PackedBatch], which: int) -> list[paddle.Tensor]:
        values = [paddle.zeros([len(batch.supervised)]) for batch in batches]

        def note(number: int, x_TD: paddle.Tensor, inputs: ModelInputs) -> None:
            hidden_TD = model.enter_head(final_norm(model, x_TD))
            if len(batches[number].supervised):
                values[number] = self.statistics(model, hidden_TD, batches[number])[which].detach()

        forward_pass(model, batches, note)
        return values

    def statistics(
        self, model: CausalLM, hidden_TD: paddle.Tensor, batch: PackedBatch
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """(log-probability of each label, entropy of its distribution) [L], with gradients, from the hidden states of
        all tokens as the head takes them. There must be labels.
        """
        places = batch.supervised
        rows = gather(hidden_TD, paddle.to_tensor(places))
        labels, head = paddle.to_tensor(batch.labels[places]), model.output_head()
        return token_statistics(rows, head, labels, self.max_logit_tokens, self.temperature, self.entropy_gradient)


def score_completions(
    cfg: Config,
    mesh: Mesh,
    completions: Sequence[Completion],
    prompt_of: Callable[[int], Prompt],
    score: Callable[[Sequence[PackedBatch]], list[paddle.Tensor]],
    options: BatchOptions,
) -> list[np.ndarray]:
    """What `score` says of the tokens of each completion, float32 [n], NaN for those that the policy did not choose, by
    passes in the microbatches of training. Every rank gets all. `options`: of the batches; all sampled tokens are
    labels.
    """
    assert not options.mask_truncated, "every completion is scored"
    size, world = cfg.batch_size, mesh.degrees.data
    batches = microbatches(completions, prompt_of, size, mesh.data, world, options)
    mine: list[list[float]] = []
    for batch, values in zip(batches, score(batches), strict=True):
        ends = np.cumsum(batch.completions.lengths)[:-1]
        mine += [part.tolist() for part in np.split(values.numpy(), ends)] if len(batch.completions) else []
    numbers = [
        number
        for start in range(mesh.data * size, len(completions), size * world)
        for number in range(start, min(start + size, len(completions)))
    ]
    lines = list(zip(numbers, mine, strict=True)) if mesh.holds_results else []
    result: list[np.ndarray] = [np.zeros(0, np.float32)] * len(completions)
    for part in comm.gather_objects(lines, mesh.world_group):
        for number, values in part:
            completion = completions[number]
            result[number] = np.full(len(completion.ids), np.nan, np.float32)
            result[number][completion.is_sampled] = values
    return result
