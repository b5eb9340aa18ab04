"""Connections between ranks, here threads of one process: meeting, missing ranks, strangers, and peers that end."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import pytest
from support.worlds import free_ports

from erniekit.parallel import tcp_transport as links_module
from erniekit.parallel.process_group import World
from erniekit.parallel.tcp_transport import Links, connect, wait_for_ranks
from erniekit.utils.errors import PeerGoneError, TrainError

TOKEN = "a token of tests, long enough"


def _endpoints(size: int) -> tuple[str, ...]:
    return tuple(f"127.0.0.1:{port}" for port in free_ports(size))


def _everywhere(
    endpoints: tuple[str, ...], ranks: list[int], work: Callable, timeout: float, token: str = TOKEN
) -> list:
    """work(World, token, timeout) on the given ranks of a world; results or exceptions, in their order."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        calls = [pool.submit(work, World(rank, len(endpoints), endpoints), token, timeout) for rank in ranks]
        return [call.exception() or call.result() for call in calls]


@contextmanager
def _linked(size: int) -> Iterator[list[Links]]:
    links = _everywhere(_endpoints(size), list(range(size)), connect, 30)
    assert all(isinstance(one, Links) for one in links), links
    yield links
    for one in links:
        one.close()


def _shown(data: bytes) -> memoryview:
    return memoryview(bytearray(data))


def test_every_rank_reaches_every_other():
    size = 5
    with _linked(size) as links:
        received = [[_shown(b"..") for _ in range(size)] for _ in range(size)]

        def exchange(rank: int) -> None:
            others = [other for other in range(size) if other != rank]
            outgoing = [(other, _shown(b"%d%d" % (rank, other))) for other in others]
            links[rank].exchange("host", outgoing, [(other, received[rank][other]) for other in others])

        with ThreadPoolExecutor(size) as pool:
            list(pool.map(exchange, range(size)))
    expected = [[b".." if a == b else b"%d%d" % (b, a) for b in range(size)] for a in range(size)]
    assert [[bytes(data) for data in row] for row in received] == expected


def test_a_message_larger_than_every_buffer_leaves_the_sender_free_and_arrives_before_the_end():
    data = bytes(range(256)) * (1 << 16)  # 16 MB
    with _linked(2) as (a, b):
        mutable = _shown(data)
        for kind in ("send", "host"):
            a.post(1, kind, mutable)  # returns although nobody receives
        mutable[:] = bytes(len(mutable))  # and what was sent is what it was
        closing = threading.Thread(target=a.close)
        closing.start()  # a process that ends writes out what it still has
        for kind in ("send", "host"):
            into = _shown(bytes(len(data)))
            b.receive(0, kind, into)
            assert into == data
        closing.join()


def test_an_exchanged_buffer_is_not_kept():
    """It is a tensor's memory, which would not be free before the next message."""

    def swap(links: Links, peer: int) -> None:
        data, received = bytearray(1 << 24), bytearray(1 << 24)
        with memoryview(data) as view, memoryview(received) as into:
            links.exchange("host", [(peer, view)], [(peer, into)])
        data.clear()  # BufferError while anything refers to it

    with _linked(2) as (a, b), ThreadPoolExecutor(2) as pool:
        for call in [pool.submit(swap, a, 1), pool.submit(swap, b, 0)]:
            call.result()


@pytest.mark.parametrize("meet", [connect, wait_for_ranks])
def test_ranks_that_do_not_come_are_named_to_all_who_came(meet: Callable):
    endpoints = _endpoints(4)
    errors = _everywhere(endpoints, [0, 2], meet, 1)
    for error in errors:
        assert isinstance(error, TrainError)
        assert f"2 of 4 ranks did not come within 1 s: rank 1 ({endpoints[1]}), rank 3 ({endpoints[3]})" in str(error)


