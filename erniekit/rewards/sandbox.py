"""Runs a Python program that a model wrote, with limits on time, memory, files, processes and output.

It is no security boundary: the program sees the file system as the user of this process does (root becomes `nobody`
where that user can read the interpreter). It has no network, sees no other process and gets no environment variable.
"""

import functools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from erniekit.rewards import sandbox_child

MAX_OUTPUT = 1 << 20  # bytes of standard output


@dataclass(frozen=True)
class Limits:
    """seconds: of processor time of a run, rounded up. memory: bytes. network: run it although it cannot be kept from
    the network.
    """

    seconds: float
    memory: int
    network: bool = False

    @property
    def wall_seconds(self) -> float:
        """The longest run, however busy the machine is, so that a reward does not depend on other processes."""
        return 4 * self.seconds + 2


@dataclass(frozen=True)
class Run:
    """How a program ended: exit code 0 and its standard output, or `problem`, which says why it has no result."""

    exit_code: int
    output: str
    problem: str = ""


def problem_of(limits: Limits) -> str:
    """Why programs cannot be run here with these limits; empty if they can."""
    if not sys.platform.startswith("linux"):
        return f"it needs Linux, and this is {sys.platform}"
    run = run_program("print(6 * 7)", "", limits)
    if run.exit_code == 0 and run.output.strip() == "42":
        return ""
    what = run.problem or f"a program that prints a number ended with exit code {run.exit_code}"
    return f"{what} (limits: {limits.seconds:g} s, {limits.memory >> 20} MB)"


def run_program(program: str, stdin: str, limits: Limits) -> Run:
    """Run the text of a Python program in an empty directory, with `stdin` as its standard input. Only the standard
    library can be imported.
    """
    drops = os.geteuid() == 0 and _nobody_can_run()
    folder = Path(tempfile.mkdtemp(prefix="erniekit-program-"))
    try:
        (folder / "program.py").write_text(program, encoding="utf-8", errors="replace")
        (folder / "stdin").write_text(stdin, encoding="utf-8", errors="replace")
        if drops:
            for path in (folder, *folder.iterdir()):
                os.chown(path, 65534, 65534)
        return _run(folder, limits, drops)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(folder: Path, limits: Limits, drops: bool) -> Run:
    settings = {
        "command": [sys.executable, "-I", "-S", "-B", "program.py"],
        "seconds": limits.seconds,
        "memory": limits.memory,
        "isolate": not limits.network,
        "drop": drops,
    }
    command = [sys.executable, "-I", "-S", "-B", str(Path(sandbox_child.__file__).resolve()), json.dumps(settings)]
    with (folder / "stdin").open("rb") as source:
        process = subprocess.Popen(
            command,
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={},
            start_new_session=True,
        )
    try:
        output, errors, problem = _read(process, limits.wall_seconds)
    finally:
        _kill(process)
    code = process.returncode
    if code == sandbox_child.CANNOT_RUN and not problem:
        problem = f"the limits cannot be set: {errors.decode(errors='replace').strip()[-200:]}"
    return Run(code, output.decode(errors="replace"), problem)


def _read(process: "subprocess.Popen[bytes]", seconds: float) -> tuple[bytes, bytes, str]:
    """Standard output, standard error, and why the program was stopped."""
    assert process.stdout is not None and process.stderr is not None
    deadline = time.monotonic() + seconds
    streams = {process.stdout: b"", process.stderr: b""}
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            ready = selector.select(max(left, 0))
            if not ready and left <= 0:
                return streams[process.stdout], streams[process.stderr], f"it ran longer than {seconds:g} s"
            for key, _ in ready:
                piece = os.read(key.fd, 1 << 16)
                stream = process.stdout if key.fileobj is process.stdout else process.stderr
                streams[stream] = (streams[stream] + piece)[-2 * MAX_OUTPUT :]
                if not piece:
                    selector.unregister(key.fileobj)
                elif len(streams[stream]) > MAX_OUTPUT:
                    return b"", b"", f"it wrote more than {MAX_OUTPUT >> 20} MB"
    try:
        process.wait(max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        return streams[process.stdout], streams[process.stderr], f"it ran longer than {seconds:g} s"
    return streams[process.stdout], streams[process.stderr], ""


def _kill(process: "subprocess.Popen[bytes]") -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()
    process.wait()


@functools.cache
def _nobody_can_run() -> bool:
    """Whether the user nobody can read this interpreter with its library."""
    needed = [Path(sys.executable).resolve(), Path(os.__file__).resolve(), Path(sys.executable).absolute()]
    return all(path.stat().st_mode & 0o005 for file in needed for path in (file, *file.parents))
