"""What a process does with one step's microbatches: its own layers, and the losses that arise there.

The pipeline's executor (parallel/pipeline.py) decides when; one process alone is a pipeline of one stage.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import paddle

from erniekit.config.schema import Config
from erniekit.data.batch import PackedBatch
from erniekit.models.decoder import CausalLM, Routings
from erniekit.models.inputs import ModelInputs, batch_inputs, padded_length
from erniekit.moe.stats import RouterStats
from erniekit.nn.dropout import DropoutStep
from erniekit.parallel import pipeline
from erniekit.parallel.mesh import Mesh
from erniekit.parallel.pipeline_schedule import forward_plan
from erniekit.training.recipes.base import Recipe, Term
from erniekit.training.recipes.routers import idle_router, router_terms
from erniekit.utils.device_sums import DeviceSums


def run_chunk(
    model: CausalLM, layers: Sequence[int], inputs: ModelInputs, x_TD: paddle.Tensor | None
) -> tuple[paddle.Tensor, Routings]:
    """One chunk's layers, behind the embedding where there is no input yet."""
    return model.model.run(model.model.embed(inputs) if x_TD is None else x_TD, layers, inputs)


class _MicrobatchInputs:
    """The inputs of a step's microbatches: each is made for the first chunk that this process runs of it, and dropped
    with the last.
    """

    def __init__(
        self,
        model: CausalLM,
        microbatches: Sequence[PackedBatch],
        num_chunks: int,
        neftune_alpha: float = 0.0,
        dropout: DropoutStep | None = None,
    ) -> None:
        self._model, self._microbatches = model, microbatches
        self._neftune_alpha, self._dropout = neftune_alpha, dropout
        self._last_chunk = num_chunks - 1
        self._made: dict[int, ModelInputs] = {}

    def of(self, chunk: int, microbatch: int) -> ModelInputs:
        """For a forward pass; those of a microbatch's chunks come in order."""
        if microbatch not in self._made:
            self._made[microbatch] = batch_inputs(
                self._model,
                self._microbatches[microbatch],
                neftune_alpha=self._neftune_alpha,
                dropout=self._dropout,
            )
        return self._made.pop(microbatch) if chunk == self._last_chunk else self._made[microbatch]


def attention_dropout(cfg: Config, step: int) -> DropoutStep | None:
    """The attention dropout of optimizer step `step` (from 0), which grows over dropout_warmup_steps. None without."""
    grown = min(1.0, step / cfg.dropout_warmup_steps) if cfg.dropout_warmup_steps else 1.0
    rate = cfg.attention_probs_dropout_prob * grown
    return DropoutStep(rate, cfg.seed, step) if rate else None


def input_shape(model: CausalLM, batch: PackedBatch) -> tuple[list[int], paddle.dtype]:
    """Shape and dtype of what goes from one stage to the next: the dtype of what the layers add up."""
    rows = padded_length(model, batch) // model.token_multiple
    first = model.model.layers[model.model.layers.numbers[0]]
    return [rows, model.config.hidden_size], first.input_layernorm.weight.dtype


@dataclass
class StepSums:
    """What the microbatches of one step add up to: the divisors (of all data ranks), the mean over them of each term of
    the loss and of each metric, the loss, and what each router did.
    """

    counts: dict[str, float]
    terms: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    loss: float = 0.0
    routers: dict[tuple[int, int], RouterStats] = field(default_factory=dict)


# Keys of a stage's DeviceSums.
_LOSS = "loss"


class _TermMean(NamedTuple):
    """The mean of a recipe's or a router's term; `is_loss`: it is a part of the loss, not a metric."""

    name: str
    is_loss: bool


class _RouterSum(NamedTuple):
    """A number of RouterStats."""

    router: tuple[int, int]
    name: str


