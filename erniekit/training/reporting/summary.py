"""Writes summary.json, a dozen numbers about the run."""

import json
import math
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from erniekit.training.reporting.base import Callback, RunInfo, StepMetrics
from erniekit.training.reporting.metrics_file import FILE_NAME as METRICS_FILE
from erniekit.training.reporting.metrics_file import read_metrics
from erniekit.utils import atomic, log
from erniekit.utils.wording import count_of

FILE_NAME = "summary.json"


def peak_memory_mb() -> float:
    """The peak resident memory of this process in MB of 2^20 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # macOS counts bytes, Linux KB


def _records(path: Path) -> list[dict[str, Any]]:
    return list(read_metrics(path)) if path.exists() else []


def _total(records: list[dict[str, Any]], name: str) -> Any:
    """The sum of a number over the records that have it."""
    return sum(record.get(name) or 0 for record in records)


# Parts of the time of a run that generates, by their names in metrics.jsonl.
_PARTS = {
    "generation_seconds": "time/generation",
    "scoring_seconds": "time/scoring",
    "rollout_seconds": "time/rollout",
}


def _waiting(numbers: dict[str, Any]) -> str:
    """Which share of the time is not spent on training steps."""
    if "rollout_seconds" not in numbers:
        return f"{numbers['data_wait_share']:.1%} of the step time waiting for data"
    whole = max(numbers["step_seconds"] + numbers["rollout_seconds"], 1e-9)
    shares = {name: numbers[f"{name}_seconds"] / whole for name in ("generation", "scoring", "step")}
    return (
        f"time: generation {shares['generation']:.0%}, scoring {shares['scoring']:.0%}, training {shares['step']:.0%}"
    )


def _left_out(data: dict[str, Any]) -> str:
    """How many samples were not trained on as they are; their first ones have had warnings."""
    counts = [f"{count_of(data[name], 'sample')} {name}" for name in ("dropped", "cut") if data.get(name)]
    return "".join(f", {count}" for count in counts)


def _plain(value: Any) -> Any:
    """Converts NaN and infinity, which JSON lacks, to null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Summary(Callback):
    """Writes output_dir/summary.json at the end and logs its most important numbers.

    Losses, token counts, step_seconds and data_wait_share (the time spent waiting for batches over that and
    step_seconds) are of the whole run, over all its resumptions. wall_seconds and the speeds
    are of this process alone; tokens_per_second is tokens over wall time, evaluations and saves included.
    """

    def __init__(self) -> None:
        self._run: RunInfo | None = None
        self._begin = 0.0
        self._tokens = 0
        self._speeds: list[float] = []

    def on_start(self, run: RunInfo) -> None:
        """Start the clock."""
        self._run = run
        self._begin = time.monotonic()

    def on_step(self, metrics: StepMetrics) -> None:
        """Count."""
        self._tokens += metrics.num_tokens
        self._speeds.append(metrics.tokens_per_second)

    def on_end(self, summary: dict[str, Any]) -> None:
        """Write the file: these numbers, and whatever the trainer's own summary says."""
        if self._run is None:  # the run ended before it began
            return
        path = self._run.output_dir / FILE_NAME
        try:
            numbers = self._numbers(self._run) | {name: _plain(value) for name, value in summary.items()}
            atomic.write_text(path, json.dumps(numbers, ensure_ascii=False, indent=2, default=str) + "\n")
        except OSError as error:  # this must not hide the run's result or error
            log.warning(f"{path}: cannot be written ({error.strerror})")
            return
        if "error" not in summary and numbers["final_loss"] is not None:
            end = "stopped" if "stopped" in summary else "done"
            log.info(
                f"{end}: {count_of(numbers['steps'], 'step')}, loss {numbers['final_loss']:.4f}, "
                f"{count_of(numbers['num_tokens'], 'token')}, "
                f"{numbers['tokens_per_second']:.0f} tokens/s, "
                f"{_waiting(numbers)}{_left_out(numbers.get('data', {}))}, "
                f"peak memory {numbers['peak_memory_mb']:.0f} MB; "
                f"see loss.png, {METRICS_FILE} and summary.json in {self._run.output_dir}"
            )

    def _numbers(self, run: RunInfo) -> dict[str, Any]:
        records = _records(run.output_dir / METRICS_FILE)
        steps = [record for record in records if "loss" in record]
        scores = [(record["eval_loss"], record["step"]) for record in records if record.get("eval_loss") is not None]
        best_loss, best_step = min(scores, default=(None, None))
        wall = time.monotonic() - self._begin
        busy, waited = _total(steps, "seconds"), _total(steps, "data_seconds")
        return {
            "steps": steps[-1]["step"] if steps else run.start_step,
            "max_steps": run.max_steps,
            "resumed_after_step": run.start_step,
            "final_loss": steps[-1]["loss"] if steps else None,
            "best_eval_loss": best_loss,
            "best_eval_step": best_step,
            "num_tokens": _total(steps, "num_tokens"),
            "num_supervised_tokens": _total(steps, "num_supervised"),
            "step_seconds": round(busy, 3),
            "data_wait_share": round(waited / max(waited + busy, 1e-9), 4),
            **{name: round(_total(steps, part), 3) for name, part in _PARTS.items() if any(part in s for s in steps)},
            "wall_seconds": round(wall, 3),
            "tokens_per_second": round(self._tokens / wall, 1) if wall > 0 else 0.0,
            "median_step_tokens_per_second": round(statistics.median(self._speeds), 1) if self._speeds else 0.0,
            "peak_memory_mb": round(peak_memory_mb(), 1),
            "num_parameters": run.num_parameters,
        }
