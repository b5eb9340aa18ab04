"""The CPU path that MKL is told to take."""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from erniekit.utils import runtime
from erniekit.utils.errors import ConfigError
from erniekit.utils.runtime import mkl_cpu_type

ZEN2 = "flags\t\t: fpu sse4_2 fma avx2"
ZEN5 = "flags\t\t: fpu sse4_2 fma avx2 avx512f avx512dq avx512ifma avx512cd avx512bw avx512vl avx512_bf16"
AMD, INTEL = "vendor_id\t: AuthenticAMD\n", "vendor_id\t: GenuineIntel\n"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (AMD + ZEN2, "5"),
        (AMD + ZEN5, "7"),
        (AMD + ZEN5.replace("avx512vl", ""), "5"),  # half an AVX-512 would stop with an illegal instruction
        (AMD, "5"),
        (INTEL + ZEN5, None),
        ("", None),
    ],
)
def test_only_amd_is_told_and_avx512_only_where_it_is_whole(cpuinfo: str, expected: str | None):
    assert mkl_cpu_type(cpuinfo) == expected


PREPARE = "import os; from erniekit.utils import runtime; runtime.prepare(); "


def test_a_value_that_the_user_set_stays():
    code = PREPARE + "print(os.environ['MKL_DEBUG_CPU_TYPE'])"
    environment = os.environ | {"MKL_DEBUG_CPU_TYPE": "4"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "4"


def test_gradients_on_a_gpu_are_summed_in_one_order_unless_the_user_says_otherwise():
    code = PREPARE + "print(*(os.environ[f'FLAGS_{n}_deterministic'] for n in ('embedding', 'cudnn')))"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FLAGS_")}
    for given, expected in (({}, "1 1"), ({"FLAGS_cudnn_deterministic": "0"}, "1 0")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment | given
        )
        assert done.stdout.strip() == expected


def test_variables_of_other_launchers_are_named(monkeypatch: pytest.MonkeyPatch):
    for name in ("NPROC_PER_NODE", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    before = runtime.ignored_variables()
    monkeypatch.setenv("NPROC_PER_NODE", "8")
    assert runtime.ignored_variables() == ["NPROC_PER_NODE=8", *before]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("NODE_RANK", "1")
    assert {"RANK=1", "NODE_RANK=1"} < set(runtime.ignored_variables())
    monkeypatch.setenv("NNODES", "2")
    assert runtime.ignored_variables() == ["NPROC_PER_NODE=8", *before]  # both are the host's number


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({"ERNIEKIT_NUM_THREADS": "3", "OMP_NUM_THREADS": "2"}, "3"), ({"OMP_NUM_THREADS": "1,4"}, "1")],
)
def test_the_number_of_threads_is_that_of_the_environment(variables: dict[str, str], expected: str):
    code = "from erniekit.utils import runtime; print(runtime.wanted_threads())"
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment | variables
    )
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("text", ["two", "1.5", "-1", "\u00b2"])
def test_a_number_of_threads_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.setenv("ERNIEKIT_NUM_THREADS", text)
    with pytest.raises(ConfigError, match=f"ERNIEKIT_NUM_THREADS={re.escape(text)}: not a number"):
        runtime.wanted_threads()


def test_the_device_has_a_name():
    assert re.fullmatch(r".+, \d+ threads?|.+ \(gpu:\d+\)", runtime.device_name())


def test_cache_of_a_user_without_a_home_directory(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(runtime.Path, "home", no_home)
    assert runtime.cache_directory().parent == Path(tempfile.gettempdir())


def test_a_process_that_runs_the_users_code_ends_with_the_one_that_started_it():
    worker = runtime.python_command(
        "import os; from erniekit.utils import runtime; runtime.end_with_parent(int(sys.argv[1]))\nwhile True: pass"
    )
    starter = (
        "import os, subprocess, sys\n"
        "print(subprocess.Popen([*sys.argv[1:], str(os.getpid())], start_new_session=True).pid)"
    )
    started = subprocess.run([sys.executable, "-c", starter, *worker], stdout=subprocess.PIPE, text=True, check=True)
    child = Path(f"/proc/{started.stdout.strip()}")
    deadline = time.monotonic() + 20
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(process: Path) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
