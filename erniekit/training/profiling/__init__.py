"""`profile: true`: where the time of training steps goes. Without it, no hook exists and nothing is measured."""

from typing import TYPE_CHECKING

from erniekit.training.build import Run

if TYPE_CHECKING:
    from erniekit.training.profiling.profiler import Profiler


def make_profiler(run: Run) -> "Profiler":
    """The profiler of a run whose configuration asks for one."""
    from erniekit.training.profiling.profiler import Profiler  # imported late, since few runs need it

    return Profiler(run)
