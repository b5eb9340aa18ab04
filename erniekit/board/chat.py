"""Passes a conversation on to a server of OpenAI's interface, and its answer back piece by piece."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from starlette.responses import Response, StreamingResponse

from erniekit.board.runs import Run
from erniekit.serve.server_errors import ApiError, to_json
from erniekit.utils.addresses import is_loopback

_TIMEOUT = httpx.Timeout(10, read=3600)


def target(server: str, key: str, run: Run | None) -> tuple[str, str]:
    """(address, key) of a server: of a run, or of an address on this machine that the user gives. The board opens no
    other address, so a page cannot make it ask around in the network. Raises ApiError.
    """
    if run is not None:
        address = run.address()
        if address is None:
            raise ApiError(503, f"{run.id} does not serve a model (yet); its log says why.", "server")
        return address, (run.directory / "key").read_text(encoding="utf-8").strip()
    try:
        parts = urlsplit(server if "://" in server else f"http://{server}")
        good = parts.scheme == "http" and is_loopback(parts.hostname or "") and parts.port
    except ValueError:
        good = False
    if not good:
        raise ApiError(400, "expected an address of this machine: http://127.0.0.1:PORT.", "server")
    return f"http://{parts.netloc.rpartition('@')[2]}", key


async def answer(address: str, key: str, body: dict[str, Any]) -> Response:
    """The answer to a request, streamed. When the page closes the connection, that to the server is closed too."""
    client = httpx.AsyncClient(trust_env=False, timeout=_TIMEOUT)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        if "model" not in body:
            models = (await client.get(f"{address}/v1/models", headers=headers)).json()
            body = {"model": models["data"][0]["id"], **body} if "data" in models else body
        request = client.build_request("POST", f"{address}/v1/chat/completions", json=body, headers=headers)
        response = await client.send(request, stream=True)
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        await client.aclose()
        raise ApiError(502, f"{address} does not answer: {error or type(error).__name__}", "server") from None

    async def pieces() -> AsyncIterator[bytes]:
        try:
            async for piece in response.aiter_raw():
                yield piece
        except httpx.HTTPError as error:
            yield b"data: " + to_json({"error": {"message": f"{address} has ended: {error}"}}) + b"\n\n"
        finally:
            await response.aclose()
            await client.aclose()

    return StreamingResponse(pieces(), response.status_code, media_type=response.headers.get("content-type"))


def save_sample(path: Path, messages: list[dict[str, Any]], tools: list[Any] | None) -> int:
    """Append a conversation as a record of the format `messages`; the number of records in the file."""
    if not messages or messages[-1].get("role") != "assistant":
        raise ApiError(400, "a sample ends with an answer.", "messages")
    record = {"messages": messages} | ({"tools": tools} if tools else {})
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    with open(path, encoding="utf-8") as file:
        return sum(1 for _ in file)
