"""CPU settings that decide Paddle's speed there. Importing a module sets nothing: the command and the functions of
api.py call `prepare`, before Paddle is imported, and the model's build calls `ensure_threads`.

Four defaults of a fresh process are slow on a CPU, and each has a one-line cure (measured by tools/bench_step.py):
* the CPU wheel links a 2019 MKL that takes a generic path on AMD processors: `MKL_DEBUG_CPU_TYPE` selects its AVX2 path
  (3 times faster products on Zen 5) or its AVX-512 path (5 times);
* Paddle gives its math library one thread: `set_num_threads` gives it the cores;
* the threads then also share each exponential, and Paddle's softmax asks for one a row: two threads meet thousands of
  times for nothing, 2 to 150 times slower on a busy machine. `MKL_DOMAIN_NUM_THREADS` leaves vector functions to one;
* glibc returns every large block to the kernel when a tensor dies, so each new tensor pays page faults that cost more
  than the arithmetic: `mallopt` keeps the blocks (element-wise operations on 16 MB tensors become 3 to 10 times
  faster). The process then holds its peak memory until it ends.
"""

import codecs
import ctypes
import os
import platform
import sys
import warnings
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path

# The user's own wish, read before paddle is imported: the import itself writes OMP_NUM_THREADS=1 into the environment
# when it is unset.
_ASKED_THREADS = os.environ.get("ERNIEKIT_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or ""

_threads_are_set = False

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # glibc malloc.h

# What MKL's AVX-512 kernels use; Zen 4 and later have all of it.
_AVX512 = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}


def mkl_cpu_type(cpuinfo: str) -> str | None:
    """The code path that MKL should take on this processor, from /proc/cpuinfo's text: "7" (AVX-512) or "5" (AVX2) on
    an AMD processor, None elsewhere: MKL chooses well for Intel, and nobody has measured others.
    """
    lines = cpuinfo.splitlines()
    if not any("AuthenticAMD" in line for line in lines if line.startswith("vendor_id")):
        return None
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return "7" if flags >= _AVX512 else "5"


def _cpuinfo() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


@lru_cache(maxsize=1)
def _keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep large freed blocks for reuse. False where there is no glibc (macOS, musl)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return all(
        mallopt(option, value) == 1
        for option, value in ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    )


def environment_variable(name: str) -> str | None:
    """The value of an environment variable that a configuration refers to as ${oc.env:NAME}."""
    return os.environ.get(name)


def require_utf8() -> None:
    """Start this process again in Python's UTF-8 mode if the locale can name ASCII files only (LC_ALL=C).

    Text of YAML files and of the command line could otherwise not be opened as a path. What is printed keeps the
    terminal's encoding.
    """
    if sys.flags.utf8_mode or codecs.lookup(sys.getfilesystemencoding()).name != "ascii":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", "ascii:replace")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def prepare() -> None:
    """Set the process up. Call before paddle is imported; a value the user set is kept."""
    # Paddle warns on import where ccache is missing; nothing is compiled here.
    warnings.filterwarnings("ignore", message="No ccache found", category=UserWarning)
    cpu_type = mkl_cpu_type(_cpuinfo())
    if cpu_type:
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", cpu_type)
    # By itself MKL takes fewer threads on a loaded machine and sums in another order: runs would differ by a bit.
    os.environ.setdefault("MKL_DYNAMIC", "FALSE")
    os.environ.setdefault("MKL_DOMAIN_NUM_THREADS", "MKL_DOMAIN_VML=1")
    os.environ.setdefault("GLOG_minloglevel", "2")
    # GPUs only: the gradients of the embedding and of attention are otherwise summed by atomic additions, in another
    # order each time and, for the embedding, in 16 bits.
    os.environ.setdefault("FLAGS_embedding_deterministic", "1")
    os.environ.setdefault("FLAGS_cudnn_deterministic", "1")


def python_command(code: str, *args: str) -> tuple[str, ...]:
    """A command that runs `code` (which may use sys) in a new interpreter, with this process's search path and this
    very package. Python itself would put the working directory first, and a json.py there in the place of the
    library's.
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


def job_token_of(addresses: Collection[str]) -> str:
    """The token of a job whose processes listen at these addresses. Raises ConfigError if there is none."""
    from erniekit.utils import job_token  # not for everybody who imports the package

    return job_token.find(os.environ, cache_directory() if len(set(addresses)) == 1 else None)


def cache_directory() -> Path:
    """Where this user's programs keep what can be made again (XDG base directory specification, by which a relative
    path is not valid and is ignored).
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "erniekit"


def num_cores() -> int:
    """Cores this process may run on (affinity where the system has it, else the machine's total)."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def set_threads(num_threads: int | None = None) -> int:
    """Give Paddle's CPU math library `num_threads` threads (default: ERNIEKIT_NUM_THREADS, OMP_NUM_THREADS, else all
    cores of this process) and keep freed memory.
    """
    import paddle

    global _threads_are_set
    _keep_freed_memory()
    threads = num_threads or _wanted_threads()
    paddle.base.core.set_num_threads(threads)
    _threads_are_set = True
    return threads


def ensure_threads() -> None:
    """`set_threads()`, unless it was called before, perhaps with another number."""
    if not _threads_are_set:
        set_threads()


def _wanted_threads() -> int:
    return (int(_ASKED_THREADS) if _ASKED_THREADS.isdigit() else 0) or num_cores()


def device_name() -> str:
    """The GPU that Paddle uses, or the processor with its threads, for people."""
    import paddle

    device = paddle.get_device()
    if device.startswith("gpu"):
        return f"{paddle.device.cuda.get_device_name()} ({device})"
    lines = (line.partition(":") for line in _cpuinfo().splitlines())
    model = next((value.strip() for name, _, value in lines if name.strip() == "model name"), platform.machine())
    threads = _wanted_threads()
    return f"{model or 'CPU'}, {threads} thread{'s' if threads > 1 else ''}"


# Variables with which other launchers say how many processes there are, and that nothing here reads.
_OTHER_LAUNCHERS = (
    "NPROC_PER_NODE GPUS_PER_NODE WORLD_SIZE LOCAL_WORLD_SIZE RANK LOCAL_RANK NODE_RANK FORCE_TORCHRUN "
    "ACCELERATE_CONFIG_FILE ACCELERATE_USE_DEEPSPEED ACCELERATE_USE_FSDP DEEPSPEED_CONFIG_FILE"
).split()


def ignored_variables() -> list[str]:
    """NAME=value of the environment variables of other launchers that are set and do nothing here."""
    names = [name for name in _OTHER_LAUNCHERS if name != "RANK" or not rank_numbers_hosts(os.environ)]
    return [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]


def rank_numbers_hosts(environ: Mapping[str, str]) -> bool:
    """Whether RANK is the number of a host among NNODES, as for PaddleFormers, and not torchrun's of a process."""
    by_process = any(environ.get(name, "").strip() for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    return environ.get("NNODES", "").strip() not in ("", "0", "1") and not by_process
