"""Requests to servers that answer in JSON, with a key that no message contains, repeated after errors that may pass."""

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from erniekit.utils.addresses import is_loopback

MAX_WAIT = 30.0  # seconds between two attempts
_MAY_PASS = (408, 409, 425, 429)  # statuses below 500 after which another attempt may succeed


class RequestFailed(RuntimeError):
    """A request without a usable answer. status: of the server's answer; None: there was none, or it was no JSON."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would send the key to another address."""

    def redirect_request(self, *args: Any, **keys: Any) -> None:
        """Refuse."""
        return


_OPENER = urllib.request.build_opener(_NoRedirect)
# A proxy of the environment (http_proxy) cannot reach a server on this machine.
_DIRECT = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))


class JsonClient:
    """Asks the server at `base_url`. `key`: sent as a bearer token; empty: none is. `timeout`: seconds of an attempt.
    `on_retry` is called before each further attempt, of which there are `max_retries`.
    """

    def __init__(
        self,
        base_url: str,
        key: str,
        timeout: float,
        max_retries: int,
        max_bytes: int,
        on_retry: Callable[[], None] = lambda: None,
    ) -> None:
        """`max_bytes`: the largest answer that is read."""
        self.base_url, self._key = base_url.rstrip("/"), key
        self._opener = _opener_for(base_url)
        self._timeout, self._max_retries, self._max_bytes, self._on_retry = timeout, max_retries, max_bytes, on_retry

    def ask(self, path: str, body: Any = None, read: Callable[[Any], Any] = lambda answer: answer) -> Any:
        """POST `body`, or GET without one, and return `read(JSON of the answer)`. If `read` raises LookupError,
        TypeError or ValueError, the attempt has failed. Raises RequestFailed after the last attempt.
        """
        return self._repeated(path, body, lambda data: read(json.loads(data)))

    def post(self, path: str, body: Any) -> None:
        """POST `body` where only the status of the answer counts."""
        self._repeated(path, body, lambda data: None)

    def _repeated(self, path: str, body: Any, read: Callable[[bytes], Any]) -> Any:
        for attempt in range(self._max_retries + 1):
            try:
                return read(self._attempt(path, body))
            except urllib.error.HTTPError as error:
                detail = self.without_key(error.read(1000).decode(errors="replace").strip()[:300])
                failure = RequestFailed(f"HTTP {error.code} {error.reason}: {detail}", error.code)
                if error.code not in _MAY_PASS and error.code < 500:
                    raise failure from None
                wait = _seconds(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
                failure, wait = RequestFailed(self.without_key(f"{type(error).__name__}: {error}")), None
            if attempt == self._max_retries:
                raise failure
            self._on_retry()
            time.sleep(min(0.5 * 2**attempt if wait is None else wait, MAX_WAIT))
        raise AssertionError

    def without_key(self, text: str) -> str:
        """The text with the key blotted out."""
        return text.replace(self._key, "***") if self._key else text

    def _attempt(self, path: str, body: Any) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.base_url}{path}", data, headers)
        with self._opener.open(request, timeout=self._timeout) as response:
            return response.read(self._max_bytes)


def _opener_for(address: str) -> urllib.request.OpenerDirector:
    try:
        host = urlsplit(address).hostname or ""
    except ValueError:  # an attempt will say what is wrong with it
        host = ""
    return _DIRECT if is_loopback(host) else _OPENER


def _seconds(text: str | None) -> float | None:
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
