"""Addresses and ports of this host."""

import contextlib
import socket

from erniekit.utils.errors import ConfigError


def resolve(name: str) -> str:
    """The IPv4 address of a host name. Raises ConfigError that names MASTER_ADDR."""
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"MASTER_ADDR={name}: no IPv4 address is known under this name ({error}). Give the first host's name or "
            "address, the same on every host."
        ) from None


def is_local(address: str) -> bool:
    """Whether `address` belongs to this host: only then can a socket be bound to it."""
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    """Ports of this host that are free at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("", 0))
        return [sock.getsockname()[1] for sock in sockets]


def call(address: tuple[str, int], timeout: float) -> socket.socket:
    """Connect to an address. While no program listens at a local port, the system may choose that same port for the
    caller, which is then connected to itself; this counts as a refused connection.
    """
    sock = socket.create_connection(address, timeout=timeout)
    if sock.getsockname() == sock.getpeername():
        sock.close()
        raise ConnectionRefusedError("nobody listens there yet")
    return sock
