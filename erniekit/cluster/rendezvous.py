"""Connects the agents of several hosts to the coordinator over TCP, with one line of JSON for each message and reply.

The master is node 0 or, without node ranks, the first host that owns MASTER_ADDR and binds MASTER_PORT. A connection
must prove that it knows the job's token before any message is read from it (erniekit.utils.handshake).
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import IO

from erniekit.cluster import net
from erniekit.cluster.coordinator import Coordinator, Message
from erniekit.cluster.job import Job, Limits, Master
from erniekit.utils import handshake, job_token, log
from erniekit.utils.errors import ConfigError, TrainError

_PURPOSE = "rendezvous"
_LINE_BYTES = 16 << 20  # a message has a few kilobytes, the list of all ranks' addresses a few hundred
_RETRY = 0.2  # seconds
_PATIENCE_WITH_MASTER = 5.0  # seconds that a running job tolerates without its master
_LINGER = 5.0  # seconds that the master stays so that other hosts receive the end of the job
_PATIENCE_WITH_NODE_0 = 15.0  # seconds after which another node that owns MASTER_ADDR becomes the master

Exchange = Callable[[Message], Message]


class Server:
    """The master's side: one thread accepts agents, and each agent is served by a thread of its own."""

    def __init__(self, address: tuple[str, int], coordinator: Coordinator, token: str) -> None:
        self.coordinator = coordinator
        self._listener = socket.create_server(address, backlog=4096)
        self._authenticator = handshake.Authenticator(self._listener, token, _PURPOSE)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._admit, daemon=True, name="rendezvous")
        self._thread.start()

    def linger(self) -> None:
        """Wait until every host has received the end of the job."""
        deadline = time.monotonic() + _LINGER
        while not self.coordinator.all_know_end and time.monotonic() < deadline:
            time.sleep(0.05)

    def close(self) -> None:
        """Stop accepting agents."""
        self._closing.set()
        self._thread.join()
        self._authenticator.close()
        self._listener.close()

    def _admit(self) -> None:
        while not self._closing.is_set():
            sock = self._authenticator.accept(0.2)
            if sock is not None:
                threading.Thread(target=self._converse, args=(sock,), daemon=True).start()

    def _converse(self, sock: socket.socket) -> None:
        """Answer the messages of one agent until it closes the connection."""
        agent = ""
        with sock, sock.makefile("rb") as lines:
            try:
                while line := _read_line(lines):
                    message = json.loads(line)
                    agent = message["id"]
                    reply = self.coordinator.handle(message, time.monotonic())
                    sock.sendall(json.dumps(reply).encode() + b"\n")
            except (OSError, EOFError, ValueError, KeyError, TypeError):
                pass  # it died or has another version: the coordinator will judge its silence
        self.coordinator.disconnect(agent, time.monotonic())


def _read_line(lines: IO[bytes]) -> bytes:
    line = lines.readline(_LINE_BYTES)
    if line and not line.endswith(b"\n"):
        raise EOFError("a message was cut short, or is too long")
    return line


