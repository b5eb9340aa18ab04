"""Message transport between the processes of a CPU run, with one TCP connection for each pair of ranks.

Why not gloo, Paddle's CPU backend (measured with Paddle 3.3.1): a rank that waits 30 s for another fails, and Paddle
has no way to set that limit, so a peer that writes a checkpoint or computes a long pipeline stage ends the run; groups
that are created at about the same time read each other's addresses; sends inside a group of more than two ranks are
matched wrongly, because a message's tag is the number of operations its sender has done; reduce-scatter, all-to-all and
asynchronous sends are missing, sums of float16 are wrong, and float8 ends the process; a small all-reduce takes 1 ms,
here a tenth of that.

Here groups cannot collide (a group is a list of ranks), waiting has no time limit, and a dead peer is reported at once.
Sends never wait for the receiver: a thread writes the data that the kernel does not accept at once. Therefore every
order of sends and receives completes in which each message is eventually received.
"""

import ctypes
import errno
import hashlib
import queue
import resource
import socket
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress

from erniekit.parallel.process_group import World
from erniekit.utils import job_token
from erniekit.utils.errors import PeerGoneError, TrainError
from erniekit.utils.handshake import PROOF_SECONDS, Authenticator, NotOurs, WrongToken, prove

_HELLO = struct.Struct("<8s16sI")  # magic, digest of the job's addresses, rank
_MAGIC = b"ernlink1"
_HEADER = struct.Struct("<BQ")  # kind of operation, bytes that follow
_LENGTH = struct.Struct("<I")
_RETRY_SECONDS = 0.05
_PURPOSE = "rank"
_OTHER_FILES = 512  # file descriptors for other purposes than connections to ranks
_ALL_HERE_SECONDS = 60  # to connect the rest, once all ranks have called rank 0

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send", "ring", "host")


def view(address: int, num_bytes: int, owner: object) -> memoryview:
    """Writable bytes at an address; `owner` (the tensor) lives as long as the view."""
    memory = (ctypes.c_uint8 * num_bytes).from_address(address)
    memory.owner = owner  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")


class Links:
    """This rank's connections. Messages between two ranks arrive in the order in which they were sent."""

    def __init__(self, world: World, peers: dict[int, "_Peer"]) -> None:
        self._world, self._peers = world, peers

    def post(self, peer: int, kind: str, data: memoryview) -> None:
        """Send without waiting for the receiver; `data` may be changed as soon as this returns."""
        self._peers[peer].post(kind, data, copy=True)

    def receive(self, peer: int, kind: str, into: memoryview) -> None:
        """Wait for the next message of `peer`.

        Raises:
            PeerGoneError: the peer's process has ended.
            TrainError: it sends something else than this rank expects.
        """
        self._peers[peer].receive(kind, into)

    def exchange(
        self, kind: str, outgoing: Sequence[tuple[int, memoryview]], incoming: Sequence[tuple[int, memoryview]]
    ) -> None:
        """Send to and receive from several peers at once; returns when everything has been read and written."""
        for peer, data in outgoing:
            self._peers[peer].post(kind, data, copy=False)
        for peer, into in incoming:
            self._peers[peer].receive(kind, into)
        for peer, _ in outgoing:
            self._peers[peer].flush()

    def close(self) -> None:
        """Send what is still queued and close the connections; data that cannot be sent any more is dropped."""
        for peer in self._peers.values():
            peer.close()


