"""The boards of report_to: TensorBoard and VisualDL, and the experiment trackers (experiment_trackers.py). Each is an
extra, imported only when report_to names it.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from erniekit.config.schema import Config, fields
from erniekit.training.reporting.base import Callback, RunInfo, StepMetrics
from erniekit.training.reporting.completions import sample_lines
from erniekit.training.reporting.experiment_trackers import TRACKERS
from erniekit.training.reporting.tracker import Open, TrackedRun, Tracker
from erniekit.utils import atomic, log
from erniekit.utils.errors import ConfigError, TrainError, UserError
from erniekit.utils.user_files import read_json_object

IDS_FILE = "trackers.json"  # in output_dir: the run's id in each tracker
DEFAULT_PROJECT = "erniekit"
_SHOWN_SAMPLES = 8  # completions of a rollout


class _ScalarWriter(Protocol):
    def add_scalar(self, tag: str, value: float, step: int) -> Any: ...

    def add_text(self, tag: str, text: str, step: int) -> Any: ...

    def close(self) -> None: ...


class _Scalars:
    """A tracker that writes one number at a time."""

    run_id = None

    def __init__(self, writer: _ScalarWriter) -> None:
        self._writer = writer
        self.close = writer.close

    def write(self, values: dict[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def write_text(self, tag: str, text: str, step: int) -> None:
        self._writer.add_text(tag, text, step)


def _tensorboard() -> Open:
    from tensorboardX import SummaryWriter

    def open_log(run: TrackedRun) -> Tracker:
        # What was drawn for steps that run again after a resumption is hidden.
        return _Scalars(SummaryWriter(run.directory, purge_step=run.start_step + 1 if run.start_step else None))

    return open_log


def _visualdl() -> Open:
    from visualdl import LogWriter

    return lambda run: _Scalars(LogWriter(run.directory))


_OPENERS: dict[str, Callable[[], Open]] = {"tensorboard": _tensorboard, "visualdl": _visualdl, **TRACKERS}


class Board(Callback):
    """Sends every step and every evaluation to one name of `report_to`. A board that fails in mid-run is a warning and
    gets no more numbers: they are in metrics.jsonl.
    """

    def __init__(self, cfg: Config, name: str) -> None:
        """Raises ConfigError if the package of `name` is not installed, or not logged in."""
        self._cfg, self._name = cfg, name
        self._tracker: Tracker | None = None
        try:
            self._open = _OPENERS[name]()
        except ImportError as error:
            raise ConfigError(
                f"report_to: {name} needs a package that cannot be imported ({error}). "
                f'Install it with `pip install "erniekit[{name}]"`, or remove {name} from report_to.'
            ) from error

    def on_start(self, run: RunInfo) -> None:
        """Open the log: a resumed run's own, if its id is known. Raises TrainError if that fails."""
        cfg = self._cfg
        ids = _ids(run.output_dir) if run.start_step else {}
        tracked = TrackedRun(
            directory=cfg.logging_dir or str(run.output_dir / "runs"),
            start_step=run.start_step,
            project=cfg.project or DEFAULT_PROJECT,
            name=cfg.run_name or run.output_dir.resolve().name,
            config=settings_of(run.config),
            run_id=ids.get(self._name),
        )
        try:
            self._tracker = self._open(tracked)
        except Exception as error:  # any error of the package
            raise TrainError(
                f"report_to: {self._name} cannot start ({type(error).__name__}: {error}). Correct its settings, or "
                f"remove {self._name} from report_to."
            ) from error
        if self._tracker.run_id is not None:
            if run.start_step and tracked.run_id is None:
                log.info(f"report_to: {self._name}: no id of the resumed run in {IDS_FILE}: a new run begins there")
            _keep_id(run.output_dir, self._name, self._tracker.run_id)

    def on_step(self, metrics: StepMetrics) -> None:
        """Write the step's numbers under train/."""
        values = {
            "loss": metrics.loss,
            "grad_norm": metrics.grad_norm,
            "learning_rate": metrics.learning_rate,
            "tokens_per_second": metrics.tokens_per_second,
        }
        self._write({f"train/{name}": value for name, value in (values | metrics.parts).items()}, metrics.step)
        if metrics.samples and isinstance(self._tracker, _Scalars):  # the others have samples.jsonl beside them
            self._tracker.write_text(
                "completions", "\n\n".join(sample_lines(metrics.samples, _SHOWN_SAMPLES)), metrics.step
            )

    def on_evaluate(self, step: int, metrics: dict[str, float]) -> None:
        """Write the evaluation's numbers under eval/."""
        self._write({f"eval/{name.removeprefix('eval_')}": value for name, value in metrics.items()}, step)

    def on_end(self, summary: dict[str, Any]) -> None:
        """Close the log."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            try:
                tracker.close()
            except Exception as error:  # any error of the package
                log.warning(f"report_to: {self._name} did not end well ({type(error).__name__}: {error})")

    def _write(self, values: dict[str, float], step: int) -> None:
        if self._tracker is None:
            return
        try:
            self._tracker.write(values, step)
        except Exception as error:  # any error of the package
            self._tracker = None
            log.warning(
                f"report_to: {self._name} gets no more numbers, from step {step} on ({type(error).__name__}: {error}); "
                "they are in metrics.jsonl"
            )


def boards(cfg: Config) -> list[Board]:
    """The boards that `cfg` asks for. Raises ConfigError as Board does."""
    return [Board(cfg, name) for name in dict.fromkeys(cfg.report_to) if name != "none"]


def settings_of(cfg: Config) -> dict[str, Any]:
    """Every key of the configuration with its value, as trackers keep it. Keys that have no effect here are left out,
    since one of them is an API key.
    """
    values = dataclasses.asdict(cfg)
    return {name: list(values[name]) if isinstance(values[name], tuple) else values[name] for name in fields()}


def _ids(output_dir: Path) -> dict[str, str]:
    try:
        return {str(name): str(value) for name, value in read_json_object(output_dir / IDS_FILE, UserError).items()}
    except FileNotFoundError:
        return {}
    except UserError as error:
        log.warning(f"{error} Trackers begin new runs.")
        return {}


def _keep_id(output_dir: Path, name: str, run_id: str) -> None:
    """Remember the id of the run in a tracker, beside those in the others."""
    atomic.write_text(output_dir / IDS_FILE, json.dumps({**_ids(output_dir), name: run_id}, indent=1) + "\n")
