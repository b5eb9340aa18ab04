"""Measures some steps of a run, and writes what it found."""

from typing import Any

import paddle

from erniekit.parallel import backend, comm
from erniekit.training.build import Run
from erniekit.training.profiling import against_plan, picture, report
from erniekit.training.profiling.boundaries import watch
from erniekit.training.profiling.recorder import DeviceClock, HostClock, Recorder
from erniekit.training.profiling.report import Profile, RankTimes
from erniekit.training.reporting.base import StepMetrics
from erniekit.utils import atomic, heartbeat, log, spans

MAX_RANKS = 64  # whose times are gathered: the first ones
TRACE, PICTURE, TABLE = "profile.json", "profile.png", "profile.txt"


class Profiler:
    """Listens to the steps from profile_step_start to profile_step_end, counted from the start of this process, on
    every rank. The first steps of a process are not typical: memory is allocated, kernels and connections are chosen.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._cfg = run, run.cfg
        self._on_gpu = not paddle.get_device().startswith("cpu")
        self._recorder = Recorder(DeviceClock() if self._on_gpu else HostClock())
        self._hooks: list[Any] | None = None
        self._first: int | None = None  # the step before this process's first
        self._tokens: list[int] = []
        self._sent: dict[str, int] = {}

    def before_step(self, done: int) -> None:
        """Called before the data of a step are asked for; `done` steps are done."""
        self._first = done if self._first is None else self._first
        number = done - self._first + 1
        if number == self._cfg.profile_step_start:
            self._start()
        elif number == self._cfg.profile_step_end + 1:
            self.finish()

    def after_step(self, metrics: StepMetrics) -> None:
        """Called after a step, with what is known of it."""
        if self._hooks is not None:
            self._tokens.append(metrics.num_tokens)
            for kind, count in metrics.sent.items():
                self._sent[kind] = self._sent.get(kind, 0) + count

    def finish(self) -> None:
        """Write what was measured, if that was not done before. All ranks call it together."""
        if self._hooks is None:
            if self._first is None or not self._tokens:
                log.warning(f"profile: the run ended before step {self._cfg.profile_step_start}: nothing was measured")
            return
        intervals = self._recorder.end()
        self.stop()
        rank, world = self._run.mesh.rank, self._run.mesh.world_group
        mine = RankTimes(rank, self._recorder.origin, intervals, self._peak_bytes(), self._sent)
        # Every rank receives what all send.
        sent = comm.gather_objects(mine.to_json() if rank < MAX_RANKS else None, world)
        if rank == 0:
            ranks = [RankTimes.from_json(times) for times in sent if times is not None]
            self._write(Profile(ranks, self._tokens, self._on_gpu))

    def _start(self) -> None:
        if self._on_gpu:
            paddle.device.cuda.reset_max_memory_allocated()
        else:
            paddle.base.core.host_memory_stat_reset_peak_value("Allocated", 0)
        self._hooks = watch(self._run.model, self._recorder)
        backend.init(on_wait=self._on_wait)
        spans.listen(self._recorder)
        self._recorder.begin()

    def stop(self) -> None:
        """Stop listening, if that was not done before."""
        if self._hooks is None:
            return
        spans.listen(None)
        backend.init(on_wait=heartbeat.waiting)
        for hook in self._hooks:
            hook.remove()
        self._hooks = None

    def _on_wait(self, what: str | None) -> None:
        heartbeat.waiting(what)
        self._recorder.waiting(what)

    def _peak_bytes(self) -> int:
        """The most bytes of tensors at a time on this rank's device, during the measured steps."""
        if self._on_gpu:
            return int(paddle.device.cuda.max_memory_allocated())
        return int(paddle.base.core.host_memory_stat_peak_value("Allocated", 0))

    def _write(self, profile: Profile) -> None:
        directory, text = self._run.output_dir, "\n".join([report.table(profile), *self._against_plan(profile)])
        log.info(f"profile of steps {self._cfg.profile_step_start} to {self._last_step()}:\n{text}")
        try:
            atomic.write_text(directory / TABLE, text + "\n")
            atomic.write_text(directory / TRACE, report.trace(profile))
            with atomic.new_file(directory / PICTURE) as temporary:
                picture.draw(profile, temporary, directory.name)
            log.info(f"{directory}: {TABLE}, {TRACE} (opens in ui.perfetto.dev) and {PICTURE}")
        except Exception as error:  # any error of the drawing library or the disk: a profile must not end a run
            log.warning(f"profile: not written completely ({type(error).__name__}: {error})")

    def _against_plan(self, profile: Profile) -> list[str]:
        model, ranks = self._run.model.config, self._run.mesh.degrees.world
        device = paddle.device.cuda.get_device_name() if self._on_gpu else "cpu"
        peak = max(rank.peak_bytes for rank in profile.ranks)
        found = against_plan.lines(self._cfg, model, ranks, device, profile.tokens_per_second, peak)
        return [*found, *([against_plan.launch_line(self._cfg, model, ranks)] if self._on_gpu else [])]

    def _last_step(self) -> int:
        return self._cfg.profile_step_start + len(self._tokens) - 1
