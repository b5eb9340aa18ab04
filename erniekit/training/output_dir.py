"""Ownership of output_dir: it belongs to one run, and one job of this run writes to it at a time.

`claim` takes the lock and makes all checks that are possible before weights are read; it creates only the directory and
the lock. `begin` changes the directory once the run is certain to start. If the process is killed during `begin`, the
same command can still resume.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from erniekit.checkpoint.manager import ABANDONED, CheckpointManager
from erniekit.checkpoint.model_dir import (
    checkpoint_step,
    has_weights,
    holds_model,
    is_adapter,
    list_checkpoints,
    model_files,
)
from erniekit.checkpoint.run_record import RUN_FILE, FinalModel, RunRecord, read_record
from erniekit.config.schema import Config
from erniekit.parallel.agree import on_first, require_shared
from erniekit.parallel.process_group import Group
from erniekit.training.damage import damage_of
from erniekit.training.ema import DIRECTORY as EMA
from erniekit.training.reporting.metrics_file import FILE_NAME as METRICS_FILE
from erniekit.training.reporting.metrics_file import copy_lines
from erniekit.training.resume_checks import check_keys, noted
from erniekit.training.state import CONFIG_FILE, OPTIMIZER_DIR, STATE_FILE, read_state
from erniekit.utils import atomic, log
from erniekit.utils.directory_lock import DirectoryLock
from erniekit.utils.errors import CheckpointError, ConfigError

# The files of reports, in addition to the record, the checkpoints and the final model.
_REPORTS = (
    "summary.json",
    "loss.png",
    "reward.png",
    "rollout.png",
    "samples.jsonl",
    "routers.jsonl",
    "expert_load.png",
    METRICS_FILE,
)
# Reports whose names other programs use, too: no sign that a directory is a run's.
_ALSO_REMOVED = ("trackers.json", "profile.json", "profile.png", "profile.txt")


@dataclass(frozen=True)
class Claim:
    """The content of a claimed directory: the checkpoint to resume from, the origin of its final model, and the record
    of the run.
    """

    source: Path | None
    final: FinalModel | None
    record: RunRecord | None


class OutputDir:
    """The output directory of one run. All ranks call its methods; the first one acts and holds the lock.

    As a context it claims the directory and releases it at the end.
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
        """Return or raise what `claim` would, in one process, without the lock and without creating anything."""
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

    # Checks that do not read the directory, so that it is not even created if they fail.

    def _explicit(self) -> Path | None:
        asked = self.cfg.resume_from_checkpoint
        return None if asked in ("auto", "none") else Path(asked).expanduser()

    def _goes_back_here(self) -> bool:
        """Whether the requested checkpoint is in this directory."""
        source = self._explicit()
        return source is not None and source.resolve().parent == self.path.resolve()

    def _check_data(self, here: Path) -> None:
        """Refuse a directory inside one of data, of which all files are read: a resumed run would read its own."""
        for key in ("train_dataset_path", "text_dataset_path", "eval_dataset_path", "upo_offline_path"):
            for value in vars(self.cfg)[key]:
                data = Path(value).expanduser().resolve()
                # hidden directories are not searched for data
                if (
                    data.is_dir()
                    and here.is_relative_to(data)
                    and not any(name.startswith(".") for name in here.relative_to(data).parts)
                ):
                    raise ConfigError(
                        f"output_dir: {self.path} is inside {key}: {value}, and every file of a directory is read as "
                        "data: a run that resumes would read its own files. Choose another output_dir, or name the "
                        "files of the data."
                    )

    def _check_keys(self) -> None:
        """Check the keys for contradictions, and check the requested checkpoint."""
        here = self.path.resolve()
        if here == here.parent:
            raise ConfigError(
                f"output_dir: {self.path} is the root of the file system; perhaps a variable in it is empty. Name a "
                "directory for this run."
            )
        for key, value in (("model_name_or_path", self.cfg.model_name_or_path), ("lora_path", self.cfg.lora_path)):
            if value and Path(value).expanduser().exists() and Path(value).expanduser().resolve() == here:
                raise ConfigError(
                    f"output_dir: {self.path} is also {key}: the trained model would replace it. Choose another "
                    "output_dir."
                )
        self._check_data(here)
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
                f"resume_from_checkpoint: {source} is not a checkpoint, but holds some: "
                f"{', '.join(p.name for p in below)}. Name one of them."
            )
        check_keys(read_state(source).identity, self.cfg, source)

    # Checks of the directory's content, under the lock.

    def _check_names(self) -> None:
        """Check that every file that the run writes is a regular file, or absent, and every checkpoint a directory."""
        entries = list(self.path.iterdir()) if self.path.is_dir() else []
        for path in entries:
            if checkpoint_step(path) is not None and not path.is_dir():
                raise ConfigError(
                    f"output_dir: {path} is not a directory, and a checkpoint of the run would replace it. Move it "
                    "elsewhere, or choose another output_dir."
                )
        of_model = model_files(self.path) if entries else []
        for path in (*(self.path / name for name in (RUN_FILE, CONFIG_FILE, *_REPORTS)), *of_model):
            if path.exists() and (path.is_dir() or path.is_fifo()):
                raise ConfigError(
                    f"output_dir: {path} is not a file, and the run writes one there. Remove or rename it, or choose "
                    "another output_dir."
                )

    def _check_removal(self) -> None:
        """Check that overwrite_output_dir would remove a run and nothing else."""
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
        """Whether the directory has files of a run; config.yaml alone may be the user's own file."""
        signs = (self.path / RUN_FILE, *(self.path / name for name in _REPORTS), *list_checkpoints(self.path))
        return any(sign.exists() for sign in signs)

    def _check_content(self, record: RunRecord | None) -> tuple[Path | None, FinalModel | None]:
        """The checkpoint to resume from, and the final model of this run."""
        checkpoints, has_final = list_checkpoints(self.path), holds_model(self.path)
        if checkpoints:
            self._refuse_without_resuming("checkpoints")
        final = self._final_of(record) if has_final else None
        newest = self._newest_whole(checkpoints, final)
        if record is not None and (checkpoints or has_final):
            check_keys(record.identity, self.cfg, self.path / RUN_FILE)
        if newest is not None and not self._goes_back_here():  # a run that goes back before it does not need to read it
            check_keys(read_state(newest).identity, self.cfg, newest)
        self._check_kind()
        if has_final and record is None and newest is None:
            raise CheckpointError(
                f"output_dir: {self.path} holds a model, and nothing shows that this run wrote it: no {RUN_FILE} and "
                "no checkpoint. Choose another output_dir, or move that model elsewhere. If it is of a run that is "
                "not needed any more, overwrite_output_dir: true removes it."
            )
        if final is not None:
            self._refuse_without_resuming("the final model of this run")
        return self._explicit() or newest, final

    def _final_of(self, record: RunRecord | None) -> FinalModel | None:
        """The final model of the run's present branch, if there is one."""
        final = None if record is None else record.final_model
        return final if record is not None and final is not None and final.branch == record.branch else None

    def _refuse_without_resuming(self, what: str) -> None:
        if self.cfg.resume_from_checkpoint == "none":
            raise CheckpointError(
                f"output_dir: {self.path} holds {what}, but resume_from_checkpoint is none. Set overwrite_output_dir: "
                "true to remove the run that is there, or choose another output_dir."
            )

    def _newest_whole(self, checkpoints: list[Path], final: FinalModel | None) -> Path | None:
        """The newest checkpoint that is not damaged; later ones are named, and `begin` sets them aside. A run that has
        ended with its `final` model needs no optimizer's state.
        """
        damages: list[tuple[Path, str]] = []
        for path in reversed(checkpoints):
            ended = final is not None and final.step == checkpoint_step(path)
            damage = damage_of(path, with_optimizer=not (ended or self.cfg.ignore_load_lr_and_optim))
            if damage is None:
                for later, why in damages if self._explicit() is None else ():
                    log.warning(f"{later} is not whole: {why.rstrip('.')}. The run goes back to {path.name}")
                return path
            damages.append((path, damage))
        if checkpoints and self._explicit() is None:
            newest, why = damages[0]
            more = f"; nor are {', '.join(path.name for path, _ in damages[1:])}" if damages[1:] else ""
            optimizer = "ignore_load_lr_and_optim: true to continue with its weights alone, "
            raise CheckpointError(
                f"output_dir: none of the checkpoints in {self.path} is whole: {newest.name}: {why.rstrip('.')}{more}. "
                f"Set {optimizer if f'{OPTIMIZER_DIR}/' in why else ''}overwrite_output_dir: true to start from "
                "scratch, or choose another output_dir."
            )
        return None

    def _check_kind(self) -> None:
        """Check that the run does not mix a model and an adapter in one directory, which would be ambiguous."""
        trains_adapter = self.cfg.fine_tuning == "LoRA"
        if has_weights(self.path) if trains_adapter else is_adapter(self.path):
            there, here = ("a model", "an adapter") if trains_adapter else ("an adapter", "a model")
            raise CheckpointError(
                f"output_dir: {self.path} holds {there}, and this run writes {here} (fine_tuning: "
                f"{self.cfg.fine_tuning}). Choose another output_dir."
            )

    # Changes.

    def begin(self, present: RunRecord, step: int, trains: bool) -> None:
        """Prepare the directory for a run that continues after `step`. `present` is the run's identity. config.yaml is
        written if there are steps left to train.
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
        """If the run goes back, as the user asks or because later checkpoints are damaged, set these aside, with a copy
        of the metrics.
        """
        source = self.claim().source
        if source is None:
            return
        here, metrics = source.resolve().parent == self.path.resolve(), self.path / METRICS_FILE
        later = [p for p in list_checkpoints(self.path) if not here or (checkpoint_step(p) or 0) > step]
        if not later and (here or not metrics.is_file()):
            return
        record.branch += 1  # first, so that the existing final model belongs to an earlier branch from here on
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
        """The files that overwrite_output_dir removes, in order: first those that can be made again, then checkpoints
        from the oldest on, so that an interrupted removal leaves a run that can be resumed.
        """
        if not self.path.is_dir() or not self._holds_run():
            return []
        reports, metrics = (*_ALSO_REMOVED, *_REPORTS[:-1]), _REPORTS[-1]
        ema = [self.path / EMA] if (self.path / EMA).is_dir() else []
        aside = sorted(path for path in self.path.glob(f"{ABANDONED}*") if path.name[len(ABANDONED) :].isdigit())
        there = [self.path / name for name in reports if (self.path / name).is_file()]
        end = [self.path / name for name in (metrics, RUN_FILE) if (self.path / name).exists()]
        return [*model_files(self.path), *ema, *there, *aside, *list_checkpoints(self.path), *end]

    def _remove_old_run(self) -> None:
        """Remove the old run for overwrite_output_dir, and log it."""
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
        """Record that the final model is complete."""
        on_first(self.group, lambda: self._record_final(final))

    def _record_final(self, final: FinalModel) -> None:
        record = read_record(self.path) or RunRecord(noted(self.cfg))
        final.branch = record.branch
        record.final_model = final
        record.write(self.path)