def test_without_rank_0_the_others_say_so():
    endpoints = _endpoints(2)
    (error,) = _everywhere(endpoints, [1], connect, 0.3)
    assert isinstance(error, TrainError)
    assert f"1 of 2 ranks did not come within 0 s: rank 0 ({endpoints[0]})" in str(error) and "refused" in str(error)


def test_a_taken_port_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TrainError, match=rf"cannot listen on port {port}: Address already in use"):
            connect(World(0, 2, (f"127.0.0.1:{port}", "127.0.0.1:1")), TOKEN, 1)


@contextmanager
def _rank_0_waits(endpoints: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Rank 0 of two listens at the address that is yielded; when the block has ended rank 1 comes, and they meet."""
    host, port = endpoints[0].split(":")
    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(_everywhere, endpoints, [0], connect, 20)
        while not _listens(host, int(port)):
            time.sleep(0.01)
        yield host, int(port)
        for links in (*_everywhere(endpoints, [1], connect, 20), *meeting.result()):
            assert isinstance(links, Links), links
            links.close()


def _listens(host: str, port: int) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection((host, port)):
        return True
    return False


def test_connections_without_the_token_are_refused_without_delay(capfd: pytest.CaptureFixture[str]):
    """Junk is refused and counted in one line; the silent are passed by."""
    began = time.monotonic()
    with ExitStack() as stack, _rank_0_waits(_endpoints(2)) as address:
        for _ in range(8):  # silent until the end
            stack.enter_context(socket.create_connection(address))
        for junk in (b"GET / HTTP/1.1\r\nHost: here\r\n".ljust(64), b"\0" * 5000, b"short"):
            with socket.create_connection(address) as stranger:
                stranger.sendall(junk)
                with suppress(OSError):  # the rank may have closed the connection already
                    stranger.shutdown(socket.SHUT_WR)
                said = b""
                with suppress(ConnectionResetError):
                    while piece := stranger.recv(4096):
                        said += piece
                assert said.startswith(b"erniekit 2 rank") and len(said) <= 96
    assert time.monotonic() - began < 4
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "refused 3 connections" in said, said


def test_a_rank_with_another_token_is_refused():
    endpoints = _endpoints(2)
    with _rank_0_waits(endpoints):
        (error,) = _everywhere(endpoints, [1], connect, 20, token="another token, also long")
        assert isinstance(error, TrainError) and "has another token than this rank" in str(error)


def test_ranks_of_one_machine_listen_on_loopback_alone():
    endpoints = _endpoints(2)
    with _rank_0_waits(endpoints) as (_, port), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


def test_a_peer_that_has_ended_is_named():
    with _linked(3) as (a, b, c):
        b.close()
        with pytest.raises(PeerGoneError, match=r"rank 1 \(127.0.0.1:\d+\) has gone"):
            a.receive(1, "host", _shown(b"1"))
        with pytest.raises(PeerGoneError, match=r"rank 1 \(127.0.0.1:\d+\) has gone"):
            for _ in range(3):  # the first may still fit into a buffer
                c.exchange("host", [(1, _shown(bytes(8 << 20)))], [])


def test_ranks_in_different_operations_raise():
    with _linked(2) as (a, b):
        a.post(1, "all_reduce", _shown(b"1234"))
        with pytest.raises(TrainError, match="sends 4 bytes of all_reduce, this rank expects 8 bytes of send"):
            b.receive(0, "send", _shown(bytes(8)))


def test_an_unknown_kind_of_message_raises(monkeypatch: pytest.MonkeyPatch):
    with _linked(2) as (a, b):
        monkeypatch.setattr(links_module, "KINDS", (*links_module.KINDS, "news"))
        a.post(1, "news", _shown(b"1234"))
        monkeypatch.undo()
        with pytest.raises(
            TrainError,
            match=rf"sends 4 bytes of an unknown kind \({len(links_module.KINDS)}\), this rank expects 8 bytes of send",
        ):
            b.receive(0, "send", _shown(bytes(8)))
