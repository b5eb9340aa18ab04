"""Writes and reads metrics.jsonl, with one object per step, from which the plot and the summary are made."""

import json
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from erniekit.checkpoint.model_dir import resuming_command, where_it_resumes
from erniekit.training.reporting.base import Callback, RunInfo, StepMetrics
from erniekit.utils import atomic, log
from erniekit.utils.errors import TrainError
from erniekit.utils.wording import count_of

FILE_NAME = "metrics.jsonl"


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines, each with its step; lines that a killed process left incomplete are
    skipped.
    """
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            record = _parse(line)
            if record is not None:
                yield record


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of metrics.jsonl. They hold numbers and null, so that sums need no check of each value; a line
    with anything else is skipped.
    """
    return (record for record in read_records(path) if _is_metrics(record))


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _is_metrics(record: dict[str, Any]) -> bool:
    return all(value is None or type(value) in (int, float) for value in record.values())


def drop_later_records(
    path: Path, last_step: int, keep: Callable[[dict[str, Any]], object] = lambda record: None
) -> None:
    """Drop the records of steps after `last_step` from a file of JSON lines, with one record in memory at a time.
    `keep` is called with each of the others. A file without any is removed.
    """
    if not path.exists():
        return
    any_kept = False
    with atomic.new_file(path) as temporary, open(temporary, "w", encoding="utf-8") as kept:
        for record in read_records(path):
            if record["step"] <= last_step:
                kept.write(json.dumps(record, ensure_ascii=False) + "\n")
                keep(record)
                any_kept = True
    if not any_kept:
        path.unlink()


def copy_lines(path: Path, target: Path, last_step: float = math.inf) -> None:
    """Copy the records of steps up to `last_step` to `target`, which does not exist afterwards if there are none."""
    kept = [record for record in read_metrics(path) if record["step"] <= last_step] if path.is_file() else []
    if kept:
        atomic.write_text(target, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
    else:
        target.unlink(missing_ok=True)


def _number(value: float) -> float | None:
    """Converts NaN and infinity, which JSON lacks, to null."""
    return value if math.isfinite(value) else None


class MetricsFile(Callback):
    """Writes output_dir/metrics.jsonl: steps as {"step", "loss", ...}, evaluations as {"step", "eval_loss", ...}.

    A run that resumes after step s first drops what an earlier process wrote about later steps, and does not repeat an
    evaluation after step s: no step is there twice. Each line is handed to the system at once, so a killed process
    loses none of its finished steps.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._path = Path()
        self._kept_evaluations: list[dict[str, Any]] = []  # of the step that the run resumes after
        self._command: Callable[[], str] = str  # what resumes the run, as text

    def on_start(self, run: RunInfo) -> None:
        """Open the file, shortened to `run.start_step`. Raises TrainError if it cannot be written."""
        self._path, self._command = run.output_dir / FILE_NAME, partial(resuming_command, run.config)
        try:
            run.output_dir.mkdir(parents=True, exist_ok=True)
            if run.start_step and self._path.exists():
                self._drop_later(run.start_step)
            elif run.start_step:
                log.info(f"{self._path} is not there: the record begins after step {run.start_step}")
            self._file = open(self._path, "a" if run.start_step else "w", encoding="utf-8")  # noqa: SIM115 open for the run
        except OSError as error:
            raise self._failure(error) from error

    def _drop_later(self, last_step: int) -> None:
        """Keep the lines up to `last_step` and log the number of dropped ones. A file without later lines is
        not changed.
        """
        kept, later, broken = [], 0, 0
        with open(self._path, encoding="utf-8", errors="replace") as old:
            for line in old:
                record = _parse(line)
                if record is None or not _is_metrics(record):
                    broken += 1
                elif record["step"] > last_step:
                    later += 1
                else:
                    kept.append(line if line.endswith("\n") else line + "\n")
                    if record["step"] == last_step and "loss" not in record:
                        self._kept_evaluations.append(record)
        if later or broken or (kept and not line.endswith("\n")):
            atomic.write_text(self._path, "".join(kept))
        if later:
            log.info(f"{self._path}: dropped {count_of(later, 'line')} on steps after {last_step}, which run again")
        if broken:
            log.info(f"{self._path}: dropped {count_of(broken, 'incomplete line')}")

    def on_step(self, metrics: StepMetrics) -> None:
        """Append the step."""
        self._write(metrics.record())

    def on_evaluate(self, step: int, metrics: dict[str, float]) -> None:
        """Append the evaluation, unless a process that was killed afterwards has written the same."""
        record = {"step": step} | metrics
        if record not in self._kept_evaluations:
            self._write(record)

    def on_end(self, summary: dict[str, Any]) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, record: dict[str, float]) -> None:
        assert self._file is not None, "on_start comes first"
        line = json.dumps({name: _number(value) for name, value in record.items()}, ensure_ascii=False)
        try:
            self._reopen_if_lost(self._file)
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from error

    def _reopen_if_lost(self, file: TextIO) -> None:
        """Open a new file if the present one was deleted, since lines written to a deleted file are lost."""
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(self._path)):
                return
        except FileNotFoundError:
            pass
        if not self._path.parent.is_dir():
            raise TrainError(
                f"output_dir: {self._path.parent} was removed or renamed during the run, so nothing can be "
                f"saved. Put it back and run {self._command()} again: it resumes from the newest checkpoint there."
            )
        log.warning(f"{self._path} was removed or replaced during the run; the record continues in a new file")
        file.close()
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 open for the run

    def _failure(self, error: OSError) -> TrainError:
        return TrainError(
            f"{self._path}: cannot be written ({error.strerror}). Make room or give another output_dir, then run "
            f"{self._command()} again: {where_it_resumes(self._path.parent)}."
        )
