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
    """Ports that nobody uses at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def call(address: tuple[str, int], timeout: float) -> socket.socket:
    """Connect. While nobody listens at a port of this host, the system may pick that very port for the caller, which
    then is connected to itself: that counts as nobody.
    """
    sock = socket.create_connection(address, timeout=timeout)
    if sock.getsockname() == sock.getpeername():
        sock.close()
        raise ConnectionRefusedError("nobody listens there yet")
    return sock
