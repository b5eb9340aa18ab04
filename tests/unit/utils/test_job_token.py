"""Where a job's token comes from."""

import re
import subprocess
from pathlib import Path

import pytest

from erniekit.utils import job_token
from erniekit.utils.errors import ConfigError

LONG = "0123456789abcdef" * 2


def test_the_variable_comes_before_the_file(tmp_path: Path):
    file = tmp_path / "token"
    file.write_text(f"{LONG[::-1]}\n")
    file.chmod(0o600)
    assert job_token.find({"ERNIEKIT_JOB_TOKEN_FILE": str(file)}, None) == LONG[::-1]
    assert job_token.find({"ERNIEKIT_JOB_TOKEN_FILE": str(file), "ERNIEKIT_JOB_TOKEN": LONG}, None) == LONG


def test_without_one_the_message_makes_one(tmp_path: Path):
    with pytest.raises(ConfigError, match="ERNIEKIT_JOB_TOKEN is not set") as caught:
        job_token.find({}, None)
    make, export = re.findall(r"^  (.*)$", str(caught.value), re.MULTILINE)
    script = f"{make}\n{export}\necho $ERNIEKIT_JOB_TOKEN_FILE"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    assert path.stat().st_mode & 0o077 == 0
    assert re.fullmatch("[0-9a-f]{64}", job_token.find({"ERNIEKIT_JOB_TOKEN_FILE": str(path)}, None))


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"ERNIEKIT_JOB_TOKEN": "short"}, "5 characters can be guessed"),
        ({"ERNIEKIT_JOB_TOKEN_FILE": "no-such-file"}, "no-such-file: no such file"),
        ({"ERNIEKIT_JOB_TOKEN_FILE": "/"}, "not a regular file|directory"),
    ],
)
def test_what_is_no_token_is_refused(environ, said):
    with pytest.raises(ConfigError, match=said):
        job_token.find(environ, None)


def test_a_file_that_all_can_read_is_named(tmp_path: Path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(job_token.log, "warning", said.append)
    file = tmp_path / "token"
    file.write_text(LONG)
    file.chmod(0o644)
    job_token.find({"ERNIEKIT_JOB_TOKEN_FILE": str(file)}, None)
    assert len(said) == 1 and "chmod 600" in said[0]


def test_on_one_machine_the_user_has_one(tmp_path: Path):
    first = job_token.find({}, tmp_path / "cache")
    assert len(first) == 64 and job_token.find({}, tmp_path / "cache") == first
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="others may have read it"):
        job_token.find({}, tmp_path / "cache")


def test_where_none_can_be_kept_the_variable_is_asked_for(tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match="export ERNIEKIT_JOB_TOKEN="):
        job_token.find({}, tmp_path / "cache")
