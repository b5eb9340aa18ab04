"""Who owns output_dir: one run, and one job of it at a time.

`claim` takes the lock and refuses whatever can be refused before a weight is read; nothing but the directory itself and
the lock is made. `begin` changes the directory, when the run is known to start. A kill at any moment in it leaves a
directory from which the same command resumes.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from erniekit.checkpoint.model_dir import (
    checkpoint_step,
    has_weights,
    holds_model,
    is_adapter,
    list_checkpoints,
    model_files,
)
from erniekit.checkpoint.manager import ABANDONED, CheckpointManager
from erniekit.checkpoint.run_record import RUN_FILE, FinalModel, RunRecord, read_record
from erniekit.parallel.agree import on_first, require_shared
from erniekit.config.schema import Config
from erniekit.parallel.process_group import Group
from erniekit.training.ema import DIRECTORY as EMA
from erniekit.training.reporting.metrics_file import FILE_NAME as METRICS_FILE
from erniekit.training.reporting.metrics_file import copy_lines
from erniekit.training.resume import check_keys, noted
from erniekit.training.state import CONFIG_FILE, STATE_FILE, read_state
from erniekit.utils import atomic, log
from erniekit.utils.directory_lock import DirectoryLock
from erniekit.utils.errors import CheckpointError, ConfigError

# What reports leave behind, beside the record, the checkpoints and the final model.
_REPORTS = ("summary.json", "loss.png", "routers.jsonl", "expert_load.png", METRICS_FILE)


@dataclass(frozen=True)
class Claim:
    """What a claimed directory offers: the checkpoint to resume from, how the final model there came about, and the
    record of the run.
    """

    source: Path | None
    final: FinalModel | None
    record: RunRecord | None


class OutputDir:
    """The output directory of one run. All ranks call its methods; the first one acts and holds the lock.

    A context: entering it claims the directory, leaving it gives it back.
    """

    def __init__(self, cfg: Config, group: Group) -> None:
        assert cfg.output_dir, "config.load requires it to train"
        self.cfg, self.group = cfg, group
        self.path = Path(cfg.output_dir)
        self.lock = DirectoryLock(self.path)
        self._claim: Claim | None = None

    def __enter__(self) -> "OutputDir":
        self.claim()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.lock.release()
        self._claim = None

    def claim(self) -> Claim:
        """Lock the directory and check that the run may write there. Once: later calls return the same.

        Raises ConfigError or CheckpointError with the cure; the directory is then as it was.
        """
        if self._claim is None:
            found = on_first(self.group, self._claim_first)
            require_shared(self.path, self.group)
            final, record = found["final"], found["record"]
            source = None if found["source"] is None else Path(found["source"])
            self._claim = Claim(
                source,
                None if final is None else FinalModel(**final),
                None if record is None else RunRecord(**record),
            )
        return self._claim

    def look(self) -> Claim:
        """What `claim` would return or raise, in one process: without the lock, and nothing is made."""
        self._check_keys()
        self.lock.require_free()
        return self._look()

    def _claim_first(self) -> dict[str, object]:
        self._check_keys()
        self.lock.acquire()
        try:
            claim = self._look()
        except BaseException:
            self.lock.release()
            raise
        source, final, record = claim.source, claim.final, claim.record
        return {
            "source": None if source is None else str(source),
            "final": None if final is None else asdict(final),
            "record": None if record is None else asdict(record) | {"final_model": None},
        }

    def _look(self) -> Claim:
        self._check_names()
        record = read_record(self.path)
        if self.cfg.overwrite_output_dir:
            self._check_removal()
            return Claim(self._explicit(), None, record)
        source, final = self._check_content(record)
        return Claim(source, final, record)

    # Checks that need no look into the directory, so that it is not even made where they refuse.

    def _explicit(self) -> Path | None:
        asked = self.cfg.resume_from_checkpoint
        return None if asked in ("auto", "none") else Path(asked).expanduser()

    def _goes_back_here(self) -> bool:
        """Whether the checkpoint that is asked for is one of this directory."""
        source = self._explicit()
        return source is not None and source.resolve().parent == self.path.resolve()

    def _check_keys(self) -> None:
        """The keys against one another, and the checkpoint that is asked for."""
        here = self.path.resolve()
        for key, value in (("model_name_or_path", self.cfg.model_name_or_path), ("lora_path", self.cfg.lora_path)):
            if value and Path(value).expanduser().exists() and Path(value).expanduser().resolve() == here:
                raise ConfigError(
                    f"output_dir: {self.path} is also {key}: the trained model would replace it. Choose another "
                    "output_dir."
                )
        source = self._explicit()
        if source is None:
            return
        if not source.is_dir():
            raise CheckpointError(
                f"resume_from_checkpoint: there is no directory {str(source)!r} (looked in {Path.cwd()}). Name a "
                "checkpoint directory, or leave the key out to resume from the newest one in output_dir."
            )
        inside = source.resolve().is_relative_to(here)
        if inside and self.cfg.overwrite_output_dir:
            raise ConfigError(
                f"overwrite_output_dir: true removes the run in {self.path}, and resume_from_checkpoint: {source} is "
                "part of it. Leave out overwrite_output_dir to resume from that checkpoint (later ones are set aside), "
                "or leave out resume_from_checkpoint to start from scratch."
            )
        below = list_checkpoints(source)
        if below and not (source / STATE_FILE).is_file():
            raise CheckpointError(
                f"resume_from_checkpoint: {source} is no checkpoint but holds some: {', '.join(p.name for p in below)}."
                " Name one of them."
            )
        check_keys(read_state(source).identity, self.cfg, source)

    # Checks of what is there, under the lock.

    def _check_names(self) -> None:
        """A file of ours that is a directory or a device would stop the run at its first write."""
        for name in (RUN_FILE, CONFIG_FILE, *_REPORTS):
            path = self.path / name
            if path.exists() and (path.is_dir() or path.is_fifo()):
                raise ConfigError(
                    f"output_dir: {path} is not a file, and the run writes one there. Remove or rename it, or choose "
                    "another output_dir."
                )

    def _check_removal(self) -> None:
        """overwrite_output_dir removes runs and nothing else."""
        doomed = [path.resolve() for path in self._old_run()]
        for key, value in (("model_name_or_path", self.cfg.model_name_or_path), ("lora_path", self.cfg.lora_path)):
            used = None if not value else Path(value).expanduser()
            if used is not None and used.exists() and any(used.resolve().is_relative_to(path) for path in doomed):
                raise ConfigError(
                    f"overwrite_output_dir: true would remove {key}: {used}, a part of the run in {self.path}. Choose "
                    "another output_dir."
                )
        if holds_model(self.path) and not self._holds_run():
            raise CheckpointError(
                f"output_dir: {self.path} holds a model that no run wrote there, and overwrite_output_dir removes only "
                "runs. Move that model elsewhere, or choose another output_dir."
            )

    def _holds_run(self) -> bool:
        """Whether a run has been in the directory; config.yaml alone may be the user's own file."""
        signs = (self.path / RUN_FILE, *(self.path / name for name in _REPORTS), *list_checkpoints(self.path))
        return any(sign.exists() for sign in signs)

    def _check_content(self, record: RunRecord | None) -> tuple[Path | None, FinalModel | None]:
        """The checkpoint to resume from, and the final model of this run."""
        checkpoints, has_final = list_checkpoints(self.path), holds_model(self.path)
        if checkpoints:
            self._refuse_without_resuming("checkpoints")
        newest = self._newest_whole(checkpoints)
        if record is not None and (checkpoints or has_final):
            check_keys(record.identity, self.cfg, self.path / RUN_FILE)
        if newest is not None and not self._goes_back_here():  # to go back before it, it need not be readable
            check_keys(read_state(newest).identity, self.cfg, newest)
        self._check_kind()
        if has_final and record is None and newest is None:
            raise CheckpointError(
                f"output_dir: {self.path} holds a model, and nothing tells that this run wrote it: no {RUN_FILE} and no "
                "checkpoint. Choose another output_dir, or move that model elsewhere; if a run wrote it that is no "
                "longer needed, overwrite_output_dir: true removes it."
            )
        final = self._final_of(record) if has_final else None
        if final is not None:
            self._refuse_without_resuming("the final model of this run")
        return self._explicit() or newest, final

    def _final_of(self, record: RunRecord | None) -> FinalModel | None:
        """The end that the run's present branch has come to, if any."""
        final = None if record is None else record.final_model
        return final if record is not None and final is not None and final.branch == record.branch else None

    def _refuse_without_resuming(self, what: str) -> None:
        if self.cfg.resume_from_checkpoint == "none":
            raise CheckpointError(
                f"output_dir: {self.path} holds {what}, but resume_from_checkpoint is none. Set overwrite_output_dir: "
                "true to remove the run that is there, or choose another output_dir."
            )

    def _newest_whole(self, checkpoints: list[Path]) -> Path | None:
        for path in reversed(checkpoints):
            if (path / STATE_FILE).is_file() and holds_model(path):
                return path
            log.warning(f"{path} is not whole (a delete or a copy was interrupted): it is skipped")
        if checkpoints and self._explicit() is None:
            raise CheckpointError(
                f"output_dir: none of the checkpoints in {self.path} is whole: {', '.join(p.name for p in checkpoints)} "
                f"lack {STATE_FILE} or weights. Set overwrite_output_dir: true to start from scratch, or choose another "
                "output_dir."
            )
        return None

    def _check_kind(self) -> None:
        """A directory with both a model and an adapter would not say which is meant."""
        trains_adapter = self.cfg.fine_tuning == "LoRA"
        if has_weights(self.path) if trains_adapter else is_adapter(self.path):
            there, here = ("a model", "an adapter") if trains_adapter else ("an adapter", "a model")
            raise CheckpointError(
                f"output_dir: {self.path} holds {there}, and this run writes {here} (fine_tuning: "
                f"{self.cfg.fine_tuning}). Choose another output_dir."
            )

    # Changes.

    def begin(self, present: RunRecord, step: int, trains: bool) -> None:
        """Make the directory that of a run which continues after `step`; `present` says what identifies it now.
        config.yaml is written if steps follow.
        """
        on_first(self.group, lambda: self._begin(present, step, trains))

    def _begin(self, present: RunRecord, step: int, trains: bool) -> None:
        manager = CheckpointManager(self.path, None)
        manager.remove_leftovers()
        for sign in self.path.glob(".shared-*"):  # see require_shared
            sign.unlink(missing_ok=True)
        if self.cfg.overwrite_output_dir:
            self._remove_old_run()
            record = present
        else:
            record = read_record(self.path) or present
            if trains:
                record.identity, record.base, record.data = present.identity, present.base, present.data
            self._set_later_aside(manager, record, step)
        record.begin(step)
        record.write(self.path)
        if trains or not (self.path / CONFIG_FILE).exists():
            atomic.write_text(self.path / CONFIG_FILE, self.cfg.to_yaml())

    def _set_later_aside(self, manager: CheckpointManager, record: RunRecord, step: int) -> None:
        """Where the run goes back, the checkpoints that are not of its past are set aside, with a copy of the metrics."""
        source = self._explicit()
        if source is None:
            return
        here, metrics = self._goes_back_here(), self.path / METRICS_FILE
        later = [p for p in list_checkpoints(self.path) if not here or (checkpoint_step(p) or 0) > step]
        if not later and (here or not metrics.is_file()):
            return
        record.branch += 1  # first, so that from here on a final model is that of a branch before
        record.write(self.path)
        aside = manager.new_aside()
        copy_lines(metrics, aside / METRICS_FILE)
        manager.set_aside(later, aside)
        if not here:  # the steps before are those of the checkpoint's own run, not of the branch that ends here
            copy_lines(source.resolve().parent / METRICS_FILE, metrics, step)
        log.info(
            f"{', '.join([*(path.name for path in later), f'a copy of {METRICS_FILE}'])} of {self.path}: set aside in "
            f"{aside.name}: the run goes back to {source}. save_total_limit does not count them; remove {aside} when "
            "they are no longer needed"
        )

    def _old_run(self) -> list[Path]:
        """What overwrite_output_dir removes, in this order: what can be made again first, then checkpoints from the
        oldest on, so that a removal that is interrupted leaves a run that can be resumed.
        """
        if not self.path.is_dir() or not self._holds_run():
            return []
        reports, metrics = _REPORTS[:-1], _REPORTS[-1]
        ema = [self.path / EMA] if (self.path / EMA).is_dir() else []
        aside = sorted(path for path in self.path.glob(f"{ABANDONED}*") if path.name[len(ABANDONED) :].isdigit())
        there = [self.path / name for name in reports if (self.path / name).exists()]
        end = [self.path / name for name in (metrics, RUN_FILE) if (self.path / name).exists()]
        return [*model_files(self.path), *ema, *there, *aside, *list_checkpoints(self.path), *end]

    def _remove_old_run(self) -> None:
        """overwrite_output_dir: remove the run that was there, and say so."""
        doomed, num_checkpoints = self._old_run(), len(list_checkpoints(self.path))
        if not doomed:
            return
        parts = [f"{num_checkpoints} checkpoints"]
        parts += ["the final model"] if holds_model(self.path) else []
        parts += ["what was set aside"] if any(path.name.startswith(ABANDONED) for path in doomed) else []
        for path in doomed:
            if path.is_dir():
                atomic.remove_tree(path)
            else:
                path.unlink(missing_ok=True)
        atomic.sync_directory(self.path)
        log.info(f"overwrite_output_dir: removed {', '.join(parts)}, metrics and reports of the run in {self.path}")

    def record_final(self, final: FinalModel) -> None:
        """The final model is whole."""
        on_first(self.group, lambda: self._record_final(final))

    def _record_final(self, final: FinalModel) -> None:
        record = read_record(self.path) or RunRecord(noted(self.cfg))
        final.branch = record.branch
        record.final_model = final
        record.write(self.path)
