"""wandb, SwanLab, MLflow and Trackio, by their own packages.

Where they send numbers to, and with which account, is decided as their own users decide it: by their login and their
environment variables (WANDB_MODE=offline, SWANLAB_MODE=offline, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID, ...). Each
number has the step of the run as its place, so the steps that a resumed run repeats fall on those before.
"""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from erniekit.training.reporting.tracker import Open, TrackedRun, Tracker
from erniekit.utils.errors import ConfigError


class _Wandb:
    """A run of wandb. Its own count of steps may not decrease, so the step is a number of its own, train/step."""

    def __init__(self, run: Any) -> None:
        self._run, self.run_id = run, str(run.id)
        run.define_metric("train/step")
        run.define_metric("*", step_metric="train/step")

    def write(self, values: dict[str, float], step: int) -> None:
        self._run.log({**values, "train/step": step})

    def close(self) -> None:
        self._run.finish()


def _wandb() -> Open:
    import wandb

    sends = wandb.setup().settings.mode in (None, "online", "run", "shared")
    if sends and not wandb.login(prompt=False):
        raise ConfigError(
            "report_to: wandb has no API key. Run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline and send "
            "the run later with `wandb sync`."
        )

    def open_run(run: TrackedRun) -> Tracker:
        Path(run.directory).mkdir(parents=True, exist_ok=True)
        opened = wandb.init(
            project=run.project,
            name=run.name,
            id=run.run_id or uuid.uuid4().hex[:8],
            resume="allow",
            dir=run.directory,
            config=run.config,
            allow_val_change=True,
        )
        return _Wandb(opened)

    return open_run


class _SwanLab:
    def __init__(self, run: Any) -> None:
        self._run, self.run_id = run, str(run.id)

    def write(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def _swanlab() -> Open:
    import swanlab

    settings = swanlab.Settings()
    if settings.mode == "online" and not settings.api_key:
        raise ConfigError(
            "report_to: swanlab has no API key. Run `swanlab login`, set SWANLAB_API_KEY, or set SWANLAB_MODE=offline "
            "and send the run later with `swanlab sync`."
        )

    def open_run(run: TrackedRun) -> Tracker:
        resumed = {} if run.run_id is None else {"id": run.run_id, "resume": "allow"}
        opened = swanlab.init(project=run.project, name=run.name, log_dir=run.directory, config=run.config, **resumed)
        return _SwanLab(opened)

    return open_run


class _MLflow:
    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self.run_id = client, run_id

    def write(self, values: dict[str, float], step: int) -> None:
        self._client.log_metrics(values, step=step, run_id=self.run_id)

    def close(self) -> None:
        self._client.end_run()


def _mlflow() -> Open:
    import mlflow

    def open_run(run: TrackedRun) -> Tracker:
        if not mlflow.is_tracking_uri_set():
            directory = Path(run.directory).resolve()
            directory.mkdir(parents=True, exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{directory / 'mlflow.db'}")
        mlflow.set_experiment(run.project)
        if run.run_id is not None:
            return _MLflow(mlflow, mlflow.start_run(run_id=run.run_id).info.run_id)
        opened = mlflow.start_run(run_name=run.name)
        mlflow.log_params(run.config)  # parameters of a run cannot change, so a resumed one keeps its first ones
        return _MLflow(mlflow, opened.info.run_id)

    return open_run


class _Trackio:
    def __init__(self, run: Any, name: str) -> None:
        self._run, self.run_id = run, name

    def write(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def _trackio() -> Open:
    import trackio

    def open_run(run: TrackedRun) -> Tracker:
        # A run is found again by its name, which therefore has to be the only one of the project.
        name = run.run_id or f"{run.name}-{uuid.uuid4().hex[:4]}"
        opened = trackio.init(
            project=run.project, name=name, config=run.config, resume="never" if run.run_id is None else "allow",
            embed=False,
        )  # fmt: skip
        return _Trackio(opened, name)

    return open_run


TRACKERS: dict[str, Callable[[], Open]] = {
    "wandb": _wandb,
    "swanlab": _swanlab,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
