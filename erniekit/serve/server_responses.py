"""Responses with a JSON body."""

from typing import Any

from starlette.responses import Response

from erniekit.serve.server_errors import ApiError, to_json


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response with a JSON body."""
    return Response(to_json(body), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """The response to a request that is refused."""
    return json_response(error.body, error.status, error.headers)
