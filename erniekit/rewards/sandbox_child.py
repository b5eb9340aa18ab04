"""Runs one program with limits; a process of its own, started by rewards/sandbox.py with only the standard library.

argv: the settings as JSON. It leaves the network, the other processes and, as root, its user, sets the limits, and
becomes the program. Exit code 125: the limits could not be set, for the reason on standard error; a program that ends
with this code has 1.
"""

import ctypes
import json
import math
import os
import resource
import signal
import sys
from typing import Any

_NEW_USER, _NEW_IPC, _NEW_PID, _NEW_NET = 0x10000000, 0x08000000, 0x20000000, 0x40000000  # linux/sched.h
_PARENT_DEATH_SIGNAL, _NO_NEW_PRIVILEGES = 1, 38  # linux/prctl.h
_NOBODY = 65534
CANNOT_RUN = 125


def main() -> None:
    """Run the program of the settings: `command`, `seconds`, `memory`, `isolate` (whether namespaces are needed),
    `drop` (whether root becomes another user).
    """
    settings = json.loads(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    if settings["isolate"]:
        flags = _NEW_IPC | _NEW_PID | _NEW_NET | (0 if os.geteuid() == 0 else _NEW_USER)
        if libc.unshare(flags):
            _refuse(f"no namespaces: {os.strerror(ctypes.get_errno())}")
    begun, beginning = os.pipe()  # the system closes it when the program begins
    child = os.fork()  # the first process of the new process namespace; all others end with it
    if child:
        os.close(beginning)
        has_begun = not os.read(begun, 1)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        code = 1 if has_begun and code == CANNOT_RUN else code
        os._exit(code if code >= 0 else 128 - code)
    try:
        _become_program(settings, libc)
    except (OSError, ValueError):  # ValueError: a limit beyond that of this process
        os.write(beginning, b"!")
        raise


def _become_program(settings: dict[str, Any], libc: ctypes.CDLL) -> None:
    if settings["drop"]:
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)  # again: a change of user cancels it
    limits = {
        resource.RLIMIT_CPU: max(math.ceil(settings["seconds"]), 1),
        resource.RLIMIT_AS: settings["memory"],
        resource.RLIMIT_FSIZE: 16 << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 64,
        resource.RLIMIT_CORE: 0,
    }
    for name, limit in limits.items():
        resource.setrlimit(name, (limit, limit))
    os.execve(settings["command"][0], settings["command"], {})


def _refuse(why: str) -> None:
    print(why, file=sys.stderr)
    os._exit(CANNOT_RUN)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        _refuse(str(error))
