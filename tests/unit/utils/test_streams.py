"""Standard streams of any encoding, closed ones, and ones that nobody reads."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.source_tree import REPOSITORY

from erniekit.utils import streams
from erniekit.utils.errors import UserError

ERNIEKIT = f"{sys.executable} -m erniekit"


def shell(command: str, **variables: str) -> "subprocess.CompletedProcess[bytes]":
    """A command line of bash in the repository; `{e}` stands for the erniekit command."""
    words = ["bash", "-c", command.replace("{e}", ERNIEKIT)]
    return subprocess.run(
        words, cwd=REPOSITORY, capture_output=True, check=False, timeout=60, env={**os.environ, **variables}
    )


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("{e} help >&-", 0),
        ("{e} help 2>&-", 0),
        ("{e} help <&- >&- 2>&-", 0),
        ("{e} trian 2>&-", 2),
        ("{e} train none.yaml >&- 2>&-", 1),
        ("{e} help train | true; exit ${PIPESTATUS[0]}", 141),
        ("{e} trian 2>&1 | true; exit ${PIPESTATUS[0]}", 2),
        ("{e} help > /dev/full", 1),
        ("{e} trian 2> /dev/full", 2),
    ],
)
def test_a_stream_that_takes_nothing_is_no_defect(command: str, code: int):
    done = shell(command)
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr + done.stdout and b"Exception ignored" not in done.stderr


def test_a_file_does_not_get_the_number_of_a_closed_stream(tmp_path: Path):
    code = (
        "from erniekit.utils import streams; streams.prepare(); import os\n"
        f"file = open({str(tmp_path / 'weights')!r}, 'w'); os.write(1, b'noise'); print('more')\n"
        "assert file.fileno() > 2"
    )
    subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "$CODE" >&- 2>&-'], env={**os.environ, "CODE": code}, check=True
    )
    assert (tmp_path / "weights").read_bytes() == b""


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("variables", [ASCII, {"PYTHONIOENCODING": "gbk"}, {"PYTHONIOENCODING": "ascii"}])
def test_what_a_terminal_cannot_show_is_replaced(tmp_path: Path, variables: dict[str, str]):
    path = tmp_path / "数 据" / "é.yaml"
    path.parent.mkdir()
    path.write_text("output_dir: [数据, é]\nmax_steps: €\n", encoding="utf-8")
    done = shell(f"{{e}} train '{path}' metric_for_best_model=数", **variables)
    assert done.returncode == 1 and b"max_steps: expected an integer, got '" in done.stderr, done.stderr
    assert b"Traceback" not in done.stderr and b"not UTF-8" not in done.stderr
    done.stderr.decode(variables.get("PYTHONIOENCODING", "ascii"))


def test_a_line_that_the_locale_cannot_read_is_utf_8(monkeypatch: pytest.MonkeyPatch):
    for encoding in ("ascii", "utf-8", "gbk"):
        stdin = io.TextIOWrapper(io.BytesIO("1加1？\n".encode() + b"caf\xe9 \xff\n"), encoding=encoding)
        monkeypatch.setattr(sys, "stdin", stdin)
        streams.prepare()
        assert streams.decode(sys.stdin.readline()) == "1加1？\n"
        with pytest.raises(UserError, match=r"standard input is not text in .*Set PYTHONIOENCODING"):
            streams.read_line()
    assert streams.decode("plain\n") == "plain\n"


def test_prepare_leaves_other_kinds_of_streams_alone(monkeypatch: pytest.MonkeyPatch):
    notebook = io.StringIO()
    monkeypatch.setattr(sys, "stdout", notebook)
    streams.prepare()
    assert sys.stdout is notebook
    streams.silence(notebook)
    assert not streams.is_gone(notebook)


def test_input_that_its_encoding_cannot_read_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("你好\n".encode()), encoding="utf-16"))
    with pytest.raises(UserError, match="standard input is not text in utf-16"):
        streams.read_line()


def test_lines_of_input_come_without_their_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("你好\r\n\n\r\nend", newline=""))
    assert [streams.read_line() for _ in range(5)] == ["你好", "", "", "end", None]
