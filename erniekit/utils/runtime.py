"""Process settings that decide Paddle's speed on a CPU. Importing this module changes nothing: the command and the
functions of api.py call `prepare` before Paddle is imported, and building the model calls `ensure_threads`.

Four defaults of a new process are slow on a CPU, and each is changed here (measured by tools/bench_step.py):
* the CPU wheel links a 2019 MKL that takes a generic path on AMD processors: `MKL_DEBUG_CPU_TYPE` selects its AVX2 path
  (3 times faster products on Zen 5) or its AVX-512 path (5 times);
* Paddle gives its math library one thread: `set_threads` gives it all cores of the process;
* MKL then also divides each vector exponential among the threads, and Paddle's softmax calls one per row: the threads
  synchronise thousands of times for no gain, which is 2 to 150 times slower on a busy machine.
  `MKL_DOMAIN_NUM_THREADS` gives vector functions one thread;
* glibc returns every large block to the kernel when a tensor is freed, so each new one causes page faults that cost
  more than the arithmetic: `mallopt` keeps the blocks (element-wise operations on 16 MB tensors become 3 to 10 times
  faster). The process then holds its peak memory until it ends.
"""

import codecs
import ctypes
import gc
import os
import platform
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from erniekit.utils import cgroups
from erniekit.utils.errors import ConfigError

# The user's setting is read before Paddle is imported, because the import writes OMP_NUM_THREADS=1 into the environment
# if it is unset.
_OMP_NUM_THREADS = os.environ.get("OMP_NUM_THREADS", "")

_threads = 0  # that Paddle's math library was given; 0: not yet

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # glibc malloc.h

# The instruction sets that MKL's AVX-512 kernels use; Zen 4 and later have all of them.
_AVX512 = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}


def mkl_cpu_type(cpuinfo: str) -> str | None:
    """The code path that MKL should take on this processor, from /proc/cpuinfo's text: "7" (AVX-512) or "5" (AVX2) on
    an AMD processor; None elsewhere, since MKL chooses well on Intel and other processors were not measured.
    """
    lines = cpuinfo.splitlines()
    if not any("AuthenticAMD" in line for line in lines if line.startswith("vendor_id")):
        return None
    return "7" if cpu_flags(cpuinfo) >= _AVX512 else "5"


def cpu_flags(cpuinfo: str | None = None) -> set[str]:
    """The instruction sets of this processor, from /proc/cpuinfo's text; none where there is no such file."""
    lines = (_cpuinfo() if cpuinfo is None else cpuinfo).splitlines()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


@lru_cache(maxsize=1)
def has_avx512() -> bool:
    """Whether this processor has AVX-512. On those with AVX2 alone, kernels of Paddle's wheel that were compiled for
    AVX-512 end the process (an illegal instruction), and some of oneDNN's have no vectors.
    """
    return cpu_flags() >= _AVX512


def _cpuinfo() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Make glibc's malloc keep large freed blocks for reuse. Returns False if there is no glibc (macOS, musl)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return all(
        mallopt(option, value) == 1
        for option, value in ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    )


@contextmanager
def importing() -> Iterator[None]:
    """While a command imports its modules, no garbage is collected: the collector would visit all objects again and
    again, which takes a sixth of the time, and modules stay. Later collections leave out what was imported. The process
    must be the command's own.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def environment_variable(name: str) -> str | None:
    """The value of an environment variable that a configuration refers to as ${oc.env:NAME}."""
    return os.environ.get(name)


def require_utf8() -> None:
    """Restart this process in Python's UTF-8 mode if the locale allows only ASCII file names (LC_ALL=C).

    Paths in YAML files and on the command line could otherwise not be opened. Output keeps the terminal's encoding.
    """
    if sys.flags.utf8_mode or codecs.lookup(sys.getfilesystemencoding()).name != "ascii":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", "ascii:replace")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def prepare() -> None:
    """Apply the settings to this process, before Paddle is imported; values that the user has set are kept."""
    # Paddle warns on import if ccache is missing, but nothing is compiled here.
    warnings.filterwarnings("ignore", message="No ccache found", category=UserWarning)
    cpu_type = mkl_cpu_type(_cpuinfo())
    if cpu_type:
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", cpu_type)
    # Otherwise MKL uses fewer threads on a loaded machine and sums in another order, so runs would not repeat exactly.
    os.environ.setdefault("MKL_DYNAMIC", "FALSE")
    os.environ.setdefault("MKL_DOMAIN_NUM_THREADS", "MKL_DOMAIN_VML=1")
    os.environ.setdefault("GLOG_minloglevel", "2")
    # For GPUs: the gradients of the embedding and of attention are otherwise summed by atomic additions, whose order
    # changes from run to run, and for the embedding in 16 bits.
    os.environ.setdefault("FLAGS_embedding_deterministic", "1")
    os.environ.setdefault("FLAGS_cudnn_deterministic", "1")


def python_command(code: str, *args: str) -> tuple[str, ...]:
    """A command that runs `code` (which may use sys) in a new interpreter with this process's search path and this same
    package. By default Python would search the working directory first, so that a json.py there would replace the
    standard library's.
    """
    package = Path(__file__).resolve().parents[1]
    prepare_imports = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('erniekit', {str(package / '__init__.py')!r})\n"
        "sys.modules['erniekit'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(sys.modules['erniekit'])\n"
    )
    return (sys.executable, "-c", prepare_imports + code, *args)


def end_with_parent(parent: int) -> None:
    """Kill this process group when the process `parent`, which started this one, is gone: also while code of the user's
    computes, which may never end.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def job_token_of(addresses: Collection[str]) -> str:
    """The token of a job whose processes listen at these addresses. Raises ConfigError if there is none."""
    from erniekit.utils import job_token  # imported late, since few importers of this module need it

    return job_token.find(os.environ, cache_directory() if len(set(addresses)) == 1 else None)