class TrainStage:
    """Runs chunk after chunk of the layers that this process holds (one chunk, or several where the pipeline is
    interleaved). When every microbatch has been forward, `on_device` holds all that `sums` reports but what routers
    counted on the host, under keys that only `sums` reads.
    """

    def __init__(
        self,
        cfg: Config,
        model: CausalLM,
        recipe: Recipe,
        chunks: Sequence[Sequence[int]],
        microbatches: Sequence[PackedBatch],
        counts: dict[str, float],
        after_backward: Callable[[int], None],
        dropout: DropoutStep | None = None,
    ) -> None:
        self.cfg, self.model, self.recipe, self.chunks = cfg, model, recipe, chunks
        self.microbatches, self.counts = microbatches, counts
        self._inputs = _MicrobatchInputs(
            model, microbatches, len(chunks), cfg.neftune_noise_alpha if cfg.neftune else 0.0, dropout
        )
        self.on_device = DeviceSums()
        self._routers: dict[tuple[int, int], RouterStats] = {}
        self._after_backward = after_backward

    def forward(
        self, chunk: int, microbatch: int, x_TD: paddle.Tensor | None
    ) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        """(output for the next stage, or None from the last; this stage's share of the loss, or None)."""
        batch, inputs = self.microbatches[microbatch], self._inputs.of(chunk, microbatch)
        x_TD, routings = run_chunk(self.model, self.chunks[chunk], inputs, x_TD)
        terms, routed = router_terms(self.cfg, self.model, routings)
        for router, (stats, on_device) in routed.items():
            self._routers[router] = self._routers[router] + stats if router in self._routers else stats
            for name, value in on_device.items():
                self.on_device.add(_RouterSum(router, name), value)
        if not _is_last(self.model, self.chunks, chunk):
            return x_TD, self._share(terms)
        return None, self._share(self.recipe.head_terms(self.model, x_TD, inputs, batch) | terms)

    def input_shape(self, chunk: int, microbatch: int) -> tuple[list[int], paddle.dtype]:
        """Shape and dtype of what the stage before sends."""
        return input_shape(self.model, self.microbatches[microbatch])

    def after_backward(self, chunk: int, microbatch: int) -> None:
        """The gradients of a chunk's pass are complete."""
        self._after_backward(chunk)

    def _share(self, terms: dict[str, Term]) -> paddle.Tensor | None:
        """The terms over the step's counts, weighted and added up."""
        shares = []
        for name, term in terms.items():
            mean = term.total / max(self.counts[term.divisor], 1.0)
            self.on_device.add(_TermMean(name, is_loss=term.weight is not None), mean)
            if term.weight is not None:
                shares.append(mean * term.weight)
        if not shares:
            return None
        loss = paddle.add_n(shares)
        self.on_device.add(_LOSS, loss)
        return loss

    def sums(self, fetched: Mapping[Hashable, np.ndarray]) -> StepSums:
        """This process's sums, once `on_device` has been fetched. All data ranks have the same routers in the same
        order, also those whose tokens are all text.
        """
        layers = self.model.model.layers
        routers = {
            (number, modality): self._routers.get((number, modality))
            or idle_router(self.cfg, self.model, number, modality)
            for number in layers.numbers
            if layers[number].sparse
            for modality in range(len(self.model.config.expert_sizes))
        }
        sums = StepSums(self.counts, loss=float(fetched.get(_LOSS, 0.0)), routers=routers)
        for key, value in fetched.items():
            if isinstance(key, _TermMean):
                (sums.terms if key.is_loss else sums.metrics)[key.name] = float(value)
            elif isinstance(key, _RouterSum):
                sums.routers[key.router].set_sum(key.name, float(value))
        return sums


# Takes a microbatch's number, the last layer's output [T, D], and the inputs of the pass.
AtHead = Callable[[int, paddle.Tensor, ModelInputs], None]


class _ForwardStage:
    """Runs this process's chunks; the last stage hands what comes out to `at_head`."""

    def __init__(
        self, model: CausalLM, chunks: Sequence[Sequence[int]], microbatches: Sequence[PackedBatch], at_head: AtHead
    ) -> None:
        self.model, self.chunks, self.microbatches, self.at_head = model, chunks, microbatches, at_head
        self._inputs = _MicrobatchInputs(model, microbatches, len(chunks))

    def forward(
        self, chunk: int, microbatch: int, x_TD: paddle.Tensor | None
    ) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        inputs = self._inputs.of(chunk, microbatch)
        x_TD, _ = run_chunk(self.model, self.chunks[chunk], inputs, x_TD)
        if not _is_last(self.model, self.chunks, chunk):
            return x_TD, None
        self.at_head(microbatch, x_TD, inputs)
        return None, None

    def input_shape(self, chunk: int, microbatch: int) -> tuple[list[int], paddle.dtype]:
        return input_shape(self.model, self.microbatches[microbatch])

    def after_backward(self, chunk: int, microbatch: int) -> None:
        """Nothing goes backward here."""


def forward_pass(
    model: CausalLM,
    mesh: Mesh,
    chunks: Sequence[Sequence[int]],
    microbatches: Sequence[PackedBatch],
    at_head: AtHead,
) -> None:
    """Run microbatches through all stages in eval mode, without gradients. Every rank asks at the same time."""
    was_training = model.training
    model.eval()
    actions = forward_plan(mesh.degrees.pipeline, len(microbatches), len(chunks), mesh.blocking_sends)[mesh.pipe]
    pipeline.run(actions, _ForwardStage(model, chunks, microbatches, at_head), mesh.pipe_group.ranks)
    if was_training:
        model.train()


def _is_last(model: CausalLM, chunks: Sequence[Sequence[int]], chunk: int) -> bool:
    return model.shard.has_head and chunk == len(chunks) - 1
