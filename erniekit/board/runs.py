"""Runs as files: a directory for each under one root, so that they are found again whatever happens to the board.

DIRECTORY/run.yaml is the configuration as written, job.json what was started, process.json and exit.json what became of
it (board.job), log.txt what it printed, and output/ what it wrote, unless its YAML names another directory.
"""

import contextlib
import os
import re
import secrets
import shlex
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from erniekit.board import job
from erniekit.utils import atomic, runtime
from erniekit.utils.directory_lock import DirectoryLock
from erniekit.utils.errors import ConfigError, UserError
from erniekit.utils.growing_files import json_object, read, read_object, tail

COMMANDS = ("train", "eval", "export", "split", "server")
MAX_LOG = 1 << 16  # bytes of a log in one answer
MAX_RECORDS = 2000  # of metrics.jsonl in one answer; of more, every k-th
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_JOB = "job.json"
_ENTRY = "from erniekit.cli.main import main; sys.exit(main())"


class NoRun(UserError):
    """A name that no run has."""


def cli(*words: str) -> tuple[str, ...]:
    """The command that runs `erniekit WORDS`."""
    return runtime.python_command(_ENTRY, *words)


@dataclass(frozen=True)
class Run:
    """One run. `words`: what follows `erniekit`; none for a run that something else has started."""

    directory: Path
    words: tuple[str, ...] = ()
    output: Path = Path()
    created: float = 0.0

    @property
    def id(self) -> str:
        """The name of its directory."""
        return self.directory.name

    @property
    def command(self) -> str:
        """train, eval ..."""
        return self.words[0] if self.words else "train"

    @property
    def yaml(self) -> Path:
        """Its configuration."""
        return self.directory / ("run.yaml" if self.words else "config.yaml")

    def pid(self) -> int | None:
        """The process that leads its group; None if it does not run. A number that another process got is not its."""
        facts = read_object(self.directory / job.PROCESS)
        pid = facts.get("pid")
        is_it = isinstance(pid, int) and facts.get("started") == job.start_time(pid) is not None
        return pid if is_it and not (self.directory / job.EXIT).exists() else None

    def state(self) -> dict[str, Any]:
        """`state`: running, done, failed, stopped (by a signal), killed or other (not started here), with the exit
        code and the time of its end.
        """
        if not self.words:
            return {"state": "other"}
        ended = read_object(self.directory / job.EXIT)
        if isinstance(ended.get("code"), int):
            # a training that saved after SIGTERM ends with 0, like one that has made all its steps
            good = "stopped" if ended.get("asked_to_stop") else "done"
            names = {0: good, 128 + signal.SIGTERM: "stopped", 128 + signal.SIGINT: "stopped"}
            return {"state": names.get(ended["code"], "failed"), **ended}
        return {"state": "running" if self.pid() else "killed"}

    def facts(self) -> dict[str, Any]:
        """What the pages show of it."""
        shown = {"id": self.id, "command": self.command, "created": self.created, "output": short(self.output)}
        words = shlex.join(["erniekit", *self.words]) if self.words else ""
        return {**shown, **self.state(), "words": words, "last": self._last(), "address": self.address()}

    def address(self) -> str | None:
        """Where it serves a model; None while it loads the model, and for all other commands."""
        if self.command != "server" or not self.pid():
            return None
        # What is in the log before this process, an earlier one wrote, at another port.
        begin = read_object(self.directory / job.PROCESS).get("log")
        said = tail(self.directory / job.LOG, 1 << 22, begin if isinstance(begin, int) else 0)[0]
        # Of this machine, and the last one: the name of the model, which stands before it, is any text.
        return next(reversed(re.findall(r" is served at (http://127\.0\.0\.1:\d+)/v1", said)), None)

    @property
    def metrics_file(self) -> Path:
        """Where its metrics are; of a command that only uses the output of a training, there are none."""
        return (self.output if self.command == "train" else self.directory) / "metrics.jsonl"

    def _last(self) -> dict[str, Any]:
        """The newest values of its metrics."""
        last: dict[str, Any] = {}
        for line in tail(self.metrics_file, 8192)[0].split("\n")[-20:]:
            last |= _record(line) or {}
        return last

    def log(self, offset: int) -> dict[str, Any]:
        """The log from a byte on, or its end where there is more of it."""
        return dict(zip(("text", "offset", "skipped"), tail(self.directory / job.LOG, MAX_LOG, offset), strict=True))

    def metrics(self, mark: str) -> dict[str, Any]:
        """The records after `mark`, which an earlier answer gave; all, with `restart`, where the file is another one
        since (a resumed run drops steps that it repeats). `every`: k where only every k-th step is returned.
        """
        try:
            facts = self.metrics_file.stat()
        except OSError:
            return {"mark": "", "records": [], "restart": bool(mark), "every": 1}
        inode, _, text = mark.partition(":")
        offset = offset_of(text) if inode == str(facts.st_ino) else 0
        offset = offset if offset <= facts.st_size else 0
        data = read(self.metrics_file, offset)
        whole = data[: data.rfind(b"\n") + 1]
        every = max(1, -(-whole.count(b"\n") // MAX_RECORDS))
        records = (_record(line.decode(errors="replace")) for line in whole.split(b"\n"))
        kept = [each for n, each in enumerate(filter(None, records)) if n % every == 0 or "loss" not in each]
        mark = f"{facts.st_ino}:{offset + len(whole)}"
        return {"mark": mark, "records": kept, "restart": offset == 0, "every": every}

    def table(self, name: str, most: int = 200) -> list[dict[str, Any]]:
        """The last objects of a file of JSON lines in its output."""
        # Not splitlines: a completion may hold other separators of lines, such as U+2028.
        lines = tail(self.output / name, 1 << 20)[0].split("\n")
        return [row for line in lines[-most:] if (row := json_object(line))]


class Runs:
    """The runs below `root`, which one board at a time uses. `roots`: where paths of a configuration may point to."""

    def __init__(self, root: Path, allowed: tuple[Path, ...] = ()) -> None:
        self.root = root.absolute()
        self.roots = tuple(path.resolve() for path in (Path.cwd(), root, *allowed))
        self._lock, self._starting = DirectoryLock(self.root, "runs"), threading.Lock()
        self._children: list[subprocess.Popen[bytes]] = []

    def open(self) -> None:
        """Lock the root. Raises ConfigError if another board, or another user, has it."""
        if self.root.exists() and self.root.stat().st_uid != os.geteuid():
            raise ConfigError(f"runs: {self.root} belongs to another user. Choose a directory of your own: runs=DIR.")
        self._lock.acquire()

    def close(self) -> None:
        """Release the root. The runs continue."""
        self._lock.release()

    def list(self) -> list[Run]:
        """All runs, the newest first."""
        if not self.root.is_dir():
            raise UserError(f"{self.root} is not there any more. Start the board again.")
        runs = [run for path in self.root.iterdir() if _NAME.fullmatch(path.name) and (run := self._read(path))]
        return sorted(runs, key=lambda run: -run.created)

    def get(self, name: str) -> Run:
        """A run. Raises NoRun for a name that none has."""
        run = self._read(self.root / name) if _NAME.fullmatch(name) else None
        if run is None:
            raise NoRun(f"there is no run {name[:80]!r}")
        return run

    def _read(self, directory: Path) -> Run | None:
        if directory.is_symlink():
            return None
        facts = read_object(directory / _JOB)
        words, output, created = (facts.get(name) for name in ("words", "output", "created"))
        if words and isinstance(words, list) and isinstance(output, str) and isinstance(created, int | float):
            return Run(directory, tuple(map(str, words)), Path(output), created)
        run = Run(directory, (), directory)
        with contextlib.suppress(OSError):  # none, or one that has just been removed
            first = run.yaml if run.yaml.is_file() else run.metrics_file  # a training writes its YAML as it starts
            return replace(run, created=first.stat().st_mtime) if run.metrics_file.is_file() else None
        return None

    def is_below(self, path: str) -> bool:
        """Whether a path, with all links followed, is below a directory that the board may use."""
        target = Path(path).expanduser().resolve()
        return any(target.is_relative_to(root) for root in self.roots)

    def words(self, command: str, directory: Path, own_output: bool) -> tuple[str, ...]:
        """What follows `erniekit` for a run in `directory`."""
        more = {
            "train": [f"output_dir={short(directory / 'output')}"] if own_output else [],
            "eval": [f"eval_output={short(directory / 'output')}"],
            "server": ["host=127.0.0.1", "port=0", f"api_key_file={short(directory / 'key')}"],
        }
        return (command, short(directory / "run.yaml"), *more.get(command, []))

    def new_directory(self, name: str) -> Path:
        """A directory for a run of this name, or of this name and a number. It is not made. Raises UserError."""
        if not _NAME.fullmatch(name):
            raise UserError(f"name: {name[:80]!r}: expected letters, digits, dots, - and _, at most 64.")
        numbered = (f"{name[:60]}-{number}" for number in range(2, 1000))
        return self.root / next(each for each in (name, *numbered) if not (self.root / each).exists())

    def create(self, directory: Path, text: str, words: tuple[str, ...], output: Path) -> Run:
        """Write the files of a new run, and start it."""
        directory.mkdir()
        (directory / "run.yaml").write_text(text, encoding="utf-8")
        if words[0] == "server":
            with open(directory / "key", "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(secrets.token_urlsafe(24) + "\n")
        facts = {"words": words, "output": str(output), "created": time.time()}
        atomic.write_json(directory / _JOB, facts)
        return self.start(self.get(directory.name))

    def start(self, run: Run) -> Run:
        """Start a run, or one that has ended once more: a training resumes from its newest checkpoint. Raises
        UserError for one that runs.
        """
        with self._starting:
            if not run.words or run.pid():
                raise UserError(f"{run.id}: runs already, or was not started by a board")
            for name in (job.PROCESS, job.EXIT):
                (run.directory / name).unlink(missing_ok=True)
            code = "from erniekit.board.job import main; sys.exit(main())"
            command = runtime.python_command(code, str(run.directory), *cli(*run.words))
            null = subprocess.DEVNULL
            child = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
            self._children = [each for each in (*self._children, child) if each.poll() is None]
            deadline = time.monotonic() + 20
            while not (run.directory / job.PROCESS).exists() and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
        return run

    def stop(self, run: Run, force: bool) -> None:
        """Ask a run to end after its step, or kill it with all its processes. Raises UserError if it does not run."""
        pid = run.pid()
        if pid is None:
            raise UserError(f"{run.id}: does not run")
        if force:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGTERM)


def offset_of(text: str) -> int:
    """The place in a file that a page asks for; 0 for what is none."""
    return int(text) if text.isdecimal() and len(text) < 20 else 0


def short(path: Path) -> str:
    """A path as a user of the working directory writes it."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _record(line: str) -> dict[str, Any] | None:
    """The numbers of a line of metrics.jsonl."""
    record = json_object(line)
    if record is None or type(record.get("step")) is not int:
        return None
    return {name: value for name, value in record.items() if value is None or type(value) in (int, float)}
