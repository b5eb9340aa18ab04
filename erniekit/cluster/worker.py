"""One worker process as its agent sees it: how it is started, what it shows, how it ended."""

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from erniekit.cluster.coordinator import Message
from erniekit.cluster.job import Job
from erniekit.cluster.watch import Sign
from erniekit.utils import heartbeat, job_token, stop_signals

_TAIL_LINES, _TAIL_BYTES = 15, 8192
_SIGNAL_HINTS = {
    signal.SIGKILL: " (the system does that when memory runs out)",
    signal.SIGABRT: " (a library aborted the process)",
    signal.SIGSEGV: " (a crash in native code)",
}


def environment(job: Job, start: Message, local: int, cores: int) -> dict[str, str]:
    """What Paddle expects of a process that its own launcher started, for the local-th worker of this host.

    start: the coordinator's reply. cores: what this host's workers share.
    """
    rank = start["first"] + local
    variables = {
        "PADDLE_MASTER": start["store"],
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINERS_NUM": str(start["world"]),
        "PADDLE_CURRENT_ENDPOINT": start["endpoints"][rank],
        "PADDLE_TRAINER_ENDPOINTS": ",".join(start["endpoints"]),
        "PADDLE_LOCAL_RANK": str(local),
        "PADDLE_LOCAL_SIZE": str(start["count"]),
        "PADDLE_NNODES": str(start["hosts"]),
    }
    environ = {**job.environ, **variables, job_token.VARIABLE: job.token}
    # Paddle would take them for the address of its own store, which has a port of its own.
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        environ.pop(name, None)
    if job.devices:
        # What CUDA_VISIBLE_DEVICES shows is counted from 0 again.
        return environ | {"FLAGS_selected_gpus": str(local)}
    if not (environ.get("ERNIEKIT_NUM_THREADS") or environ.get("OMP_NUM_THREADS")):
        environ["ERNIEKIT_NUM_THREADS"] = str(max(1, cores // start["count"]))
    return environ


class Worker:
    """A process of its own session, so that Ctrl-C reaches the agent alone and the agent reaches all its children."""

    def __init__(self, job: Job, start: Message, local: int, cores: int) -> None:
        self.rank: int = start["first"] + local
        self._memory = heartbeat.new_memory()
        self._reads_terminal = job.reads_terminal and self.rank == 0
        self._path = _log_path(job.logs, self.rank, start["attempt"])
        self.log = None if self.rank == 0 else self._path
        words = [*job.command, *start["overrides"], *(job.again() if start["attempt"] > 1 else [])]
        environ = environment(job, start, local, cores) | {"ERNIEKIT_AGENT": f"{os.getpid()}:{self._memory}"}
        if self.log is None:
            self._start(words, environ, None)
        else:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "wb") as file:
                file.write(f"rank {self.rank}, attempt {start['attempt']}, {time.strftime('%F %T')}\n".encode())
                file.flush()
                self._start(words, environ, file)
        self.began = self.alive_at = time.monotonic()
        self._last: dict[str, Any] = {}

    def _start(self, words: list[str], environ: dict[str, str], output: Any) -> None:
        # The child keeps what is blocked when it is made: a signal waits until stop_signals.listen in the child.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals.SIGNALS)
        try:
            self.process = subprocess.Popen(
                words,
                env=environ,
                stdin=None if self._reads_terminal else subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=[self._memory],
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def poll(self) -> int | None:
        """Its exit code, as subprocess gives it; None while it runs."""
        code = self.process.poll()
        if code is None:
            self.alive_at = time.monotonic()
        return code

    def sign(self) -> dict[str, Any]:
        """Its last record as a Sign's fields."""
        now = time.monotonic()
        self._last = heartbeat.last_record(self._memory) or self._last
        last = self._last
        if not last:  # Python itself is starting
            silent = now - self.began
            return asdict(Sign(self.rank, 0, heartbeat.START, None, silent, silent, 0.0, stopped=self._is_stopped()))
        silent = now - last["time"]
        return asdict(
            Sign(
                self.rank,
                last["step"],
                last["phase"],
                last["waiting"],
                silent,
                max(now - last["since"], 0.0),
                last["longest"],
                last["at"],
                silent > 2 * heartbeat.INTERVAL and self._is_stopped(),
            )
        )

    def _is_stopped(self) -> bool:
        try:
            status = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        return status.rpartition(")")[2].split()[0] in ("T", "t")

    def failure(self, code: int) -> dict[str, Any]:
        """A Failure's fields for a process that ended with `code`; `at` is in seconds before now."""
        said = heartbeat.last_error(self._memory) or {}
        step = said.get("step", self.sign()["step"])
        where = f"; its log: {self.log}" if self.log else ""
        if code < 0:
            what = f"was killed by {_signal_name(code)}"
        else:
            what = f"ended with exit code {code}"
        # It was alive at the last poll: a rank that reports when it failed did so later than one killed since then.
        at = time.monotonic() - said.get("time", self.alive_at)
        detail = said.get("text") or f"{self._tail()}error: rank {self.rank} {what}"
        by_peer = said.get("by_peer", False)
        if self.log is None and by_peer:  # not for the terminal, which shows the first error alone
            with contextlib.suppress(OSError):  # the job ends anyway, and says why
                self._path.parent.mkdir(exist_ok=True)
                self._path.write_text(detail + "\n", encoding="utf-8")
        return {
            "rank": self.rank,
            "at": at,
            "what": what + where,
            "code": code,
            "by_peer": by_peer,
            "step": step,
            "detail": detail,
        }

    def _tail(self) -> str:
        """The last lines of its log."""
        if self.log is None:
            return ""
        try:
            with open(self.log, "rb") as file:
                file.seek(max(self.log.stat().st_size - _TAIL_BYTES, 0))
                lines = file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
        except OSError:  # somebody has removed the directory
            return ""
        return "".join(f"{line}\n" for line in lines)

    def send_signal(self, number: int) -> None:
        """Ask it to stop after its step. Not its children: it still needs them."""
        if self.process.returncode is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """End it and all that it started, now."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # none is left; macOS says the latter of zombies
            pass
        self.process.wait()
        os.close(self._memory)


def _log_path(logs: Path, rank: int, attempt: int) -> Path:
    """A restart does not overwrite the log that tells why it was needed."""
    return logs / (f"rank-{rank}.log" if attempt == 1 else f"rank-{rank}.attempt-{attempt}.log")


def _signal_name(code: int) -> str:
    try:
        number = signal.Signals(-code)
    except ValueError:
        return f"signal {-code}"
    return number.name + _SIGNAL_HINTS.get(number, "")
