"""Documents say what is so: tables are those of the code, links lead somewhere, commands and files are read by the
program, both READMEs say the same, and lines are short enough to compare.
"""

import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest
from support.source_tree import REPOSITORY

from erniekit.cli.commands import COMMANDS
from erniekit.config import load, reference, schema
from erniekit.utils.version import __version__
from tools.make_doc_tables import BLOCKS, filled, key_names

DOCUMENTS = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "tools/*.md", "data/*.md")
    for path in REPOSITORY.glob(pattern)
)
COLUMNS = 100
CHANGES = "CHANGELOG.md"


def read(document: str) -> str:
    return (REPOSITORY / document).read_text(encoding="utf-8")


def prose(text: str) -> list[tuple[int, str]]:
    """Numbered lines outside code blocks, tables and what a tool makes."""
    lines, inside = [], ""
    for number, line in enumerate(text.splitlines(), 1):
        mark = line.strip()
        if inside:
            inside = "" if mark.startswith(inside) else inside
        elif mark.startswith("```"):
            inside = "```"
        elif mark.startswith("<!-- begin:"):
            inside = "<!-- end:"
        elif not mark.startswith(("|", "<!--")):
            lines.append((number, line))
    return lines


def blocks(text: str) -> list[tuple[str, str]]:
    """(language and words behind it, text) of every code block."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", BLOCKS)
def test_tables_made_from_the_code_are_current(document: str):
    assert filled(document, read(document)) == read(document), "run: python tools/make_doc_tables.py"


def test_every_key_of_llama_factory_is_on_its_page():
    missing = [name for name in key_names("llama_factory") if f"`{name}`" not in read("docs/from-llama-factory.md")]
    assert not missing, "they need a table in tools/make_doc_tables.py"


@pytest.mark.parametrize("document", ["from-erniekit", "from-paddleformers", "from-llama-factory"])
def test_defaults_in_the_migration_pages_are_ours(document: str):
    after = read(f"docs/{document}.md").split("<!-- defaults: checked by tests/test_documents.py -->")[1]
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (?:`([^`]*)`|\(empty\)) \|", after, re.MULTILINE)
    assert len(rows) > 4
    for name, default in rows:
        value = reference.entry(schema.fields()[name]).default
        assert {"empty": "", "not given": "None"}.get(value, value) == default, name


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = [
        re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", line.lstrip("#"))
        for _, line in prose(text)
        if line.startswith("#")
    ]
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str):
    text = read(document)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (REPOSITORY / document).parent / path if path else REPOSITORY / document
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != CHANGES])
def test_modules_that_are_named_exist(document: str):
    """`nn/linear.py`, `erniekit/nn/linear.py: Linear`, `tests/unit/nn/test_mlp.py`; not files of other projects."""
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)[:`]", read(document)):
        first = name.split("/")[0]
        root = REPOSITORY if first in ("erniekit", "tests", "tools") else REPOSITORY / "erniekit"
        assert (root / name).is_file() or not (root / first).is_dir() or name == "data/indexed_dataset.py", name


def test_the_architecture_page_names_every_module():
    """Those that lie directly in a package; `schema*` in a row names all that begin like this."""
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.*) \|$", read("docs/architecture.md"), re.MULTILINE)
    named = {unit: text for units, text in rows for unit in re.findall(r"\w+", units)}
    units = [path for path in (REPOSITORY / "erniekit").iterdir() if path.name[0] != "_" and path.suffix in ("", ".py")]
    assert {unit.stem for unit in units} - {"api"} == named.keys()
    for unit in units:
        words = re.findall(r"\w+\*?", named.get(unit.stem, ""))
        for module in unit.glob("[a-z]*.py"):
            assert any(fnmatch(module.stem, word) for word in words), f"{unit.stem}/{module.name}"


def commands(document: str) -> list[list[str]]:
    """Every `erniekit COMMAND ...` in a code block without a language, as words."""
    texts = [text for language, text in blocks(read(document)) if not language.strip()]
    lines = re.findall(r"^(?:[A-Z_]+=\S+ )*(?:\S+/)?erniekit ([a-z]+ .*)$", "\n".join(texts), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_are_commands_and_their_files_load(document: str, tmp_path: Path):
    for command, *words in commands(document):
        assert command in COMMANDS, command
        files = [word for word in words if word.endswith(".yaml") and "=" not in word]
        overrides = [word for word in words if re.fullmatch(r"\w+=[^|\s]+", word) and word != "key=value"]
        if command not in ("train", "eval", "chat", "export", "split") or not files:
            continue
        path = REPOSITORY / files[0]
        if files[0].startswith("examples/"):
            assert path.is_file(), files[0]
        else:  # a file of the reader's own
            path = tmp_path / "own.yaml"
            path.write_text("model_name_or_path: m\ntrain_dataset_path: a\neval_dataset_path: a\noutput_dir: o\n")
        load(str(path), overrides, command)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_complete_yaml_files_load(document: str, tmp_path: Path):
    for language, text in blocks(read(document)):
        if language.startswith("yaml") and "output_dir:" in text and "# erniekit" not in text:
            path = tmp_path / "shown.yaml"
            path.write_text(text, encoding="utf-8")
            load(str(path), None, "train")


def test_both_readmes_have_the_same_parts():
    english, chinese = read("README.md"), read("README.zh.md")

    def shape(text: str) -> list[str]:
        return re.findall(r"^(#+) |^(\*) |^(\|)|^(```)", text, re.MULTILINE)

    def links(text: str) -> list[str]:
        return sorted(link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("README"))

    def numbers(text: str) -> list[str]:
        return sorted(re.findall(r"\d[\d.,]*\d|\d", "\n".join(text for _, text in blocks(text))))

    assert shape(english) == shape(chinese)
    assert links(english) == links(chinese)
    assert numbers(english) == numbers(chinese)


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name.startswith("docs/")])
def test_every_page_is_linked_from_both_readmes(document: str):
    for readme in ("README.md", "README.zh.md"):
        assert f"({document})" in read(readme), readme


def columns(line: str) -> int:
    """The width of a line in a terminal, where a Chinese character takes two columns."""
    return sum(2 if ord(character) > 0x2E7F else 1 for character in line)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_lines_are_wrapped_or_hold_one_sentence(document: str):
    long = []
    for number, line in prose(read(document)):
        one_sentence = not re.search(r"[.!?] |[。！？].", line.strip().rstrip("*)）"))
        one_word = " " not in re.sub(r"^\s*([*-] |\d+\. )?", "", line)
        if columns(line) > COLUMNS and not one_sentence and not one_word:
            long.append(f"{document}:{number}: {columns(line)} columns")
    assert not long, "run: python tools/wrap_docs.py\n" + "\n".join(long)


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## \[([^\]]+)\] - (\S+)$", read(CHANGES), re.MULTILINE)
    assert versions[0][0] == __version__
    assert all(re.fullmatch(r"unreleased|\d{4}-\d{2}-\d{2}", date) for _, date in versions)
