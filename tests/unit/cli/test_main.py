"""The `erniekit` command: exit codes and messages."""

import ast
import errno
import os
import subprocess
import sys
import types

import pytest
from support.source_tree import REPOSITORY

from erniekit.cli import main as cli
from erniekit.cli.commands import COMMANDS
from erniekit.utils import heartbeat, stop_signals
from erniekit.utils.errors import ConfigError, DataError, PeerError, PeerGoneError, TrainError

PYTHON = [sys.executable, "-m", "erniekit"]


def run(*args: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*PYTHON, *args], capture_output=True, text=True, cwd=REPOSITORY, check=False)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Let `erniekit train` run a function of the test; the function takes the arguments and returns the exit code."""

    def install(function):
        module = types.ModuleType("erniekit.cli.train")
        module.run = function
        monkeypatch.setitem(sys.modules, "erniekit.cli.train", module)

    return install


def failing(error: BaseException):
    def function(args: list[str]) -> int:
        raise error

    return function


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_help_lists_is_there(name: str):
    module_name, _, function_name = COMMANDS[name].target.partition(":")
    path = REPOSITORY.joinpath(*module_name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert function_name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_command_that_takes_a_configuration_gets_it_before_its_module_is_imported(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "erniekit.evaluate.quantised", None)  # to import it would raise
    assert cli.main(["export", "no_such_key=1"]) == cli.EXIT_USER_ERROR
    assert "no_such_key: unknown key" in capsys.readouterr().err
    seen = []
    module = types.ModuleType("erniekit.evaluate.quantised")
    module.export_and_report = seen.append
    monkeypatch.setitem(sys.modules, "erniekit.evaluate.quantised", module)
    assert cli.main(["export", "model_name_or_path=m", "output_dir=o"]) == 0
    assert [cfg.output_dir for cfg in seen] == ["o"]


def test_help_and_version_load_neither_paddle_nor_any_other_package():
    code = (
        "import sys; before = set(sys.modules); from erniekit.cli.main import main; main(['help']); main(['version']);"
        "names = {m.partition('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(names - set(sys.stdlib_module_names) - {'erniekit'}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("args", [(), ("help",), ("-h",), ("--help",)])
def test_help_lists_each_command_with_a_summary_and_an_example(args: tuple[str, ...]):
    done = run(*args)
    assert done.returncode == 0
    for name, entry in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert entry.summary in done.stdout
        assert entry.example in done.stdout


@pytest.mark.parametrize("args", [("help", "train"), ("train", "--help"), ("train", "x.yaml", "-h")])
def test_help_of_one_command(args: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    assert cli.main(list(args)) == 0
    out = capsys.readouterr().out
    assert "erniekit train CONFIG.yaml [key=value ...]" in out
    assert COMMANDS["train"].example in out


def test_help_of_a_command_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["help", "trian"]) == 1
    assert "no command and no key named 'trian' (did you mean train?)" in capsys.readouterr().err


def test_unknown_command_names_the_nearest_and_shows_the_usage():
    done = run("trian", "x.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Unknown command: trian\nDid you mean: erniekit train\n")
    assert "usage: erniekit COMMAND" in done.stderr


def test_train_without_arguments_asks_for_a_configuration():
    done = run("train")
    assert done.returncode == 1
    assert done.stderr.startswith("error: Missing configuration files.")
    assert "Traceback" not in done.stderr


def test_the_arguments_and_the_exit_code_are_passed_on(command):
    seen = []

    def function(args: list[str]) -> int:
        seen.extend(args)
        return 3

    command(function)
    assert cli.main(["train", "x.yaml", "a=1"]) == 3
    assert seen == ["x.yaml", "a=1"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConfigError("max_seq_len: expected a number"), "error: max_seq_len: expected a number\n"),
        (DataError("a.jsonl:3: not JSON\nmend the line"), "error: a.jsonl:3: not JSON\nmend the line\n"),
    ],
)
def test_a_user_error_is_one_block_without_a_traceback(command, capsys, error: Exception, expected: str):
    command(failing(error))
    assert cli.main(["train", "x.yaml"]) == 1
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "error: no space left on the disk: out/model.safetensors"),
        (errno.EACCES, "error: not allowed to read or write: out/model.safetensors"),
        (errno.EROFS, "error: not allowed to read or write: out/model.safetensors"),
    ],
)
def test_a_full_disk_and_a_forbidden_path_are_said_plainly(command, capsys, number: int, expected: str):
    command(failing(OSError(number, "text", "out/model.safetensors")))
    assert cli.main(["train", "x.yaml"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(expected)
    assert "output_dir" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "no block of memory was left"),
        (MemoryError("\n\n(ResourceExhausted) Fail to alloc memory of 33554432 size.\n  [Hint: 12]"), "Fail to alloc"),
        (OSError("(External) MemoryError: Unable to allocate 32.0 MiB"), "Unable to allocate 32.0 MiB"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Cannot allocate memory"),
        (ImportError("libphi_core.so: failed to map segment from shared object"), "libphi_core.so"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
    ],
)
def test_memory_that_runs_out_is_said_with_what_to_lower(command, capsys, error: Exception, reason: str):
    command(failing(error))
    assert cli.main(["train", "x.yaml"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: memory ran out (") and reason in err, err
    assert "batch_size" in err and "Traceback" not in err


def test_without_paddle_the_message_says_what_to_install(command, capsys):
    command(failing(ModuleNotFoundError("No module named 'paddle'", name="paddle")))
    assert cli.main(["train", "x.yaml"]) == 1
    err = capsys.readouterr().err
    assert "pip install 'erniekit[cpu]'" in err and "paddlepaddle-gpu" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("broken"),
        ModuleNotFoundError("No module named 'paddle.nosuch'", name="paddle.nosuch"),
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        BrokenPipeError(errno.EPIPE, "a worker died"),
    ],
)
def test_a_defect_shows_the_traceback_and_asks_for_a_report(command, capsys, error: Exception):
    command(failing(error))
    assert cli.main(["train", "x.yaml"]) == 70
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert type(error).__name__ in err
    assert "This is a bug in erniekit, please report it with the lines above." in err


@pytest.mark.parametrize(
    ("error", "by_peer"), [(PeerError("x"), True), (PeerGoneError("x"), True), (TrainError("x"), False)]
)
def test_an_agent_hears_whether_another_rank_is_to_blame(command, monkeypatch, error: Exception, by_peer: bool):
    """Such an error is worth a restart, and that of the other rank is shown."""
    heard: list[bool] = []
    monkeypatch.setattr(heartbeat, "fail", lambda text, by_peer: heard.append(by_peer))
    command(failing(error))
    assert cli.main(["train", "x.yaml"]) == 1
    assert heard == [by_peer]


def test_interrupted(command, capsys, monkeypatch):
    monkeypatch.setattr(stop_signals, "_what_is_left", str)  # a run of an earlier test in this process has set it
    command(failing(KeyboardInterrupt()))
    assert cli.main(["train", "x.yaml"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


INTERRUPTED = """
import os, signal, sys, time
class Finder:
    def find_spec(self, name, *_):
        if name == "erniekit.cli.launch":
            exec("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
from erniekit.cli.main import main
sys.exit(main())
"""


@pytest.mark.parametrize("name", ["train", "check"])
def test_ctrl_c_during_an_import_gives_the_exit_code(name: str, tmp_path):
    """`python -m` kills itself by SIGINT at its end, whatever the exit code, if a plain KeyboardInterrupt has passed
    through an exec of text; dataclasses have one, and imports are full of them.
    """
    (tmp_path / "begun.py").write_text(INTERRUPTED)
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    command = [sys.executable, "-m", "begun", name, "x.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=tmp_path, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_the_module_of_the_command_runs_it():
    command = [sys.executable, "-m", "erniekit.cli.main", "no-such-command"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == cli.EXIT_USAGE, "to do nothing would look like success"


@pytest.mark.parametrize("unbuffered", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_a_reader_that_goes_away_is_no_error(unbuffered: list[str]):
    command = [sys.executable, *unbuffered, "-m", "erniekit", "help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (141, b"")
