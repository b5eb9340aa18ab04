"""Programs on a terminal of their own."""

import os
import pty
import select
import signal
import time

PATIENCE = 60.0  # seconds after which a process that says nothing has failed the test


class Terminal:
    """A process on a terminal of its own, as a person has it."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self._file = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "dumb"
            os.execv(command[0], command)
        self.text = ""

    def expect(self, wanted: str) -> None:
        """Read until `wanted` has come, after what was expected before."""
        until = time.monotonic() + PATIENCE
        while wanted not in self.text:
            ready, _, _ = select.select([self._file], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"waited for {wanted!r}, got {self.text!r}"
            try:
                self.text += os.read(self._file, 4096).decode(errors="replace")
            except OSError:  # the other side is closed
                assert wanted in self.text, f"ended before {wanted!r}: {self.text!r}"
        self.text = self.text.partition(wanted)[2]

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def exit_code(self) -> int:
        until = time.monotonic() + PATIENCE
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                os.close(self._file)
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < until, "the process did not end"
            time.sleep(0.05)

    def kill(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
