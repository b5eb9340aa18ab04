"""The trainer of all methods: the training loop and the optimizer step."""

import contextlib
import math
import signal
import time
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import paddle

from erniekit.checkpoint.model_dir import what_is_saved
from erniekit.data.packed_batch import PackedBatch
from erniekit.models.qat import MovingRanges
from erniekit.models.sharded_blocks import local_tensors
from erniekit.models.weights import num_parameters
from erniekit.moe.expert_bias import update_biases
from erniekit.moe.layer import MoELayer
from erniekit.parallel import comm, pipeline
from erniekit.parallel.grad_clip import clip_, global_norm, squared_norms
from erniekit.parallel.mesh import Mesh
from erniekit.training.batch_warmup import microbatches_at, repeats_line, warmup_steps
from erniekit.training.build import Run
from erniekit.training.callbacks import Callback, RunInfo, StepMetrics
from erniekit.training.checkpointing import Saver
from erniekit.training.evaluation import evaluate
from erniekit.training.forward_step import StepSums, TrainStage
from erniekit.training.fp8_shares import Fp8Shares
from erniekit.training.loss_scale import LossScaler
from erniekit.training.output_dir import OutputDir
from erniekit.training.profiling import make_profiler
from erniekit.training.reduce_metrics import global_counts, global_sums
from erniekit.training.replica_check import ReplicaCheck
from erniekit.training.reporting.summary import FILE_NAME as SUMMARY_FILE
from erniekit.training.state import TrainState
from erniekit.utils import heartbeat, log, stop_signals
from erniekit.utils.errors import TrainError
from erniekit.utils.spans import span
from erniekit.utils.thread_waits import ThreadWaits
from erniekit.utils.user_files import read_json_object
from erniekit.utils.wording import count_of

# Keys of the values that are fetched together with a stage's sums.
_SQUARES = "squared norms of the gradients"


class _Bias(NamedTuple):
    """The correction biases of a sparse layer's routers."""

    layer: int


