"""The process around one command of the board: keeps its log and its exit code, whether or not the board still runs.

It leads a process group of its own. SIGTERM is passed on to the command, which finishes its step and saves; SIGKILL to
the group ends everything, and then there is no exit code.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from erniekit.utils import atomic

LOG, PROCESS, EXIT = "log.txt", "process.json", "exit.json"


def start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since the machine did (proc(5)); None if it is gone or has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def main() -> int:
    """Run a command, sys.argv[2:], with the directory sys.argv[1] for its files; the result is its exit code."""
    directory, command, pid = Path(sys.argv[1]), sys.argv[2:], os.getpid()
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    with open(directory / LOG, "ab") as log:
        atomic.write_json(directory / PROCESS, {"pid": pid, "started": start_time(pid), "log": log.tell()})
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        child.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    if asked:  # it arrived before the command had started
        child.send_signal(signal.SIGTERM)
    code = child.wait()
    facts = {"code": code if code >= 0 else 128 - code, "ended": time.time(), "asked_to_stop": bool(asked)}
    atomic.write_json(directory / EXIT, facts)
    return code
