"""The collected corpus: real text, the same every time, no larger than asked for, nothing twice."""

import importlib.util
import inspect
import json
import textwrap
from pathlib import Path

import pytest

from erniekit.data.records.formats import parse_record

ROOT = Path(__file__).parents[3]
SPEC = importlib.util.spec_from_file_location("make_pretrain_corpus", ROOT / "tools/make_pretrain_corpus.py")
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)


@pytest.fixture(scope="module")
def whole():
    return tool.collect(list(tool.KINDS), 1, 10**9)


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run_tool(*arguments):
        monkeypatch.setattr("sys.argv", ["", "--out", str(tmp_path / "c.jsonl"), *arguments])
        tool.main()
        return (tmp_path / "c.jsonl").read_bytes()

    return run_tool


def test_it_is_real_text_of_every_kind_and_of_many_lengths(whole):
    taken, found = whole
    assert len(taken) == found > 500
    assert {kind for kind, _, _ in taken} == set(tool.KINDS)
    texts = [parse_record(json.loads(line), "text").text for _, _, line in taken]
    lengths = sorted(map(len, texts))
    assert lengths[0] >= 80 and lengths[len(lengths) // 10] < 2000
    assert sum(length > 20_000 for length in lengths) > 50  # long documents for a long-context stage
    assert sum(lengths) > 4_000_000
    by_place = {(kind, where): json.loads(line)["text"] for kind, where, line in taken}
    assert "# How erniekit is built" in by_place["project", "docs/architecture.md"]


def test_no_text_comes_twice(whole):
    taken, _ = whole
    texts = [line for _, _, line in taken]
    assert len(set(texts)) == len(texts)
    source, docs = ({where for kind, where, _ in taken if kind == name} for name in ("source", "docstrings"))
    assert not source & docs and min(len(source), len(docs)) > 100


def test_docstrings_stand_under_their_signatures(monkeypatch):
    names = {"textwrap": textwrap, "json.__init__": json}
    monkeypatch.setattr(tool, "modules", lambda: [(name, inspect.getsource(module)) for name, module in names.items()])
    found = dict(tool.docstrings())
    assert found["textwrap"].startswith("textwrap\n\nText wrapping and filling.")
    assert "\n\nfill(text, width=70, **kwargs)\n\nFill a single paragraph of text" in found["textwrap"]
    assert "\n\nclass TextWrapper\n\n" in found["textwrap"] and "TextWrapper.wrap(self, text)" in found["textwrap"]
    assert found["json.__init__"].startswith("json\n\n")


def test_the_same_seed_gives_the_same_bytes_and_no_more_than_asked(run, tmp_path, capsys):
    kinds = ("--kinds", "licences,reference")
    first = run(*kinds, "--max-bytes", "100000", "--seed", "3", "--list", str(tmp_path / "list.tsv"))
    assert 80_000 < len(first) <= 100_000 and first == run(*kinds, "--max-bytes", "100000", "--seed", "3")
    assert first != run(*kinds, "--max-bytes", "100000", "--seed", "4")
    places = (tmp_path / "list.tsv").read_text().splitlines()
    assert len(places) == len(first.splitlines()) and places[0].split("\t")[0] in ("licences", "reference")
    assert f"{len(places)} of " in capsys.readouterr().out


def test_wrong_arguments_say_so(run):
    with pytest.raises(SystemExit, match="unknown novels; there are source"):
        run("--kinds", "source,novels")
    with pytest.raises(SystemExit, match="raise --max-bytes"):
        run("--kinds", "licences", "--max-bytes", "10")
