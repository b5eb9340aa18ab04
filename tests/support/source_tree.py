"""Reads the source of a package with `ast`, for tests/test_layering.py and tests/test_budgets.py."""

import ast
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One import. `target` is the module, as far as it is known; inside a function it is not `at_import_time`."""

    target: str
    line: int
    at_import_time: bool


@dataclass(frozen=True)
class Module:
    """One source file. `name` is dotted, a package's `__init__` has the package's name."""

    name: str
    path: Path
    shown: str  # the path for messages, relative to the root
    text: str
    tree: ast.Module

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the tree, which many tests look through."""
        return list(ast.walk(self.tree))

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def unit(self) -> str:
        """The part of the package it belongs to: `erniekit.nn.rotary` -> `nn`; the root package itself -> ``."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else ""


def read_files(root: Path, pattern: str) -> list[Module]:
    """All Python files under `root` that match, named by their path."""
    gc.disable()  # it would look again and again through trees that stay: three quarters of the time
    try:
        return [_read(path, root) for path in sorted(root.glob(pattern)) if "__pycache__" not in path.parts]
    finally:
        gc.enable()


def read_package(root: Path, package: str = "erniekit") -> dict[str, Module]:
    """The modules of the package that lies in `root`, by dotted name."""
    return {module.name: module for module in read_files(root, f"{package}/**/*.py")}


def _read(path: Path, root: Path) -> Module:
    relative = path.relative_to(root)
    parts = list(relative.with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    text = path.read_text(encoding="utf-8")
    return Module(".".join(parts), path, str(relative), text, ast.parse(text, filename=str(path)))


def imports(module: Module, known: dict[str, Module]) -> list[Import]:
    """Everything the module imports, inside functions and under TYPE_CHECKING too."""
    found = []
    late = _nodes_run_late(module)
    for node in module.nodes:
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute_base(module, node)
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        else:
            continue
        found += [Import(target, node.lineno, id(node) not in late) for target in dict.fromkeys(targets)]
    return found


def _absolute_base(module: Module, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.name.split(".")
    keep = len(parts) - node.level + (1 if module.is_package else 0)
    return ".".join([*parts[:keep], *([node.module] if node.module else [])])


def _nodes_run_late(module: Module) -> set[int]:
    """The ids of nodes that do not run on import: function bodies, and `if TYPE_CHECKING:`."""
    late: set[int] = set()
    for node in module.nodes:  # from the outside to the inside
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if id(node) not in late and (is_typing or isinstance(node, FunctionNode)):
            late.update(id(inner) for statement in node.body for inner in ast.walk(statement))
    return late


def functions(module: Module) -> Iterator[FunctionNode]:
    """Every function of the module, methods and nested ones included."""
    return (node for node in module.nodes if isinstance(node, FunctionNode))


def public_functions(module: Module) -> Iterator[FunctionNode]:
    """Functions and methods that others may call: no leading underscore in their name or in that of their class."""

    def visit(body: list[ast.stmt]) -> Iterator[FunctionNode]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from visit(node.body)
            elif isinstance(node, FunctionNode) and (not node.name.startswith("_") or node.name == "__init__"):
                yield node

    return visit(module.tree.body)


def complexity(function: FunctionNode) -> int:
    """Cyclomatic complexity: 1 + decisions. A nested function counts on its own, not for the one around it."""
    total = 1
    stack: list[ast.AST] = list(function.body)
    while stack:
        node = stack.pop()
        if isinstance(node, FunctionNode):
            continue
        total += _decisions(node)
        stack.extend(ast.iter_child_nodes(node))
    return total


def _decisions(node: ast.AST) -> int:
    if isinstance(node, ast.BoolOp):
        return len(node.values) - 1
    if isinstance(node, ast.comprehension):
        return 1 + len(node.ifs)
    if isinstance(node, ast.If | ast.For | ast.AsyncFor | ast.While | ast.IfExp | ast.ExceptHandler | ast.match_case):
        return 1
    return 0


def aliases(module: Module) -> dict[str, str]:
    """What imported names stand for: `import paddle.distributed as dist` -> {"dist": "paddle.distributed"}."""
    names = {}
    for node in module.nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                head = alias.name.partition(".")[0]
                names[alias.asname or head] = alias.name if alias.asname else head
        elif isinstance(node, ast.ImportFrom):
            base = _absolute_base(module, node)
            names.update({alias.asname or alias.name: f"{base}.{alias.name}" for alias in node.names})
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`dist.all_reduce` -> "paddle.distributed.all_reduce" with the aliases resolved; "" if it is not a dotted name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([names.get(node.id, node.id), *reversed(parts)])


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach one another (strongly connected, more than one member), each sorted."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        stack = [start]
        while stack:
            for following in edges.get(stack.pop(), set()) - seen:
                seen.add(following)
                stack.append(following)
        return seen

    reachable = {node: reach(node) for node in edges}
    groups = {
        tuple(sorted(other for other in edges if other in reachable[node] and node in reachable[other]))
        for node in edges
        if node in reachable[node]
    }
    return [list(group) for group in sorted(groups)]
