"""The memory of this machine."""

import os

from erniekit.utils.cgroups import memory_limit


def host_memory() -> int:
    """Bytes of memory that processes may use here: the machine's, or less where a container or a job limits it."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = memory_limit()
    return total if limit is None else min(total, limit)
