"""The shares of values in FP8 at the end of the range and of those that became zero, for metrics.jsonl."""

from collections.abc import Hashable, Mapping
from typing import NamedTuple

import numpy as np

from erniekit.models.decoder import CausalLM
from erniekit.models.fp8 import fp8_counts
from erniekit.parallel import comm
from erniekit.parallel.process_group import Group
from erniekit.precision.fp8_counts import KINDS
from erniekit.utils.device_sums import DeviceSums


class _Count(NamedTuple):
    kind: str


class Fp8Shares:
    """Counts in every `every`-th step (0: never) of what a model multiplies in FP8 on this rank, in the passes of
    training alone: evaluations and references run between the steps and are not counted.
    """

    def __init__(self, model: CausalLM, every: int) -> None:
        self._counts = fp8_counts(model) if every else None
        self._every, self._is_due = every, False

    def begin(self, step: int) -> None:
        """Before optimizer step `step` (from 1)."""
        self._is_due = self._every > 0 and step % self._every == 0
        if self._counts is not None:
            self._counts.enabled = self._is_due

    def add_to(self, on_device: DeviceSums) -> None:
        """After the last backward pass: what the host will read with the step's other numbers."""
        if self._counts is None:
            return
        self._counts.enabled = False
        for kind, sums in self._counts.take().items():
            on_device.add(_Count(kind), sums)

    def parts(self, fetched: Mapping[Hashable, np.ndarray], world: Group) -> dict[str, float]:
        """The shares over all ranks, by their names in metrics.jsonl; empty where nothing was counted."""
        if not self._is_due:
            return {}
        own = np.stack([fetched.get(_Count(kind), np.zeros(3)) for kind in KINDS])
        largest, zeros, total = comm.sum_floats(own.reshape(-1), world).reshape(len(KINDS), 3).T
        parts = {}
        for number, kind in enumerate(KINDS):
            if total[number]:
                parts[f"fp8_saturated_{kind}"] = float(largest[number] / total[number])
                parts[f"fp8_zeroed_{kind}"] = float(zeros[number] / total[number])
        return parts
