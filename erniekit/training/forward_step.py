"""The forward and backward passes of a training step on one pipeline stage, with the losses that are computed there.

The pipeline's executor (parallel/pipeline.py) decides when each chunk runs; one process alone is a pipeline of one
stage.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import paddle

from erniekit.config.schema import Config
from erniekit.data.packed_batch import PackedBatch
from erniekit.models.decoder import CausalLM
from erniekit.models.picture_balance import PatchLoad
from erniekit.moe.stats import RouterStats
from erniekit.nn.dropout import DropoutStep
from erniekit.nn.neftune import NoiseStep
from erniekit.training.forward_pass import ChunkRunner
from erniekit.training.recipes.base import Recipe, Term
from erniekit.training.recipes.routers import idle_router, router_terms
from erniekit.utils.device_sums import DeviceSums
from erniekit.utils.spans import span


def _attention_dropout(cfg: Config, step: int) -> DropoutStep | None:
    """The attention dropout of optimizer step `step` (from 0), which grows over dropout_warmup_steps. None without."""
    grown = min(1.0, step / cfg.dropout_warmup_steps) if cfg.dropout_warmup_steps else 1.0
    rate = cfg.attention_probs_dropout_prob * grown
    return DropoutStep(rate, cfg.seed, step) if rate else None


@dataclass
class StepSums:
    """The sums over the microbatches of one step: the divisors (over all data ranks), each term of the loss and each
    metric divided by them, the extremes ("max" or "min", and the value), the loss, and the statistics of each router.
    """

    counts: dict[str, float]
    terms: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    extremes: dict[str, tuple[str, float]] = field(default_factory=dict)
    loss: float = 0.0
    routers: dict[tuple[int, int], RouterStats] = field(default_factory=dict)


# Keys of a stage's DeviceSums.
_LOSS = "loss"


class _TermMean(NamedTuple):
    """The mean of a recipe's or a router's term; `is_loss`: it is a part of the loss, not a metric."""

    name: str
    is_loss: bool


class _Extreme(NamedTuple):
    """A microbatch's candidate for the largest or smallest value of a metric."""

    name: str
    reduce: str
    number: int


def merge_extremes(target: dict[str, tuple[str, float]], name: str, reduce: str, value: float) -> None:
    """Add a candidate to the extremes of a step."""
    known = target.get(name, (reduce, value))[1]
    target[name] = (reduce, max(known, value) if reduce == "max" else min(known, value))


class _RouterSum(NamedTuple):
    """A number of RouterStats."""

    router: tuple[int, int]
    name: str


class TrainStage:
    """Runs chunk after chunk of the layers that this process holds (one chunk, or several where the pipeline is
    interleaved). Gradients are those of the loss times `loss_scale`, which nothing that is reported contains. When
    every microbatch has been forward, `on_device` holds all that `sums` reports but what routers counted on the host,
    under keys that only `sums` reads. Dropout and noise are those of the optimizer step `step`, from 0.
    """

    def __init__(
        self,
        cfg: Config,
        model: CausalLM,
        recipe: Recipe,
        microbatches: Sequence[PackedBatch],
        counts: dict[str, float],
        after_backward: Callable[[int], None],
        step: int = 0,
        loss_scale: float = 1.0,
    ) -> None:
        self.cfg, self.recipe, self.counts, self._loss_scale = cfg, recipe, counts, loss_scale
        noise = NoiseStep(cfg.neftune_noise_alpha, cfg.seed, step) if cfg.neftune else None
        self._runner = ChunkRunner(model, microbatches, noise, _attention_dropout(cfg, step))
        self.on_device = DeviceSums()
        self._routers: dict[tuple[int, int], RouterStats] = {}
        self._num_extremes = 0
        self._after_backward = after_backward

    def forward(
        self, chunk: int, microbatch: int, x_TD: paddle.Tensor | None
    ) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        """(output for the next stage, or None from the last; this stage's share of the loss, or None)."""
        runner = self._runner
        x_TD, routings, inputs = runner.run(chunk, microbatch, x_TD)
        terms, routed = router_terms(self.cfg, runner.model, routings)
        for router, (stats, on_device) in routed.items():
            self._routers[router] = self._routers[router] + stats if router in self._routers else stats
            for name, value in on_device.items():
                self.on_device.add(_RouterSum(router, name), value)
        if not runner.reaches_head(chunk):
            return x_TD, self._share(terms)
        with span("head and loss"):
            head_terms = self.recipe.head_terms(runner.model, x_TD, inputs, runner.microbatches[microbatch])
        return None, self._share(head_terms | terms)

    @property
    def patch_load(self) -> PatchLoad | None:
        """How data ranks divide the patches of the step; None where each encodes its own."""
        return self._runner.patch_load

    def input_shape(self, chunk: int, microbatch: int) -> tuple[list[int], paddle.dtype]:
        """Shape and dtype of what the stage before sends."""
        return self._runner.input_shape(microbatch)

    def after_backward(self, chunk: int, microbatch: int) -> None:
        """Called when the gradients of a chunk's pass are complete."""
        self._after_backward(chunk)

    def _share(self, terms: dict[str, Term]) -> paddle.Tensor | None:
        """The weighted sum of the terms, each divided by the step's count."""
        shares = []
        for name, term in terms.items():
            if term.reduce != "sum":
                self._num_extremes += 1
                self.on_device.add(_Extreme(name, term.reduce, self._num_extremes), term.total)
                continue
            mean = term.total / max(self.counts[term.divisor], 1.0)
            self.on_device.add(_TermMean(name, is_loss=term.weight is not None), mean)
            if term.gradient_divisor is not None:
                zero = term.total - term.total.detach()  # its gradient alone
                mean = mean.detach() + zero / max(self.counts[term.gradient_divisor], 1.0)
            if term.weight is not None:
                shares.append(mean * term.weight)
        if not shares:
            return None
        loss = paddle.add_n(shares)
        self.on_device.add(_LOSS, loss)
        return loss if self._loss_scale == 1.0 else loss * self._loss_scale

    def sums(self, fetched: Mapping[Hashable, np.ndarray]) -> StepSums:
        """This process's sums, once `on_device` has been fetched. All data ranks have the same routers in the same
        order, also those whose tokens are all text.
        """
        model = self._runner.model
        layers = model.model.layers
        routers = {
            (number, modality): self._routers.get((number, modality)) or idle_router(self.cfg, model, number, modality)
            for number in layers.numbers
            if layers[number].sparse
            for modality in range(len(model.config.expert_sizes))
        }
        sums = StepSums(self.counts, loss=float(fetched.get(_LOSS, 0.0)), routers=routers)
        for key, value in fetched.items():
            if isinstance(key, _TermMean):
                (sums.terms if key.is_loss else sums.metrics)[key.name] = float(value)
            elif isinstance(key, _Extreme):
                merge_extremes(sums.extremes, key.name, key.reduce, float(value))
            elif isinstance(key, _RouterSum):
                sums.routers[key.router].set_sum(key.name, float(value))
        # Data ranks add up the same terms, also one whose trained routers got no token in this step.
        for name in (name for stats in routers.values() for name in stats.losses):
            sums.terms.setdefault(name, 0.0)
        return sums
