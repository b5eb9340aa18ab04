"""The socket that a server listens to, and what all servers tell uvicorn."""

import socket
from typing import Any

from erniekit.utils.errors import ConfigError

# Whatever else is installed: h11 bounds the headers of a request, and a request for a websocket is one like any other.
UVICORN: dict[str, Any] = {
    "log_level": "warning",
    "access_log": False,
    "server_header": False,
    "http": "h11",
    "ws": "none",
}


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens to an address. Raises ConfigError for one that is taken, or not of this machine."""
    try:
        family = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host.strip("[]"), port))
        listening.listen(2048)
    except OSError as error:
        raise ConfigError(
            f"host: {host}, port: {port}: cannot listen there: {error.strerror}. Choose another."
        ) from None
    return listening


def url_of(listening: socket.socket) -> str:
    """http://ADDRESS:PORT of a socket."""
    address = listening.getsockname()
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"http://{host}:{address[1]}"
