"""The time of a step: operators on each stage, the pipeline's own lists of actions on a clock, then what follows the
last backward pass.

The step is `pipeline + data + optimizer`: `pipeline` is executed by plan/events.py with the seconds of each stage's
chunks; `data` is what the backward pass of the last microbatch does not hide of the exchange of gradients and weights.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from erniekit.parallel.pipeline_schedule import Compute, Forward
from erniekit.plan.collectives import num_exchanges, stage_data_bytes, trained_entries, transfer_bytes
from erniekit.plan.events import Duration, Timeline, execute
from erniekit.plan.flops import TokenFlops, token_flops
from erniekit.plan.hardware import GIGA, Hardware
from erniekit.plan.job import Job
from erniekit.plan.layout import Layout, Run, run_of
from erniekit.plan.operator_time import Seconds, layer_backward, layer_forward
from erniekit.plan.work import Layer, work_of

# Bytes that AdamW moves for one parameter: gradient and three fp32 numbers of state read, these and the weight written.
ADAM_BYTES = 30
# A pipeline with more microbatches than this many times its stages is executed on the clock in part.
EXECUTED_PERIODS = 8
# Bytes of the optimizer's state that come from host memory for one parameter, and go back at the same time.
OFFLOADED_BYTES = 12


@dataclass(frozen=True)
class StageTime:
    """Seconds of one microbatch on each chunk of a stage, by kind; `data`: seconds of the collectives of gradients and
    weights in a step, of which `data_exposed` are not hidden; `optimizer`: of the update.
    """

    forward: tuple[Seconds, ...]
    backward: tuple[Seconds, ...]
    data: float
    data_exposed: float
    optimizer: float
    offload: float

    @property
    def microbatch(self) -> float:
        """Seconds of all chunks' forward and backward pass."""
        return sum(sum(chunk.values()) for chunk in (*self.forward, *self.backward))

    @property
    def after(self) -> float:
        """Seconds after the last backward pass."""
        return self.data_exposed + self.optimizer + self.offload


