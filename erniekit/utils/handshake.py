"""How two processes of one job prove to each other that they know its token, before either reads anything else.

The side that listens sends a greeting and a random challenge; the caller answers with a challenge of its own and an
HMAC of both; the listener answers with another HMAC. The token itself is never sent, and an answer is of no use to
a listener. What follows is neither encrypted nor signed: no stranger may be able to change what others send on
the network between the hosts.

A `Door` treats all connections that have proved nothing at once: none of them can hold up another one, each has a few
seconds and 64 bytes, and a stranger gets nothing but the greeting.
"""

import hashlib
import hmac
import secrets
import selectors
import socket
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

from erniekit.utils import log

_NONCE = 32
_PROOF = hashlib.sha256().digest_size
_REFUSAL = bytes(_PROOF)
_GREETING_SIZE = 32
PROOF_SECONDS = 5.0  # for a caller to prove itself
_MOST_PENDING = 256  # connections that have proved nothing yet
_YOUNG = 1.0  # seconds for which a pending connection keeps its place even when there are too many


class NotOurs(Exception):
    """What listens there is no erniekit process of this kind. `said`: its first bytes."""

    def __init__(self, said: bytes) -> None:
        super().__init__(f"it says {said!r}")
        self.said = said


class WrongToken(Exception):
    """The two sides have different tokens."""


def greeting(purpose: str) -> bytes:
    """The first bytes that a listener sends; `purpose` keeps apart the different kinds of connections."""
    return f"erniekit 2 {purpose}\n".encode().ljust(_GREETING_SIZE)


def prove(sock: socket.socket, token: str, purpose: str) -> None:
    """Prove to the listener at the other end that we know the token, and let it prove the same.

    The socket's time-out holds for each read; OSErrors are the caller's to judge.

    Raises:
        NotOurs: the other end says something else.
        WrongToken: it has another token.
        EOFError: it closed the connection.
    """
    said = _first_bytes(sock)
    if said != greeting(purpose):
        raise NotOurs(said)
    theirs, ours = _receive(sock, _NONCE), secrets.token_bytes(_NONCE)
    sock.sendall(ours + _digest(token, purpose, b"caller", theirs, ours))
    answer = _receive(sock, _PROOF)
    if not hmac.compare_digest(answer, _digest(token, purpose, b"listener", theirs, ours)):
        raise WrongToken


def _digest(token: str, purpose: str, side: bytes, listeners: bytes, callers: bytes) -> bytes:
    return hmac.digest(token.encode(), b"|".join((purpose.encode(), side, listeners, callers)), "sha256")


def _first_bytes(sock: socket.socket) -> bytes:
    """The greeting, or as much as whatever listens there says instead of one."""
    data = b""
    with suppress(TimeoutError):
        while len(data) < _GREETING_SIZE and (piece := sock.recv(_GREETING_SIZE - len(data))):
            data += piece
        if not data:
            raise EOFError("it closed the connection")
    return data


def _receive(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise EOFError("it closed the connection")
        data += piece
    return data


@dataclass
class _Caller:
    """A connection that has proved nothing yet."""

    sock: socket.socket
    since: float
    challenge: bytes = field(default_factory=lambda: secrets.token_bytes(_NONCE))
    said: bytes = b""


class Door:
    """Lets in those who know the token. For one thread; `listener` stays the caller's to close."""

    def __init__(self, listener: socket.socket, token: str, purpose: str) -> None:
        self._listener, self._token, self._purpose = listener, token, purpose
        self._callers: dict[socket.socket, _Caller] = {}  # oldest first
        self._proven: deque[socket.socket] = deque()
        self._refused = 0
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def admit(self, timeout: float) -> socket.socket | None:
        """The next connection that has proved itself, as a blocking socket; None after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not self._proven:
            now = time.monotonic()
            for caller in [each for each in self._callers.values() if now - each.since > PROOF_SECONDS]:
                self._refuse(caller)
            if now >= deadline:
                return None
            for key, _ in self._selector.select(min(deadline - now, PROOF_SECONDS / 10)):
                if key.fileobj is self._listener:
                    self._accept(now)
                else:
                    self._read(key.data)
        return self._proven.popleft()

    def close(self) -> None:
        """Hang up on those who have proved nothing, and say in one line how many strangers there were."""
        for caller in list(self._callers.values()):
            self._forget(caller)
        for sock in self._proven:
            sock.close()
        self._selector.close()
        if self._refused:
            with suppress(OSError):
                port = self._listener.getsockname()[1]
                log.warning(f"port {port}: refused {self._refused} connections that did not know this job's token")

    def _accept(self, now: float) -> None:
        if len(self._callers) >= _MOST_PENDING:
            oldest = next(iter(self._callers.values()))
            if now - oldest.since < _YOUNG:
                time.sleep(0.01)
                return
            self._refuse(oldest)
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it has gone again, or no file descriptor is left
            time.sleep(0.01)
            return
        sock.setblocking(False)
        caller = _Caller(sock, now)
        self._callers[sock] = caller
        self._selector.register(sock, selectors.EVENT_READ, caller)
        self._send(caller, greeting(self._purpose) + caller.challenge)

    def _read(self, caller: _Caller) -> None:
        wanted = _NONCE + _PROOF
        try:
            piece = caller.sock.recv(wanted - len(caller.said))
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        caller.said += piece
        if piece and len(caller.said) < wanted:
            return
        theirs, proof = caller.said[:_NONCE], caller.said[_NONCE:]
        if not piece:
            self._refuse(caller) if caller.said else self._forget(caller)  # a probe that says nothing is no attack
        elif hmac.compare_digest(proof, _digest(self._token, self._purpose, b"caller", caller.challenge, theirs)):
            answer = _digest(self._token, self._purpose, b"listener", caller.challenge, theirs)
            if self._send(caller, answer):
                self._forget(caller, close=False)
                caller.sock.setblocking(True)
                self._proven.append(caller.sock)
        else:
            self._send(caller, _REFUSAL)
            self._refuse(caller)

    def _send(self, caller: _Caller, data: bytes) -> bool:
        """Send what fits into every new connection's buffer; forget a caller that takes less."""
        with suppress(OSError):
            if caller.sock.send(data) == len(data):
                return True
        self._forget(caller)
        return False

    def _refuse(self, caller: _Caller) -> None:
        self._refused += 1
        self._forget(caller)

    def _forget(self, caller: _Caller, close: bool = True) -> None:
        if self._callers.pop(caller.sock, None) is not None:
            self._selector.unregister(caller.sock)
            if close:
                caller.sock.close()
