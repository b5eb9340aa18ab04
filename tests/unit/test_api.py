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


def test_train_logs_the_notes_that_the_command_logs(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    from erniekit.cli import main
    from erniekit.training import run

    keys = {"model_name_or_path": "examples/models/tiny-dense", "train_dataset_path": "x.jsonl", "do_predict": True}
    keys |= {"train_dataset_type": "erniekit", "output_dir": str(tmp_path), "continue_training": False, "lora_rank": 4}
    (tmp_path / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in keys.items()))
    monkeypatch.setattr(run, "train", lambda cfg: types.SimpleNamespace(summary={}))
    monkeypatch.setattr("erniekit.utils.stop_signals.listen", lambda *_: None)
    erniekit.train(str(tmp_path / "run.yaml"))
    said = capsys.readouterr().err
    assert "lora_rank: no effect" in said
    assert main.main(["train", str(tmp_path / "run.yaml")]) == 0
    assert capsys.readouterr().err == said


IMPORT_ALL = """
import importlib, os, pkgutil, signal, sys, threading, warnings
import numpy, paddle

def state():
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return dict(os.environ), handlers, blocked, threading.active_count(), sys.path[:]

thread_counts = []
paddle.base.core.set_num_threads = thread_counts.append
before = state()
filters = [str(entry) for entry in warnings.filters]
import erniekit
from erniekit.utils.errors import UserError
for module in pkgutil.walk_packages(erniekit.__path__, "erniekit."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except UserError:  # it needs a package of an extra that is not installed here
        assert module.name == "erniekit.data.vision.video_file"
from erniekit.utils import runtime
assert state() == before, "environment, signal handlers, threads or search path"
assert not thread_counts and not runtime.keep_freed_memory.cache_info().misses, "thread counts or malloc"
assert not any("ccache" in str(entry) for entry in warnings.filters if str(entry) not in filters)
print(sum(name.startswith("erniekit") for name in sys.modules))
"""


def test_importing_every_module_changes_no_process_state():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 150


def test_a_public_name_and_a_built_model_set_the_process_up():
    code = (
        "import os, sys; os.environ.pop('MKL_DYNAMIC', None)\n"
        "from erniekit import load_model\n"
        "assert os.environ['MKL_DYNAMIC'] == 'FALSE'\n"
        "from erniekit.build import ModelOptions, prepare_model\n"
        "from erniekit.precision import policy\n"
        "import paddle\n"
        "counts = []; paddle.base.core.set_num_threads = counts.append\n"
        "options = ModelOptions(precision=policy.choose('fp32', 'cpu'), random_start=True)\n"
        "for _ in range(2):\n"
        "    prepare_model('examples/models/tiny-dense', options).build()\n"
        "print(len(counts))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stdout.strip().splitlines()[-1:]) == (0, ["1"]), done.stderr


def test_a_number_of_threads_that_was_chosen_stays(monkeypatch):
    import paddle

    from erniekit.utils import runtime

    counts = []
    monkeypatch.setattr(paddle.base.core, "set_num_threads", counts.append)
    monkeypatch.setattr(runtime, "_threads", 0)
    runtime.set_threads(3)
    runtime.ensure_threads()
    assert counts == [3]
