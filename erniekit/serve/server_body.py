"""Reads the body of a request: bounded in bytes and depth, strict JSON with each name once, valid Unicode."""

import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from erniekit.serve.server_errors import ApiError
from erniekit.utils.user_files import unique_keys

MAX_DEPTH = 64  # of lists and objects inside one another


async def read_body(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object in the body of a request. Raises ApiError for anything else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        given = repr(kind[:80]) if kind else "missing"
        raise ApiError(400, f"Content-Type is {given}; send the body as application/json.")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ApiError(415, f"Content-Encoding is {coding[:80]!r}; send the body uncompressed.")
    too_large = ApiError(413, f"the body has more than {max_bytes} bytes (max_request_mb in the server's YAML).")
    length = request.headers.get("content-length", "")
    if length.isdigit() and len(length) < 20 and int(length) > max_bytes:
        raise too_large
    data = bytearray()
    try:
        async for piece in request.stream():
            data += piece
            if len(data) > max_bytes:
                raise too_large
    except ClientDisconnect:
        raise ApiError(400, "the client left before the body was complete.") from None
    return parse_body(bytes(data))


def parse_body(data: bytes) -> dict[str, Any]:
    """The JSON object that `data` holds. Raises ApiError for anything else."""
    try:
        body = json.loads(data.decode(), object_pairs_hook=unique_keys, parse_constant=_refuse, parse_float=_finite)
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8.", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        reason = "a number has too many digits" if "digits" in reason else reason
        raise ApiError(400, f"the body is not valid JSON: {reason[:200]}", code="invalid_json") from None
    _check(body)
    if not isinstance(body, dict):
        raise ApiError(400, "the body has to be a JSON object.", code="invalid_json")
    return body


def _check(body: Any) -> None:
    """Bounds the depth and refuses halves of surrogate pairs, which no text has."""
    pending: list[tuple[Any, int]] = [(body, 1)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ApiError(
                    400, "the body holds half of a surrogate pair (\\ud800 to \\udfff), which is not a character."
                ) from None
        elif isinstance(value, dict | list):
            if depth > MAX_DEPTH:
                raise ApiError(400, f"the body is nested more than {MAX_DEPTH} levels deep.")
            inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            pending += [(item, depth + 1) for item in inner]


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} is too large")
    return number
