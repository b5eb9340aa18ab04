"""Programs in the sandbox: what they can do, what stops them, and the reward for passing tests."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from erniekit.config.schema_rewards import RewardArgs
from erniekit.rewards import Sample, Scorer, sandbox
from erniekit.rewards.code import code, program_of
from erniekit.rewards.sandbox import Limits, problem_of, run_program
from erniekit.utils import log
from erniekit.utils.errors import ConfigError

LIMITS = Limits(seconds=1.0, memory=256 << 20)
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or bool(problem_of(LIMITS)), reason="no network namespaces on this system"
)

STOPPED = {
    "import time; time.sleep(60)": "it ran longer than 2.4 s",
    "while True: print('x' * 10000)": "it wrote more than 1 MB",
}
FAILS = (
    "while True: pass",
    "x = bytearray(10**9)",
    "open('big', 'wb').write(bytes(1 << 25))",
    "import sys; sys.exit(3)",
    "import sys; sys.exit(125)",
    "raise ValueError",
    "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
    "import numpy",
    "def (",
    "\0",
)


# A function, and what it does as a script only: read its input.
SCRIPT = """from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Pair:
    a: int
def f(x):
    return Pair(x).a + 1
if __name__ == "__main__":
    print(f(int(input())))
"""


UNITTEST = """import unittest
class Test(unittest.TestCase):
    def test(self):
        self.assertEqual(f(1), {})
if __name__ == "__main__":
    unittest.main()
"""


def test_a_program_runs_alone_in_an_empty_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("A_SECRET", "key")
    program = "import os; print(input(), os.environ.get('A_SECRET'), os.getpid(), sorted(os.listdir('.')))"
    run = run_program(program, "line", LIMITS)
    assert (run.exit_code, run.problem) == (0, "")
    assert run.output == "line None 1 ['program.py', 'stdin']\n"


@pytest.mark.parametrize("program", STOPPED)
def test_a_program_is_stopped(program: str):
    run = run_program(program, "", Limits(seconds=0.1, memory=256 << 20))
    assert run.problem == STOPPED[program] and run.exit_code != 0


@pytest.mark.parametrize("program", FAILS)
def test_a_program_fails_at_its_limits(program: str):
    run = run_program(program, "", LIMITS)
    assert run.exit_code != 0 and run.output == ""
    # On a busy machine the clock may end a program that is to reach its limit of processor time.
    assert not run.problem or (program == "while True: pass" and run.problem.startswith("it ran longer"))


def test_a_limit_that_cannot_be_set_is_no_failure_of_the_program():
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "from erniekit.rewards.sandbox import Limits, problem_of\n"
        "print(problem_of(Limits(1.0, 256 << 20)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "the limits cannot be set: not allowed to raise maximum limit" in ended.stdout


def test_nothing_is_left_behind(tmp_path: Path):
    mark = tmp_path / "alive"
    program = (
        f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(0.5)\n    open({str(mark)!r}, 'w')\n"
    )
    run_program(program, "", LIMITS)
    time.sleep(0.8)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("answer", "tests", "expected"),
    [
        ("```python\ndef f(x): return x + 1\n```", ["assert f(1) == 2", "assert f(2) == 3"], {"all": 1, "fraction": 1}),
        ("```python\ndef f(x): return 2\n```", ["assert f(1) == 2", "assert f(2) == 3"], {"all": 0, "fraction": 0.5}),
        ("print(int(input()) * 2)", [{"input": "4", "output": "8\n"}], {"all": 1}),
        (SCRIPT, ["assert f(1) == 2"], {"all": 1}),
        (SCRIPT, [{"input": "1", "output": "2"}], {"all": 1}),
        (SCRIPT, ["if __name__ == '__main__':\n    assert f(1) == 2"], {"all": 1}),
        (SCRIPT, ["if __name__ == '__main__':\n    assert f(1) == 3"], {"all": 0}),
        (SCRIPT, [UNITTEST.format(2)], {"all": 1}),
        (SCRIPT, [UNITTEST.format(3)], {"all": 0}),
        ("def f(x): exit()", [UNITTEST.format(2)], {"all": 0}),
        ("def f(x): raise SystemExit", ["assert f(1) == 2"], {"all": 0}),
        ("1. So:\n   ```python\n   def f(x):\n       return 2\n   ```", ["assert f(1) == 2"], {"all": 1}),
        ("import atexit; atexit.register(print, 'end')", ["pass"], {"all": 1}),
        ("print('8  ')\nprint()", [{"output": "8"}], {"all": 1}),
        ("import os; os._exit(0)", ["assert False"], {"all": 0}),
        ("import sys; sys.exit(0)", ["assert False"], {"all": 0}),
        ("while True: pass", ["pass"], {"all": 0}),
        ("", ["pass"], {"all": 0}),
    ],
)
def test_the_reward(answer: str, tests: list, expected: dict):
    for how, value in expected.items():
        cfg = RewardArgs(code_score=how, code_sandbox="subprocess", code_time_limit=1.0)
        assert code(Sample([], answer, (), {"tests": tests}, "d:1"), cfg) == value, how


@pytest.mark.parametrize("tests", [None, [], [5], [{"input": "x"}], [""]])
def test_a_record_without_tests_is_an_error(tests: object):
    with pytest.raises(ValueError, match="'tests' of the record must be"):
        code(Sample([], "x = 1", (), {"tests": tests}, "d:1"), RewardArgs())


def test_the_program_in_an_answer():
    assert program_of("a\n```\nx\n```\n```python\ny\n```\n```text\nz\n```") == "y\n"
    assert program_of("```\nx\n```\nthen\n```sh\ny\n```") == "y\n"
    assert program_of("```python\nopen") == "open"
    assert program_of("x = 1") == "x = 1"


def test_a_system_without_a_sandbox_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch):
    cfg = RewardArgs(reward_funcs=("code",), code_sandbox="subprocess", code_memory_mb=32)
    with pytest.raises(ConfigError, match=r"code_sandbox: programs cannot be run here: .* 32 MB"):
        monkeypatch.setattr(sandbox, "run_program", lambda *rest: sandbox.Run(1, ""))
        Scorer(cfg)


def test_running_programs_is_announced():
    with log.captured() as lines:
        Scorer(RewardArgs(reward_funcs=("code",), code_sandbox="subprocess")).close()
    assert "programs that the model writes are run on this machine" in lines[0][1]
