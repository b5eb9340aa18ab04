"""Server-sent events: a response whose pieces come as they are made, and that ends what makes them when the client
leaves or does not read.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from erniekit.serve.server_errors import ApiError, to_json
from erniekit.serve.server_responses import error_response
from erniekit.utils import log

WRITE_SECONDS = 30.0  # that a client has to take a piece
COMMENT = b": nothing yet\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(Response):
    """Sends each object of `pieces` as one event (None: a comment), and [DONE] at the end. The first object is made
    before the headers are sent, so that a request that fails at once still gets its own status.
    """

    def __init__(self, pieces: AsyncGenerator[dict[str, Any] | None, None], headers: dict[str, str]) -> None:
        super().__init__(None, 200, _HEADERS | headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self._pieces = pieces
        self._writes_since = 0.0  # the time (time.monotonic) at which the piece that is being written began; 0: none is

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(scope, receive, send))
        leaving = asyncio.ensure_future(client_left(receive))
        try:
            while not (sending.done() or leaving.done() or self._is_stuck()):
                await asyncio.wait((sending, leaving), timeout=WRITE_SECONDS / 8, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, leaving):
                if not task.done():
                    task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._pieces.aclose()

    def _is_stuck(self) -> bool:
        """Whether the client has taken nothing for too long. A look now and then costs less than a timer a piece."""
        is_stuck = self._writes_since > 0 and time.monotonic() - self._writes_since > WRITE_SECONDS
        if is_stuck:
            log.info("a client has stopped reading its stream, which ends")
        return is_stuck

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(kind: str, **values: Any) -> None:
            self._writes_since = time.monotonic()
            await send({"type": kind, **values})
            self._writes_since = 0.0

        first: dict[str, Any] | None = None
        try:
            while first is None:  # a request that waits in the queue may still be refused
                first = await anext(self._pieces, {})
        except ApiError as error:
            return await error_response(error)(scope, receive, send)
        try:
            await write("http.response.start", status=self.status_code, headers=self.raw_headers)
            if first:
                await write("http.response.body", body=_event(first), more_body=True)
            try:
                async for piece in self._pieces:
                    await write("http.response.body", body=COMMENT if piece is None else _event(piece), more_body=True)
            except ApiError as error:
                await write("http.response.body", body=_event(error.body), more_body=True)
            await write("http.response.body", body=b"data: [DONE]\n\n", more_body=False)
        except OSError:
            log.info("a client has closed its stream, which ends")


def _event(piece: dict[str, Any]) -> bytes:
    return b"data: " + to_json(piece) + b"\n\n"


async def client_left(receive: Receive) -> None:
    """Wait until the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
