"""Builds the callbacks of a run, which are in erniekit/training/reporting/."""

from erniekit.config.schema import Config
from erniekit.training.reporting.base import Callback, RunInfo, StepMetrics
from erniekit.training.reporting.completions import CompletionLog
from erniekit.training.reporting.metrics_file import MetricsFile
from erniekit.training.reporting.plot import LossPlot
from erniekit.training.reporting.progress import ProgressReport
from erniekit.training.reporting.routers import RouterLog
from erniekit.training.reporting.summary import Summary
from erniekit.training.reporting.trackers import Board

__all__ = ["Callback", "RunInfo", "StepMetrics", "build_callbacks"]


def build_callbacks(cfg: Config) -> list[Callback]:
    """The callbacks that `cfg` asks for, in the order in which they are to be called.

    The progress bar comes first, so that it is removed before the others write their last lines. The metrics file comes
    before the plot and the summary, which read it.
    Raises ConfigError if report_to needs a package that is not installed.
    """
    callbacks: list[Callback] = [ProgressReport(cfg.logging_steps, cfg.disable_tqdm), MetricsFile()]
    if cfg.report_to != "none":
        callbacks.append(Board(cfg))
    if cfg.method.reads("log_completions"):
        callbacks.append(CompletionLog(cfg.log_completions, cfg.num_completions_to_print, cfg.print_completions_steps))
    return [*callbacks, RouterLog(), LossPlot(), Summary()]
