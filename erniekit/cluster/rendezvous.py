"""The agents of several hosts talk to the coordinator over TCP: a line of JSON there, a line back.

The master is node 0, or without node ranks whoever owns MASTER_ADDR and is first to bind MASTER_PORT on it. Like NCCL's
own bootstrap this trusts the network: whoever reaches the port can take part.
"""

import contextlib
import json
import os
import socket
import socketserver
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from erniekit.cluster import net
from erniekit.cluster.coordinator import Coordinator, Message
from erniekit.cluster.job import Job, Limits, Master
from erniekit.utils import log
from erniekit.utils.errors import ConfigError, TrainError

_GREETING = b"erniekit rendezvous 1\n"
_RETRY = 0.2  # seconds
_PATIENCE_WITH_MASTER = 5.0  # seconds a running job does without its master
_LINGER = 5.0  # seconds in which the other hosts may hear that the job is over

Exchange = Callable[[Message], Message]


class _Handler(socketserver.StreamRequestHandler):
    """One agent's connection."""

    server: "Server"

    def handle(self) -> None:
        """Answer line by line until the agent hangs up."""
        self.wfile.write(_GREETING)
        agent = ""
        try:
            for line in self.rfile:
                message = json.loads(line)
                agent = message["id"]
                reply = self.server.coordinator.handle(message, time.monotonic())
                self.wfile.write(json.dumps(reply).encode() + b"\n")
        except (OSError, ValueError, KeyError):
            pass  # not one of ours, or it died: its silence is judged
        self.server.coordinator.disconnect(agent, time.monotonic())


class Server(socketserver.ThreadingTCPServer):
    """The master's ear."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 4096

    def __init__(self, address: tuple[str, int], coordinator: Coordinator) -> None:
        super().__init__(address, _Handler)
        self.coordinator = coordinator
        threading.Thread(target=self.serve_forever, args=(0.2,), daemon=True, name="rendezvous").start()

    def linger(self) -> None:
        """Wait until every host knows how the job ended."""
        deadline = time.monotonic() + _LINGER
        while not self.coordinator.all_told and time.monotonic() < deadline:
            time.sleep(0.05)


class Client:
    """An agent's connection to the master, made anew when it breaks."""

    def __init__(self, master: Master, limits: Limits) -> None:
        self._master = master
        self._patience = limits.rendezvous
        self._answer_time = min(10.0, limits.detect)
        self._socket: socket.socket | None = None

    def exchange(self, message: Message) -> Message:
        """Send, and wait for the answer. TrainError if the master cannot be reached for some time."""
        gathering, said = message["kind"] == "hello", False
        where = f"{self._master.address}:{self._master.port}"
        deadline = time.monotonic() + (self._patience if gathering else _PATIENCE_WITH_MASTER)
        while True:
            try:
                return self._once(message)
            except (OSError, EOFError) as error:
                self.close()
                if gathering and not said:
                    log.info(f"waiting for the first host at MASTER_ADDR:MASTER_PORT = {where} ({error})")
                    said = True
                if time.monotonic() > deadline:
                    raise TrainError(
                        f"the first host cannot be reached at MASTER_ADDR:MASTER_PORT = {where}: {error}. "
                        "Does the command run there, can this host reach it, and has it ended?"
                    ) from None
                time.sleep(_RETRY)

    def _once(self, message: Message) -> Message:
        if self._socket is None:
            address = self._master.address, self._master.port
            self._socket = socket.create_connection(address, timeout=self._answer_time)
            self._lines = self._socket.makefile("rb")
            try:
                greeting = self._lines.readline()
            except TimeoutError:
                greeting = b"nothing"
            if greeting != _GREETING:
                self._refuse(greeting)
        if "address" in message:
            message = {**message, "address": self._socket.getsockname()[0]}
        self._socket.sendall(json.dumps(message).encode() + b"\n")
        line = self._lines.readline()
        if not line:
            raise EOFError("it hung up")
        reply: Message = json.loads(line)
        return reply

    def _refuse(self, greeting: bytes) -> None:
        where = f"{self._master.address}:{self._master.port}"
        if not greeting:
            raise EOFError("it hung up")
        raise ConfigError(
            f"MASTER_PORT: what listens at {where} is no erniekit job (it says {greeting[:60]!r}). "
            "Choose a free port, the same on every host."
        )

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


@contextlib.contextmanager
def connect(job: Job) -> Iterator[tuple[Exchange, Message]]:
    """How to talk to the coordinator, and what a hello says about this host; while the context lasts.

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
    server = _serve(job.master, coordinator)
    client = Client(job.master, job.limits)
    try:
        yield client.exchange, about | {"node": job.master.node, "master": server is not None}
        if server is not None:
            server.linger()
    finally:
        client.close()
        if server is not None:
            server.shutdown()
            server.server_close()


def _serve(master: Master, coordinator: Coordinator) -> Server | None:
    """The server if this host is to be the master; None if another is."""
    if master.node not in (None, 0):
        return None
    address = master.address
    if not net.is_local(address):
        if master.node != 0:
            return None
        address = ""  # behind a translated address: whatever comes in at that port
    try:
        return Server((address, master.port), coordinator)
    except PermissionError:
        raise ConfigError(
            f"MASTER_PORT={master.port}: only root may listen there. Choose one from 1024 to 65535."
        ) from None
    except OSError:
        return None  # another agent of this host was first, or a stranger: its greeting tells
