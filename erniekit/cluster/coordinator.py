"""The coordinator decides for all hosts of a job: which hosts take part, when an attempt starts and ends, which rank
failed first, and whether there is a restart.

It is a state machine without clock, sockets or processes, which makes it testable. It runs in the agent of the master
host; the agents of other hosts reach it through rendezvous.py, and a job on one host calls it directly.

An agent sends `hello` until it gets `start` (its ranks, and the addresses of all ranks). Then it sends `report` about
twice a second (signs of life of its ranks, failures, whether all are done) until it gets `stop`. If that `stop` has
`restart` set, the agent begins again with `hello`.
"""

import math
import signal
import threading
from dataclasses import dataclass, field
from typing import Any

from erniekit.cluster.job import Layout, Limits
from erniekit.cluster.watch import Sign, diagnose

Message = dict[str, Any]

# One rank's death makes others fail at almost the same moment, and their reports may arrive first. These are the
# seconds to wait for the report of the first failure: GRACE in general, GRACE_FOR_PEERS while every failure reported
# so far blames a peer, since its cause is then still missing.
GRACE, GRACE_FOR_PEERS = 1.0, 6.0
JUDGE = 0.2  # seconds between judgements: hundreds of hosts report twice a second each, and judging looks at all ranks
GONE = 3.0  # seconds after which a broken connection counts as a lost host
EXIT_USER_ERROR = 1  # as in erniekit.cli.main


@dataclass
class Host:
    """The agent of a host that takes part. `order`: the order of first hellos; `last_message_at`: a time in seconds;
    `again`: the arguments with which a restarted worker resumes, as this agent sees the files.
    """

    id: str
    name: str
    address: str
    order: int
    slots: int
    node: int | None
    is_master: bool
    ports: list[int]
    again: list[str]
    last_message_at: float
    disconnected_at: float | None = None
    ranks: range = range(0)
    reply: Message = field(default_factory=dict)
    signs: list[Sign] = field(default_factory=list)
    done: bool = False
    knows_end: bool = False

    @property
    def label(self) -> str:
        """The host's name and address for messages."""
        return f"{self.name} ({self.address})"


@dataclass(frozen=True)
class Failure:
    """An unexpected exit of a rank. by_peer: the rank reports that another one failed first. code: negative for a
    signal, as in subprocess; None if the rank hangs or its host is lost. detail: the last lines that it printed.
    """

    rank: int
    host: Host
    at: float
    what: str
    code: int | None = None
    by_peer: bool = False
    step: int = 0
    detail: str = ""

    @property
    def sort_key(self) -> tuple[bool, float]:
        """Sort key that puts the cause before its consequences: gloo and NCCL abort the process when a peer is gone."""
        return self.by_peer or self.code == -signal.SIGABRT, self.at

    @property
    def is_worth_restart(self) -> bool:
        """Whether a restart can help: not against a mistake in the configuration or the data."""
        return self.by_peer or self.code != EXIT_USER_ERROR


