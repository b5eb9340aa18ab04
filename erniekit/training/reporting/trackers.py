"""TensorBoard and VisualDL: both are extras, imported only when report_to names them."""

from collections.abc import Callable
from typing import Any

from erniekit.config.schema import Config
from erniekit.training.reporting.base import Callback, RunInfo, StepMetrics
from erniekit.training.reporting.completions import sample_lines
from erniekit.utils.errors import ConfigError

Write = Callable[[str, float, int], Any]  # (tag, value, step)
WriteText = Callable[[str, str, int], Any]  # (tag, text, step)
# (directory, step resumed after) -> (write, write a text, close)
Open = Callable[[str, int], tuple[Write, WriteText, Callable[[], None]]]


def _tensorboard() -> Open:
    from tensorboardX import SummaryWriter

    def open_log(directory: str, last_step: int) -> tuple[Write, WriteText, Callable[[], None]]:
        # What was drawn for steps that run again after a resumption is hidden.
        writer = SummaryWriter(directory, purge_step=last_step + 1 if last_step else None)
        return writer.add_scalar, writer.add_text, writer.close

    return open_log


def _visualdl() -> Open:
    from visualdl import LogWriter

    def open_log(directory: str, last_step: int) -> tuple[Write, WriteText, Callable[[], None]]:
        writer = LogWriter(directory)
        return (
            lambda tag, value, step: writer.add_scalar(tag=tag, value=value, step=step),
            lambda tag, text, step: writer.add_text(tag=tag, text_string=text, step=step),
            writer.close,
        )

    return open_log


_SHOWN_SAMPLES = 8  # completions of a rollout

_WRITERS: dict[str, Callable[[], Open]] = {"tensorboard": _tensorboard, "visualdl": _visualdl}


class Board(Callback):
    """Sends every step and every evaluation to `report_to`, in logging_dir or output_dir/runs."""

    def __init__(self, cfg: Config) -> None:
        """Raises ConfigError if the package for `report_to` is not installed."""
        self._logging_dir = cfg.logging_dir
        self._close: Callable[[], None] | None = None
        try:
            self._open = _WRITERS[cfg.report_to]()
        except ImportError as error:
            raise ConfigError(
                f"report_to: {cfg.report_to} needs a package that cannot be imported ({error}). "
                f'Install it with `pip install "erniekit[{cfg.report_to}]"`, or set report_to: none.'
            ) from error

    def on_start(self, run: RunInfo) -> None:
        """Open the log."""
        directory = self._logging_dir or str(run.output_dir / "runs")
        self._write, self._write_text, self._close = self._open(directory, run.start_step)

    def on_step(self, metrics: StepMetrics) -> None:
        """Write the step's numbers under train/."""
        values = {
            "loss": metrics.loss,
            "grad_norm": metrics.grad_norm,
            "learning_rate": metrics.learning_rate,
            "tokens_per_second": metrics.tokens_per_second,
        }
        for name, value in (values | metrics.parts).items():
            self._write(f"train/{name}", value, metrics.step)
        if metrics.samples:
            self._write_text("completions", "\n\n".join(sample_lines(metrics.samples, _SHOWN_SAMPLES)), metrics.step)

    def on_evaluate(self, step: int, metrics: dict[str, float]) -> None:
        """Write the evaluation's numbers under eval/."""
        for name, value in metrics.items():
            self._write(f"eval/{name.removeprefix('eval_')}", value, step)

    def on_end(self, summary: dict[str, Any]) -> None:
        """Close the log."""
        if self._close is not None:
            self._close()
            self._close = None