class Trainer:
    """Runs a Run. `fit` is the loop; `train_step` is one optimizer step."""

    def __init__(self, run: Run, callbacks: list[Callback], output: OutputDir | None = None) -> None:
        """`output`: the run's directory if it is claimed already."""
        self.run = run
        self.cfg = run.cfg
        self.callbacks = callbacks
        self.saver = Saver(run, output)
        self.check_replicas = ReplicaCheck(run.model, run.mesh)
        self.state = TrainState()
        self.profiler = make_profiler(run) if run.cfg.profile else None
        self.scaler = LossScaler(self.cfg.scale_loss) if run.model.residual_dtype == paddle.float16 else None
        self._fp8_shares = Fp8Shares(run.model, self.cfg.fp8_statistics_steps)
        self._ranges = MovingRanges(run.model, run.mesh)
        self._waits = ThreadWaits()
        self._saved_step: int | None = None
        self._evaluated_step: int | None = None
        self._stopped_by: signal.Signals | None = None
        self._data_ended = False

    def fit(self) -> dict[str, Any]:
        """Resume if there is something to resume, train to the last step, save. Returns the summary.

        A run that has ended is not changed at all.
        """
        with contextlib.closing(self.run), self.saver.output:
            self.state = self.saver.resume()
            if self.scaler is not None:
                self.scaler.load(self.state)
            self._saved_step = self.state.step if self.state.step else None
            if self.saver.has_ended(self.state, self._stopped_early()):
                return self._leave_as_it_is()
            self.saver.begin(self.state)
            return self._fit()

    def _fit(self) -> dict[str, Any]:
        run, number = self.run, num_parameters(self.run.model.config)
        info = RunInfo(run.output_dir, run.max_steps, self.state.step, number, self.cfg)
        summary: dict[str, Any] = {"steps": self.state.step}
        try:
            with stop_signals.deferred():
                for callback in self.callbacks:
                    callback.on_start(info)
                self._train_to_the_end()
                with heartbeat.phase("the end of the run"):
                    summary = self._pause() if self._stopped_by else self._finish()
        except BaseException as error:
            summary = {"steps": self.state.step, "error": f"{type(error).__name__}: {error}"}
            raise
        finally:
            if self.profiler is not None:
                self.profiler.stop()
            with heartbeat.phase("the end of the run"):  # a plot takes seconds
                for callback in self.callbacks:
                    callback.on_end(summary)
                self.saver.manager.join()
        if self._stopped_by is not None:
            by = "interrupted by Ctrl-C" if self._stopped_by == signal.SIGINT else f"stopped by {self._stopped_by.name}"
            log.info(f"{by} after step {self.state.step}; {what_is_saved(self.cfg)}")
        return summary

    def _leave_as_it_is(self) -> dict[str, Any]:
        """End without changing any file of the finished run; its summary is returned."""
        out = self.run.output_dir
        log.info(f"no step is left to train: the final model and the records in {out} stay as they are")
        try:
            return read_json_object(out / SUMMARY_FILE, TrainError)
        except FileNotFoundError:
            return {"steps": self.state.step, "total_tokens": self.state.num_tokens}

    def _train_to_the_end(self) -> None:
        """Run steps until all are done, the data has ended, or a signal asks the run to stop."""
        while self.state.step < self.run.max_steps and not self._stopped_early():
            if not self._advance() or (self.state.step < self.run.max_steps and self._must_stop()):
                break
        if self.profiler is not None:
            self.profiler.finish()

    def _advance(self) -> bool:
        """Run one step and what it triggers: callbacks, an evaluation, a checkpoint. False when the data has ended."""
        epochs, began = self.run.loader.epochs_done, time.perf_counter()
        if self.profiler is not None:
            self.profiler.before_step(self.state.step)
        try:
            with span("data"):
                batches = self._next_batches()
        except StopIteration:
            log.info(f"the data ended after step {self.state.step} of {self.run.max_steps}")
            self._data_ended = True
            if self._compares_last() and self._evaluate():
                self._save()
            return False
        waited = time.perf_counter() - began
        self._warn_of_repeats(self.run.loader.epochs_done - epochs)
        report = self.run.loader.report_step()
        metrics = self.train_step(batches)
        self._waits.after_step()
        metrics = replace(
            metrics, data_seconds=waited, parts=metrics.parts | report.metrics, samples=tuple(report.samples)
        ).with_logged(report.logged)
        if self.profiler is not None:
            self.profiler.after_step(metrics)
        heartbeat.step(self.state.step)
        every = self.cfg.check_replicas_steps
        if every > 0 and self.state.step % every == 0:
            self.check_replicas(self.state.step)
        for callback in self.callbacks:
            callback.on_step(metrics)
        epoch_ended = self.run.loader.epochs_done > epochs
        is_due = self._is_due(self.cfg.evaluation_strategy, self.cfg.eval_steps or self.cfg.logging_steps, epoch_ended)
        is_last = self.state.step == self.run.max_steps
        is_best = (is_due or (is_last and self._compares_last())) and self._evaluate()
        if is_best or self._is_due(self.cfg.save_strategy, self.cfg.save_steps, epoch_ended):
            self._save()
        return True

    def _warn_of_repeats(self, times: int) -> None:
        """Warn if one step has read the end of the data several times."""
        if times > 1 and self.cfg.method.reads("gradient_accumulation_steps"):
            rows = self.cfg.batch_size * self.cfg.gradient_accumulation_steps * self.run.mesh.degrees.batch
            log.once(repeats_line(rows))

    def _next_batches(self) -> list[PackedBatch]:
        """This step's microbatches. While the batch still grows, the loader gives them one by one."""
        warmup = warmup_steps(self.cfg)
        if not warmup:
            return self.run.loader.next_step()
        batches = self.run.loader.next_step()
        for _ in range(microbatches_at(self.state.step, self.cfg.gradient_accumulation_steps, warmup) - 1):
            try:
                batches = batches + self.run.loader.next_step()
            except StopIteration:
                break
        return batches

    def train_step(self, batches: list[PackedBatch]) -> StepMetrics:
        """One optimizer step on this rank's microbatches."""
        started = time.perf_counter()
        step = self.state.step
        paddle.seed(noise_seed(self.cfg.seed, step, self.run.mesh))
        with span("prepare"):
            self.run.recipe.before_step(step)
            microbatches = self.run.recipe.prepare(batches)
        self._fp8_shares.begin(step + 1)
        stage, gradients = self._forward_backward(microbatches)
        with span("gradients"):
            sums, norm, biases = self._fetch(stage, gradients)
        learning_rate = self.run.schedule(step)
        scaling = self._note_scale(sums.loss, norm)
        if not scaling.get("skipped"):
            self._require_finite(sums.loss, norm, gradients, microbatches)
            with span("optimizer"):
                biases = self._update(gradients, norm, learning_rate, sums, biases)
        self._ranges.forget()  # a step that is skipped moves nothing
        self.run.sync.clear()
        routers = self._router_records(sums, biases)
        num_tokens = int(sums.counts["tokens"])
        self.state.step += 1
        self.run.recipe.after_step(self.state.step)
        self.state.num_tokens += num_tokens
        return StepMetrics(
            step=self.state.step,
            loss=sums.loss,
            grad_norm=norm,
            learning_rate=learning_rate,
            num_tokens=num_tokens,
            num_supervised=int(sums.counts["supervised"]),
            seconds=time.perf_counter() - started,
            parts=_parts(sums, routers) | scaling,
            routers=routers,
            sent=comm.traffic.take(),
            patch_load=stage.patch_load,
        )

    def _note_scale(self, loss: float, norm: float) -> dict[str, float]:
        """What the step records of fp16's loss scaling: its scale, and whether it is skipped (1) or not (0)."""
        if self.scaler is None:
            return {}
        scale = self.scaler.scale
        skipped = self.scaler.skips(self.state.step + 1, loss, norm)
        self.scaler.save(self.state)
        self.state.skipped_steps += skipped
        return {"loss_scale": scale, "skipped": float(skipped)}

    def _update(
        self,
        gradients: dict[str, paddle.Tensor],
        norm: float,
        learning_rate: float,
        sums: StepSums,
        biases: dict[int, np.ndarray],
    ) -> dict[int, np.ndarray]:
        """Update what is trained: weights, correction biases, averages. Returns the biases of the sparse layers."""
        clip_(gradients, norm, self.cfg.max_grad_norm)
        self.run.optimizer.step(gradients, learning_rate, seed=self.cfg.seed * 1_000_003 + self.state.step)
        if self.run.update_router_bias:
            usages = {router: stats.usage for router, stats in sums.routers.items()}
            changes = update_biases(self._sparse_layers(), usages, self.cfg.moe_use_aux_free_update_coef)
            biases = {layer: bias + changes[layer] for layer, bias in biases.items()}
        self._ranges.update()
        if self.run.average is not None:
            self.run.average.update()
        return biases

    def _forward_backward(self, microbatches: list[PackedBatch]) -> tuple[TrainStage, dict[str, paddle.Tensor]]:
        """Accumulate gradients of the summed loss over the step's counts, which are known before any model runs."""
        run, mesh = self.run, self.run.mesh
        counts = global_counts(run.recipe, microbatches, mesh)
        sync = run.sync
        step, scale = self.state.step, 1.0 if self.scaler is None else self.scaler.scale
        stage = TrainStage(self.cfg, run.model, run.recipe, microbatches, counts, sync.after_backward, step, scale)
        sync.begin(len(microbatches))
        pipeline.run(run.actions(len(microbatches)), stage, mesh.pipe_group.ranks)
        with span("gradients"):
            gradients = sync.finish()
            return stage, gradients if self.scaler is None else self.scaler.unscale(gradients)

    def _fetch(
        self, stage: TrainStage, gradients: dict[str, paddle.Tensor]
    ) -> tuple[StepSums, float, dict[int, np.ndarray]]:
        """The step's sums over all ranks, the gradients' norm, and the correction bias of each sparse layer's routers.

        This is the host's only wait for what the step computed (beside what dropless experts and several ranks need):
        between the backward pass and the optimizer, because a loss or a norm that is not finite must stop the run
        before the update.
        """
        stage.on_device.add(_SQUARES, squared_norms(gradients))
        for number, layer in self._sparse_layers().items():
            stage.on_device.add(_Bias(number), layer.correction_bias)
        self._fp8_shares.add_to(stage.on_device)
        fetched = stage.on_device.fetch()
        biases = {key.layer: value.astype(np.float32) for key, value in fetched.items() if isinstance(key, _Bias)}
        sums = global_sums(stage.sums(fetched), self.run.mesh)
        entries, world = self.run.sync.parameters.entries, self.run.mesh.world_group
        sums.metrics |= self._fp8_shares.parts(fetched, world)
        return sums, global_norm(gradients, entries, world, fetched[_SQUARES]), biases

    def _sparse_layers(self) -> dict[int, MoELayer]:
        """The sparse layers of this process by number."""
        layers = self.run.model.model.layers
        return {number: layers[number].mlp for number in layers.numbers if layers[number].sparse}

    def _router_records(self, sums: StepSums, biases: dict[int, np.ndarray]) -> dict[str, dict[str, Any]]:
        """Each router's numbers and its experts' loads, by "layer" or "layer.vision"; those of every stage."""
        records = {}
        for (layer, modality), stats in sums.routers.items():
            name = f"{layer}.vision" if modality else str(layer)
            records[name] = stats.record(biases[layer][modality]) | {"load": stats.usage.tolist()}
        return {k: v for part in comm.gather_objects(records, self.run.mesh.pipe_group) for k, v in part.items()}

    def _require_finite(
        self, loss: float, norm: float, gradients: dict[str, paddle.Tensor], microbatches: list[PackedBatch]
    ) -> None:
        """Raise an error before a bad update. Loss and norm are equal on every rank, so all raise the same error."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        step = self.state.step + 1
        named = local_tensors(self.run.model)
        found = {
            "weights": [name for name, p in named.items() if not bool(paddle.isfinite(p).all())],
            "gradients": [name for name, gradient in gradients.items() if not bool(paddle.isfinite(gradient).all())],
            "sources": [source for batch in microbatches for source in batch.sources],
        }
        everywhere = comm.gather_objects(found, self.run.mesh.world_group)
        newest = self.saver.manager.newest()
        kept = f"{newest} is unharmed" if newest else "no checkpoint had been saved yet"
        cure = (
            f"Lower learning_rate (now {self.run.schedule(step - 1):.3g}), add warmup_steps, or look at these samples."
        )
        if step == 1 and self.cfg.continue_training and any(rank["weights"] for rank in everywhere):
            files = " or ".join(filter(None, (self.cfg.model_name_or_path, self.cfg.lora_path)))
            cure = f"No step came before, so the weight was read like this: copy the files of {files} again."
        raise TrainError(
            f"step {step}: loss {loss}, gradient norm {norm}: {_what_is_not_finite(everywhere)}. "
            f"Nothing was updated; {kept}. {cure}"
        )

    def _is_due(self, strategy: str, every: int, epoch_ended: bool) -> bool:
        if strategy == "steps":
            return self.state.step % every == 0
        return strategy == "epoch" and (epoch_ended or self.state.step == self.run.max_steps)

    def _compares_last(self) -> bool:
        """Whether the last step is to be evaluated, since evaluations before have something to compare it with. The
        first evaluation of a run is left to `_finish`, which saves before it.
        """
        is_compared = self.cfg.evaluation_strategy != "no" and self.state.best_step is not None
        return is_compared and self._evaluated_step != self.state.step

    def _evaluate(self) -> bool:
        """Evaluate the model. Returns whether this is the best evaluation so far, which is to be saved."""
        with heartbeat.phase("an evaluation"):
            metrics = self._metrics()
        assert self.run.best is not None
        return self.run.best.note(self.state, metrics) and self.cfg.save_strategy != "no"

    def _metrics(self) -> dict[str, float]:
        """An evaluation's numbers, which are reported."""
        metrics = evaluate(self.run, self.state.step)
        self._evaluated_step = self.state.step
        for callback in self.callbacks:
            callback.on_evaluate(self.state.step, metrics)
        return metrics

    def _stopped_early(self) -> bool:
        return self.run.best is not None and self.run.best.stops_early(self.state)

    def _must_stop(self) -> bool:
        """Whether a signal has reached any rank: all of them then stop after the same step."""
        arrived = np.array([stop_signals.requested() == number for number in stop_signals.SIGNALS], np.float64)
        counts = comm.sum_floats(arrived, self.run.mesh.world_group)
        self._stopped_by = next(
            (number for number, count in zip(stop_signals.SIGNALS, counts, strict=True) if count), None
        )
        return self._stopped_by is not None

    def _pause(self) -> dict[str, Any]:
        """Save a checkpoint, even if the configuration asks for none, and leave the remaining steps to the
        next start.
        """
        assert self._stopped_by is not None
        if self._saved_step != self.state.step:
            self._save()
        self.saver.manager.wait()
        return {"steps": self.state.step, "total_tokens": self.state.num_tokens, "stopped": self._stopped_by.name}

    def _save(self) -> None:
        with heartbeat.phase("a save"):
            path = self.saver.save(self.state)
            self._saved_step = self.state.step
            for callback in self.callbacks:  # the first plot imports its library, which takes seconds
                callback.on_save(self.state.step, path)

    def _log_unseen(self) -> None:
        """Log if rows are left, which may happen if the number of steps was estimated."""
        epoch, wanted = self.run.loader.report()["epoch"], self.cfg.num_train_epochs
        estimated = self.cfg.max_steps <= 0 and not self.run.loader.exact
        if estimated and epoch < wanted and self.state.step >= self.run.max_steps:
            log.warning(
                f"the number of steps was estimated (max_estimate_samples): the training ends after {epoch:.3g} of "
                f"{count_of(wanted, 'epoch')}"
            )

    def _finish(self) -> dict[str, Any]:
        """Last checkpoint, last evaluation, final model."""
        done = self.state.step
        self._log_unseen()
        summary: dict[str, Any] = {"steps": done, "total_tokens": self.state.num_tokens}
        if self.cfg.save_strategy != "no" and self._saved_step != done:
            self._save()  # saved first, since an evaluation may fail
        if self.run.eval_loader is not None and (self.cfg.evaluation_strategy == "no" or self.state.best_step is None):
            metrics = self._metrics()
            if self._must_stop():
                return self._pause()
            summary |= metrics
        path = self.saver.save_final(self.state, self._data_ended)
        for callback in self.callbacks:
            callback.on_save(done, path)
        if self.state.best_step is not None:
            summary |= {"best_metric": self.state.best_metric, "best_step": self.state.best_step}
        summary["data"] = self.run.loader.report()
        if self._evaluated_step is not None:
            assert self.run.eval_loader is not None
            summary["eval_data"] = self.run.eval_loader.report()
        return summary


