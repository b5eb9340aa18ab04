"""Errors of a server, in the one shape that OpenAI's clients read."""

import json
from typing import Any

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "TimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """A request that is refused. `param`: the field that is wrong; `code`: a word for programs; `headers`: those of the
    response. `repeats`: a second attempt would fail as well, so clients should make none.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        repeats: bool = True,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if repeats:
            self.headers["x-should-retry"] = "false"

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response."""
        kind = _TYPES.get(self.status, "InternalServerError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def closing() -> ApiError:
    """The error of a request to a server that is being ended."""
    return ApiError(503, "the server is closing.", code="server_closing", repeats=False)


def to_json(body: Any) -> bytes:
    """JSON as bytes of UTF-8; half of a surrogate pair, which UTF-8 has not, becomes a question mark."""
    return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")
