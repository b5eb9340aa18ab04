"""How this process reaches the other ranks: over TCP on CPUs (parallel/tcp_transport.py), over NCCL through
`paddle.distributed` on GPUs, which has never been run here. Each process has one backend, which `init` sets up.
"""

import atexit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import paddle
import paddle.distributed as dist

from erniekit.parallel import tcp_transport
from erniekit.parallel.process_group import Group, Ranks, World
from erniekit.parallel.tcp_transport import Links
from erniekit.utils import runtime

# Receives a description when this rank starts to wait for others, and None when it stops (a heartbeat's hook).
OnWait = Callable[[str | None], None]


@dataclass
class _Backend:
    """The connections of this process. `links` are None over NCCL, `channels` (sender, receiver) are empty over TCP."""

    world: World
    links: Links | None = None
    groups: dict[tuple[str, Ranks], Group] = field(default_factory=dict)
    channels: dict[tuple[int, int], Any] = field(default_factory=dict)
    on_wait: OnWait | None = None


_backend = _Backend(World(0, 1, ("localhost:0",)))


def init(timeout_seconds: float = 600, on_wait: OnWait | None = None) -> World:
    """Join the processes that a launcher started (PADDLE_TRAINER_ID, PADDLE_TRAINERS_NUM, PADDLE_TRAINER_ENDPOINTS).
    Without a launcher this process is the whole world. A second call replaces `on_wait` and does nothing else.

    Args:
        timeout_seconds: how long to wait until all ranks have joined.
        on_wait: is called with a description whenever this rank starts to wait for others, and with None when it stops.

    Raises:
        TrainError: ranks did not join in time (the message names them), or a port is taken.
        ConfigError: several hosts have no job token.
    """
    _backend.on_wait = on_wait
    env = dist.ParallelEnv()
    if env.world_size < 2 or _backend.world.size > 1:
        return _backend.world
    joined = World(env.rank, env.world_size, tuple(env.trainer_endpoints))
    token = runtime.job_token_of([endpoint.rpartition(":")[0] for endpoint in joined.endpoints])
    if paddle.get_device().startswith("gpu"):
        tcp_transport.wait_for_ranks(joined, token, timeout_seconds)
        dist.init_parallel_env()
    else:
        _backend.links = tcp_transport.connect(joined, token, timeout_seconds)
        atexit.register(_backend.links.close)
    _backend.world = joined
    return joined


def world() -> World:
    """The rank of this process and the number of all ranks."""
    return _backend.world


def groups(rank_lists: Sequence[Ranks], role: str = "") -> dict[Ranks, Group]:
    """Create the groups that do not exist yet; returns those that this rank is in. All ranks call it with the same
    lists in the same order (NCCL needs that).

    Over NCCL, groups of the same ranks but another `role` have communicators of their own: an operation on one of them
    neither waits for the other nor needs to be started in a fixed order with it.
    """
    known, rank = _backend.groups, _backend.world.rank
    for ranks in rank_lists:
        if (role, ranks) not in known:
            handle = dist.new_group(list(ranks)) if _backend.links is None and len(ranks) > 1 else None
            known[role, ranks] = Group(ranks, ranks.index(rank) if rank in ranks else -1, handle)
    return {ranks: known[role, ranks] for ranks in rank_lists if rank in ranks}


def world_group() -> Group:
    """The group of all ranks."""
    ranks = tuple(range(_backend.world.size))
    return groups([ranks])[ranks]


def open_channels(pairs: Sequence[tuple[int, int]]) -> None:
    """Prepare `comm.send` and `comm.recv` along these (sender, receiver) pairs; all ranks call it with the same pairs.
    NCCL gets a communicator for each direction, otherwise a send that crosses another would wait forever; TCP needs
    nothing.
    """
    for pair in pairs:
        if _backend.links is None and pair not in _backend.channels:
            _backend.channels[pair] = dist.new_group(sorted(pair))


def channel(sender: int, receiver: int) -> Any:
    """NCCL's communicator for one direction between two ranks; None over TCP."""
    return None if _backend.links is not None else _backend.channels[sender, receiver]


def tcp_links() -> Links:
    """The connections of a CPU run."""
    assert _backend.links is not None, "backend.init() comes first"
    return _backend.links


@contextmanager
def waiting(kind: str, num_bytes: int, ranks: Ranks) -> Iterator[None]:
    """Report to `on_wait` what this rank waits for. After an error the end of the wait is not reported, because a peer
    is then to blame.
    """
    on_wait = _backend.on_wait
    if on_wait is None:
        yield
        return
    on_wait(f"{kind} of {num_bytes} bytes with ranks {', '.join(map(str, ranks))}")
    yield
    on_wait(None)
