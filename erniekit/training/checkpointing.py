"""Resumes a run, and saves its checkpoints and its final model."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import paddle

from erniekit.checkpoint.manager import CheckpointManager
from erniekit.checkpoint.model_dir import checkpoint_dir, checkpoint_step, list_checkpoints, resuming_command
from erniekit.checkpoint.model_shape import processor_directory
from erniekit.checkpoint.processor import settings_of
from erniekit.checkpoint.rank_files import RankFiles
from erniekit.checkpoint.reshard import Shares
from erniekit.checkpoint.run_record import RUN_FILE, FinalModel, RunRecord
from erniekit.data.vision.options import vision_spec
from erniekit.parallel.agree import all_or_none, on_first
from erniekit.training import resume_checks
from erniekit.training.build import Run
from erniekit.training.ema import DIRECTORY as EMA
from erniekit.training.ema import WeightAverage
from erniekit.training.moment_codes import CODES, Rounding
from erniekit.training.muon import MOMENTUM
from erniekit.training.output_dir import OutputDir
from erniekit.training.state import (
    OPTIMIZER_DIR,
    TrainState,
    load_optimizer,
    optimizer_rank_files,
    read_state,
    state_writer,
    stored_code,
)
from erniekit.training.trainable import load_trained, prepare_save, trained_tensors
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError
from erniekit.utils.wording import count_of


class Saver:
    """Checkpoints of one run. All ranks call its methods."""

    def __init__(self, run: Run, output: OutputDir | None = None) -> None:
        """`output`: the run's directory if it is claimed already."""
        self.run = run
        self.output = output or OutputDir(run.cfg, run.mesh.world_group)
        self.cfg = run.cfg
        self.output_dir = run.output_dir
        self.ranks = run.mesh.world_group
        self.shares = Shares.of(run.model, run.mesh)
        directory = processor_directory(run.cfg, run.model_dir)
        self.processor = settings_of(directory)
        if run.cfg.method.vision:
            self.processor = vision_spec(run.cfg, self.processor).settings
        command = functools.partial(resuming_command, run.cfg)
        self.manager = CheckpointManager(self.output_dir, self.cfg.save_total_limit, self.ranks, command)

    def resume(self) -> TrainState:
        """Claim the output directory, and load the checkpoint that resume_from_checkpoint asks for, if any. What is in
        the directory stays as it is: `begin` changes it.
        """
        claim = self.output.claim()
        base = on_first(self.ranks, lambda: resume_checks.base_of(self.cfg, self.run.model_dir))
        self.present = resume_checks.Present(self.cfg, base, self.run.loader)
        state = TrainState()
        if claim.source is not None:
            with all_or_none(self.ranks):
                state = self._load(claim.source)
        else:
            self.run.plan_steps(0)
            if claim.final is not None:
                state = self._after_final(claim.final, claim.record)
        state.identity, state.base, state.layout = resume_checks.noted(self.cfg), base, self._layout()
        state.max_steps = self.run.max_steps
        state.has_optimizer = not self.cfg.ignore_save_lr_and_optim
        return state

    def begin(self, state: TrainState) -> None:
        """Prepare the output directory for a run that continues after `state`."""
        record = RunRecord(state.identity, state.base, self.run.loader.state_dict())
        self.output.begin(record, state.step, trains=state.step < self.run.max_steps)

    def _after_final(self, final: FinalModel, record: RunRecord | None) -> TrainState:
        """The state of a run that saved only its final model. Such a run is complete, or it cannot be resumed."""
        then, where = None, self.output_dir / RUN_FILE
        if record is not None and record.data:
            then = TrainState(identity=record.identity, base=record.base, data=record.data)
            resume_checks.check(then, self.present, where)
        if final.step < self.run.max_steps and not (final.data_ended and final.max_steps == self.run.max_steps):
            raise CheckpointError(
                f"output_dir: {self.output_dir} holds the final model of this run, of step {final.step}, and no "
                f"checkpoint to resume from to step {self.run.max_steps}. Set overwrite_output_dir: true to train from "
                "scratch, or choose another output_dir (and model_name_or_path: that model, to train it further)."
            )
        for line in [] if then is None else resume_checks.changed_lines(then, self.present, where, complete=True):
            log.info(line)
        return TrainState(step=final.step)

    def has_ended(self, state: TrainState, stopped_early: bool) -> bool:
        """Whether the run that `state` belongs to has nothing left to do: no step, and its final model is there."""
        final = self.output.claim().final
        if final is None or final.step != state.step:
            return False
        data_ended = final.data_ended and final.max_steps == self.run.max_steps
        return state.step >= self.run.max_steps or stopped_early or data_ended

    def _layout(self) -> dict[str, int]:
        """The parallel degrees and the rows of a step; a run may be resumed under another layout."""
        rows = self.cfg.batch_size * self.cfg.gradient_accumulation_steps * self.run.mesh.degrees.batch
        accumulates = self.cfg.method.reads("gradient_accumulation_steps")
        return asdict(self.run.mesh.degrees) | ({"rows_per_step": rows} if accumulates else {})

    def _load(self, source: Path) -> TrainState:
        state, run = read_state(source), self.run
        resume_checks.check(state, self.present, source)
        self._log_layout(state.layout, source)
        with _cure_of(source):
            load_trained(run.model, source)
            if run.average is not None:
                self._load_average(run.average, state.identity.get("ema_decay") is not None, source)
            moved = state.identity.get("ref_model_update_steps", -1) != -1 or state.identity.get("sync_ref_model")
            for directory, tensors in run.recipe.extra_weights().items():
                if _holds(source, directory, bool(moved)):
                    load_trained(run.model, source / directory, into=tensors)
                else:
                    log.info(
                        f"{directory}: {source.name} was trained with the one of "
                        "the beginning; it is updated from now on"
                    )
        log.info(f"resuming after step {state.step} from {source}")
        self._set_position(state, source)
        run.plan_steps(state.step)
        complete = state.step >= run.max_steps
        if complete:
            key = "max_steps" if self.cfg.max_steps > 0 else "num_train_epochs"
            log.info(
                f"the run is complete: {key} is {vars(self.cfg)[key]:g}, and "
                f"{count_of(state.step, 'step is', 'steps are')} done. Raise it to train more, or set "
                "overwrite_output_dir: true to train from scratch"
            )
        else:
            with _cure_of(source, "ignore_load_lr_and_optim: true continues with the weights of this one. "):
                self._load_optimizer(state, source)
        for line in resume_checks.changed_lines(state, self.present, source, complete):
            log.info(line)
        rate = resume_checks.rate_line(state, self.cfg, run.max_steps)
        if rate is not None:
            log.info(rate)
        if run.best is not None:
            forgotten = run.best.forget_incomparable(state)
            if forgotten is not None:
                log.warning(forgotten)
        return state

    def _load_average(self, average: WeightAverage, was_saved: bool, source: Path) -> None:
        if _holds(source, EMA, was_saved):
            average.load(source)
        else:
            average.restart()
            log.warning(f"ema_decay: {source.name} holds no average of its weights: it begins with those of this step")

    def _load_optimizer(self, state: TrainState, source: Path) -> None:
        if self.cfg.ignore_load_lr_and_optim:
            self.run.optimizer.reset()
            log.info("ignore_load_lr_and_optim: the optimizer's state is reset")
        elif _holds(source, OPTIMIZER_DIR, bool(state.has_optimizer)):
            load_optimizer(source, self.run.optimizer, self.shares)
            code = stored_code(source)
            if code is not None:
                log.info(
                    f"ckpt_quant_stage: {source.name} holds AdamW's moments in {code.bits} bits ({code.name}), so the "
                    "next steps differ from an uninterrupted run's (docs/resuming.md says by how much)"
                )
        else:
            self.run.optimizer.reset()
            log.warning(
                f"{source.name} was saved without the optimizer's state (ignore_save_lr_and_optim): its weights are "
                "trained further with new state (moments of 0), so the next steps differ from an uninterrupted run's"
            )

    def _set_position(self, state: TrainState, source: Path) -> None:
        """Set the loader to the position after the rows that were trained on. With ignore_data_skip it starts from the
        beginning, unless the run is complete; otherwise every start of the same command would train once more.
        """
        if not self.cfg.ignore_data_skip:
            self.run.loader.load_state_dict(state.data)
            self.run.loader.load_files(source)
            return
        if state.data and not self.run.loader.changes(state.data) and self.cfg.max_steps <= 0:
            begin = self.run.loader.state_dict()
            self.run.loader.load_state_dict(state.data)
            if not self.run.loader.rows_left():
                self.run.loader.load_files(source)
                return
            self.run.loader.load_state_dict(begin)
        log.info(f"ignore_data_skip: the data start again after step {state.step} of {source.name}")

    def _log_layout(self, before: dict[str, int], source: Path) -> None:
        now = self._layout()
        changed = [f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
        if changed:
            log.info(f"{source.name} was saved under another layout: {', '.join(changed)}")
        if "rows_per_step" in now and before.get("rows_per_step", now["rows_per_step"]) != now["rows_per_step"]:
            log.warning(
                f"batch_size * gradient_accumulation_steps * data ranks: a step now takes {now['rows_per_step']} rows, "
                f"before {before['rows_per_step']}. Change gradient_accumulation_steps to continue as before"
            )

    def save(self, state: TrainState) -> Path:
        """Note the position of the data in `state` and write checkpoint-N atomically, then remove the oldest
        checkpoints beyond save_total_limit. With use_async_save it has only been copied when this returns, and later
        errors are raised by the next save.
        """
        state.data = self.run.loader.state_dict()
        files: list[RankFiles] = []
        adds = []
        for directory, tensors in (self._weights() | self.run.recipe.extra_weights()).items():
            more, add = self._prepare_save(tensors, below=directory)
            files += more
            adds.append(add)
        rounding = Rounding()
        if not self.cfg.ignore_save_lr_and_optim:
            code = CODES.get(self.cfg.ckpt_quant_stage)
            files.append(optimizer_rank_files(self.run.optimizer, self.shares, code, rounding))
        adds.append(_files_writer(self.run.loader.files()))
        adds.append(state_writer(self.cfg, state))  # last, so that a directory without it is not a training checkpoint

        def add_all(checkpoint: Path) -> None:
            for add in adds:
                add(checkpoint)

        best = None if state.best_step is None else checkpoint_dir(self.output_dir, state.best_step)
        saved = self.manager.save(state.step, add_all, files, keep=best, background=self.cfg.use_async_save)
        if rounding.tensors:
            log.info(f"ckpt_quant_stage: {self.cfg.ckpt_quant_stage}: {rounding}{self._kept_line()}")
        return saved

    def _kept_line(self) -> str:
        """What ckpt_quant_stage does not round: its codes are for the ratio of two moments, and Muon has one."""
        matrices = sum(entry.endswith(f"/{MOMENTUM}") for entry in self.run.optimizer.state_shapes())
        return f"; the momentum of {count_of(matrices, 'parameter')} stays in fp32 (optim: muon)" if matrices else ""

    def save_final(self, state: TrainState, data_ended: bool = False) -> Path:
        """Write the final model into output_dir: the last step's, or the best checkpoint's with
        load_best_model_at_end.
        """
        self.manager.wait()
        if self.cfg.load_best_model_at_end and state.best_step not in (None, state.step):
            best = checkpoint_dir(self.output_dir, state.best_step)
            if on_first(self.ranks, best.is_dir):
                metric = self.cfg.metric_for_best_model or self.cfg.method.metric
                log.info(f"the final model is that of {best.name}: {metric} {state.best_metric:.6g}")
                with all_or_none(self.ranks):
                    load_trained(self.run.model, best)
                    if self.run.average is not None:
                        self._load_average(self.run.average, (best / EMA).is_dir(), best)
            else:
                log.warning(f"load_best_model_at_end: {best.name} was not saved; the final model is the last step's")
        for directory, tensors in self._weights().items():
            files, add = self._prepare_save(tensors)
            self.manager.save_into(self.output_dir / directory, add, files)
        self.output.record_final(FinalModel(state.step, 1, self.run.max_steps, data_ended))
        return self.output_dir

    def _weights(self) -> dict[str, dict[str, paddle.Tensor]]:
        """The tensors to write, by directory: the model's weights, and their average in a separate directory."""
        own = {"": trained_tensors(self.run.model)}
        return own if self.run.average is None else own | {EMA: self.run.average.average}

    def _prepare_save(
        self, tensors: dict[str, paddle.Tensor], below: str = ""
    ) -> tuple[list[RankFiles], Callable[[Path], None]]:
        return prepare_save(
            self.run.model,
            tensors,
            self.shares,
            "paddle" if self.cfg.save_format == "paddle" else "pt",
            (self.run.model_dir, self.run.tokenizer_dir),
            self.run.template,
            self.processor,
            directory=below,
        )


def _files_writer(files: dict[str, bytes]) -> Callable[[Path], None]:
    """A function that writes these files into a checkpoint."""

    def write(directory: Path) -> None:
        for name, data in files.items():
            (directory / name).write_bytes(data)

    return write


def _holds(checkpoint: Path, directory: str, was_saved: bool) -> bool:
    """Whether a checkpoint has a directory that it need not have. CheckpointError if it was saved and is gone."""
    there = (checkpoint / directory).is_dir()
    if was_saved and not there:
        raise CheckpointError(f"{checkpoint}: {directory}/ was saved with it and is gone.")
    return there


@contextlib.contextmanager
def _cure_of(checkpoint: Path, cure: str = "") -> Iterator[None]:
    """Add to an error in a checkpoint's files what can be resumed from instead."""
    try:
        yield
    except CheckpointError as error:
        step = checkpoint_step(checkpoint)
        others = [path for path in list_checkpoints(checkpoint.parent) if (checkpoint_step(path) or 0) < (step or 0)]
        instead = f"resume_from_checkpoint={others[-1]}" if others else "no earlier checkpoint is there"
        raise CheckpointError(f"{error} {cure}To resume from another checkpoint: {instead}.") from error
