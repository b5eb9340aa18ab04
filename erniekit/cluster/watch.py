"""Find the rank that hangs, from the last signs of life of all ranks. Pure functions."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from erniekit.utils.heartbeat import ASKING, TRAINING

# Starting, saving and evaluating take long with good reason, and one rank may wait for another all that time.
PATIENCE = 60
# A rank may compute, or wait, this many times as long as it ever did before.
SLOWER = 3


@dataclass(frozen=True)
class Sign:
    """What a rank showed last; times in seconds before now.

    silent: since its last record. idle: since it last began or ended a wait or a step. longest: the longest it was ever
    idle while training. stopped: the system says that the process is stopped.
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

    def shown(self) -> str:
        """A clause for a message: what the rank has been doing, where, and for how long."""
        doing = f"been waiting in {self.waiting}" if self.waiting else "been"
        return f"rank {self.rank} has {doing} at {self.at or 'an unknown place'} for {self.idle:.0f} s"


def diagnose(signs: Iterable[Sign], limit: float) -> tuple[int, str] | None:
    """The rank that holds up the others and why we think so; None as long as all is well.

    limit: seconds. A rank hangs if
    * no record has come from it for longer than that: it is stopped, or its interpreter is;
    * it neither waits nor moves for longer than that, while another waits for longer than that, or while nobody moves;
    * all ranks wait for longer than that: each for another.
    """
    signs = list(signs)
    for sign in signs:
        if sign.silent > (limit if sign.phase == TRAINING or sign.stopped else limit * PATIENCE):
            why = "it is stopped (SIGSTOP, or a debugger)" if sign.stopped else f"it was at {sign.at}"
            return sign.rank, f"it has shown no sign of life for {sign.silent:.0f} s; {why}"
    late = [sign for sign in signs if sign.idle > _allowed(sign, limit)]
    return _holding_up(late, nobody_moves=len(late) == len(signs)) if late else None


def _holding_up(late: list[Sign], nobody_moves: bool) -> tuple[int, str] | None:
    """Who of those that have not moved for too long is to blame."""
    busy = [sign for sign in late if not sign.waiting]
    waiting = [sign for sign in late if sign.waiting]
    if busy and (waiting or nobody_moves):
        first = max(busy, key=lambda sign: sign.idle)
        others = f", while {waiting[0].shown()}" if waiting else ", and no rank moves"
        return first.rank, f"it does not finish its computation: {first.shown()}{others}"
    if nobody_moves:
        first = max(late, key=lambda sign: (-sign.step, sign.idle))
        return first.rank, "all ranks wait for one another: " + ", ".join(sign.shown() for sign in late[:8])
    return None


def _allowed(sign: Sign, limit: float) -> float:
    if sign.phase == ASKING:
        return math.inf
    return max(limit, SLOWER * sign.longest) if sign.phase == TRAINING else limit * PATIENCE