@dataclass(frozen=True)
class StepTime:
    """A planned step. `transfer`: seconds of a message between two stages."""

    run: Run
    card: Hardware
    stages: tuple[StageTime, ...]
    timeline: Timeline = field(repr=False)
    flops: TokenFlops
    transfer: float

    @cached_property
    def pipeline_seconds(self) -> float:
        """The seconds from the first forward to the last backward pass."""
        return float(self.timeline.seconds[0])

    @cached_property
    def seconds(self) -> float:
        """The whole step."""
        ends = [float(end[0]) + stage.after for end, stage in zip(self.timeline.finished, self.stages)]
        return max(ends)

    @property
    def slowest(self) -> int:
        """The stage that computes longest."""
        return int(np.argmax([stage.microbatch for stage in self.stages]))

    @property
    def bubble(self) -> float:
        """The share of the pipeline's time in which a stage is idle, on average: by the schedule, and where stages take
        different times.
        """
        return 1 - float(self.timeline.busy.mean()) / self.pipeline_seconds

    @property
    def seconds_by_kind(self) -> Seconds:
        """Where the time of the slowest stage goes; `bubble`: it waits. The values add up to `seconds`."""
        stage, times = self.stages[self.slowest], self.run.layout.microbatches
        spent: Seconds = defaultdict(float)
        for chunk in (*stage.forward, *stage.backward):
            _add(spent, chunk, times)
        idle = self.seconds - sum(spent.values()) - stage.after
        spent["bubble"] = max(idle, 0.0)
        spent["data"] += stage.data_exposed
        spent["optimizer"] += stage.optimizer
        spent["offload"] += stage.offload
        return {kind: spent[kind] for kind in sorted(spent, key=lambda kind: -spent[kind]) if spent[kind]}

    @property
    def tokens_per_second(self) -> float:
        """The tokens per second of all devices."""
        return self.run.layout.step_tokens / self.seconds

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """The tokens per second of one device."""
        return self.tokens_per_second / self.run.layout.gpus

    def model_flops_per_second(self, convention: str = "causal") -> float:
        """The model FLOPs per second of one device; `convention`: causal or full (see plan/flops.py)."""
        flops = self.flops.causal if convention == "causal" else self.flops.full
        return self.tokens_per_second_per_gpu * flops

    def mfu(self, convention: str = "causal") -> float:
        """Model FLOPs utilisation: of the 16-bit peak, also where products are in FP8; on a CPU of its fp32 peak."""
        peak = self.card.peak("fp32") if self.run.layout.precision == "fp32" else self.card.half_peak
        return self.model_flops_per_second(convention) / peak

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilisation: with what is computed again."""
        return self.mfu() * self.flops.hardware / self.flops.causal

    def days(self, tokens: float) -> float:
        """Days of training on this many tokens, without failures."""
        return tokens / self.tokens_per_second / 86400

    def gpu_hours(self, tokens: float) -> float:
        """The same in hours of one device."""
        return self.days(tokens) * 24 * self.run.layout.gpus


def plan_time(job: Job, card: Hardware) -> StepTime:
    """The time of one step of a job on a cluster of these cards."""
    return step_time(run_of(job, work_of(job)), card)


def step_time(run: Run, card: Hardware) -> StepTime:
    """The time of one step of a run."""
    layout = run.layout
    stages = stage_times(run, card)
    rate, latency = card.link("send", 2, layout.spans_hosts(2, layout.data * layout.context * layout.tensor))
    transfer = transfer_bytes(layout, run.work.hidden) / rate + latency if layout.pipeline > 1 else 0.0
    totals = [([sum(c.values()) for c in s.forward], [sum(c.values()) for c in s.backward]) for s in stages]

    def duration(stage: int, action: Compute) -> float:
        return totals[stage][0 if isinstance(action, Forward) else 1][action.chunk]

    timeline = _pipeline(layout, duration, transfer)
    flops = token_flops(run.work, list(layout.lengths), layout.recomputed, layout.passes_ahead)
    return StepTime(run, card, stages, timeline, flops, transfer)


def least_seconds(run: Run, card: Hardware) -> float:
    """A lower bound of the time of a step, without executing its pipeline: for comparing many layouts.

    A stage starts when the first chunks of the stages before it have passed a microbatch forward; then it computes all
    microbatches; its last action is a backward pass of its first chunk, after which those of the stages before follow.
    """
    times = run.layout.microbatches
    least = before = behind = 0.0
    stages = stage_times(run, card)
    for stage in stages:
        busy = before + times * stage.microbatch
        least = max(least, busy + stage.after, busy + behind + stages[0].after)
        before += sum(stage.forward[0].values())
        behind += sum(stage.backward[0].values())
    return least


def stage_times(run: Run, card: Hardware) -> tuple[StageTime, ...]:
    """The times of all stages. Those that have the same layers are computed once."""
    known: dict[tuple[object, ...], StageTime] = {}
    passes: _Passes = {}
    found = []
    for stage, chunks in enumerate(run.numbers):
        alike = tuple(
            (tuple(id(layer) for layer in run.chunk(stage, chunk)), tuple(run.is_recomputed(n) for n in numbers))
            for chunk, numbers in enumerate(chunks)
        )
        key = (stage == 0, alike)
        if key not in known:
            known[key] = _stage_time(run, stage, card, passes)
        found.append(known[key])
    return tuple(found)


def _pipeline(layout: Layout, duration: Duration, transfer: float) -> Timeline:
    """The pipeline of a step on the clock. Between warm-up and cool-down it repeats itself every p microbatches (p
    stages), so a long step is that of fewer microbatches and a multiple of this period.
    """

    def run(microbatches: int) -> Timeline:
        return execute(layout.actions(microbatches), duration, transfer, layout.synchronous_sends, recorded=None)

    period = layout.pipeline
    left_out = max(layout.microbatches // period - EXECUTED_PERIODS, 0)
    if not left_out:
        return run(layout.microbatches)
    short = run(layout.microbatches - left_out * period)
    shorter = run(layout.microbatches - (left_out + 1) * period)
    return Timeline(
        short.finished + left_out * (short.finished - shorter.finished),
        short.busy + left_out * (short.busy - shorter.busy),
    )


def _add(total: Seconds, spent: Mapping[str, float], times: float = 1.0) -> None:
    for kind, seconds in spent.items():
        total[kind] += seconds * times


# Forward and backward pass of layers: by identity (most layers are one object), with embedding, recomputed.
_Passes = dict[tuple[int, bool, bool], tuple[Seconds, Seconds]]


def _chunk_times(run: Run, stage: int, card: Hardware, known: _Passes) -> tuple[list[Seconds], list[Seconds]]:
    """Forward and backward pass of each chunk of a stage. Equal layers are computed once, and kept in `known`."""
    layout = run.layout

    def passes(layer: Layer, embedding: bool, recomputed: bool) -> tuple[Seconds, Seconds]:
        key = (id(layer), embedding, recomputed)
        if key not in known:
            there = layer_forward(layer, layout, card, embedding)
            known[key] = (there, layer_backward(layer, layout, card, embedding, recomputed))
        return known[key]

    forward: list[Seconds] = []
    backward: list[Seconds] = []
    for chunk, numbers in enumerate(run.numbers[stage]):
        there: Seconds = defaultdict(float)
        back: Seconds = defaultdict(float)
        before = len(run.work.first) if numbers[0] == 0 else 0
        for place, layer in enumerate(run.chunk(stage, chunk)):
            number = numbers[0] + place - before  # of the decoder layer, or outside `numbers`
            recomputed = run.is_recomputed(number) if number in numbers else layout.recomputed.in_ahead
            embedding = stage == chunk == place == 0
            one, other = passes(layer, embedding, recomputed)
            _add(there, one)
            _add(back, other)
        if layout.passes_ahead:  # before the step, without a backward pass
            there["reference"] = layout.passes_ahead * sum(there.values())
        forward.append(there)
        backward.append(back)
    return forward, backward


def _stage_time(run: Run, stage: int, card: Hardware, known: _Passes) -> StageTime:
    layout = run.layout
    forward, backward = _chunk_times(run, stage, card, known)
    microbatch = sum(sum(chunk.values()) for chunk in (*forward, *backward))
    layers = run.stage(stage)
    embedding = run.work.embedding if stage == 0 else 0
    entries = trained_entries(layers, layout, embedding)
    data = _data_seconds(layers, layout, card, embedding)
    if layout.zero_stage == 3 and layout.blocks_alone:
        hidden = 0.0
    elif layout.zero_stage < 2:
        # Gradients leave while the last microbatch is computed backward, weights arrive during the first forward pass.
        hidden = microbatch
    else:
        hidden = layout.microbatches * microbatch
    one_bucket = data / max(len(layers), 1)
    exposed = min(max(data - hidden, one_bucket), data)
    owned = sum(entry.chunk for entry in entries)
    offload = 0.0
    optimizer = ADAM_BYTES * owned / card.memory_bandwidth
    if layout.offload_optimizer:
        offload = OFFLOADED_BYTES * owned / (card.pcie_gb_s * GIGA)
    return StageTime(tuple(forward), tuple(backward), data, exposed, optimizer, offload)


def _data_seconds(layers: Sequence[Layer], layout: Layout, card: Hardware, embedding: int) -> float:
    ranks = layout.data * layout.context
    spans = layout.spans_hosts(ranks, layout.tensor)
    seconds = 0.0
    exchanges = num_exchanges(layers, layout)
    for kind, sent in stage_data_bytes(layers, layout, embedding).items():
        rate, latency = card.link("all_reduce" if kind == "all_reduce" else "all_gather", ranks, spans)
        seconds += sent / rate + exchanges * latency * (sent > 0)
    return seconds
