"""Where a run begins and what it leaves behind: resuming, checkpoints, the final model."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import paddle

from erniekit.checkpoint.folder import has_weights, is_adapter
from erniekit.checkpoint.manager import CheckpointManager, list_checkpoints
from erniekit.checkpoint.portion import Portion
from erniekit.checkpoint.reshard import Shares
from erniekit.checkpoint.together import all_or_none, on_first, require_shared
from erniekit.lora import state_of
from erniekit.train.adapt import load_trained, prepare_save, trained_tensors
from erniekit.train.build import Run
from erniekit.train.ema import DIRECTORY as EMA
from erniekit.train.state import (
    CONFIG_FILE,
    TrainState,
    check_identity,
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

    def __init__(self, run: Run) -> None:
        self.run = run
        self.cfg = run.cfg
        self.output_dir = run.output_dir
        self.ranks = run.mesh.world_group
        self.shares = Shares.of(run.model, run.mesh)
        self.manager = CheckpointManager(self.output_dir, self.cfg.save_total_limit, self.ranks)

    def resume(self) -> TrainState:
        """Prepare the output directory and go on from the checkpoint that resume_from_checkpoint asks for, if any."""
        found = on_first(self.ranks, self._prepare)
        require_shared(self.output_dir, self.ranks)
        state = TrainState()
        if found is not None:
            with all_or_none(self.ranks):
                state = self._load(Path(found))
        state.identity, state.layout = identity_of(self.cfg), self._layout()
        return state

    def _prepare(self) -> str | None:
        """Make the output directory ready; the checkpoint to go on from."""
        if self.cfg.overwrite_output_dir:
            self._remove_old_run()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.manager.remove_leftovers()
        source = self._source()
        if source is not None:
            check_identity(read_state(source), self.cfg, source)
        self._refuse_other_kind()
        (self.output_dir / CONFIG_FILE).write_text(self.cfg.to_yaml(), encoding="utf-8")
        return None if source is None else str(source)

    def _refuse_other_kind(self) -> None:
        """A directory with both a model and an adapter would not say which is meant."""
        trains_adapter = state_of(self.run.model) is not None
        if has_weights(self.output_dir) if trains_adapter else is_adapter(self.output_dir):
            there, here = ("a model", "an adapter") if trains_adapter else ("an adapter", "a model")
            raise CheckpointError(
                f"output_dir: {self.output_dir} holds {there}, and this run writes {here} (fine_tuning: "
                f"{self.cfg.fine_tuning}). Choose another output_dir."
            )

    def _layout(self) -> dict[str, int]:
        """How the run is divided, and the rows of a step; a run may go on under another layout."""
        rows = self.cfg.batch_size * self.cfg.gradient_accumulation_steps * self.run.mesh.degrees.data
        return asdict(self.run.mesh.degrees) | {"rows_per_step": rows}

    def _source(self) -> Path | None:
        asked = self.cfg.resume_from_checkpoint
        if asked == "auto":
            return self.manager.newest()
        if asked == "none":
            if list_checkpoints(self.output_dir):
                raise CheckpointError(
                    f"output_dir: {self.output_dir} holds checkpoints, but resume_from_checkpoint is none. Set "
                    "overwrite_output_dir: true to remove "
                    "them, or choose another output_dir."
                )
            return None
        return Path(asked)

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

    def _remove_old_run(self) -> None:
        """overwrite_output_dir: remove checkpoints and metrics of the run that was there, and say so."""
        old = list_checkpoints(self.output_dir)
        for path in old:
            shutil.rmtree(path)
        metrics = self.output_dir / "metrics.jsonl"
        if old or metrics.exists():
            log.info(
                f"overwrite_output_dir: removed {len(old)} checkpoints and the metrics of the run in {self.output_dir}"
            )
        metrics.unlink(missing_ok=True)

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

    def save_final(self, state: TrainState) -> Path:
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
