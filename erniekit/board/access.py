"""Who may use the board: its cookie in place of a key, and what browsers are told not to do with its pages."""

import hashlib
import hmac

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from erniekit.serve.server_errors import ApiError
from erniekit.serve.server_responses import error_response

_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LOGIN = "/login"


def digest_of(key: str) -> bytes:
    """SHA-256 of a key, as the server's Gate keeps it."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def cookie_of(digest: bytes) -> str:
    """What the cookie of a user holds who has shown the key with this digest; the key cannot be computed from it."""
    return hmac.new(digest, b"erniekit board", hashlib.sha256).hexdigest()


def with_cookies(keys: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """The digests of keys, and of the cookies that stand for them."""
    return keys + tuple(digest_of(cookie_of(key)) for key in keys)


class Cookie:
    """Goes before the server's Gate: shows it the cookie as a key, leads pages without one to the login, and refuses
    what another site sends. Cookies ignore ports, so their name has it.
    """

    def __init__(self, app: ASGIApp, name: str, is_open: bool) -> None:
        self._app, self._name, self._is_open = app, name, is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers, path = Headers(scope=scope), scope["path"]
        if scope["method"] != "GET" and headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            refused = ApiError(403, "requests from pages of other sites are refused.", code="origin_not_allowed")
            return await error_response(refused)(scope, receive, send_with_headers)
        cookie = cookie_parser(headers.get("cookie", "")).get(self._name)
        if cookie and "authorization" not in headers:
            scope = {**scope, "headers": [*scope["headers"], (b"authorization", b"Bearer " + cookie.encode())]}
        elif not (
            self._is_open or cookie or "authorization" in headers or path.startswith((LOGIN, "/api/", "/static/"))
        ):
            return await RedirectResponse(LOGIN, 303)(scope, receive, send_with_headers)
        await self._app(scope, receive, send_with_headers)
