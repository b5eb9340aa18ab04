"""The root package: light to import, with the public names on first use."""

import importlib
import subprocess
import sys
import types

import pytest
from support.source_tree import REPOSITORY

import erniekit
from erniekit.utils.errors import ConfigError


def test_the_public_names():
    assert {"load_model", "save_model", "train", "__version__"} <= set(dir(erniekit))
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = erniekit.no_such_name


def test_train_is_a_function_and_a_package_in_any_order(monkeypatch: pytest.MonkeyPatch):
    calls = []
    api = types.ModuleType("erniekit.api")
    api.train = lambda path, **overrides: calls.append((path, overrides))
    monkeypatch.setitem(sys.modules, "erniekit.api", api)
    monkeypatch.setattr(erniekit, "api", api, raising=False)
    erniekit.train("x.yaml", max_steps=3)
    schedule = importlib.import_module("erniekit.training.lr_scheduler")
    erniekit.train("y.yaml")
    assert calls == [("x.yaml", {"max_steps": 3}), ("y.yaml", {})]
    assert erniekit.training.lr_scheduler is schedule


def test_train_refuses_what_the_command_line_refuses(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        erniekit.train(str(tmp_path / "x.yaml"))


def test_importing_the_package_is_light():
    heavy = "{'paddle', 'numpy', 'yaml', 'rich'}"
    code = f"import sys, erniekit; print(len(sys.modules), sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    count, loaded = done.stdout.split(maxsplit=1)
    assert loaded.strip() == "[]"
    assert int(count) < 120