JUDGE_KEY_VARIABLE = "ERNIEKIT_JUDGE_API_KEY"


def judge_api_key() -> str:
    """The key of the server that judges answers (judge_base_url); "" if there is none. Never log it."""
    return os.environ.get(JUDGE_KEY_VARIABLE, "").strip()


ROLLOUT_KEY_VARIABLE = "ERNIEKIT_ROLLOUT_API_KEY"


def rollout_api_key() -> str:
    """The key of the server that generates completions (rollout_base_url); "" if there is none. Never log it."""
    return os.environ.get(ROLLOUT_KEY_VARIABLE, "").strip()


def cache_directory() -> Path:
    """The user's cache directory (XDG base directory specification, by which a relative path is invalid and
    ignored); for a user without a home directory, as a container may have, one below the directory for temporary files.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named / "erniekit"
    try:
        return Path.home() / ".cache" / "erniekit"
    except RuntimeError:  # HOME is not set, and the user's number has no entry in /etc/passwd
        return Path(tempfile.gettempdir()) / f"erniekit-{os.getuid()}"


def num_cores() -> int:
    """The number of cores that this process may use: its affinity if the system has one, else all cores, or fewer where
    a container limits its processor time. More threads than that would be stopped in turn, each while others wait for
    it.
    """
    try:
        available = len(os.sched_getaffinity(0))
    except AttributeError:
        available = os.cpu_count() or 1
    return cgroups.processors_of(cgroups.cpu_quota(), available)


def set_threads(num_threads: int | None = None) -> int:
    """Give Paddle's CPU math library `num_threads` threads (default: ERNIEKIT_NUM_THREADS, OMP_NUM_THREADS, else all
    cores of this process) and keep freed memory.
    """
    import paddle

    global _threads
    keep_freed_memory()
    _threads = num_threads or wanted_threads()
    paddle.base.core.set_num_threads(_threads)
    return _threads


def ensure_threads() -> None:
    """`set_threads()`, unless it was called before, perhaps with another number."""
    if not _threads:
        set_threads()


def threads_in_use() -> int:
    """The number of threads that `set_threads` has given to Paddle's math library; 0 before."""
    return _threads


def wanted_threads() -> int:
    """The number of threads for computing: ERNIEKIT_NUM_THREADS, OMP_NUM_THREADS, else all cores of this process.
    Raises ConfigError if the first is not a number.
    """
    asked = os.environ.get("ERNIEKIT_NUM_THREADS", "").strip()
    if asked and not asked.isdecimal():
        raise ConfigError(f"ERNIEKIT_NUM_THREADS={asked}: not a number. Give a whole number from 1, or unset it.")
    outer = _OMP_NUM_THREADS.partition(",")[0].strip()  # OpenMP takes a list: the threads of each level of nesting
    return int(asked or 0) or (int(outer) if outer.isdecimal() else 0) or num_cores()


def device_name() -> str:
    """The name of the GPU that Paddle uses, or of the processor with its number of threads, for log lines."""
    import paddle

    device = paddle.get_device()
    if device.startswith("gpu"):
        return f"{paddle.device.cuda.get_device_name()} ({device})"
    lines = (line.partition(":") for line in _cpuinfo().splitlines())
    model = next((value.strip() for name, _, value in lines if name.strip() == "model name"), platform.machine())
    threads = wanted_threads()
    return f"{model or 'CPU'}, {threads} thread{'s' if threads > 1 else ''}"


def local_ranks(world: int) -> int:
    """How many of a job's `world` processes run on this host; all of them where the launcher does not say."""
    text = os.environ.get("PADDLE_LOCAL_SIZE", "")
    return min(int(text), world) if text.isascii() and text.isdigit() and int(text) else world


# Variables in which other launchers give the number of processes; of these, RANK and NODE_RANK may number hosts here.
_OTHER_LAUNCHERS = (
    "NPROC_PER_NODE GPUS_PER_NODE WORLD_SIZE LOCAL_WORLD_SIZE RANK LOCAL_RANK NODE_RANK FORCE_TORCHRUN "
    "ACCELERATE_CONFIG_FILE ACCELERATE_USE_DEEPSPEED ACCELERATE_USE_FSDP DEEPSPEED_CONFIG_FILE"
).split()


def ignored_variables() -> list[str]:
    """The variables of other launchers that are set and have no effect here, as NAME=value."""
    is_read = {"NODE_RANK": _has_several_hosts(os.environ), "RANK": rank_numbers_hosts(os.environ)}
    return [f"{name}={os.environ[name]}" for name in _OTHER_LAUNCHERS if os.environ.get(name) and not is_read.get(name)]


def _has_several_hosts(environ: Mapping[str, str]) -> bool:
    return environ.get("NNODES", "").strip() not in ("", "0", "1")


def rank_numbers_hosts(environ: Mapping[str, str]) -> bool:
    """Whether RANK is the number of a host among NNODES, as for PaddleFormers, and not of a process as for torchrun."""
    by_process = any(environ.get(name, "").strip() for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    return _has_several_hosts(environ) and not by_process
