"""The Dockerfile and compose.yaml name files, extras, targets and commands that exist. No image is built here."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from erniekit.cli.commands import ALIASES, COMMANDS

ROOT = Path(__file__).parents[1]
LINES = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8")).splitlines()
INSTRUCTIONS = [line.split(None, 1) for line in LINES if line and not line.startswith("#")]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


def arguments(instruction: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == instruction]


def stages() -> list[str]:
    return [found[1] for text in arguments("FROM") if (found := re.search(r" AS (\w+)$", text))]


def extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return set(re.findall(r"^([\w-]+) = \[", text.split("[project.optional-dependencies]")[1].split("\n[")[0], re.M))


def is_ignored(name: str) -> bool:
    """Whether .dockerignore keeps a file of the root out of the build: its last rule that matches decides."""
    ignored = False
    for rule in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if rule and not rule.startswith("#") and fnmatch(name, rule.removeprefix("!")):
            ignored = not rule.startswith("!")
    return ignored


def test_what_is_copied_exists_and_is_sent_to_the_build():
    copied = [name for text in arguments("COPY") if not text.startswith("--from") for name in text.split()[:-1]]
    assert "erniekit" in copied
    for name in copied:
        assert (ROOT / name).exists() and not is_ignored(name), name
    assert is_ignored(".git") and is_ignored("tests") and is_ignored("board_key")


def test_the_wheel_has_all_that_its_build_reads():
    """pyproject.toml names files; setup.py reads none."""
    named = re.findall(r'(?:readme = |license-files = \[)"([^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert set(named) <= {name for text in arguments("COPY") for name in text.split()} and named


def test_stages_and_extras_exist():
    assert {"cpu", "gpu"} <= set(stages())
    for text in arguments("FROM"):
        base = text.split()[0]
        assert base in stages() or base.startswith("python:"), base
    defaults = [text.removeprefix("EXTRAS=") for text in arguments("ARG") if text.startswith("EXTRAS=")]
    assert len(defaults) == 2
    wanted = {name for text in defaults for name in text.split(",")}
    wanted |= {name for text in arguments("RUN") for name in re.findall(r"\.whl\)\[(\w+),", text)}
    assert {"cpu", "gpu", "serve"} <= wanted <= extras()
    assert arguments("ENTRYPOINT") == ['["erniekit"]']


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_services_have_a_stage_and_a_command_that_exist(name: str):
    service = COMPOSE["services"][name]
    target = service["build"]["target"]
    assert target in stages() and service["image"] == f"erniekit:{target}"
    for argument in service["build"].get("args", {}):
        assert argument in arguments("ARG")
    command = service.get("command", ["help"])[0]
    assert command in {*COMMANDS, *ALIASES}
    assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
    for port in service.get("ports", []):
        host, _, inside = port.split(":")
        assert host == "127.0.0.1" and f"port={inside}" in service["command"]
    if "host=0.0.0.0" in service.get("command", []):
        assert any(word.startswith("api_key_file=/run/secrets/") for word in service["command"])
