"""Proving to know the token, over sockets of the loopback interface."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from erniekit.utils import handshake
from erniekit.utils.handshake import Authenticator, NotOurs, WrongToken, prove

TOKEN = "a token of tests, long enough"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def caller(listener: socket.socket) -> socket.socket:
    return socket.create_connection(listener.getsockname(), timeout=5)


def admit(authenticator: Authenticator, count: int = 1, timeout: float = 5) -> tuple[threading.Thread, list]:
    found: list = []
    thread = threading.Thread(target=lambda: found.extend(authenticator.accept(timeout) for _ in range(count)))
    thread.start()
    return thread, found


def test_who_knows_the_token_is_let_in(listener):
    with closing(Authenticator(listener, TOKEN, "test")) as authenticator:
        thread, found = admit(authenticator)
        with caller(listener) as sock:
            prove(sock, TOKEN, "test")
            sock.sendall(b"what follows is the caller's")
            thread.join()
            assert found[0].recv(100) == b"what follows is the caller's"
            found[0].close()


@pytest.mark.parametrize(("token", "purpose", "error"), [("another", "test", WrongToken), (TOKEN, "other", NotOurs)])
def test_who_does_not_is_not(listener, token, purpose, error):
    with closing(Authenticator(listener, TOKEN, "test")) as authenticator:
        thread, found = admit(authenticator, timeout=1)
        with caller(listener) as sock, pytest.raises(error):
            prove(sock, token, purpose)
        thread.join()
        assert found == [None]


def test_a_listener_that_does_not_know_the_token_gets_nothing_of_use(listener):
    """It repeats a greeting that it has seen: its proof is wrong, and the caller says no more."""

    def pretend():
        sock, _ = listener.accept()
        with sock:
            sock.sendall(handshake.greeting("test") + bytes(32))
            said = sock.recv(64)
            sock.sendall(said[32:])  # the caller's own proof, sent back

    thread = threading.Thread(target=pretend)
    thread.start()
    with caller(listener) as sock, pytest.raises(WrongToken):
        prove(sock, TOKEN, "test")
    thread.join()


def test_an_answer_is_of_no_use_a_second_time(listener):
    with closing(Authenticator(listener, TOKEN, "test")) as authenticator:
        thread, found = admit(authenticator)
        sent = []
        with caller(listener) as sock:
            send, sock_send = sock.sendall, lambda data: (sent.append(data), send(data))
            prove(_Recording(sock, sock_send), TOKEN, "test")
        thread.join()
        found[0].close()
        thread, found = admit(authenticator, timeout=1)
        with caller(listener) as sock:
            sock.recv(64)
            sock.sendall(sent[0])
            assert sock.recv(32) == bytes(32)
        thread.join()
        assert found == [None]


class _Recording:
    def __init__(self, sock, send):
        self.recv, self.sendall = sock.recv, send


def test_the_silent_and_the_slow_hold_up_nobody(listener, monkeypatch, capfd):
    monkeypatch.setattr(handshake, "PROOF_SECONDS", 2.0)
    with closing(Authenticator(listener, TOKEN, "test")) as authenticator, ExitStack() as stack:
        strangers = [stack.enter_context(caller(listener)) for _ in range(20)]
        strangers[0].sendall(b"slow")
        began = time.monotonic()
        thread, found = admit(authenticator)
        with caller(listener) as sock:
            prove(sock, TOKEN, "test")
        thread.join()
        assert time.monotonic() - began < 1.8
        found[0].close()
        assert authenticator.accept(2.5) is None
        for stranger in strangers:  # all of them have been hung up on
            assert len(stranger.recv(100)) == 64 and stranger.recv(100) == b""
    assert "refused 20 connections" in capfd.readouterr().err


def test_more_strangers_than_places(listener, monkeypatch):
    monkeypatch.setattr(handshake, "_MAX_PENDING", 4)
    monkeypatch.setattr(handshake, "_YOUNG", 0.1)
    with closing(Authenticator(listener, TOKEN, "test")) as authenticator, ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(caller(listener))
        thread, found = admit(authenticator)
        with caller(listener) as sock:
            prove(sock, TOKEN, "test")
        thread.join()
        found[0].close()


def test_something_else_that_listens_is_shown(listener):
    def talk():
        sock, _ = listener.accept()
        with sock:
            sock.sendall(b"SSH-2.0-OpenSSH\n")

    thread = threading.Thread(target=talk)
    thread.start()
    with caller(listener) as sock, pytest.raises(NotOurs, match=r"SSH-2\.0-OpenSSH"):
        prove(sock, TOKEN, "test")
    thread.join()
