"""`erniekit version`."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.source_tree import REPOSITORY

import erniekit
from erniekit.cli import info, launch
from erniekit.cli.commands import COMMANDS
from erniekit.config import reference, schema
from erniekit.config.compat_keys import RULES
from erniekit.utils.errors import ConfigError


def test_version_is_a_box_with_version_and_commit(capsys: pytest.CaptureFixture[str]):
    assert info.version([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "Welcome to ErnieKit" in lines[1]
    assert f"version : {erniekit.__version__} " in lines[2]
    assert "commit  : " in lines[3]


def test_version_takes_no_arguments():
    with pytest.raises(ConfigError, match=r"takes no arguments, but got: x\.yaml"):
        info.version(["x.yaml"])


def test_help_takes_the_name_of_one_command():
    with pytest.raises(ConfigError, match="takes the name of one command or key, but got: train learning_rate"):
        info.help(["train", "learning_rate"])


def test_the_commit_of_an_installed_package_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(info, "__file__", str(tmp_path / "erniekit" / "cli" / "info.py"))
    assert info.commit() == "unknown"


def test_the_commit_of_a_checkout_says_whether_files_were_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def git(*args: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    monkeypatch.setattr(info, "__file__", str(tmp_path / "erniekit" / "cli" / "info.py"))
    git("init", "-q")
    (tmp_path / "a.txt").write_text("one")
    git("add", "a.txt")
    git("commit", "-qm", "one")
    sha = git("rev-parse", "--short=12", "HEAD")
    assert info.commit() == sha
    (tmp_path / "a.txt").write_text("other")
    assert info.commit() == f"{sha}.dirty"


@pytest.mark.parametrize("command", ["train", "eval", "chat", "server", "export", "split"])
def test_help_of_a_command_lists_its_keys_with_their_documentation(command: str):
    text = " ".join(info.usage(command).split())
    names = [entry.name for entries in reference.by_group(command).values() for entry in entries]
    assert names
    for name in names:
        assert f" {name} (" in text and schema.fields()[name].metadata["doc"] in text, name
    assert len(names) == len(set(names))


@pytest.mark.parametrize("command", launch.ON_RANKS)
def test_help_lists_the_degrees_of_a_command_that_runs_on_ranks(command: str):
    text = info.usage(command)
    assert "  tensor_parallel_degree (" in text and "  pipeline_parallel_degree (" in text


def test_help_needs_no_paddle():
    code = "import sys; from erniekit.cli.main import main; main(['help', 'train']); assert 'paddle' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True)


def test_help_knows_the_other_name_of_a_command(capsys: pytest.CaptureFixture[str]):
    assert info.help(["serve"]) == 0
    assert capsys.readouterr().out.startswith("erniekit server: ")


def test_the_first_screen_says_what_this_is_not():
    assert "not Baidu's official ERNIEKit" in info.usage() and "Nothing here has run on a GPU" in info.usage()


def test_help_says_what_a_key_may_be():
    text = " ".join(info.usage("train").split())
    assert "lora_rank (8; at least 1): " in text and "max_steps (-1; at least 1 (or -1)): " in text
    assert "save_strategy (steps; no, steps, epoch): " in text and "eval_steps (not given; at least 1): " in text


def test_help_of_a_command_without_keys_lists_its_options():
    text = info.usage("check")
    assert "command=train: the command that the file is for" in text and "strict=false" in text
    for name, command in COMMANDS.items():
        for line in command.options:
            option = line.partition(":")[0].partition("=")[0]
            assert f"{option}=" in command.syntax, (name, option)


def test_help_of_a_misspelt_command_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no command and no key named 'trian' \(did you mean train\?\)"):
        info.usage("trian")


def test_help_of_a_key_of_another_toolkit_names_ours():
    with pytest.raises(ConfigError, match=r"no key named 'cutoff_len' \(did you mean max_seq_len\?\)"):
        info.usage("cutoff_len")


def test_help_of_another_name_of_a_key_explains_the_key():
    first, rest = info.usage("tokenizer").split("\n", 1)
    assert first == "  tokenizer: another name of tokenizer_name_or_path."
    assert rest == info.usage("tokenizer_name_or_path")


def test_help_of_a_key_says_what_it_means_and_who_reads_it():
    text = " ".join(info.usage("learning_rate").split())
    assert text.startswith("learning_rate (5e-05; at least 0): Highest learning rate. Read by: train.")
    assert text.endswith(
        "Group: The optimizer, the learning-rate schedule, and regularisation. Default with stage RL or VL-RL: 1e-06."
    )
    assert info.usage("beta").split("\n")[-1].endswith("stage: DPO, VL-DPO or KTO.")
    assert "Read by: train, eval, chat, server." in info.usage("max_pixels")
    assert all("Read by: " in info.usage(name) for name in schema.fields().keys() - COMMANDS.keys())


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("logging_first_step", "accepted without effect: metrics.jsonl records loss, norm, rate"),
        ("sep_parallel_size", "a value that asks for it is refused: heads exchanged for tokens"),
        ("use_template", "any value but True is refused: answers are always trained behind the chat template"),
    ],
)
def test_help_of_a_key_of_other_toolkits_says_what_becomes_of_it(name: str, meaning: str):
    """No such key is called unknown, since a file may have it."""
    assert f"{name}: a key of ERNIEKit or PaddleFormers" in info.usage(name)
    assert meaning in " ".join(info.usage(name).split())


def test_help_knows_every_key_that_a_file_may_have():
    assert all(info.usage(name) for name in RULES)