class Client:
    """An agent's connection to the master, which is renewed when it breaks."""

    def __init__(self, master: Master, limits: Limits, token: str) -> None:
        self._master = master
        self._token = token
        self._patience = limits.rendezvous
        self._answer_time = min(10.0, limits.detect)
        self._socket: socket.socket | None = None

    def exchange(self, message: Message) -> Message:
        """Send a message and return the reply. Raises TrainError if the master cannot be reached for some time."""
        gathering, was_logged = message["kind"] == "hello", False
        address = f"{self._master.address}:{self._master.port}"
        deadline = time.monotonic() + (self._patience if gathering else _PATIENCE_WITH_MASTER)
        while True:
            try:
                return self._once(message)
            except (OSError, EOFError) as error:
                self.close()
                if gathering and not was_logged:
                    log.info(f"waiting for the first host at MASTER_ADDR:MASTER_PORT = {address} ({error})")
                    was_logged = True
                if time.monotonic() > deadline:
                    raise TrainError(
                        f"the first host cannot be reached at MASTER_ADDR:MASTER_PORT = {address}: {error}. "
                        "Is the command running there, and can this host reach it?"
                    ) from None
                time.sleep(_RETRY)

    def _once(self, message: Message) -> Message:
        if self._socket is None:
            self._connect()
        assert self._socket is not None
        if "address" in message:
            message = {**message, "address": self._socket.getsockname()[0]}
        self._socket.sendall(json.dumps(message).encode() + b"\n")
        line = _read_line(self._lines)
        if not line:
            raise EOFError("it closed the connection")
        reply: Message = json.loads(line)
        return reply

    def _connect(self) -> None:
        sock = net.call((self._master.address, self._master.port), self._answer_time)
        address = f"{self._master.address}:{self._master.port}"
        try:
            handshake.prove(sock, self._token, _PURPOSE)
        except handshake.NotOurs as other:
            raise ConfigError(
                f"MASTER_PORT: the program that listens at {address} is not an erniekit job (it answers "
                f"{other.received or 'nothing'!r}). Choose a free port, the same on every host."
            ) from None
        except handshake.WrongToken:
            raise ConfigError(
                f"{job_token.VARIABLE}: the job at MASTER_ADDR:MASTER_PORT = {address} has another token than this "
                "host. Give all hosts of a job the same one, and two jobs with one first host two MASTER_PORTs."
            ) from None
        self._socket, self._lines = sock, sock.makefile("rb")

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            self._lines.close()  # the connection stays open as long as one of the two is
            self._socket.close()
            self._socket = None


@contextlib.contextmanager
def connect(job: Job) -> Iterator[tuple[Exchange, Message]]:
    """A context with the function that exchanges messages with the coordinator, and this host's `hello`.

    Raises ConfigError if the port cannot be used.
    """
    coordinator = Coordinator(job.hosts, job.layouts, job.limits)
    about: Message = {
        "id": f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}",
        "name": socket.gethostname(),
        "address": "127.0.0.1",
        "node": None,
        "slots": job.slots,
        "master": True,
        "config": dict(job.config or {}),
    }
    if job.master is None:
        yield lambda message: coordinator.handle(message, time.monotonic()), about
        return
    server = _serve(job.master, coordinator, job.token)
    client = Client(job.master, job.limits, job.token)
    try:
        yield client.exchange, about | {"node": job.master.node, "master": server is not None}
        if server is not None:
            server.linger()
    finally:
        client.close()
        if server is not None:
            server.close()


def _serve(master: Master, coordinator: Coordinator, token: str) -> Server | None:
    """The server if this host is the master; None if another host is."""
    address = master.address
    local = net.is_local(address)
    if master.node not in (None, 0) and not (local and _nobody_listens(master)):
        return None
    if not local:
        if master.node != 0:
            return None
        address = ""  # the address is translated (NAT), so listen at that port on all addresses
    try:
        return Server((address, master.port), coordinator, token)
    except PermissionError:
        raise ConfigError(
            f"MASTER_PORT={master.port}: only root may listen there. Choose one from 1024 to 65535."
        ) from None
    except OSError:
        return None  # another agent of this host, or another program, has the port; the handshake will show which


def _nobody_listens(master: Master) -> bool:
    """Waits for node 0, and returns True if it does not come although this host owns MASTER_ADDR. The node numbers are
    then wrong, and this host becomes the master, so that the hosts meet and can report their numbers.
    """
    deadline, was_logged = time.monotonic() + _PATIENCE_WITH_NODE_0, False
    while time.monotonic() < deadline:
        try:
            net.call((master.address, master.port), 1.0).close()
            return False
        except TimeoutError:
            return False
        except OSError:
            if not was_logged:
                log.info(
                    f"waiting for node 0 at MASTER_ADDR:MASTER_PORT = {master.address}:{master.port}; this is node "
                    f"{master.node}"
                )
                was_logged = True
            time.sleep(_RETRY)
    log.warning(f"node 0 has not come to MASTER_ADDR, which belongs to this host: node {master.node} takes its place")
    return True
