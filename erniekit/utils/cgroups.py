"""The control groups (cgroups) of this process: the limits that a container, a Slurm job or a systemd service sets.

The process's own group has a limit of its own, and so has every group above it. Inside a container the path of the
group may be the host's, which does not exist there; the container's group is then the root of the file system.
"""

import math
from collections.abc import Iterator
from pathlib import Path

_ROOT, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory_limit() -> int | None:
    """The smallest limit of memory in bytes; None where there is none."""
    texts = (_text(group / name) for group in _groups("memory") for name in ("memory.max", "memory.limit_in_bytes"))
    return min((int(text) for text in texts if text.isdecimal()), default=None)  # "max": no limit


def cpu_quota() -> float | None:
    """The smallest quota of processor time, in processors (of which every thread may use any): `docker run --cpus` and
    the CPU limit of a Kubernetes pod set it, and the affinity does not show it. None where there is none.
    """
    quotas = []
    for group in _groups("cpu"):
        words = _text(group / "cpu.max").split()  # version 2
        words = words or [_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]  # version 1
        if len(words) == 2 and all(map(str.isdecimal, words)) and int(words[1]):  # "max" and -1: no limit
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def processors_of(quota: float | None, available: int) -> int:
    """How many of the available processors a quota lets threads use at a time, at least one."""
    return available if quota is None else max(1, min(available, math.ceil(quota)))


def _groups(controller: str) -> Iterator[Path]:
    """The directories of this process's group and of those above it, in both versions."""
    for line in _text(_OWN).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _ROOT / controller if controllers else _ROOT  # version 2 has one hierarchy for all controllers
        own = root / path.strip("/")
        yield from (group for group in (own, *own.parents) if group == root or root in group.parents)


def _text(path: Path) -> str:
    """The content of a file; empty where it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
