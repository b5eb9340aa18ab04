"""Imports go down only. The layers are those of docs/architecture.md, and imports inside functions count."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.source_tree import REPOSITORY, Import, Module, imports, read_package

# From the bottom up; the root module (erniekit/__init__, api, __main__) is above all of them.
LAYERS = (
    ("config", "utils"),
    ("nn", "hub", "cluster"),
    ("parallel", "precision", "lora"),
    ("moe", "losses", "data"),
    ("models",),
    ("checkpoint", "plan"),
    ("build", "join"),
    ("quantize",),
    ("export", "generation"),
    ("rewards", "tools"),
    ("training",),
    ("evaluate", "serve"),
    ("board",),
    ("cli",),
)
ROOT = ("", "api", "__main__")
# Within a layer nobody imports anybody, but for these.
SIDEWAYS = {("config", "utils")}
# The chain allows these, a design decision forbids them.
FORBIDDEN = {
    ("serve", "training"): "serving does not need the trainer",
    ("data", "parallel"): "ranks come into data as numbers",
    ("data", "nn"): "data is numpy only",
}
WITHOUT_PADDLE_ANYWHERE = ("config", "data", "cluster", "rewards", "tools", "board")  # not even inside a function
WITHOUT_PADDLE_AT_IMPORT = (
    "erniekit",
    "erniekit.config",
    "erniekit.cli.main",
    "erniekit.cli.info",
    "erniekit.board.server",
    "erniekit.rewards.workers",
    "erniekit.rewards.scorer",
)

LEVEL = {unit: level for level, units in enumerate([*LAYERS, ROOT]) for unit in units}


def layer_problems(modules: dict[str, Module]) -> list[str]:
    """A line for each import that does not go down, and for each part of the package that no layer names."""
    problems = []
    for module in modules.values():
        if module.unit not in LEVEL:
            problems.append(f"{module.shown}: {module.unit!r} is in no layer of tests/test_layering.py")
            continue
        for found in imports(module, modules):
            reason = _against_layers(module, found)
            if reason:
                problems.append(f"{module.shown}:{found.line}: imports {found.target}: {reason}")
    return problems


def _against_layers(module: Module, found: Import) -> str:
    here, parts = module.unit, found.target.split(".")
    there = parts[1] if len(parts) > 1 else ""
    if parts[0] != "erniekit" or here == there or (here, there) in SIDEWAYS or here in ROOT:
        return ""
    if (here, there) in FORBIDDEN:
        return FORBIDDEN[here, there]
    if there == "":
        return "" if here == "cli" else "the root package lies above everything"
    if there not in LEVEL:
        return f"{there!r} is in no layer"
    return "" if LEVEL[there] < LEVEL[here] else f"{here} may import only what lies below it, {there} does not"


def paddle_problems(modules: dict[str, Module]) -> list[str]:
    """A line for each import of paddle where it must not be, directly or through other modules."""
    problems = []
    for module in modules.values():
        if module.unit in WITHOUT_PADDLE_ANYWHERE:
            lines = [found.line for found in imports(module, modules) if _is_paddle(found.target)]
            problems += [f"{module.shown}:{line}: {module.unit} never imports paddle" for line in lines]
    for name in WITHOUT_PADDLE_AT_IMPORT:
        if name in modules:
            chain = _chain_to_paddle(name, modules)
            problems += [f"{name} imports paddle: {' -> '.join(chain)}"] if chain else []
    return problems


def _is_paddle(target: str) -> bool:
    return target.partition(".")[0] == "paddle"


def _chain_to_paddle(start: str, modules: dict[str, Module]) -> list[str]:
    """The shortest chain of import-time imports from `start` to paddle; empty if there is none."""
    queue, seen = [[start]], {start}
    while queue:
        chain = queue.pop(0)
        for found in imports(modules[chain[-1]], modules):
            if not found.at_import_time:
                continue
            if _is_paddle(found.target):
                return [*chain, found.target]
            parts = found.target.split(".")
            # Importing a.b.c runs a and a.b first.
            for target in (".".join(parts[: end + 1]) for end in range(len(parts))):
                if target in modules and target not in seen:
                    seen.add(target)
                    queue.append([*chain, target])
    return []


@pytest.fixture(scope="module")
def package() -> dict[str, Module]:
    """The package, parsed once for all tests here."""
    return read_package(REPOSITORY)


def test_imports_go_down(package: dict[str, Module]):
    problems = layer_problems(package)
    assert not problems, "\n" + "\n".join(problems)


def test_paddle_stays_out_of_config_data_and_help(package: dict[str, Module]):
    problems = paddle_problems(package)
    assert not problems, "\n" + "\n".join(problems)


def test_importing_the_root_config_and_cli_leaves_paddle_out():
    code = "import erniekit, erniekit.config, erniekit.cli.main, sys; print([m for m in sys.modules if m == 'paddle'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_one_module_pads_what_a_model_takes(package: dict[str, Module]):
    """Data, training and losses have whole rows without padding; only the inputs of a model are made longer."""
    padding = {
        module.name
        for module in package.values()
        if module.unit in ("data", "models", "training", "losses", "evaluate")
        for node in module.nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "pad"
    }
    assert padding == {"erniekit.models.inputs"}


def test_the_architecture_page_shows_these_layers():
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    chain = re.search(r"`[\w, ]+`(\s*->\s*`[\w, ]+`)+", page)
    assert chain, "docs/architecture.md has no chain of layers such as `config, utils` -> `nn, hub` -> ..."
    shown = [set(units.split(", ")) for units in re.findall(r"`([\w, ]+)`", chain.group())]
    assert shown == [set(units) for units in LAYERS]


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("nn/rotary.py", "from erniekit.models import config", "nn may import only what lies below it"),
        ("nn/rotary.py", "def f():\n    import erniekit.models.config", "nn may import only what lies below it"),
        ("nn/rotary.py", "import erniekit", "the root package lies above everything"),
        ("moe/router.py", "from erniekit.losses import lm", "moe may import only what lies below it"),
        ("generation/engine.py", "from erniekit import training", "generation may import only what lies below it"),
        ("data/loader.py", "from erniekit.parallel import mesh", "ranks come into data as numbers"),
        ("models/decoder.py", "from ..training import run", "models may import only what lies below it"),
        ("plugins/x.py", "x = 1", "'plugins' is in no layer"),
        ("data/loader.py", "def f():\n    import paddle", "data never imports paddle"),
        ("config/__init__.py", "from erniekit.utils import heavy", "erniekit.config imports paddle"),
        ("cli/main.py", "from erniekit.nn.rotary import rotate", "erniekit.cli.main imports paddle"),
    ],
)
def test_a_violation_is_caught(tmp_path: Path, file: str, source: str, expected: str):
    files = {
        "utils/heavy.py": "import paddle.nn.functional as F",
        "models/config.py": "",
        "losses/lm.py": "",
        "training/__init__.py": "",
        "training/run.py": "",
        "nn/__init__.py": "import paddle",
        "nn/rotary.py": "from erniekit.utils import heavy",
        file: source,
    }
    for name, text in files.items():
        path = tmp_path / "erniekit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    modules = read_package(tmp_path)
    found = [*layer_problems(modules), *paddle_problems(modules)]
    assert any(expected in line and file.split("/")[0] in line for line in found), found


def test_a_sound_package_passes(tmp_path: Path):
    files = {
        "utils/log.py": "import logging",
        "utils/runtime.py": "def threads():\n    import paddle",
        "config/load.py": "from erniekit.utils import log",
        "nn/rotary.py": "import paddle\nfrom erniekit.utils import log",
        "generation/engine.py": "from erniekit.nn import rotary",
        "evaluate.py": "from erniekit.generation import engine",
        "__init__.py": "from erniekit.utils import runtime\ndef f():\n    from erniekit import evaluate",
    }
    for name, text in files.items():
        path = tmp_path / "erniekit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    modules = read_package(tmp_path)
    assert [*layer_problems(modules), *paddle_problems(modules)] == []
