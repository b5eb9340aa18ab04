"""The agent of a host: starts the worker processes, supervises them, and follows the coordinator's decisions.

It never imports Paddle, so it needs very little memory and cannot hang in a library that makes its workers hang.
"""

import signal
import sys
import time
from types import FrameType
from typing import Any

from erniekit.cluster import net, rendezvous
from erniekit.cluster.coordinator import Message
from erniekit.cluster.job import Job
from erniekit.cluster.rendezvous import Exchange
from erniekit.cluster.worker import Worker
from erniekit.utils import log, runtime, stop_signals
from erniekit.utils.errors import ConfigError, TrainError

_POLL = 0.1  # seconds between checks of the workers
_REPORT = 0.5  # seconds between reports while nothing happens
_LOG_WAITING = 30.0  # seconds between log lines about missing hosts while nothing changes


def run(job: Job) -> int:
    """Run this host's part of the job. Returns the exit code: 0 also after a SIGTERM that let the workers save, 130
    after a Ctrl-C.

    Raises:
        ConfigError: the hosts do not fit together, or cannot meet.
        TrainError: the master is lost.
        KeyboardInterrupt: the second Ctrl-C.
    """
    with rendezvous.connect(job) as (exchange, about):
        agent = _Agent(job, exchange, about)
        before = {number: signal.getsignal(number) for number in stop_signals.SIGNALS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # started with nohup, which ignores it
                signal.signal(number, agent.on_signal)
        try:
            return agent.run()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            agent.kill()
            agent.leave("interrupted by Ctrl-C")
            raise
        finally:
            agent.kill()
            for number, handler in before.items():
                signal.signal(number, handler)


class _Agent:
    def __init__(self, job: Job, exchange: Exchange, about: Message) -> None:
        self._job = job
        self._exchange = exchange
        self._about = about
        self._workers: list[Worker] = []
        self._failures: dict[int, dict[str, Any]] = {}
        self._failed_at: dict[int, float] = {}
        self._stopped_by: signal.Signals | None = None
        self._stopped_at = 0.0
        self._is_spare = False

    def run(self) -> int:
        """Run attempts until one succeeds or no restart is left. Returns the exit code."""
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

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Pass the signal on to the workers, which agree on a step, save and exit. A second Ctrl-C ends the job at
        once. If rank 0 reads the terminal, it alone handles Ctrl-C.
        """
        if self._job.reads_terminal and number == signal.SIGINT:
            for worker in self._workers:
                if worker.rank == 0:
                    worker.send_signal(number)
            return
        now = time.monotonic()
        if self._stopped_by is not None:
            if number == signal.SIGINT and now - self._stopped_at > stop_signals.TWICE:
                raise KeyboardInterrupt
            return
        self._stopped_by, self._stopped_at = signal.Signals(number), now
        for worker in self._workers:
            worker.send_signal(number)

    def leave(self, reason: str) -> None:
        """Report to the coordinator that this host leaves the job."""
        try:
            self._exchange({"kind": "leave", "id": self._about["id"], "why": reason})
        except TrainError:
            pass  # the coordinator is gone already

    def kill(self) -> None:
        """Kill all workers and their children."""
        for worker in self._workers:
            worker.kill()
        if any(worker.rank == 0 and worker.process.returncode < 0 for worker in self._workers):
            stop_signals.restore_terminal()  # a killed worker's progress bar could not do it
        self._workers = []

    def _join(self) -> Message:
        """Wait for the other hosts. Returns `start`, or the `stop` of a job that is over."""
        ports = net.free_ports(1 + self._job.slots)
        logged_reason, logged_at = "", 0.0
        while True:
            reply = self._exchange({**self._about, "kind": "hello", "ports": ports, "again": self._job.again()})
            if reply["kind"] == "refused":
                raise ConfigError(reply["why"])
            if reply["kind"] != "wait":
                return reply
            if self._stopped_by is not None:
                self.leave(f"stopped by {self._stopped_by.name}")
                return {"restart": False, "code": 128 + self._stopped_by, "headline": "", "detail": "", "kind": "stop"}
            now = time.monotonic()
            if reply["why"] != logged_reason or now - logged_at > _LOG_WAITING:
                log.info(f"waiting: {reply['why']}")
                logged_reason, logged_at = reply["why"], now
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
            self._workers.append(Worker(self._job, start, local, cores))
        if self._stopped_by is not None:  # the signal arrived while the workers were starting
            for worker in self._workers:
                worker.send_signal(self._stopped_by)
        self._is_spare = not count

    def _watch(self, attempt: int) -> Message:
        """Supervise the workers until the coordinator ends the attempt."""
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
        """Record the workers that have exited. Returns whether there are any new ones."""
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
            "stopping": self._stopped_by is not None,
            "signs": [worker.sign() for worker in self._workers if worker.process.returncode is None],
            "failures": [failure | {"at": now - self._failed_at[rank]} for rank, failure in self._failures.items()],
            "done": all(code == 0 for code in codes),
        }

    def _end(self, verdict: Message) -> int:
        signalled = self._stopped_by
        if self._job.reads_terminal and verdict["code"] == stop_signals.EXIT_INTERRUPTED:
            signalled = signal.SIGINT
        if verdict["code"] == 0:
            if self._is_spare:
                log.info("the job has ended without an error; this host had no ranks in it")
            return stop_signals.EXIT_INTERRUPTED if signalled == signal.SIGINT else 0
        if signalled is not None and self._ended_untrained(verdict["code"]):
            log.info(stop_signals.interrupted(signalled))
            return 128 + signalled
        log.warning(f"the job has ended: {verdict['headline']}")
        self._show(verdict)
        return int(verdict["code"])

    def _ended_untrained(self, code: int) -> bool:
        """Whether the signal arrived before the workers had handlers that save."""
        codes = {failure["code"] for failure in self._failures.values()} | {code}
        return any(128 + number in codes for number in stop_signals.SIGNALS)

    def _show(self, verdict: Message) -> None:
        """Print the error of the rank that failed first, on its host and on the host that shows rank 0's output."""
        if verdict["detail"] and (self._about["master"] or verdict.get("host") == self._about["id"]):
            print(verdict["detail"], file=sys.stderr, flush=True)
