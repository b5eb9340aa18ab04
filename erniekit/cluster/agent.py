"""The agent of a host: starts the workers, watches them, and does what the job's hosts have agreed on.

It never imports Paddle, so it takes next to no memory and cannot hang in what its workers hang in.
"""

import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

from erniekit.cluster import net, rendezvous
from erniekit.cluster.coordinator import Message
from erniekit.cluster.job import Job
from erniekit.cluster.rendezvous import Exchange
from erniekit.cluster.worker import Worker
from erniekit.utils import log, runtime
from erniekit.utils.errors import ConfigError, TrainError

_POLL = 0.1  # seconds from one look at the workers to the next
_REPORT = 0.5  # seconds from one report to the next, when nothing has happened
_SAY_WAITING = 30.0  # seconds from one line about missing hosts to the next, when nothing has changed
EXIT_TERMINATED = 128 + signal.SIGTERM


def run(job: Job) -> int:
    """Run this host's part of the job. Returns the exit code: 0 also after a SIGTERM that let the workers save.

    Raises:
        ConfigError: the hosts do not fit together, or cannot meet.
        TrainError: the master is lost.
    """
    with rendezvous.connect(job) as (exchange, about), tempfile.TemporaryDirectory(prefix="erniekit-") as beats:
        agent = _Agent(job, exchange, about, Path(beats))
        before = signal.signal(signal.SIGTERM, agent.on_sigterm)
        try:
            return agent.run()
        except KeyboardInterrupt:
            agent.leave("interrupted by Ctrl-C")
            raise
        finally:
            agent.kill()
            signal.signal(signal.SIGTERM, before)


class _Agent:
    def __init__(self, job: Job, exchange: Exchange, about: Message, beats: Path) -> None:
        self._job = job
        self._exchange = exchange
        self._about = about
        self._beats = beats
        self._workers: list[Worker] = []
        self._failures: dict[int, dict[str, Any]] = {}
        self._failed_at: dict[int, float] = {}
        self._stopping = False

    def run(self) -> int:
        """Attempt after attempt, until one ends well or is the last."""
        attempt = 1
        while True:
            reply = self._join()
            if reply["kind"] == "start":
                attempt = reply["attempt"]
                self._start(reply)
                reply = self._watch(attempt)
                self.kill()
            if not reply["restart"]:
                return self._end(reply)
            attempt += 1
            log.warning(
                f"{reply['headline']}. Starting again: attempt {attempt} of {1 + self._job.limits.max_restarts}"
            )
            self._show(reply)

    def on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """Hand the scheduler's wish on; the workers agree on a step, save and end."""
        self._stopping = True
        for worker in self._workers:
            worker.terminate()

    def leave(self, why: str) -> None:
        """Tell the other hosts that this one goes."""
        try:
            self._exchange({"kind": "leave", "id": self._about["id"], "why": why})
        except TrainError:
            pass  # there is nobody left to tell

    def kill(self) -> None:
        """No process of ours outlives this."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _join(self) -> Message:
        """Wait for the other hosts. Returns `start`, or the `stop` of a job that is over."""
        ports = net.free_ports(1 + self._job.slots)
        said, said_at = "", 0.0
        while True:
            reply = self._exchange({**self._about, "kind": "hello", "ports": ports})
            if reply["kind"] == "refused":
                raise ConfigError(reply["why"])
            if reply["kind"] != "wait":
                return reply
            if self._stopping:
                self.leave("stopped by SIGTERM")
                headline = "stopped by SIGTERM before training began"
                return {"restart": False, "code": EXIT_TERMINATED, "headline": headline, "detail": "", "kind": "stop"}
            now = time.monotonic()
            if reply["why"] != said or now - said_at > _SAY_WAITING:
                log.info(f"waiting: {reply['why']}")
                said, said_at = reply["why"], now
            time.sleep(_REPORT)

    def _start(self, start: Message) -> None:
        self._failures, self._failed_at = {}, {}
        first, count = start["first"], start["count"]
        ranks = f"ranks {first} to {first + count - 1} of {start['world']}" if count else "no ranks: a spare"
        host = f"host {start['node'] + 1} of {start['hosts']} ({self._about['name']}): " if start["hosts"] > 1 else ""
        log.info(f"{host}{ranks}; the logs of all but rank 0 are in {self._job.logs}")
        if start["note"]:
            log.warning(start["note"])
        cores = runtime.num_cores()
        for local in range(count):
            self._workers.append(Worker(self._job, start, local, cores, self._beats))
        if self._stopping:  # the signal came while they started
            self.on_sigterm(signal.SIGTERM, None)

    def _watch(self, attempt: int) -> Message:
        """Look after the workers until the coordinator says stop."""
        reported_at = 0.0
        while True:
            news = self._look()
            now = time.monotonic()
            if news or now - reported_at >= _REPORT:
                reported_at = now
                reply = self._exchange(self._report(attempt))
                if reply["kind"] == "stop":
                    return reply
            time.sleep(_POLL)

    def _look(self) -> bool:
        """Note who has ended. True if somebody has."""
        news = False
        for worker in self._workers:
            running = worker.process.returncode is None
            code = worker.poll()
            if running and code is not None:
                news = True
                if code != 0:
                    failure = worker.failure(code)
                    self._failures[worker.rank] = failure
                    self._failed_at[worker.rank] = time.monotonic() - failure["at"]
        return news

    def _report(self, attempt: int) -> Message:
        now = time.monotonic()
        codes = [worker.process.returncode for worker in self._workers]
        return {
            "kind": "report",
            "id": self._about["id"],
            "attempt": attempt,
            "stopping": self._stopping,
            "signs": [worker.sign() for worker in self._workers if worker.process.returncode is None],
            "failures": [failure | {"at": now - self._failed_at[rank]} for rank, failure in self._failures.items()],
            "done": all(code == 0 for code in codes),
        }

    def _end(self, stop: Message) -> int:
        if stop["code"] == 0:
            return 0
        log.warning(f"the job has ended: {stop['headline']}")
        if any(failure["code"] == -signal.SIGTERM for failure in self._failures.values()):
            log.info("SIGTERM came before the workers could meet it: nothing was trained, nothing saved")
            return EXIT_TERMINATED
        self._show(stop)
        return int(stop["code"])

    def _show(self, stop: Message) -> None:
        """The first failing rank's own words: on its host, and where rank 0 streams."""
        if stop["detail"] and (self._about["master"] or stop.get("host") == self._about["id"]):
            print(stop["detail"], file=sys.stderr, flush=True)