class Coordinator:
    """The state machine that the module describes. `handle` may be called from several threads."""

    def __init__(self, hosts: int, layouts: tuple[Layout, ...], limits: Limits) -> None:
        self._wanted = hosts
        self._layouts = layouts
        self._limits = limits
        self._lock = threading.Lock()
        self._attempt = 1
        self._began: float | None = None  # when the hosts began to gather; None while an attempt runs
        self._orders: dict[str, int] = {}
        self._spares: dict[str, float] = {}  # host id -> last message, of hosts that wait for the next attempt
        self._hosts: dict[str, Host] = {}  # host id -> host, gathering or in the running attempt
        self._running = False
        self._stopping = False
        self._config: dict[str, str] | None = None
        self._failures: list[Failure] = []
        self._judged = -math.inf  # time of the last judgement
        self._verdict: Message = {}  # the `stop` message of the last attempt
        self._over = False

    def handle(self, message: Message, now: float) -> Message:
        """The reply to a `hello`, `report` or `leave` at time `now` (seconds of one monotonic clock)."""
        with self._lock:
            host = self._hosts.get(message["id"])
            if host is not None:
                host.last_message_at, host.disconnected_at = now, None
            if message["kind"] == "hello":
                return self._hello(message, now)
            if message["kind"] == "leave":
                return self._leave(host, message["why"], now)
            return self._report(host, message, now)

    def disconnect(self, host_id: str, now: float) -> None:
        """Note that the connection of a host broke; the host may come back."""
        with self._lock:
            self._spares.pop(host_id, None)
            if host_id in self._hosts:
                self._hosts[host_id].disconnected_at = now

    @property
    def all_know_end(self) -> bool:
        """Whether every host has received the end of the job, or is gone."""
        with self._lock:
            hosts = self._hosts.values()
            return (
                self._over
                and not self._spares
                and all(host.knows_end or host.disconnected_at is not None for host in hosts)
            )

    # ---- gathering

    def _hello(self, message: Message, now: float) -> Message:
        host = self._hosts.get(message["id"])
        if host is not None and self._running:
            return host.reply
        if host is not None and self._over:
            return self._tell(host)
        problem = self._other_configuration(message)
        if not problem and not self._running and not self._over:
            problem = self._no_place(message)
        if problem:
            return {"kind": "refused", "why": problem}
        if self._running or self._over:
            return self._answer_spare(message["id"], now)
        if self._began is None:
            self._began = now
        if host is None:
            self._hosts[message["id"]] = self._new_host(message, now)
            self._spares.pop(message["id"], None)
        self._gather(now)
        return self._answer(message["id"])

    def _answer(self, host_id: str) -> Message:
        """The reply to the `hello` of a host that takes part."""
        host = self._hosts.get(host_id)
        if self._over:
            return self._tell(host)
        if self._running and host is not None:
            return host.reply
        return {"kind": "wait", "why": self._present_hosts()}

    def _answer_spare(self, host_id: str, now: float) -> Message:
        """The reply to a host that came when the job was running or over. It may be a lost host that its scheduler has
        started again; such a host waits here instead of exiting with an error, which the scheduler would count.
        """
        if self._over:
            self._spares.pop(host_id, None)
            headline = "it ended before this host could join it; nothing was trained here"
            return {"kind": "stop", "restart": False, "code": EXIT_USER_ERROR, "headline": headline, "detail": ""}
        if self._attempt > self._limits.max_restarts and len(self._hosts) == self._wanted:
            hosts = ", ".join(host.label for host in self._hosts.values())
            return {
                "kind": "refused",
                "why": f"the job runs already, on {hosts}, and max_restarts leaves no restart at which this host could "
                "join it. If this is another job, give it another MASTER_PORT.",
            }
        self._spares[host_id] = now
        return {"kind": "wait", "why": "the job runs without this host, which can join it at its next restart"}

    def _new_host(self, message: Message, now: float) -> Host:
        order = self._orders.setdefault(message["id"], len(self._orders))
        node = message["node"]
        return Host(
            message["id"],
            message["name"],
            message["address"],
            order,
            message["slots"],
            node,
            message["master"],
            message["ports"],
            message["again"],
            now,
        )

    def _other_configuration(self, message: Message) -> str:
        """How this host's configuration differs from the job's; empty if it does not."""
        if self._config is None:
            self._config = message["config"]
        host_config, job_config = message["config"], self._config
        different = [key for key in sorted({*host_config, *job_config}) if host_config.get(key) != job_config.get(key)]
        if different:
            lines = [
                f"\n  {key}: {host_config.get(key, '-')} here, {job_config.get(key, '-')} there"
                for key in different[:8]
            ]
            return (
                f"{message['name']} has another configuration than the host that came first:{''.join(lines)}\n"
                "Start every host alike; if these are two jobs, give each its own MASTER_PORT."
            )
        return ""

    def _no_place(self, message: Message) -> str:
        """Why the gathering job cannot admit this host; empty if it can."""
        others = [host for host in self._hosts.values() if host.id != message["id"]]
        for host in others:
            if message["node"] is not None and host.node == message["node"]:
                return (
                    f"{message['name']} and {host.name} both say that they are node {host.node}. Start one `erniekit` "
                    "on each host, and give each its own PADDLE_NODE_RANK (or none of them any)."
                )
        if len(others) >= self._wanted:
            return f"the job has all hosts already (NNODES={self._wanted}): {', '.join(h.label for h in others)}"
        return ""

    def _gather(self, now: float) -> None:
        """Start an attempt when all hosts are present. After the time limit, start with fewer hosts if the job is
        elastic and this is a restart; otherwise end the job.
        """
        assert self._began is not None
        for host in list(self._hosts.values()):
            if now - host.last_message_at > self._limits.detect or (
                host.disconnected_at is not None and now - host.disconnected_at > GONE
            ):
                del self._hosts[host.id]
        self._forget_silent_spares(now)
        waited = now - self._began
        if len(self._hosts) == self._wanted:
            self._start(self._layouts[0])
        elif self._attempt > 1 and self._limits.elastic and waited > self._limits.fault:
            num_slots = sum(host.slots for host in self._hosts.values())
            layout = next((layout for layout in self._layouts if layout.world <= num_slots), None)
            if layout is not None:
                self._start(layout)
            else:
                smallest = self._layouts[-1].world
                self._give_up(
                    f"{self._present_hosts()}\nThe job needs at least {smallest} processes, and these hosts can run "
                    f"{num_slots}"
                )
        elif waited > self._limits.rendezvous:
            hint = (
                "Is the command running there, with the same MASTER_ADDR and MASTER_PORT? Is a firewall "
                f"between them? rendezvous_timeout (now {self._limits.rendezvous:g}) is how long the hosts wait."
            )
            self._give_up(f"{self._present_hosts()} after {self._limits.rendezvous:g} s. {hint}")

    def _forget_silent_spares(self, now: float) -> None:
        self._spares = {host: seen for host, seen in self._spares.items() if now - seen <= self._limits.detect}

    def _present_hosts(self) -> str:
        """A line for messages: how many hosts are connected, which, and which node numbers are missing."""
        hosts = sorted(self._hosts.values(), key=lambda host: host.order)
        present = ", ".join(f"node {h.node} {h.label}" if h.node is not None else h.label for h in hosts)
        nodes_present = {host.node for host in hosts}
        absent = [str(node) for node in range(self._wanted) if node not in nodes_present]
        missing = f"; missing: node {', '.join(absent[:20])}" if None not in nodes_present and absent else ""
        return f"hosts that have come: {len(hosts)} of {self._wanted} ({present or 'none'}){missing}"

    def _start(self, layout: Layout) -> None:
        def sort_key(host: Host) -> tuple[float, int]:
            if host.node is not None:
                return host.node, host.order
            return (-1 if host.is_master else math.inf), host.order

        hosts = sorted(self._hosts.values(), key=sort_key)
        first, endpoints = 0, []
        for host in hosts:
            host.ranks = range(first, min(first + host.slots, layout.world))
            first = host.ranks.stop
            endpoints += [f"{host.address}:{port}" for port in host.ports[1 : 1 + len(host.ranks)]]
        overrides = list(layout.overrides)
        if self._attempt > 1:
            # The master's, for all hosts: only it has been there since the job began, and all ranks must be started
            # alike.
            overrides += next(host.again for host in hosts if host.is_master)
        for node, host in enumerate(hosts):
            host.signs, host.done, host.disconnected_at = [], not host.ranks, None
            host.reply = {
                "kind": "start",
                "attempt": self._attempt,
                "node": node,
                "hosts": sum(1 for each in hosts if each.ranks),
                "first": host.ranks.start,
                "count": len(host.ranks),
                "world": layout.world,
                "store": f"{hosts[0].address}:{hosts[0].ports[0]}",
                "endpoints": endpoints,
                "overrides": overrides,
                "note": layout.note,
            }
        self._running, self._failures, self._began = True, [], None

    # ---- running

    def _report(self, host: Host | None, message: Message, now: float) -> Message:
        self._stopping = self._stopping or message["stopping"]
        if not self._running or message["attempt"] != self._attempt:
            return self._tell(host)
        if host is None:
            return {"kind": "stop", "restart": False, "code": 1, "headline": "this host is not in it", "detail": ""}
        host.signs = [Sign(**sign) for sign in message["signs"]]
        host.done = message["done"]
        known = {failure.rank for failure in self._failures}
        for entry in message["failures"]:
            if entry["rank"] not in known:
                self._failures.append(Failure(**{**entry, "host": host, "at": now - entry["at"]}))
        if message["failures"] or message["done"] or now - self._judged >= JUDGE:
            self._judge(now)
        return {"kind": "run"} if self._running else self._tell(host)

    def _leave(self, host: Host | None, reason: str, now: float) -> Message:
        if host is not None and not self._over:
            host.knows_end = True
            if self._running and host.ranks:
                self._failures.append(self._lost(host, reason, now))
                self._stopping = True
                self._judge(now + GRACE)
            elif not self._running:
                del self._hosts[host.id]
        return {"kind": "bye"}

    def _judge(self, now: float) -> None:
        """Decide whether the attempt continues, has succeeded or has failed, and which rank failed first."""
        self._judged = now
        self._forget_silent_spares(now)
        self._find_lost(now)
        if not self._failures and all(host.done for host in self._hosts.values()):
            self._end({"restart": False, "code": 0, "headline": "", "detail": ""})
        elif not self._failures:
            self._find_hanging(now)
        if self._failures:
            self._decide(now)

    def _find_lost(self, now: float) -> None:
        failed = {failure.rank for failure in self._failures}
        for host in self._hosts.values():
            if host.done or host.ranks[0] in failed:
                continue
            silent = now - host.last_message_at
            if host.disconnected_at is not None and now - host.disconnected_at > GONE:
                self._failures.append(self._lost(host, "the connection to its agent broke", host.disconnected_at))
            elif silent > self._limits.detect:
                self._failures.append(
                    self._lost(host, f"its agent has sent nothing for {silent:.0f} s", host.last_message_at)
                )

    def _decide(self, now: float) -> None:
        """End the attempt once no report of an earlier failure can still arrive."""
        # `first` is the most likely cause so far. If every rank is done or has failed, no other report can follow, so
        # there is nothing to wait for, unless all failures blame a peer whose own report is still missing.
        first = min(self._failures, key=lambda failure: failure.sort_key)
        since = now - min(failure.at for failure in self._failures)
        ranks = sum(len(host.ranks) for host in self._hosts.values())
        done = sum(len(host.ranks) for host in self._hosts.values() if host.done)
        grace = GRACE if done + len({failure.rank for failure in self._failures}) < ranks else 0.0
        if since >= (GRACE_FOR_PEERS if first.sort_key[0] else grace):
            self._fail(first)

    def _find_hanging(self, now: float) -> None:
        hosts = [host for host in self._hosts.values() if not host.done]
        signs = [sign for host in hosts for sign in host.signs]
        if not all(host.signs for host in hosts):
            return  # not all ranks have started
        diagnosis = diagnose(signs, self._limits.detect)
        if diagnosis is None:
            return
        rank, reason = diagnosis
        host = next(host for host in hosts if rank in host.ranks)
        step = next(sign.step for sign in signs if sign.rank == rank)
        what = f"hangs: {reason}"
        advice = f"If the rank was doing useful work, raise distributed_timeout (now {self._limits.fault:g})."
        detail = f"error: rank {rank} {what}\n{advice}"
        # Dated back by GRACE so that the attempt ends at once: a hanging rank makes no other rank fail.
        self._failures.append(Failure(rank, host, now - GRACE, what, step=step, detail=detail))

    def _lost(self, host: Host, reason: str, at: float) -> Failure:
        step = max((sign.step for sign in host.signs), default=0)
        first, last = host.ranks[0], host.ranks[-1]
        ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
        what = f"is lost with its host ({ranks}): {reason}"
        host.knows_end = True  # it cannot be reached, so nothing more is sent to it
        rank = host.ranks[0]
        return Failure(rank, host, at, what, step=step, detail=f"error: rank {rank} on {host.label} {what}")

    def _fail(self, first: Failure) -> None:
        headline = f"rank {first.rank} on {first.host.label} {first.what}; last finished step: {first.step}"
        others = len({failure.rank for failure in self._failures} - {first.rank})
        if others:
            headline += f"; {others} more failed after it"
        restarts_left = self._limits.max_restarts - (self._attempt - 1)
        restart = restarts_left > 0 and first.is_worth_restart and not self._stopping
        if not restart and restarts_left > 0:
            headline += "; not started again, " + (
                "the job was asked to stop" if self._stopping else "the same error would occur again"
            )
        code = first.code if first.code is not None and first.code > 0 else 1
        self._end(
            {"restart": restart, "code": code, "headline": headline, "detail": first.detail, "host": first.host.id}
        )

    def _give_up(self, reason: str) -> None:
        self._end({"restart": False, "code": 1, "headline": "not all hosts came", "detail": f"error: {reason}"})

    def _end(self, verdict: Message) -> None:
        """End the attempt; each agent receives the verdict as the reply to its next report."""
        self._verdict = {"kind": "stop", **verdict}
        self._running, self._over, self._began = False, not verdict["restart"], None
        if verdict["restart"]:
            self._attempt += 1
            self._hosts = {}

    def _tell(self, host: Host | None) -> Message:
        if host is not None:
            host.knows_end = True
        return self._verdict
