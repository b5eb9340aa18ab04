"""The numbers that keep the code small enough to hold. Raise one only on purpose, with the reason in the commit."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from support.source_tree import (
    REPOSITORY,
    Module,
    aliases,
    complexity,
    cycles,
    dotted,
    functions,
    imports,
    public_functions,
    read_files,
    read_package,
)

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_COMPLEXITY = 15
MAX_GUESSES = 5  # hasattr and getattr calls in the whole package

ENVIRONMENT_FILES = {"erniekit/cli/launch.py", "erniekit/utils/runtime.py"}
COLLECTIVES_FILE = "erniekit/parallel/comm.py"
DYNAMIC_IMPORT_FILES = {"erniekit/cli/main.py"}

# Names that can only be a collective, wherever they come from.
COLLECTIVES = {
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "alltoall",
    "alltoall_single",
    "batch_isend_irecv",
    "broadcast_object_list",
    "irecv",
    "isend",
    "reduce_scatter",
    "reduce_scatter_tensor",
}
# Names that are collectives only when they come from paddle.distributed.
COLLECTIVES_OF_DISTRIBUTED = COLLECTIVES | {"barrier", "broadcast", "gather", "recv", "reduce", "scatter", "send"}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"}
MACHINE_PATH = re.compile(r"(?<![\w.~}])/(work|root|tmp|home)(?![\w-])")


def sizes(modules: Iterable[Module]) -> list[str]:
    """Files and functions that are too long."""
    problems = []
    for module in modules:
        lines = module.text.count("\n")
        if lines > MAX_FILE_LINES:
            problems.append(f"{module.shown}: {lines} lines, at most {MAX_FILE_LINES}")
        for function in functions(module):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length > MAX_FUNCTION_LINES:
                problems.append(
                    f"{module.shown}:{function.lineno}: {function.name}: {length} lines, at most {MAX_FUNCTION_LINES}"
                )
    return problems


def branches(modules: Iterable[Module]) -> list[str]:
    """Functions with too many decisions."""
    problems = []
    for module in modules:
        for function in functions(module):
            where = f"{module.shown}:{function.lineno}: {function.name}"
            decisions = complexity(function)
            if decisions > MAX_COMPLEXITY:
                problems.append(f"{where}: cyclomatic complexity {decisions}, at most {MAX_COMPLEXITY}")
    return problems


def mutual_imports(modules: dict[str, Module]) -> list[str]:
    """Modules, or parts of the package, that import one another, directly or in a circle."""
    of_modules: dict[str, set[str]] = {name: set() for name in modules}
    of_units: dict[str, set[str]] = {module.unit: set() for module in modules.values()}
    for name, module in modules.items():
        for found in imports(module, modules):
            if found.target in modules and found.target != name:
                of_modules[name].add(found.target)
                of_units[module.unit].add(modules[found.target].unit)
    of_units = {unit: others - {unit, ""} for unit, others in of_units.items() if unit}
    return [f"import one another: {', '.join(group)}" for group in [*cycles(of_modules), *cycles(of_units)]]


def untyped(modules: Iterable[Module]) -> list[str]:
    """Public functions with an argument or a result without a type."""
    problems = []
    for module in modules:
        for function in public_functions(module):
            missing = _arguments_without_type(function)
            if function.returns is None and function.name != "__init__":
                missing.append("the result")
            if missing:
                problems.append(f"{module.shown}:{function.lineno}: {function.name}: no type for {', '.join(missing)}")
    return problems


def _arguments_without_type(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args]
    if positional and positional[0].arg in ("self", "cls"):
        positional = positional[1:]
    every = [*positional, *spec.kwonlyargs, *(arg for arg in (spec.vararg, spec.kwarg) if arg)]
    return [arg.arg for arg in every if arg.annotation is None]


def guesses(modules: Iterable[Module]) -> list[str]:
    """The calls of hasattr and getattr, if there are too many of them."""
    found = [
        f"{module.shown}:{node.lineno}: {node.func.id}"
        for module in modules
        for node in module.nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr")
    ]
    return [f"{len(found)} calls, at most {MAX_GUESSES}:", *found] if len(found) > MAX_GUESSES else []


def collectives(modules: Iterable[Module]) -> list[str]:
    """Collectives called, or imported, outside the one file for them."""

    def is_collective(name: str) -> bool:
        head, _, last = name.rpartition(".")
        if head.startswith("erniekit.parallel"):
            return False
        return last in (COLLECTIVES_OF_DISTRIBUTED if head.startswith("paddle.distributed") else COLLECTIVES)

    return _uses(modules, is_collective, {COLLECTIVES_FILE}, f"collectives belong in {COLLECTIVES_FILE}")


def environment(modules: Iterable[Module]) -> list[str]:
    """Environment variables read or set outside the files for them."""
    reason = f"environment variables belong in {', '.join(sorted(ENVIRONMENT_FILES))}"
    return _uses(modules, ENVIRONMENT.__contains__, ENVIRONMENT_FILES, reason)


def dynamic_imports(modules: Iterable[Module]) -> list[str]:
    """Imports by string, which the layering test cannot see."""
    names = {"importlib.import_module", "__import__", "importlib.__import__"}
    return _uses(modules, names.__contains__, DYNAMIC_IMPORT_FILES, "an import by string hides from the layering test")


def _uses(modules: Iterable[Module], unwanted: Callable[[str], bool], allowed: set[str], reason: str) -> list[str]:
    """Dotted names, and names imported, that are `unwanted` in files that are not `allowed`."""
    problems = []
    for module in modules:
        if module.shown in allowed:
            continue
        names = aliases(module)
        for node in module.nodes:
            if isinstance(node, ast.Attribute):
                # self.group.all_reduce(...), f().all_reduce(...): no dotted name, but its last part tells.
                found = [dotted(node, names) or f"?.{node.attr}"]
            elif isinstance(node, ast.Name):
                found = [node.id]
            elif isinstance(node, ast.ImportFrom):
                found = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            problems += [f"{module.shown}:{node.lineno}: {name}: {reason}" for name in found if unwanted(name)]
    return problems


def machine_paths(modules: Iterable[Module]) -> list[str]:
    """Absolute paths of somebody's machine."""
    return [
        f"{module.shown}:{number}: a path of one machine: {line.strip()}"
        for module in modules
        for number, line in enumerate(module.text.splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]


PACKAGE_CHECKS: dict[str, Callable[[dict[str, Module]], list[str]]] = {
    "sizes": lambda modules: sizes(modules.values()),
    "branches": lambda modules: branches(modules.values()),
    "mutual_imports": mutual_imports,
    "untyped": lambda modules: untyped(modules.values()),
    "guesses": lambda modules: guesses(modules.values()),
    "collectives": lambda modules: collectives(modules.values()),
    "environment": lambda modules: environment(modules.values()),
    "dynamic_imports": lambda modules: dynamic_imports(modules.values()),
    "machine_paths": lambda modules: machine_paths(modules.values()),
}


@pytest.fixture(scope="module")
def package() -> dict[str, Module]:
    """The package, parsed once for all checks."""
    return read_package(REPOSITORY)


@pytest.mark.parametrize("check", PACKAGE_CHECKS)
def test_the_package_keeps_its_budget(package: dict[str, Module], check: str):
    problems = PACKAGE_CHECKS[check](package)
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize("pattern", ["tests/**/*.py", "tools/**/*.py", "setup.py"])
def test_tests_and_tools_keep_the_size_budget(pattern: str):
    files = read_files(REPOSITORY, pattern)
    # A test's many assertions are no maze; what a tool decides is.
    problems = sizes(files) + ([] if pattern.startswith("tests") else branches(files))
    assert not problems, "\n" + "\n".join(problems)


LONG_FUNCTION = "def f() -> None:\n" + "    x = 1\n" * 80
BRANCHES = "def f(a: int) -> None:\n" + "    if a and a:\n        pass\n" * 8
VIOLATIONS = [
    ("sizes", {"nn/a.py": "x = 1\n" * 501}, "erniekit/nn/a.py: 501 lines"),
    ("sizes", {"nn/a.py": LONG_FUNCTION}, "erniekit/nn/a.py:1: f: 81 lines"),
    ("branches", {"nn/a.py": BRANCHES}, "erniekit/nn/a.py:1: f: cyclomatic complexity 17"),
    ("mutual_imports", {"nn/a.py": "import erniekit.nn.b", "nn/b.py": "from erniekit.nn import a"}, "nn.a, "),
    (
        "mutual_imports",
        {"nn/a.py": "def f():\n    import erniekit.moe.b", "moe/b.py": "", "moe/c.py": "from erniekit.nn import a"},
        "import one another: moe, nn",
    ),
    (
        "mutual_imports",
        {"nn/a.py": "import erniekit.nn.b", "nn/b.py": "import erniekit.nn.c", "nn/c.py": "import erniekit.nn.a"},
        "erniekit.nn.a, erniekit.nn.b, erniekit.nn.c",
    ),
    ("untyped", {"nn/a.py": "def f(x):\n    pass"}, "f: no type for x, the result"),
    ("untyped", {"nn/a.py": "class A:\n    def f(self, *, k=1) -> None:\n        pass"}, "f: no type for k"),
    ("guesses", {"nn/a.py": "hasattr(1, 'a')\n" * 6}, "6 calls, at most 5"),
    ("collectives", {"nn/a.py": "import paddle.distributed as dist\ndist.barrier()"}, "a.py:2: paddle.distributed"),
    ("collectives", {"nn/a.py": "from paddle.distributed import all_reduce"}, "a.py:1: paddle.distributed.all_reduce"),
    ("collectives", {"nn/a.py": "import paddle\npaddle.distributed.send(1)"}, "a.py:2: paddle.distributed.send"),
    ("collectives", {"nn/a.py": "def f(self):\n    self.groups[0].all_gather(1)"}, "a.py:2: ?.all_gather"),
    ("environment", {"nn/a.py": "import os\nx = os.environ['A']"}, "a.py:2: os.environ"),
    ("environment", {"nn/a.py": "from os import getenv as g\ng('A')"}, "a.py:1: os.getenv"),
    ("environment", {"nn/a.py": "import os as o\no.getenv('A')"}, "a.py:2: os.getenv"),
    ("dynamic_imports", {"nn/a.py": "import importlib\nimportlib.import_module('x')"}, "a.py:2: importlib"),
    ("machine_paths", {"nn/a.py": "x = '/tmp/x'"}, "a.py:1: a path of one machine"),
    ("machine_paths", {"nn/a.py": "# see /root/notes"}, "a.py:1: a path of one machine"),
]


@pytest.mark.parametrize(("check", "files", "expected"), VIOLATIONS)
def test_a_violation_is_caught(tmp_path: Path, check: str, files: dict[str, str], expected: str):
    problems = PACKAGE_CHECKS[check](_package(tmp_path, files))
    assert any(expected in line for line in problems), problems


def test_what_is_allowed_passes(tmp_path: Path):
    files = {
        "parallel/comm.py": "import paddle.distributed as dist\ndef f() -> None:\n    dist.all_reduce(1)",
        "nn/a.py": "from erniekit.parallel import comm\nimport numpy as np\ncomm.all_reduce(1)\nnp.broadcast(1)",
        "cli/launch.py": "import os\nos.environ['A']",
        "nn/b.py": "def _hidden(x):\n    pass\nclass _A:\n    def f(self, x):\n        pass\nx = 'a/tmp/b ./root'",
        "nn/c.py": "x = 1\n" * 500,
    }
    modules = _package(tmp_path, files)
    assert {name: check(modules) for name, check in PACKAGE_CHECKS.items()} == {name: [] for name in PACKAGE_CHECKS}


def test_complexity_counts_decisions_but_not_those_of_a_nested_function(tmp_path: Path):
    source = (
        "def f(a):\n"
        "    def g(b):\n        return 1 if b else 2\n"
        "    for x in a:\n        while x and a:\n            pass\n"
        "    return [y for y in a if y]\n"
    )
    module = _package(tmp_path, {"nn/a.py": source})["erniekit.nn.a"]
    assert {function.name: complexity(function) for function in functions(module)} == {"f": 6, "g": 2}


def _package(root: Path, files: dict[str, str]) -> dict[str, Module]:
    for name, text in files.items():
        path = root / "erniekit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return read_package(root)


LINTERS = {"ruff": ["ruff", "check", "--output-format=concise", "."], "mypy": ["mypy"]}


@pytest.mark.parametrize("tool", LINTERS)
def test_the_linters_are_content(tool: str):
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed (extra `dev`)")
    command = [sys.executable, "-m", *LINTERS[tool]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