def noise_seed(seed: int, step: int, mesh: Mesh) -> int:
    """The seed of a step's noise, which follows from numbers, so that nothing has to be saved. Data ranks have other
    tokens and stages other layers, and draw other numbers; tensor ranks share inputs, and draw the same.
    """
    return (seed * 1_000_003 + step + mesh.data * 15_485_863 + mesh.pipe * 32_452_843) % 2**32


def _parts(sums: StepSums, routers: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The named means of the loss, the recipe's metrics, and the load of the busiest expert over the mean, averaged
    over layers.
    """
    parts = {f"loss_{name}": value for name, value in sums.terms.items()} if len(sums.terms) > 1 else {}
    # A metric that has a count of its own, such as the loss of a modality, is nothing where that is 0.
    parts |= {name: value for name, value in sums.metrics.items() if sums.counts.get(name) != 0.0}
    if routers:
        parts["expert_load_max_over_mean"] = float(np.mean([r["load_max_over_mean"] for r in routers.values()]))
        parts["dropped_pairs"] = float(sum(r["dropped"] for r in routers.values()))
    compared = [record for record in routers.values() if "compared" in record]
    for name in ("changed_fraction", "disagreeing_fraction") if compared else ():
        weights = [record["compared"] for record in compared]
        parts[f"router/{name}"] = float(np.average([record[name] for record in compared], weights=weights))
    return parts


def _what_is_not_finite(ranks: list[dict[str, list[str]]]) -> str:
    """A sentence with the first bad weight or gradient on any rank, and the samples of the batch."""
    weights, gradients, sources = ([x for rank in ranks for x in rank[key]] for key in ranks[0])
    if weights:
        where = f"the weight {weights[0]} is not finite"
    elif gradients:
        where = f"the first bad gradient is that of {gradients[0]}"
    else:
        where = "every gradient is finite, but their squares overflow"
    sources = list(dict.fromkeys(sources))
    shown = ", ".join(sources[:5]) + (f" and {len(sources) - 5} more" if len(sources) > 5 else "")
    return f"{where}. The batch: {shown or 'no named samples'}"
