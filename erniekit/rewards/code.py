"""The reward for programs: the record's tests are run in the sandbox."""

import re
import secrets
import textwrap
from typing import Any

from erniekit.config.schema_rewards import RewardArgs
from erniekit.rewards.sample import Sample
from erniekit.rewards.sandbox import Limits, run_program
from erniekit.rewards.sandbox_child import CANNOT_RUN

_BLOCK = re.compile(r"```(?P<language>[A-Za-z0-9_+-]*)[^\n]*\n(?P<code>.*?)(?:```|\Z)", re.DOTALL)


# The program is a module that the test uses: what it does only as a script (if __name__ == "__main__": ... input()) is
# not part of what the test asks for, and there is nothing to read. The test is run as a script: what it does only there
# would otherwise be left out, and any program would pass. unittest.main() looks for its cases in the module __main__,
# and ends the process also where they pass; that ends the test, unless it is the program that ends the process.
_WITH_TEST = """\
import sys, types
module = sys.modules["program"] = sys.modules["__main__"] = types.ModuleType("program")
for part, name in zip({parts!r}, ("program", "__main__")):
    module.__name__ = name
    try:
        exec(compile(part, name, "exec"), module.__dict__)
    except SystemExit as end:
        files, trace = [], end.__traceback__
        while trace:
            files.append(trace.tb_frame.f_code.co_filename)
            trace = trace.tb_next
        if end.code or "program" in files:
            raise
print("\\n{token}")
"""


def code(sample: Sample, cfg: RewardArgs) -> float:
    """Whether the answer's last Python block (or, without one, its last block, or all of it) passes the record's
    `tests`: 1.0 or 0.0, or with code_score: fraction the share of tests that pass.

    A test is a text of Python statements that follow the program and must not raise, or {"input", "output"}: what the
    program reads from standard input, and prints apart from blank space at the ends of lines.
    """
    tests = tests_of(sample, cfg)
    program, limits = program_of(sample.answer), limits_of(cfg)
    passed = 0
    for test in tests:
        is_passed = bool(program.strip()) and _passes(program, test, limits)
        passed += is_passed
        if not is_passed and cfg.code_score == "all":
            return 0.0
    return passed / len(tests)


def limits_of(cfg: RewardArgs) -> Limits:
    """The limits of the configuration."""
    return Limits(cfg.code_time_limit, cfg.code_memory_mb << 20, cfg.code_network)


def seconds_of(sample: Sample, cfg: RewardArgs) -> float:
    """The longest time that the tests of a record may take."""
    tests = sample.fields.get("tests")
    return (limits_of(cfg).wall_seconds + 1) * (len(tests) if isinstance(tests, list) else 1)


def program_of(answer: str) -> str:
    """The program in an answer; its block may be indented, as in a list."""
    blocks = list(_BLOCK.finditer(answer))
    python = [block for block in blocks if block["language"].lower() in ("python", "py", "python3")]
    chosen = (python or blocks)[-1:]
    return textwrap.dedent(chosen[0]["code"]) if chosen else answer


def tests_of(sample: Sample, cfg: RewardArgs) -> list[str | dict[str, str]]:
    tests = sample.fields.get("tests")
    tests = [tests] if isinstance(tests, str | dict) else tests
    if not isinstance(tests, list) or not tests or not all(map(_is_test, tests)):
        raise ValueError('\'tests\' of the record must be a list of Python texts or of {"input": ..., "output": ...}')
    return tests


def _is_test(test: Any) -> bool:
    if isinstance(test, dict):
        return isinstance(test.get("input", ""), str) and isinstance(test.get("output"), str)
    return isinstance(test, str) and bool(test.strip())


def _passes(program: str, test: str | dict[str, str], limits: Limits) -> bool:
    if isinstance(test, dict):
        run = run_program(program, test.get("input", ""), limits)
        expected, output = test["output"], run.output
    else:
        # Printed behind the test, so that a program that ends early with exit code 0 does not pass. What the program
        # prints at its own end may follow.
        expected = secrets.token_hex(16)
        run = run_program(_WITH_TEST.format(parts=(program, test), token=expected), "", limits)
        output = expected if expected in run.output.split() else ""
    if run.exit_code == CANNOT_RUN:
        raise RuntimeError(run.problem)
    return not run.problem and run.exit_code == 0 and _lines(output) == _lines(expected)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
