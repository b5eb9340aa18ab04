"""Mutual authentication: two processes of a job prove that they know its token before either reads anything else.

The listener sends a greeting and a random challenge. The caller answers with a challenge of its own and an HMAC over
both. The listener answers with another HMAC. The token itself is never sent, and recorded answers cannot be replayed.
The data that follows is neither encrypted nor signed, so the network between the hosts must protect it from changes.

An `Authenticator` handles all unproven connections concurrently: none can block another, each is limited to a few
seconds and 64 bytes, and a program that does not know the token receives only the greeting.
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
from erniekit.utils.wording import count_of

_NONCE = 32
_PROOF = hashlib.sha256().digest_size
_REFUSAL = bytes(_PROOF)
_GREETING_SIZE = 32
PROOF_SECONDS = 5.0  # the time in which a caller must complete its proof
_MAX_PENDING = 256  # connections that have not proved anything yet
_YOUNG = 1.0  # seconds for which a pending connection is kept even if there are too many


class NotOurs(Exception):
    """The listener is not an erniekit process of this kind. `received` holds the first bytes that it sent."""

    def __init__(self, received: bytes) -> None:
        super().__init__(f"it says {received!r}")
        self.received = received


class WrongToken(Exception):
    """The two sides have different tokens."""


def greeting(purpose: str) -> bytes:
    """The first bytes that a listener sends; `purpose` distinguishes the kinds of connections."""
    return f"erniekit 2 {purpose}\n".encode().ljust(_GREETING_SIZE)


def prove(sock: socket.socket, token: str, purpose: str) -> None:
    """Prove to the listener at the other end that we know the token, and check that it knows the token too.

    The socket's time-out applies to each read. OSErrors are raised as they are.

    Raises:
        NotOurs: the other end sends something else.
        WrongToken: it has another token.
        EOFError: it closed the connection.
    """
    received = _first_bytes(sock)
    if received != greeting(purpose):
        raise NotOurs(received)
    challenge_received, challenge_sent = _receive(sock, _NONCE), secrets.token_bytes(_NONCE)
    sock.sendall(challenge_sent + _digest(token, purpose, b"caller", challenge_received, challenge_sent))
    answer = _receive(sock, _PROOF)
    if not hmac.compare_digest(answer, _digest(token, purpose, b"listener", challenge_received, challenge_sent)):
        raise WrongToken


def _digest(token: str, purpose: str, side: bytes, listeners: bytes, callers: bytes) -> bytes:
    return hmac.digest(token.encode(), b"|".join((purpose.encode(), side, listeners, callers)), "sha256")


def _first_bytes(sock: socket.socket) -> bytes:
    """The bytes of the greeting, or those that another program sends instead."""
    data = b""
    with suppress(TimeoutError):
        while len(data) < _GREETING_SIZE and (received := sock.recv(_GREETING_SIZE - len(data))):
            data += received
        if not data:
            raise EOFError("it closed the connection")
    return data


def _receive(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        received = sock.recv(count - len(data))
        if not received:
            raise EOFError("it closed the connection")
        data += received
    return data


@dataclass
class _Caller:
    """A connection that has not proved yet that it knows the token."""

    sock: socket.socket
    since: float
    challenge: bytes = field(default_factory=lambda: secrets.token_bytes(_NONCE))
    received: bytes = b""


class Authenticator:
    """Accepts connections that prove that they know the token. Used by one thread; the caller closes `listener`."""

    def __init__(self, listener: socket.socket, token: str, purpose: str) -> None:
        self._listener, self._token, self._purpose = listener, token, purpose
        self._callers: dict[socket.socket, _Caller] = {}  # oldest first
        self._proven: deque[socket.socket] = deque()
        self._refused = 0
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def accept(self, timeout: float) -> socket.socket | None:
        """The next connection that has proved its knowledge of the token, as a blocking socket; None after
        `timeout` s.
        """
        deadline = time.monotonic() + timeout
        while not self._proven:
            now = time.monotonic()
            for caller in [entry for entry in self._callers.values() if now - entry.since > PROOF_SECONDS]:
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
        """Close all unproven connections, and log how many were refused."""
        for caller in list(self._callers.values()):
            self._forget(caller)
        for sock in self._proven:
            sock.close()
        self._selector.close()
        if self._refused:
            with suppress(OSError):
                port = self._listener.getsockname()[1]
                log.warning(f"port {port}: refused {count_of(self._refused, 'connection')} without this job's token")

    def _accept(self, now: float) -> None:
        if len(self._callers) >= _MAX_PENDING:
            oldest = next(iter(self._callers.values()))
            if now - oldest.since < _YOUNG:
                time.sleep(0.01)
                return
            self._refuse(oldest)
        try:
            sock, _ = self._listener.accept()
        except OSError:  # the caller has closed it already, or there are no file descriptors left
            time.sleep(0.01)
            return
        sock.setblocking(False)
        caller = _Caller(sock, now)
        self._callers[sock] = caller
        self._selector.register(sock, selectors.EVENT_READ, caller)
        self._send(caller, greeting(self._purpose) + caller.challenge)

    def _read(self, caller: _Caller) -> None:
        num_expected = _NONCE + _PROOF
        try:
            received = caller.sock.recv(num_expected - len(caller.received))
        except BlockingIOError:
            return
        except OSError:
            received = b""
        caller.received += received
        if received and len(caller.received) < num_expected:
            return
        their_challenge, proof = caller.received[:_NONCE], caller.received[_NONCE:]
        if not received:
            # a port scan that sends nothing is not counted as refused
            self._refuse(caller) if caller.received else self._forget(caller)
        elif hmac.compare_digest(
            proof, _digest(self._token, self._purpose, b"caller", caller.challenge, their_challenge)
        ):
            answer = _digest(self._token, self._purpose, b"listener", caller.challenge, their_challenge)
            if self._send(caller, answer):
                self._forget(caller, close=False)
                caller.sock.setblocking(True)
                self._proven.append(caller.sock)
        else:
            self._send(caller, _REFUSAL)
            self._refuse(caller)

    def _send(self, caller: _Caller, data: bytes) -> bool:
        """Send a few bytes, which fit into the buffer of a new connection; drop a caller that accepts fewer."""
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
