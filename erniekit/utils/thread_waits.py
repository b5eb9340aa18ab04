"""How the threads that compute wait for one another on a CPU: spinning while the cores are theirs alone, asleep while
other programs use them too. No result depends on it.

Paddle, MKL and oneDNN share Intel's OpenMP runtime. Its threads spin for 200 ms before they sleep, because waking one
takes longer than most parallel parts of a step. Beside another program they take the core from the thread that they
wait for: a training run at a load of 14 is 1.7 times as fast if they sleep at once (docs/speed.md).
"""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

from erniekit.utils import log, runtime

_SPIN_MS, _SLEEP_MS = 200, 0  # the runtime's default, and none at all
_WINDOW = 0.25  # seconds at least between two decisions
# Shares of the time that this thread waited for a core: surely beside another program, perhaps, and without one. The
# run's own workers, which read data, take up to a quarter of a window now and then.
_SURE, _BUSY, _QUIET = 0.3, 0.1, 0.05
_BUSY_WINDOWS, _QUIET_WINDOWS = 2, 4  # one after another until threads sleep, and until they spin again
_SETTINGS = ("KMP_BLOCKTIME", "OMP_WAIT_POLICY")
_SCHEDULER = Path("/proc/thread-self/schedstat")  # nanoseconds on a core, nanoseconds of waiting for one, turns


def waited_for_core() -> float | None:
    """The seconds for which this thread was ready to run and had no core; None if the system does not count them."""
    try:
        return int(_SCHEDULER.read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


def blocktime_setter() -> Callable[[int], None] | None:
    """The function that says for how many ms the threads of the calling thread spin; None if Paddle has other threads,
    or computes on a GPU.
    """
    import paddle

    if paddle.get_device() != "cpu":
        return None
    for file in sorted((Path(paddle.__file__).parent / "libs").glob("libiomp5.so*")):
        try:
            setter = ctypes.CDLL(str(file)).kmp_set_blocktime
        except (OSError, AttributeError):
            continue
        setter.argtypes, setter.restype = [ctypes.c_int], None
        return setter
    return None


class ThreadWaits:
    """Chooses, from step to step, whether the threads of the thread that calls it spin or sleep. A user who has set
    KMP_BLOCKTIME or OMP_WAIT_POLICY has chosen, and with one thread there is nothing to choose.
    """

    def __init__(
        self, waited: Callable[[], float | None] = waited_for_core, set_blocktime: Callable[[int], None] | None = None
    ) -> None:
        is_chosen = runtime.wanted_threads() == 1 or any(runtime.environment_variable(name) for name in _SETTINGS)
        if set_blocktime is None and not is_chosen:
            set_blocktime = blocktime_setter()
        self._waited, self._set = waited, set_blocktime
        self._busy_windows, self._quiet_windows, self._was_said = 0, 0, False
        self._begin, self._before = time.perf_counter(), waited()
        self.sleep = False

    def after_step(self, now: float | None = None) -> None:
        """Look at what has passed since the last decision, and decide. `now`: seconds of the clock; None: as it is."""
        now = time.perf_counter() if now is None else now
        if self._set is None or self._before is None or now - self._begin < _WINDOW:
            return
        waited = self._waited()
        if waited is None:
            return
        share = (waited - self._before) / (now - self._begin)
        self._begin, self._before = now, waited
        self._busy_windows = self._busy_windows + 1 if share > _BUSY else 0
        self._quiet_windows = self._quiet_windows + 1 if share < _QUIET else 0
        if not self.sleep and (share > _SURE or self._busy_windows >= _BUSY_WINDOWS):
            self._change(True)
            if not self._was_said:
                log.info(
                    f"other processes use this machine's cores ({share:.0%} of the time a thread waited for one): "
                    "threads sleep while they wait for one another, until the cores are free again"
                )
                self._was_said = True
        elif self.sleep and self._quiet_windows >= _QUIET_WINDOWS:
            self._change(False)

    def _change(self, sleep: bool) -> None:
        assert self._set is not None
        self._set(_SLEEP_MS if sleep else _SPIN_MS)
        self.sleep = sleep
