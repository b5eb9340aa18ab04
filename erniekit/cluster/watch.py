"""Finds the rank that hangs from the last signs of life of all ranks. These are pure functions."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from erniekit.utils.heartbeat import ASKING, TRAINING

# Starting, saving and evaluating may take long, and other ranks may wait all that time, without a fault.
PATIENCE = 60
# A rank may compute or wait for up to this multiple of its longest time so far.
SLOWER = 3


@dataclass(frozen=True)
class Sign:
    """The last sign of life of a rank, with times in seconds.

    silent: time since its last record. idle: time since it last began or ended a wait or a step. longest: its longest
    idle time so far while training. stopped: whether the process is stopped (SIGSTOP), according to the system.
    """

    rank: int
    step: int
    phase: str
    waiting: str | None
    silent: float
    idle: float
    longest: float
    at: str = ""
    stopped: bool = False

    def describe(self) -> str:
        """A clause for messages: what the rank has been doing, where, and for how long."""
        doing = f"been waiting in {self.waiting}" if self.waiting else "been"
        return f"rank {self.rank} has {doing} at {self.at or 'an unknown place'} for {self.idle:.0f} s"


def diagnose(signs: Iterable[Sign], limit: float) -> tuple[int, str] | None:
    """The rank that blocks the others, with the reason; None while no rank hangs.

    limit: seconds. A rank hangs if
    * it has sent no record for longer than the limit: the process or its interpreter is stopped;
    * it has neither waited nor progressed for longer than the limit, while another rank has waited that long or no rank
      makes progress;
    * all ranks have been waiting for one another for longer than the limit.
    """
    signs = list(signs)
    for sign in signs:
        if sign.silent > (limit if sign.phase == TRAINING or sign.stopped else limit * PATIENCE):
            reason = "it is stopped (SIGSTOP, or a debugger)" if sign.stopped else f"it was at {sign.at}"
            return sign.rank, f"it has shown no sign of life for {sign.silent:.0f} s; {reason}"
    late = [sign for sign in signs if sign.idle > _allowed(sign, limit)]
    return _holding_up(late, nobody_moves=len(late) == len(signs)) if late else None


def _holding_up(late: list[Sign], nobody_moves: bool) -> tuple[int, str] | None:
    """The rank that blocks the others, among those without progress for too long."""
    busy = [sign for sign in late if not sign.waiting]
    waiting = [sign for sign in late if sign.waiting]
    if busy and (waiting or nobody_moves):
        first = max(busy, key=lambda sign: sign.idle)
        context = f", while {waiting[0].describe()}" if waiting else ", and no rank moves"
        return first.rank, f"it does not finish its computation: {first.describe()}{context}"
    if nobody_moves:
        first = max(late, key=lambda sign: (-sign.step, sign.idle))
        return first.rank, "all ranks wait for one another: " + ", ".join(sign.describe() for sign in late[:8])
    return None


def _allowed(sign: Sign, limit: float) -> float:
    if sign.phase == ASKING:
        return math.inf
    return max(limit, SLOWER * sign.longest) if sign.phase == TRAINING else limit * PATIENCE
