"""Words that docs/glossary.md retires stay out of the documents, and out of docstrings, comments and messages of the
modules that were gone through.

A package is gone through once its name (or a module's) is added to CLEAN; the failure lists every line to change.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
from support.source_tree import REPOSITORY, Module, read_package

PAGE = REPOSITORY / "docs" / "glossary.md"

# Packages and modules without retired words. It only grows.
CLEAN = (
    "erniekit.__main__",
    "erniekit.cli",
    "erniekit.cluster",
    "erniekit.config",
    "erniekit.hub",
    "erniekit.utils",
    "erniekit.api",
    "erniekit.checkpoint",
    "erniekit.data.packed_batch",
    "erniekit.data.chat",
    "erniekit.data.lengths",
    "erniekit.data.loader",
    "erniekit.data.packed_stream",
    "erniekit.data.packing",
    "erniekit.data.prefetch",
    "erniekit.data.record_feed",
    "erniekit.data.records",
    "erniekit.data.sampler",
    "erniekit.data.tokens",
    "erniekit.data.workers",
    "erniekit.data.vision",
    "erniekit.evaluate",
    "erniekit.export",
    "erniekit.generation",
    "erniekit.losses",
    "erniekit.lora",
    "erniekit.models",
    "erniekit.moe",
    "erniekit.nn",
    "erniekit.parallel",
    "erniekit.precision",
    "erniekit.serve",
    "erniekit.training",
)

DOCUMENTS = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "tools/*.md", "data/*.md")
    for path in REPOSITORY.glob(pattern)
)


def retired() -> dict[str, str]:
    """Every retired phrase, and what to write instead."""
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", PAGE.read_text("utf-8").split("| do not write | write |")[1], re.M)
    return {phrase.strip(): better for phrases, better in rows[1:] for phrase in phrases.split(",")}


RETIRED = retired()
ANY = re.compile(
    r"\b(" + "|".join(re.escape(phrase).replace(r"\ ", r"\s+") for phrase in RETIRED) + r")\b", re.IGNORECASE
)


def found_in(text: str, where: str, first: int = 1) -> list[str]:
    """One line for each retired phrase in the text, which begins at line `first` of `where`."""
    lines = []
    for match in ANY.finditer(text):
        phrase = " ".join(match[0].lower().split())
        line = first + text.count("\n", 0, match.start())
        lines.append(f"{where}:{line}: {phrase!r}: write {RETIRED[phrase]}")
    return lines


def prose_of(module: Module) -> list[tuple[int, str]]:
    """(first line, text) of every string and comment of a module."""
    strings = [
        (node.lineno, node.value)
        for node in module.nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(module.text).readline)
    return strings + [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


def violations(module: Module) -> list[str]:
    """Every retired phrase in a module's strings and comments."""
    return [line for first, text in prose_of(module) for line in found_in(text, module.shown, first)]


def clean_modules() -> list[Module]:
    """The modules that CLEAN names, with those of its packages."""
    package = read_package(REPOSITORY)
    return [
        module
        for name, module in package.items()
        if any(name == clean or name.startswith(f"{clean}.") for clean in CLEAN)
    ]


def test_every_clean_name_is_a_module():
    assert set(CLEAN) <= read_package(REPOSITORY).keys()


def test_the_table_is_read():
    assert RETIRED["goes on"] == "resume, continue" and len(RETIRED) > 20


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_use_the_words_of_the_glossary(document: str):
    text = Path(REPOSITORY / document).read_text("utf-8")
    if document == "docs/glossary.md":
        text = text.split("## Words that are no longer used")[0]
    text = re.sub(r"<!-- begin: .*?<!-- end: [^>]*>", lambda made: "\n" * made[0].count("\n"), text, flags=re.DOTALL)
    assert not (found := found_in(re.sub(r"`[^`\n]*`", "``", text), document)), "\n" + "\n".join(found)


@pytest.mark.parametrize("module", clean_modules(), ids=lambda module: module.name)
def test_clean_modules_use_the_words_of_the_glossary(module: Module):
    assert not (found := violations(module)), "\n" + "\n".join(found)
