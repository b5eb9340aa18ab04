"""What every test runs under: no network, no display, the same examples each time."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

from erniekit.utils import runtime

runtime.prepare()  # before any test imports paddle
# Else each process that a test starts would compile the whole package.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# The threads of several test processes share the cores: they sleep when they wait, which changes no bit.
os.environ.setdefault("KMP_BLOCKTIME", "0")
# What runs keep for later ones must not come from an earlier test run, nor go to the user's own cache.
_CACHE = tempfile.TemporaryDirectory(prefix="erniekit-tests-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
for name in ("NNODES", "PADDLE_TRAINERS_NUM", "ALLOW_EXTRA_ARGS"):
    os.environ.pop(name, None)

try:
    from hypothesis import settings
except ImportError:  # the tests that need it say so themselves
    pass
else:
    settings.register_profile("erniekit", deadline=None, derandomize=True, database=None)
    settings.load_profile("erniekit")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the cases of slow_cases.txt."""
    lines = Path(__file__).with_name("slow_cases.txt").read_text(encoding="utf-8").splitlines()
    entries = [line for line in lines if line and not line.startswith("#")]
    matched = set()
    of_tests: dict[str, list[str]] = {}
    for entry in entries:
        of_tests.setdefault(entry.partition("[")[0], []).append(entry)
    for item in items:
        name = item.nodeid
        for entry in of_tests.get(name.partition("[")[0], ()):
            if name.startswith(entry):
                item.add_marker(pytest.mark.slow)
                matched.add(entry)
    if config.args == ["tests"] and (unknown := [entry for entry in entries if entry not in matched]):
        raise pytest.UsageError("tests/slow_cases.txt has lines that match no test:\n" + "\n".join(unknown))