class _Peer:
    """One connection. The caller's thread reads; writes that would block are done by another thread."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock, self._name = sock, name
        self._queue: queue.Queue[memoryview | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None
        self._header = bytearray(_HEADER.size)

    def post(self, kind: str, data: memoryview, *, copy: bool) -> None:
        header = _HEADER.pack(KINDS.index(kind), len(data))
        sent = 0
        # Small messages usually fit into the kernel's buffer, so try to send without the thread. This is only allowed
        # while the thread has nothing left to write, or messages would overtake one another.
        if self._queue.unfinished_tasks == 0:
            try:
                sent = self._sock.sendmsg([header, data], [], socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
            except OSError as error:
                raise self._gone() from error
        if sent == len(header) + len(data):
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name=f"to {self._name}", daemon=True)
            self._thread.start()
        # The thread writes the rest, which may begin within the header.
        if sent < len(header):
            self._queue.put(memoryview(header)[sent:])
        rest = data[max(0, sent - len(header)) :]
        self._queue.put(memoryview(bytes(rest)) if copy else rest)

    def _write(self) -> None:
        # After an error the queue is still emptied, so that flush() returns and raises it.
        while (data := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._sock.sendall(data)
            except OSError as error:
                self._error = error
            # Before flush() returns: while this thread waits for the next message, it would keep a tensor's memory.
            del data
            self._queue.task_done()

    def flush(self) -> None:
        self._queue.join()
        if self._error is not None:
            raise self._gone() from self._error

    def receive(self, kind: str, into: memoryview) -> None:
        self._read(memoryview(self._header))
        number, num_bytes = _HEADER.unpack(self._header)
        if number != KINDS.index(kind) or num_bytes != len(into):
            sent = KINDS[number] if number < len(KINDS) else f"an unknown kind ({number})"
            raise TrainError(
                f"{self._name} sends {num_bytes} bytes of {sent}, this rank expects {len(into)} bytes of "
                f"{kind}: the ranks do not run the same step. Start all with the same configuration and code."
            )
        self._read(into)

    def _read(self, into: memoryview) -> None:
        while len(into):
            try:
                count = self._sock.recv_into(into)
            except OSError as error:
                raise self._gone() from error
            if not count:
                raise self._gone()
            into = into[count:]

    def _gone(self) -> PeerGoneError:
        return PeerGoneError(f"{self._name} has gone: its process ended. The reason is at the end of that rank's log.")

    def close(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout=10)
        self._sock.close()


def connect(world: World, token: str, timeout_seconds: float) -> Links:
    """Connect every rank with every other. All ranks call it; it returns when all are connected.

    Raises:
        TrainError: an address is taken, ranks did not come in time, or have another token; the message names them.
    """
    with _listen(world) as listener, closing(Authenticator(listener, token, _PURPOSE)) as authenticator:
        sockets = _gather_ranks(world, token, authenticator, timeout_seconds)
        # Rank 0 is connected to every rank. Of every other pair, the higher rank connects to the lower one.
        deadline = time.monotonic() + _ALL_HERE_SECONDS
        for rank in range(1, world.rank):
            sockets[rank] = _call(world, token, rank, deadline)
        while len(sockets) < world.size - 1:
            sock, rank = _accept_rank(world, authenticator, deadline)
            if sock is None:
                absent = [r for r in range(world.size) if r != world.rank and r not in sockets]
                raise _missing(world, absent, _ALL_HERE_SECONDS)
            sockets[rank] = sock
    return Links(world, {rank: _Peer(sock, world.name(rank)) for rank, sock in sorted(sockets.items())})


def wait_for_ranks(world: World, token: str, timeout_seconds: float) -> None:
    """Wait until every rank has called rank 0, for backends that make their own connections afterwards.

    Raises:
        TrainError: ranks did not come in time, or have another token; the message names them.
    """
    with ExitStack() as stack:
        authenticator = None
        if world.rank == 0:
            listener = stack.enter_context(_listen(world))
            authenticator = stack.enter_context(closing(Authenticator(listener, token, _PURPOSE)))
        sockets = _gather_ranks(world, token, authenticator, timeout_seconds)
    for sock in sockets.values():
        sock.close()


def _gather_ranks(
    world: World, token: str, authenticator: Authenticator | None, timeout_seconds: float
) -> dict[int, socket.socket]:
    """Every rank calls rank 0, which replies with the missing ranks, so that all raise the same error."""
    deadline = time.monotonic() + timeout_seconds
    sockets: dict[int, socket.socket] = {}
    if authenticator is not None and world.rank == 0:
        while len(sockets) < world.size - 1:
            sock, rank = _accept_rank(world, authenticator, deadline)
            if sock is None:
                break
            sockets[rank] = sock
        absent = [rank for rank in range(1, world.size) if rank not in sockets]
        message = ",".join(map(str, absent)).encode()
        for sock in sockets.values():
            with suppress(OSError):  # a rank that has died since then is noticed when it is needed
                sock.sendall(_LENGTH.pack(len(message)) + message)
    else:
        sock = _call(world, token, 0, deadline)
        # Rank 0 may have started later than this rank; its limit decides.
        sock.settimeout(timeout_seconds + _ALL_HERE_SECONDS)
        try:
            length = _LENGTH.unpack(_receive_exactly(sock, _LENGTH.size))[0]
            absent = [int(rank) for rank in _receive_exactly(sock, length).split(b",") if rank]
        except OSError as error:
            raise PeerGoneError(
                f"{world.name(0)} ended while the ranks were gathering; see that rank's log."
            ) from error
        sockets[0] = sock
    if absent:
        raise _missing(world, absent, timeout_seconds)
    return sockets


def _missing(world: World, absent: list[int], waited: float) -> TrainError:
    names = ", ".join(world.name(rank) for rank in absent)
    return TrainError(
        f"{len(absent)} of {world.size} ranks did not come within {waited:.0f} s: {names}. Look at their logs, check "
        "that each host was started and that the hosts reach one another under these addresses."
    )


def _digest(world: World) -> bytes:
    """Identifies the job: another job with the same token may still call an old address."""
    return hashlib.sha256(",".join(world.endpoints).encode()).digest()[:16]


def _split(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def _listen(world: World) -> socket.socket:
    host, port = _split(world.endpoints[world.rank])
    limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < world.size + _OTHER_FILES <= hard_limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    backlog = max(128, world.size)
    try:
        try:
            return socket.create_server((host, port), backlog=backlog)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
            # The address under which others reach this rank may be translated (NAT) and not belong to this host.
            return socket.create_server(("", port), backlog=backlog)
    except OSError as error:
        raise TrainError(
            f"{world.name(world.rank)} cannot listen on port {port}: {error.strerror}. Another process uses it; start "
            "again, or name other ports."
        ) from error


def _call(world: World, token: str, rank: int, deadline: float) -> socket.socket:
    """Connect to a rank, which may not listen yet, and send this rank's number."""
    address = _split(world.endpoints[rank])
    reason = "no answer"
    started = time.monotonic()
    while (left := deadline - time.monotonic()) > 0:
        sock = None
        try:
            sock = socket.create_connection(address, timeout=left)
            # If no process listens, the system may choose that same port for this end, which is then its own peer.
            if sock.getsockname() == sock.getpeername():
                raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
            sock.settimeout(min(left, PROOF_SECONDS))
            prove(sock, token, _PURPOSE)
            sock.settimeout(left)
            sock.sendall(_HELLO.pack(_MAGIC, _digest(world), world.rank))
            return sock
        except WrongToken:
            raise TrainError(
                f"{world.name(rank)} has another token than this rank. Give all of them the same {job_token.VARIABLE}."
            ) from None
        except (OSError, EOFError, NotOurs) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        if sock is not None:
            sock.close()
        time.sleep(_RETRY_SECONDS)
    missing = _missing(world, [rank], time.monotonic() - started)
    raise TrainError(f"{missing} (The last attempt: {reason}.)")


def _accept_rank(world: World, authenticator: Authenticator, deadline: float) -> tuple[socket.socket | None, int]:
    """The next rank of this job; (None, -1) when time is up."""
    while (left := deadline - time.monotonic()) > 0:
        sock = authenticator.accept(left)
        if sock is None:
            break
        try:
            sock.settimeout(min(left, PROOF_SECONDS))
            magic, digest, rank = _HELLO.unpack(_receive_exactly(sock, _HELLO.size))
        except OSError:
            sock.close()
            continue
        if (magic, digest) == (_MAGIC, _digest(world)) and rank < world.size:
            return sock, rank
        sock.close()
    return None, -1


def _receive_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        received = sock.recv(count - len(data))
        if not received:
            raise ConnectionResetError("closed")
        data += received
    return data
