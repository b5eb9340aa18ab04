"""Shows progress: a bar on a terminal, otherwise plain log lines."""

import time
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from erniekit.models.picture_balance import PatchLoad
from erniekit.training.reporting.base import Callback, RunInfo, StepMetrics
from erniekit.utils import log
from erniekit.utils.wording import count_of

_LOSSES_OF_MODALITIES = ("loss_text", "loss_image", "loss_video")
_WINDOW = 20  # the number of steps over which the speed is averaged


def _count(value: float) -> str:
    """A large number with three digits: 1234567 -> 1.23M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:  # three digits of less are less than 1000 of the next smaller unit
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _rewards(parts: dict[str, float]) -> str:
    """The reward margin and accuracy, which show whether preference training works; for policies the mean reward,
    where the step began a rollout, and the entropy.
    """
    if "reward" in parts:
        accuracy = f"  accuracy {parts['accuracy']:.0%}" if "accuracy" in parts else ""
        return f"  reward {parts['reward']:.3f}{accuracy}  entropy {parts.get('entropy', 0.0):.3f}"
    if "reward_margin" not in parts:
        return ""
    return f"  reward margin {parts['reward_margin']:.3f}  accuracy {parts['reward_accuracy']:.0%}"


def _modalities(parts: dict[str, float]) -> str:
    """The losses by modality, where the data have more than one."""
    losses = {name: parts[name] for name in _LOSSES_OF_MODALITIES if name in parts}
    shown = ", ".join(f"{name.removeprefix('loss_')} {loss:.4f}" for name, loss in losses.items())
    return f" ({shown})" if len(losses) > 1 else ""


def _metrics(values: dict[str, float]) -> str:
    """The numbers of an evaluation; losses by modality stand behind the loss."""
    values = {name.removeprefix("eval_"): value for name, value in values.items()}
    shown = {name: f"{name} {value:.4g}" for name, value in values.items() if name not in _LOSSES_OF_MODALITIES}
    if "loss" in shown:
        shown["loss"] += _modalities(values)
    return ", ".join(shown.values())


def _patch_load(step: int, load: PatchLoad) -> str:
    return (
        f"pictures of step {step}: the busiest data rank encodes {load.divided / load.mean:.2f} times the mean number "
        f"of patches; without balance_pictures it would be {load.own / load.mean:.2f} times"
    )


class ProgressReport(Callback):
    """A rich bar with loss, learning rate, tokens per second and remaining time when stderr is a terminal.

    Otherwise, or with disable_tqdm, a line every `logging_steps` steps, for the first and for the last one.
    """

    def __init__(self, logging_steps: int, disable_bar: bool, console: Console | None = None) -> None:
        self._logging_steps = logging_steps
        self._disable_bar = disable_bar
        self._console = console
        self._bar: Progress | None = None
        self._said_patch_load = False

    def on_start(self, run: RunInfo) -> None:
        """Log the start of the run, and show the bar if there is a terminal."""
        self._run = run
        self._recent: deque[tuple[int, float]] = deque(maxlen=_WINDOW)
        self._begin = time.monotonic()
        what = f"training continues after step {run.start_step}" if run.start_step else "training begins"
        if run.start_step >= run.max_steps:
            what = f"no step is left after step {run.start_step}; the final model and the reports are written"
        log.info(
            f"{what}: {count_of(run.max_steps, 'step')}, {_count(run.num_parameters)} parameters, into {run.output_dir}"
        )
        console = self._console or Console(stderr=True)
        if not self._disable_bar and console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
                expand=True,
            )
            self._task = self._bar.add_task("train", total=run.max_steps, completed=run.start_step, numbers="")
            self._bar.start()

    def on_step(self, metrics: StepMetrics) -> None:
        """Update the bar, or log a line every `logging_steps` steps."""
        self._recent.append((metrics.num_tokens, metrics.seconds))
        if not self._said_patch_load and metrics.patch_load is not None and metrics.patch_load.mean:
            self._said_patch_load = True
            log.info(_patch_load(metrics.step, metrics.patch_load))
        loss = f"loss {metrics.loss:.4f}{_modalities(metrics.parts)}{_rewards(metrics.parts)}"
        numbers = f"{loss}  lr {metrics.learning_rate:.2e}  {_count(self._speed())} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=metrics.step, numbers=numbers)
            return
        edge = metrics.step in (self._run.start_step + 1, self._run.max_steps)
        if edge or metrics.step % self._logging_steps == 0:
            log.info(f"step {metrics.step}/{self._run.max_steps}  {numbers}  left {_clock(self._left(metrics.step))}")

    def on_evaluate(self, step: int, metrics: dict[str, float]) -> None:
        """Write the evaluation on a line of its own."""
        log.info(f"step {step}: evaluation: {_metrics(metrics)}")

    def on_save(self, step: int, path: Path) -> None:
        """Log the path of the checkpoint, which may still be being written in the background."""
        what = "the final model in " if path == self._run.output_dir else ""
        log.info(f"step {step}: {'saved' if path.is_dir() else 'saving'} {what}{path}")

    def on_end(self, summary: dict[str, Any]) -> None:
        """Stop the bar; its last state stays on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _speed(self) -> float:
        """Tokens per second over the last steps."""
        seconds = sum(second for _, second in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds > 0 else 0.0

    def _left(self, step: int) -> float:
        """The estimated remaining seconds, at the average speed of this process, including evaluations and saves."""
        done = step - self._run.start_step
        return (time.monotonic() - self._begin) / done * (self._run.max_steps - step)
