"""Where a run begins and what it leaves behind: resuming, checkpoints, the final model."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import paddle

from erniekit.checkpoint.manager import CheckpointManager
from erniekit.checkpoint.portion import Portion
from erniekit.checkpoint.reshard import Shares
from erniekit.checkpoint.run_record import FinalModel
from erniekit.checkpoint.together import all_or_none, on_first
from erniekit.train.adapt import load_trained, prepare_save, trained_tensors
from erniekit.train.build import Run
from erniekit.train.ema import DIRECTORY as EMA
from erniekit.train.output_dir import OutputDir
from erniekit.train.state import (
    TrainState,
    identity_of,
    load_optimizer,
    optimizer_portion,
    read_state,
    state_writer,
)
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError


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
        self.manager = CheckpointManager(self.output_dir, self.cfg.save_total_limit, self.ranks)

    def resume(self) -> TrainState:
        """Claim the output directory, and load the checkpoint that resume_from_checkpoint asks for, if any. What is in
        the directory stays as it is: `begin` changes it.
        """
        claim = self.output.claim()
        state = TrainState()
        if claim.source is not None:
            with all_or_none(self.ranks):
                state = self._load(claim.source)
        elif claim.final is not None:
            state = self._after_final(claim.final)
        state.identity, state.layout = identity_of(self.cfg), self._layout()
        return state

    def _after_final(self, final: FinalModel) -> TrainState:
        """Of a run that saved nothing but its final model: it is complete, or cannot go on."""
        if final.step < self.run.max_steps and not (final.data_ended and final.max_steps == self.run.max_steps):
            raise CheckpointError(
                f"output_dir: {self.output_dir} holds the final model of this run, of step {final.step}, and no "
                f"checkpoint to go on from to step {self.run.max_steps}. Set overwrite_output_dir: true to train anew, "
                "or choose another output_dir (and model_name_or_path: that model, to train it further)."
            )
        return TrainState(step=final.step)

    def has_ended(self, state: TrainState, stopped_early: bool) -> bool:
        """Whether the run that `state` belongs to has nothing left to do: no step, and its final model is there."""
        final = self.output.claim().final
        if final is None or final.step != state.step:
            return False
        data_ended = final.data_ended and final.max_steps == self.run.max_steps
        return state.step >= self.run.max_steps or stopped_early or data_ended

    def _layout(self) -> dict[str, int]:
        """How the run is divided, and the rows of a step; a run may go on under another layout."""
        rows = self.cfg.batch_size * self.cfg.gradient_accumulation_steps * self.run.mesh.degrees.data
        return asdict(self.run.mesh.degrees) | {"rows_per_step": rows}

    def _load(self, source: Path) -> TrainState:
        state = read_state(source)
        self._say_layout(state.layout, source)
        load_trained(self.run.model, source)
        if self.run.average is not None:
            self.run.average.load(source)
        for directory, tensors in self.run.recipe.extra_weights().items():
            load_trained(self.run.model, source / directory, into=tensors)
        if self.cfg.ignore_load_lr_and_optim:
            self.run.optimizer.reset()
        else:
            load_optimizer(source, self.run.optimizer, self.shares)
        if not self.cfg.ignore_data_skip:
            self.run.loader.load_state_dict(state.data)
        log.info(f"resuming after step {state.step} from {source}")
        if state.step >= self.run.max_steps:
            log.info(
                f"the run is complete: max_steps is {self.run.max_steps}. Raise it to train on, or set "
                "overwrite_output_dir: true"
            )
        return state

    def _say_layout(self, before: dict[str, int], source: Path) -> None:
        now = self._layout()
        changed = [f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
        if changed:
            log.info(f"{source.name} was saved under another layout: {', '.join(changed)}")
        if before.get("rows_per_step", now["rows_per_step"]) != now["rows_per_step"]:
            log.warning(
                f"batch_size * gradient_accumulation_steps * data ranks: a step now takes {now['rows_per_step']} rows, "
                f"before {before['rows_per_step']}. Change gradient_accumulation_steps to go on as before"
            )

    def save(self, state: TrainState) -> Path:
        """Write checkpoint-N (whole or not at all), then remove the oldest beyond save_total_limit. With
        use_async_save it is only copied when this returns; what goes wrong later is raised by the next save.
        """
        portions: list[Portion] = []
        adds = []
        for directory, tensors in (self._weights() | self.run.recipe.extra_weights()).items():
            more, add = self._prepare_save(tensors, below=directory)
            portions += more
            adds.append(add)
        if not self.cfg.ignore_save_lr_and_optim:
            portions.append(optimizer_portion(self.run.optimizer, self.shares))
        adds.append(state_writer(self.cfg, state))  # last, so that a directory without it is not a training checkpoint

        def add_all(checkpoint: Path) -> None:
            for add in adds:
                add(checkpoint)

        best = None if state.best_step is None else self.output_dir / f"checkpoint-{state.best_step}"
        return self.manager.save(state.step, add_all, portions, keep=best, background=self.cfg.use_async_save)

    def save_final(self, state: TrainState, data_ended: bool = False) -> Path:
        """Write the final model into output_dir: the last step's, or the best checkpoint's with
        load_best_model_at_end.
        """
        self.manager.wait()
        if self.cfg.load_best_model_at_end and state.best_step not in (None, state.step):
            best = self.output_dir / f"checkpoint-{state.best_step}"
            if on_first(self.ranks, best.is_dir):
                log.info(
                    f"the final model is that of {best.name}: {self.cfg.metric_for_best_model or 'loss'} "
                    f"{state.best_metric:.6g}"
                )
                with all_or_none(self.ranks):
                    load_trained(self.run.model, best)
            else:
                log.warning(f"load_best_model_at_end: {best.name} was not saved; the final model is the last step's")
        for directory, tensors in self._weights().items():
            portions, add = self._prepare_save(tensors)
            self.manager.save_into(self.output_dir / directory, add, portions)
        self.output.record_final(FinalModel(state.step, 1, self.run.max_steps, data_ended))
        return self.output_dir

    def _weights(self) -> dict[str, dict[str, paddle.Tensor]]:
        """What is written, by directory: the model's weights, and their average in a directory of its own."""
        own = {"": trained_tensors(self.run.model)}
        return own if self.run.average is None else own | {EMA: self.run.average.average}

    def _prepare_save(
        self, tensors: dict[str, paddle.Tensor], below: str = ""
    ) -> tuple[list[Portion], Callable[[Path], None]]:
        return prepare_save(
            self.run.model,
            tensors,
            self.shares,
            self.cfg.save_format,
            self.run.model_dir,
            self.run.template,
            directory=below,
        )
