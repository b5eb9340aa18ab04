"""The connection of an agent to the coordinator."""

import socket
import threading
from types import SimpleNamespace
from typing import Any

from erniekit.cluster.job import Limits, Master
from erniekit.cluster.rendezvous import Client, Server


def test_a_client_that_hangs_up_is_noticed_at_once():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = probe.getsockname()
    gone = threading.Event()
    coordinator: Any = SimpleNamespace(
        handle=lambda message, now: {"kind": "wait"}, disconnect=lambda host, now: gone.set()
    )
    server = Server(address, coordinator, "token")
    try:
        client = Client(Master(*address), Limits(fault=30.0, rendezvous=5.0), "token")
        assert client.exchange({"kind": "hello", "id": "a"}) == {"kind": "wait"} and not gone.is_set()
        client.close()
        assert gone.wait(5.0)
    finally:
        server.close()
