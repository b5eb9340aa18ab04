"""YAML that is broken, hostile or unusual: one message with file and line, at once."""

import itertools
import os
import time
from pathlib import Path

import pytest

from erniekit.config import load
from erniekit.utils.errors import ConfigError


@pytest.fixture
def message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def read(content: str | bytes, name: str = "x.yaml") -> str:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        started = time.process_time()
        with pytest.raises(ConfigError) as caught:
            load(name, None, "version")
        assert time.process_time() - started < 5 and len(str(caught.value)) < 600
        return str(caught.value)

    return read


def bomb(*, merged: bool) -> str:
    """Twenty levels of nine uses of the level before: 9^20 values in 1 kB."""
    names = [f"a{level}" for level in range(20)]
    lines = [f"{names[0]}: &{names[0]} {{k: 1}}"]
    for before, name in itertools.pairwise(names):
        uses = ", ".join([f"*{before}"] * 9) if not merged else f"{{<<: *{before}, {name}: [{f'*{before}, ' * 9}]}}"
        lines.append(f"{name}: &{name} " + (uses if merged else f"[{uses}]"))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bomb(merged=False), "more than 20,000 values"),
        (bomb(merged=True), "more than 20,000 values"),
        ("a:\n  <<: *x\n", "x.yaml:2: *x names nothing"),
        ("k: &a 1\n<<: *a\n", "x.yaml:2: <<: takes a mapping"),
        ("<<: [1]\n", "x.yaml:1: <<: takes a mapping"),
        ("<<: {seed: 1}\n<<: {seed: 2}\n", "<<: given twice (lines 1 and 2 of x.yaml)"),
        ("a: &a\n  b: *a\n", "x.yaml:2: an alias (*a) stands inside what it names"),
        ("a: &a\n  - x\n  - <<: *a\n", "x.yaml:3: an alias (*a) stands inside what it names"),
        ("x: " + "[" * 100_000, "x.yaml:1: nested more than 100 levels deep"),
        ("- " * 100_000, "x.yaml:1: nested more than 100 levels deep"),
        ("x: " + "{a: " * 500 + "}" * 500, "x.yaml:1: nested more than 100 levels deep"),
        ("a: &a " + "[" * 60 + "]" * 60 + "\nb: " + "[" * 60 + "*a" + "]" * 60, "x.yaml:2: nested more than 100"),
        ("a: {b: {c: 1,\n c: 2}}\n", "c: given twice (lines 1 and 2 of x.yaml)"),
        ("a: [{c: 1, c: 2}]\n", "c: given twice"),
        ("seed: 1\n[a]: 1\n", "x.yaml:2: a key must be a word"),
        ("? {a: 1}\n: 2\n", "x.yaml:1: a key must be a word"),
        ("a: &a [1]\n*a : 2\n", "x.yaml:2: a key must be a word"),
        ("1: 2\n", "1: unknown key (x.yaml:1)"),
        ("true: 2\n", "true: unknown key (x.yaml:1)"),
        ("null: 2\n", "null: unknown key (x.yaml:1)"),
        ("seed: 1\n---\nseed: 2\n", "x.yaml:2: a second document begins"),
        ("seed: 1\n...\n%YAML 9.9\n", "x.yaml:3: not valid YAML"),
        ("seed: 1\nmax_steps\uff1a3\nlr: 1\n", "Line 2 has a full-width colon or space behind its key: write ': '"),
        ("seed: 1\nmax_steps:\u30003\n", "Line 2 has a full-width colon or space behind its key: write ': '"),
        ("%YAML " + "1" * 5000 + ".1\n---\nseed: 1\n", "x.yaml:1: not valid YAML"),
        ("output_dir: !!binary aGVsbG8=\n", "x.yaml:1: the tag !!binary is not taken here"),
        ("output_dir: !!python/object/apply:os.system [ls]\n", "the tag !!python/object/apply:os.system is not taken"),
        ("output_dir: !!set {a}\n", "the tag !!set is not taken"),
        ("!!omap a: b\n", "the tag !!omap is not taken"),
        ("output_dir: !own x\n", "the tag !own is not taken"),
        ('output_dir: "\\ud800"\n', "x.yaml:1: half of a surrogate pair"),
        ('output_dir: "\\U00110000"\n', "x.yaml:1: not valid YAML"),
        ("seed: 1\na_args:\n\tmax_steps: 1\n", "x.yaml:3: not valid YAML: found character '\\t'"),
        ("seed: 1\na_args:\n\tmax_steps: 1\n", "Indent and separate with spaces, not with tabs"),
        ("seed: 1\nmax_steps:3\nlr: 1\n", "x.yaml:2: not valid YAML: could not find expected ':'. Write `key: value`"),
        ("seed: 1\nrun_name: 'a\nlr: 1\nlogging_dir: b\n", "x.yaml:2: not valid YAML: found unexpected end of stream"),
        ("seed: 1\nrun_name: a: b\n", "a value that has ': ' in it needs quotes"),
        (
            "seed: 1\nrun_name: @a\n",
            "x.yaml:2: not valid YAML: found character '@' that cannot start any token. A value",
        ),
        ("seed: 1\nrun_name: *.txt\n", "A value that begins with * or & needs quotes"),
        ("seed: 1\n\u200bmax_steps: 3\n", "'\\u200bmax_steps': unknown key; did you mean max_steps? (x.yaml:2)"),
        ("seed: 1\n'max_steps ': 3\n", "'max_steps ': unknown key"),
        ("'': 3\n", "'': unknown key (x.yaml:1)"),
        ("seed: 1\nx: \x01\n", "x.yaml:2: not valid YAML: the character #x0001"),
        ("null\n", "expected `key: value` lines, got plain text"),
        ("--- []\n", "expected `key: value` lines, got a list"),
        ("---\n", "x.yaml: the file is empty."),
        (b"\xff\xfes\x00e\x00e\x00d\x00", "x.yaml: not UTF-8 text (line 1)"),
        ("seed: 1\n".encode("utf-16-le"), "x.yaml:1: not valid YAML: the character #x0000"),
        ("seed: 1\noutput_dir: 数据\n".encode("gbk"), "x.yaml: not UTF-8 text (line 2)"),
        ("seed: 1\n" * 200_000, "1,600,000 bytes; such a file has at most"),
    ],
    ids=lambda value: str(value)[:30].encode("unicode_escape").decode(),
)
def test_one_message_with_file_and_line(message, text: str | bytes, expected: str):
    assert expected in message(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"seed": NaN}', "x.json: NaN is not a JSON number"),
        ('{"a_args": {"seed": 1, "seed": 2}}', "the key 'seed' stands twice"),
        ("[" * 100_000, "nested more than 100 levels deep"),
        ('{"seed": ' + "1" * 5000 + "}", "seed: expected an integer"),
        ('{"output_dir": "\\ud800"}', "half of a pair"),
        ('{"seed": 1}{}', "x.json: not JSON"),
        ("null", "expected keys and values at the top, got null"),
    ],
)
def test_json_under_attack(message, text: str, expected: str):
    assert expected in message(text, "x.json")


def test_what_is_no_regular_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"pipe\.yaml: not a regular file"):
        load(str(tmp_path / "pipe.yaml"))
    (tmp_path / "d.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"d\.yaml: a directory"):
        load(str(tmp_path / "d.yaml"))
    with pytest.raises(ConfigError, match="there is no such file"):
        load(str(tmp_path / "none.yaml"))


def test_unusual_yaml_that_is_fine(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "\ufeff%YAML 1.1\n---\n"
        "one_args: &one\n  seed: &number 5\n  batch_size: 2\n"
        "two_args:\n  <<: [{batch_size: 3, save_steps: 7}, *one]\n"
        "? max_steps\n: *number\n'output_dir': !!str 007\nlogging_dir: >-\n  a\n  b\n...\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError, match="batch_size: given twice"):  # the first of several merged mappings wins
        load(str(path), None, "version")
    path.write_text(path.read_text().replace("batch_size: 2", "batch_size: 3"))
    cfg = load(str(path), None, "version")
    assert (cfg.seed, cfg.batch_size, cfg.save_steps, cfg.max_steps) == (5, 3, 7, 5)
    assert (cfg.output_dir, cfg.logging_dir) == ("007", "a b")
