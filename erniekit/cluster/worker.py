"""A worker process from its agent's side: start, signs of life, exit and failure report."""

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
    """The environment of the local-th worker of this host, as Paddle's own launcher would set it.

    start: the coordinator's `start` message. cores: the CPU cores that the workers of this host share.
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
    # Paddle would use these as the address of its own store, which has a separate port.
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        environ.pop(name, None)
    if job.devices:
        # Devices are numbered from 0 within CUDA_VISIBLE_DEVICES.
        environ["FLAGS_selected_gpus"] = str(local)
    if not (environ.get("ERNIEKIT_NUM_THREADS") or environ.get("OMP_NUM_THREADS")):
        environ["ERNIEKIT_NUM_THREADS"] = str(max(1, cores // start["count"]))
    return environ


class Worker:
    """A worker in a session of its own: Ctrl-C reaches only the agent, and the agent can kill all its children."""

    def __init__(self, job: Job, start: Message, local: int, cores: int) -> None:
        self.rank: int = start["first"] + local
        self._memory = heartbeat.new_memory()
        self._reads_terminal = job.reads_terminal and self.rank == 0
        self._path = _log_path(job.logs, self.rank, start["attempt"])
        self.log = None if self.rank == 0 else self._path
        arguments = [*job.command, *start["overrides"]]
        environ = environment(job, start, local, cores) | {"ERNIEKIT_AGENT": f"{os.getpid()}:{self._memory}"}
        if self.log is None:
            self._start(arguments, environ, None)
        else:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "wb") as file:
                file.write(f"rank {self.rank}, attempt {start['attempt']}, {time.strftime('%F %T')}\n".encode())
                file.flush()
                self._start(arguments, environ, file)
        self.began = self.alive_at = time.monotonic()
        self._last: dict[str, Any] = {}

    def _start(self, arguments: list[str], environ: dict[str, str], output: Any) -> None:
        with stop_signals.blocked():  # they stay pending until the worker calls stop_signals.listen
            self.process = subprocess.Popen(
                arguments,
                env=environ,
                stdin=None if self._reads_terminal else subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=[self._memory],
            )

    def poll(self) -> int | None:
        """The exit code, as subprocess gives it; None while the process runs."""
        code = self.process.poll()
        if code is None:
            self.alive_at = time.monotonic()
        return code

    def sign(self) -> dict[str, Any]:
        """The last heartbeat record as the fields of a Sign."""
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
        last_error = heartbeat.last_error(self._memory) or {}
        step = last_error.get("step", self.sign()["step"])
        log_hint = f"; its log: {self.log}" if self.log else ""
        if code < 0:
            description = f"was killed by {_signal_name(code)}"
        else:
            description = f"ended with exit code {code}"
        # A killed process reports no time. It was alive at the last poll, so it sorts before ranks that failed since
        # then.
        at = time.monotonic() - last_error.get("time", self.alive_at)
        detail = last_error.get("text") or f"{self._tail()}error: rank {self.rank} {description}"
        by_peer = last_error.get("by_peer", False)
        if self.log is None and by_peer:  # keep it off the terminal, which shows only the first error
            with contextlib.suppress(OSError):  # best effort: the job ends with a message in any case
                self._path.parent.mkdir(exist_ok=True)
                self._path.write_text(detail + "\n", encoding="utf-8")
        return {
            "rank": self.rank,
            "at": at,
            "what": description + log_hint,
            "code": code,
            "by_peer": by_peer,
            "step": step,
            "detail": detail,
        }

    def _tail(self) -> str:
        """The last lines of the worker's log."""
        if self.log is None:
            return ""
        try:
            with open(self.log, "rb") as file:
                file.seek(max(self.log.stat().st_size - _TAIL_BYTES, 0))
                lines = file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
        except OSError:  # the directory has been removed
            return ""
        return "".join(f"{line}\n" for line in lines)

    def send_signal(self, number: int) -> None:
        """Ask the worker to stop after its step. Its children get no signal, since it still needs them."""
        if self.process.returncode is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """Kill the worker and all its children at once."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # no process is left; macOS raises PermissionError for zombies
            pass
        self.process.wait()
        os.close(self._memory)


def _log_path(logs: Path, rank: int, attempt: int) -> Path:
    """The log file of a rank and attempt: a restart does not overwrite the log that shows why it was needed."""
    return logs / (f"rank-{rank}.log" if attempt == 1 else f"rank-{rank}.attempt-{attempt}.log")


def _signal_name(code: int) -> str:
    try:
        number = signal.Signals(-code)
    except ValueError:
        return f"signal {-code}"
    return number.name + _SIGNAL_HINTS.get(number, "")
