"""The interface of callbacks, and the data that the trainer passes to them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from erniekit.config.schema import Config
from erniekit.models.picture_balance import PatchLoad


@dataclass(frozen=True)
class RunInfo:
    """The facts about a run at its start: `start_step` is the step after which it resumes (0: none),
    `max_steps` the last.
    """

    output_dir: Path
    max_steps: int
    start_step: int
    num_parameters: int
    config: Config


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, summed over its microbatches and all data ranks.

    `num_tokens` are the tokens that are not padding, `num_supervised` those with a label, `seconds` the step's time,
    `data_seconds` the time before it that this rank waited for its batches.
    `parts` are the named parts of the loss and other numbers; `routers` what each router did, by layer; `sent` the
    bytes that this rank sent to others, by kind of operation; `patch_load` how data ranks divide the patches of
    pictures, None where each encodes its own. `samples` are the completions that were generated for the step, as
    samples.jsonl has them.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_supervised: int
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    routers: dict[str, dict[str, Any]] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    data_seconds: float = 0.0
    patch_load: PatchLoad | None = None
    samples: tuple[dict[str, Any], ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """Tokens that are not padding over the step's time; 0 if the clock saw no time pass."""
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0

    def record(self) -> dict[str, Any]:
        """The step as metrics.jsonl has it, named parts flattened."""
        own = {
            "step": self.step,
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "num_tokens": self.num_tokens,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "num_supervised": self.num_supervised,
            "seconds": round(self.seconds, 4),
            "data_seconds": round(self.data_seconds, 4),
        }
        clash = own.keys() & self.parts.keys()
        assert not clash, f"parts named as a step's own numbers: {clash}"
        return own | self.parts | self._patch_load() | {f"bytes_sent_{kind}": n for kind, n in self.sent.items()}

    def with_logged(self, numbers: Mapping[str, float]) -> "StepMetrics":
        """With numbers that the user's functions named; one that has the name of another number is logged/NAME."""
        taken = self.record().keys()
        parts = {f"logged/{name}" if name in taken else name: value for name, value in numbers.items()}
        return replace(self, parts=self.parts | parts)

    def _patch_load(self) -> dict[str, float]:
        """The load of the busiest data rank over the mean, and what it would be if each encoded its own pictures."""
        load = self.patch_load
        if load is None or not load.mean:
            return {}
        return {
            "patch_load_max_over_mean": load.divided / load.mean,
            "patch_load_max_over_mean_unbalanced": load.own / load.mean,
        }


class Callback:
    """Receives the events of a run. The methods here do nothing. Reports are those of the first rank alone."""

    def on_start(self, run: RunInfo) -> None:
        """The run begins, or resumes after `run.start_step`."""

    def on_step(self, metrics: StepMetrics) -> None:
        """An optimizer step is done."""

    def on_evaluate(self, step: int, metrics: dict[str, float]) -> None:
        """An evaluation after `step` is done; its names begin with eval_."""

    def on_save(self, step: int, path: Path) -> None:
        """A checkpoint, or the final model, is whole at `path`."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """The run is over, also after an error, which is then `summary["error"]`."""
