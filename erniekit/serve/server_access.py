"""Who may ask a server: keys, the Host header and the Origin header, looked at before any route."""

import hashlib
import secrets
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from erniekit.serve.server_errors import ApiError
from erniekit.serve.server_responses import error_response
from erniekit.utils.addresses import is_loopback
from erniekit.utils.errors import ConfigError
from erniekit.utils.user_files import read_text

MIN_KEY = 8  # characters
OPEN_PATHS = ("/health",)  # answered without a key


def key_digests(file: str | None, variable: str | None) -> tuple[bytes, ...]:
    """SHA-256 digests of the keys in a file (one a line; # begins a comment) and in the environment variable. Raises
    ConfigError for a key that is too short, and a file without keys.
    """
    keys = [variable] if variable else []
    if file is not None:
        try:
            lines = [line.strip() for line in read_text(Path(file), ConfigError).splitlines()]
        except FileNotFoundError:
            raise ConfigError(f"api_key_file: there is no file {file!r}.") from None
        of_file = [line for line in lines if line and not line.startswith("#")]
        if not of_file:
            raise ConfigError(f"api_key_file: {file} holds no key. Write one on each line.")
        keys += of_file
    for key in keys:
        if len(key) < MIN_KEY or not key.isascii() or any(character.isspace() for character in key):
            raise ConfigError(f"an API key has at least {MIN_KEY} ASCII characters and no spaces. Choose another.")
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


def require_key_if_reachable(host: str, keys: tuple[bytes, ...]) -> None:
    """Raises ConfigError for an address that other machines reach, where nobody has to show a key."""
    if not keys and not is_loopback(host):
        raise ConfigError(
            f"host: {host}: other machines reach this address, and the server has no key. Set api_key_file, or "
            "ERNIEKIT_API_KEY in the environment, or leave host at 127.0.0.1."
        )


class Gate:
    """Refuses requests before they reach a route, and notes whose they are (`owner` in the scope).

    On loopback the Host header has to name this machine: a web page whose name was made to point here (DNS rebinding)
    has its own name in it. A request from a web page (Origin) has to come from this server's own pages. The paths in
    `open_paths` are answered without a key.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        allowed_hosts: tuple[str, ...],
        keys: tuple[bytes, ...],
        open_paths: tuple[str, ...] = OPEN_PATHS,
    ) -> None:
        self._app, self._keys, self._open_paths = app, keys, open_paths
        self._only_local = is_loopback(host)
        self._allowed = {name.lower() for name in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                scope["owner"] = self._check(scope["path"], Headers(scope=scope))
            except ApiError as error:
                return await error_response(error)(scope, receive, send)
        elif scope["type"] != "lifespan":
            return
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> str:
        """Raises ApiError for a request that is refused; a word for the key of one that is not, "" without keys."""
        hosts = headers.getlist("host")
        if not hosts and path in self._open_paths:  # load balancers ask without one; a browser always sends it
            return ""
        if len(hosts) != 1:
            raise ApiError(400, "the request has to have one Host header.", code="host_not_allowed")
        if self._only_local and not self._is_local(hosts[0]):
            raise ApiError(
                403,
                f"Host {hosts[0][:80]!r} is not a name of this machine (allowed_hosts in the server's YAML adds one).",
                code="host_not_allowed",
            )
        for origin in headers.getlist("origin"):
            if origin.lower() not in (f"http://{hosts[0]}".lower(), f"https://{hosts[0]}".lower()):
                raise ApiError(403, "requests from pages of other servers are refused.", code="origin_not_allowed")
        if self._keys and path not in self._open_paths:
            return self._checked_key(headers.getlist("authorization"))
        return ""

    def _is_local(self, host: str) -> bool:
        name = _without_port(host).lower()
        return is_loopback(name) or name in self._allowed

    def _checked_key(self, given: list[str]) -> str:
        scheme, _, key = (given[0] if len(given) == 1 else "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        # all keys are compared, so that the time does not tell which one was near
        matches = [secrets.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "the request needs a valid key: Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return str(matches.index(True))


def _without_port(host: str) -> str:
    """The name in a Host header; an IPv6 address has brackets."""
    if host.startswith("["):
        end = host.find("]") + 1
        rest = host[end:]
        return host[:end] if not rest or (rest[0] == ":" and rest[1:].isdigit()) else ""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
